"""What a run is: the keys of a recipe, its file, and the command line. It imports utils and sources, nothing heavy."""

import utils  # noqa: F401, first: it names the package that is missing before anything here imports it
