"""What an epoch trains on: which conversations, in which order, in which packs.

All of it is a pure function of (rng_seed, epoch), computed by every process for itself. So nothing is communicated,
every kept example is used exactly once an epoch, and any step can be reached without replay.
"""

from dataclasses import dataclass

import numpy as np

from data.mix import Mix
from recipe.keys import Recipe

# What a draw is for, so that no two share a stream.
ORDER, SUBSET, WINDOW = range(3)


def random_stream(recipe: Recipe, *purpose: int) -> np.random.Generator:
    """The random numbers for one purpose, as one of the above and the epoch, row and so on that it is drawn for."""
    return np.random.default_rng([recipe.rng_seed, *purpose])


@dataclass(frozen=True)
class Position:
    """How far a run has come in its data: so many conversations of an epoch (from 0) are used, fewer than it has."""

    epoch: int = 0
    conversations: int = 0


@dataclass(frozen=True)
class EpochPlan:
    """The training conversations of an epoch in their order, in packs: what a row of a batch holds.

    A pack is one conversation, or with `packing` as many whole ones as max_length takes.

    Attributes:
        rows: int64 [conversations], of the training split.
        bounds: int64 [packs + 1]; pack i is rows[bounds[i] : bounds[i + 1]].
    """

    rows: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """Packs of the epoch."""
        return len(self.bounds) - 1

    def first_pack(self, position: Position) -> int:
        """The pack that a position in this epoch stands before."""
        return int(np.searchsorted(self.bounds, position.conversations))

    def of_packs(self, first: int, end: int) -> np.ndarray:
        """The rows of some packs; `end` may be beyond the last."""
        return self.rows[self.bounds[first] : self.bounds[min(end, len(self))]]


def epoch_plan(mix: Mix, recipe: Recipe, epoch: int) -> EpochPlan:
    """What an epoch trains on, in its order.

    `fraction` and `size` are drawn anew each epoch. Under `sort_by_length` the conversations come in micro-batches of
    similar lengths, the micro-batches shuffled; under `packing` in shuffled packs.
    """
    rows = []
    for index, options in enumerate(recipe.datasets.chosen().values()):
        own = np.flatnonzero(mix.train.dataset == index)
        # At least one row: a small fraction of a small data set is not to drop it, or leave an epoch without a step.
        wanted = options.size if options.size is not None else max(1, round(len(own) * (options.fraction or 1.0)))
        if wanted < len(own):
            own = np.sort(random_stream(recipe, SUBSET, epoch, index).choice(own, wanted, replace=False))
        rows.append(own)
    rng = random_stream(recipe, ORDER, epoch)
    order = rng.permutation(np.concatenate(rows))
    lengths = mix.train.lengths[order]
    if recipe.packing:
        pack = best_fit_decreasing(np.minimum(lengths, recipe.max_length), recipe.max_length)
        place = rng.permutation(pack.max() + 1)[pack]  # of each conversation the place of its pack
        by_pack = np.argsort(place, kind="stable")
        return EpochPlan(order[by_pack], np.concatenate([[0], np.cumsum(np.bincount(place))]))
    if recipe.sort_by_length:
        order = order[np.argsort(lengths, kind="stable")]  # ties stay as shuffled
        size = recipe.per_device_train_batch_size
        whole = len(order) // size * size  # the one incomplete micro-batch stays last, so that the others stay aligned
        order = np.concatenate([rng.permutation(order[:whole].reshape(-1, size)).ravel(), order[whole:]])
    return EpochPlan(order, np.arange(len(order) + 1))


def training_rows(mix: Mix, recipe: Recipe, epoch: int) -> np.ndarray:
    """Rows of the training split that an epoch uses, in its order: int64 [conversations]."""
    return epoch_plan(mix, recipe, epoch).rows


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put items into as few bins as this rule finds: the longest first, each into the fullest bin that still holds it.

    Never more than 11/9 of the fewest possible bins, plus 6/9 (Dosa 2007, of the same bound for first fit decreasing;
    Johnson et al. 1974 for best fit). 100,000 conversations take about 0.2 s.

    Args:
        lengths: int64 [items], each from 1 to capacity.

    Returns:
        int64 [items], the bin of each, from 0 in the order in which they were opened.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    rooms = 0  # bit r is set where open_bins[r] is not empty, so that the smallest fitting room is one expression
    count = 0
    order = np.argsort(-lengths, kind="stable")  # of equals the first comes first
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen, count = capacity, count, count + 1
        bins[item] = chosen
        left = room - length
        if left:
            open_bins[left].append(chosen)
            rooms |= 1 << left
    return bins
