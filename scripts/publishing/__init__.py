"""What a model is published with: its card, the folder for use elsewhere, the hub. It imports utils, sources, recipe,
data, training, run and evaluation."""
