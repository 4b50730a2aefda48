"""What the evaluation scripts share: the model, its replies, results and reports. It imports utils, sources, recipe,
data and training."""
