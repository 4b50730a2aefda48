"""Random numbers by purpose: each draw of the data follows from rng_seed and what it is for, on every process alike."""

import numpy as np

from utils.recipe import Recipe

# What a draw is for, so that no two share a stream.
ORDER, SUBSET, WINDOW = range(3)


def random_stream(recipe: Recipe, *purpose: int) -> np.random.Generator:
    """The random numbers for one purpose, as one of the above and the epoch, row and so on that it is drawn for."""
    return np.random.default_rng([recipe.rng_seed, *purpose])
