"""A run from its start to its end: folder, checkpoints, going on, what it says and leaves. It imports utils, sources,
recipe, data and training."""
