"""What a run is: the keys of a recipe, its file, and the command line. It imports utils and sources, nothing heavy."""
