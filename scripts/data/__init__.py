"""From data files to tokenized conversations, prepared once. It imports utils, sources and recipe."""
