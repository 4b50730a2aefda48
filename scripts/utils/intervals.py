"""95 % intervals: by bootstrap of ratios (loss over tokens), and Wilson's of a share."""

import math

import numpy as np

RESAMPLES = 2000
AT_ONCE = 4_000_000  # draws held in memory


def resampled_sums(
    values: np.ndarray, groups: np.ndarray, strata: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """The sums of each column over bootstrap resamples of the groups, each stratum resampled by itself.

    Args:
        values: float64 [items, columns].
        groups: [items], any dtype; items of one group are drawn together, as they are not independent.
        strata: [items]; every resample holds as many groups of each as there are, as the mix of data sets is fixed.

    Returns: float64 [resamples, columns].
    """
    rng = np.random.default_rng(seed)
    total = np.zeros((resamples, values.shape[1]))
    for stratum in np.unique(strata):
        own = strata == stratum
        _, group = np.unique(groups[own], return_inverse=True)
        count = group.max() + 1
        sums = np.stack([np.bincount(group, column, minlength=count) for column in values[own].T], axis=1)
        step = max(1, AT_ONCE // count)
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
            total[start : start + rows] += times @ sums
    return total


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 % of resampled figures (float64 [resamples]); None for what cannot be said of a single group."""
    samples = samples[np.isfinite(samples)]
    if not len(samples) or samples.min() == samples.max():
        return None, None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson 1927, JASA 22), which holds near 0 and 1 and for few items."""
    z = 1.959964
    share, scale = successes / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
