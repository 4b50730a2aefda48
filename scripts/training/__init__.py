"""What the loop of sft.py runs on: plan, batches, model, loss, optimizer, engine. It imports utils, sources, recipe and
data."""
