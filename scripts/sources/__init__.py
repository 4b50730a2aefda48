"""Where training conversations come from: a file for each source, with its options, hub, reader and licence. It imports
utils, nothing heavy."""
