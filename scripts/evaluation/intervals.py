"""95 % intervals: by bootstrap of ratios of sums over items (loss over tokens), and Wilson's of a share.

An item is a mapping with what was measured on it. It counts `times` (1). Items of one `group` (else each by itself) are
drawn together, as they are not independent; each `dataset` is resampled by itself, as the mix of data sets is fixed.
"""

import math
from collections.abc import Sequence

import numpy as np

from evaluation.result_files import ResultFile

RESAMPLES = 2000
AT_ONCE = 4_000_000  # draws held in memory


def item_columns(items: Sequence[dict], fields: Sequence[str | None], where: dict) -> np.ndarray:
    """What items add to the sums: float64 [items, fields], 0 for an item that is not as `where` says.

    Args:
        fields: of the items, 0 where one lacks it, NaN where it is None; None counts items.
        where: {field: value} of the items that take part.
    """
    weights = [item.get("times", 1) * all(item.get(key) == value for key, value in where.items()) for item in items]
    values = [[1.0 if field is None else item.get(field, 0) for field in fields] for item in items]
    return np.array(weights, dtype=np.float64)[:, None] * np.array(values, dtype=np.float64)


def resampled_sums(items: Sequence[dict], columns: np.ndarray, seed: int) -> np.ndarray:
    """The sums of each column (float64 [items, columns]) over bootstrap resamples: float64 [RESAMPLES, columns]."""
    rng = np.random.default_rng(seed)
    strata = np.array([item.get("dataset", "") for item in items])
    groups = np.array([str(item.get("group", f"item {place}")) for place, item in enumerate(items)])
    total = np.zeros((RESAMPLES, columns.shape[1]))
    for stratum in np.unique(strata):
        own = strata == stratum
        _, group = np.unique(groups[own], return_inverse=True)
        count = group.max() + 1
        sums = np.stack([np.bincount(group, column, minlength=count) for column in columns[own].T], axis=1)
        step = max(1, AT_ONCE // count)
        for start in range(0, RESAMPLES, step):
            rows = min(step, RESAMPLES - start)
            drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
            total[start : start + rows] += times @ sums
    return total


def paired_differences(first: ResultFile, other: ResultFile, seed: int = 0) -> dict[str, tuple[float, tuple, int]]:
    """How much more each metric is in another result file than in the first, over the items that both have.

    Returns: {metric: (difference, ends of its interval, items)} of each metric that both keep by item.
    """
    keys = [key for key in first.items if key in other.items]
    kinds = [{name: (one.ratio, one.where, one.exp) for name, one in file.results.items()} for file in (first, other)]
    metrics = [name for name, kind in kinds[0].items() if kind[0] and kind == kinds[1].get(name)]
    if not keys or not metrics:
        return {}
    sides = [[result.items[key] for key in keys] for result in (first, other)]
    found, columns = {}, []
    # A resample may miss every item of a small part; a model that diverged has what no number can hold.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for name in metrics:
            ratio, where, _ = kinds[0][name]
            # Taking part is for both to say: one checkpoint's training data may hold what the other's do not.
            both = np.logical_and(*(item_columns(items, [None], where) > 0 for items in sides))
            columns += [both * item_columns(items, ratio, where) for items in sides]
        columns = np.concatenate(columns, axis=1)
        drawn = resampled_sums(sides[0], columns, seed)
        for number, name in enumerate(metrics):
            own = slice(4 * number, 4 * number + 4)
            values, samples = columns[:, own].sum(0), drawn[:, own].T
            shape = np.exp if kinds[0][name][2] else np.asarray
            difference = shape(values[2] / values[3]) - shape(values[0] / values[1])
            bounds = interval(shape(samples[2] / samples[3]) - shape(samples[0] / samples[1]))
            items = (columns[:, own][:, [1, 3]] > 0).any(1)
            found[name] = float(difference), bounds, int(item_columns(sides[0], [None], {})[items].sum())
    return found


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
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # whatever was rounded
