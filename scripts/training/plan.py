"""The plan of a run: what an epoch trains on and in which order, packs and steps.

All of it is a pure function of the recipe, the mix, the epoch and the number of processes, computed by every process
for itself. So nothing is communicated, every kept example is used exactly once an epoch, and any step can be reached
without replay.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data.mix import Mix
from recipe.keys import Recipe
from sources.source import DatasetOptions
from utils.errors import UserError
from utils.launch import say
from utils.tables import counted

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
    """

    rows: np.ndarray  # int64 [conversations], of the training split
    bounds: np.ndarray  # int64 [packs + 1]; pack i is rows[bounds[i] : bounds[i + 1]]

    def __len__(self) -> int:
        """Packs of the epoch."""
        return len(self.bounds) - 1

    def first_pack(self, position: Position) -> int:
        """The pack that a position in this epoch stands before."""
        return int(np.searchsorted(self.bounds, position.conversations))

    def tokens(self, mix: Mix, recipe: Recipe) -> np.ndarray:
        """Of each pack, after cutting to max_length: int64 [packs]."""
        return np.add.reduceat(np.minimum(mix.train.lengths[self.rows], recipe.max_length), self.bounds[:-1])

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
        wanted = _rows_wanted(options, len(own))
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

    `lengths` are int64 [items], each from 1 to capacity.
    Returns: int64 [items], the bin of each, from 0 in the order in which they were opened.
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


def _rows_wanted(options: DatasetOptions, rows: int) -> int:
    """Of a data set's training split of so many rows, in an epoch; `size` may be more than there are."""
    # At least one row: a small fraction of a small data set is not to drop it, or leave an epoch without a step.
    return options.size if options.size is not None else max(1, round(rows * (options.fraction or 1.0)))


def foretold_steps(recipe: Recipe, rows: Mapping[str, int], num_processes: int) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the run, by the rows of each data set's training split; not with `packing`."""
    mix = recipe.datasets.chosen().items()
    conversations = sum(min(rows[name], _rows_wanted(options, rows[name])) for name, options in mix)
    epoch = math.ceil(conversations / packs_per_step(recipe, num_processes))
    return epoch, recipe.max_steps or _steps_of_epochs(recipe.num_train_epochs, epoch)


def _steps_of_epochs(epochs: float, steps: int) -> int:
    """Of epochs of so many steps; rounded, since 0.1 of 2.1 is a little over 0.1."""
    return math.ceil(round(epochs * steps, 6))


def packs_per_step(recipe: Recipe, num_processes: int) -> int:
    """Packs (without `packing`: conversations) of a full optimizer step over all processes."""
    if recipe.global_batch_size is not None:
        return recipe.global_batch_size
    return num_processes * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def describe_cut(recipe: Recipe, num_processes: int) -> str:
    """How many processes, conversations and micro-batches make a full step, for a message."""
    accumulated = accumulation_steps(recipe, num_processes)
    if recipe.micro_batch_tokens is not None:
        most = f"up to {recipe.micro_batch_tokens:,} tokens x up to {accumulated}"
        return f"{counted(num_processes, 'process')} x {most} accumulated"
    batch = counted(recipe.per_device_train_batch_size, "pack" if recipe.packing else "conversation")
    return f"{counted(num_processes, 'process')} x {batch} x {accumulated} accumulated"


def describe_step(recipe: Recipe, num_processes: int) -> str:
    """What a full step holds, for a message."""
    what = f"pack of up to {recipe.max_length:,} tokens" if recipe.packing else "conversation"
    return f"{counted(packs_per_step(recipe, num_processes), what)} a step"


def micro_batch_size(recipe: Recipe) -> int:
    """Packs of a full micro-batch; under `micro_batch_tokens` as many as fit into it however long they are."""
    if recipe.micro_batch_tokens is None:
        return recipe.per_device_train_batch_size
    return recipe.micro_batch_tokens // recipe.max_length


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches of a process in a full optimizer step; under `micro_batch_tokens` the most that one can have.

    Where they do not go round, some of a process are empty.
    """
    micro_batches = math.ceil(packs_per_step(recipe, num_processes) / micro_batch_size(recipe))
    return math.ceil(micro_batches / num_processes)


def steps_per_epoch(mix: Mix, recipe: Recipe, num_processes: int, epoch: int = 0) -> int:
    """Optimizer steps of an epoch, the last, incomplete one counted.

    All epochs have as many, but with packing where `fraction` or `size` is drawn.
    """
    return math.ceil(len(epoch_plan(mix, recipe, epoch)) / packs_per_step(recipe, num_processes))


def steps_left(mix: Mix, recipe: Recipe, num_processes: int, position: Position) -> int:
    """Optimizer steps from a position to the end of num_train_epochs.

    Raises: UserError where so many epochs differ, each to be packed for it, that counting would take a quarter of an
        hour or more.
    """
    steps_of = functools.cache(functools.partial(steps_per_epoch, mix, recipe, num_processes))
    fraction, whole = math.modf(recipe.num_train_epochs)
    if position.epoch > whole:
        return 0
    plan = epoch_plan(mix, recipe, position.epoch)
    drawn = any(options.fraction or options.size for options in recipe.datasets.chosen().values())
    varies = recipe.packing and drawn
    epochs = int(whole) - position.epoch
    if varies:
        _check_counting(recipe, epochs, len(plan.rows))
    steps = sum(map(steps_of, range(position.epoch, int(whole)))) if varies else epochs * steps_of(0)
    steps += _steps_of_epochs(fraction, steps_of(int(whole) if varies else 0)) if fraction else 0
    # Counted from what is left of this epoch: what is used may have been in steps of another size.
    of_epoch = math.ceil((len(plan) - plan.first_pack(position)) / packs_per_step(recipe, num_processes))
    return max(0, steps - steps_of(position.epoch if varies else 0) + of_epoch)


def _check_counting(recipe: Recipe, epochs: int, conversations: int) -> None:
    """Say, or refuse, what takes long before the first step: packing takes about a microsecond a conversation."""
    packed = epochs * (conversations + 1000)  # an epoch itself takes as long as 1,000
    if packed > 10**9:
        raise UserError(
            f"num_train_epochs = {recipe.num_train_epochs:g}: under packing each draw of fraction or size makes "
            f"another number of steps, and {epochs:,} epochs are too many to count: give max_steps"
        )
    if packed > 3 * 10**7:
        say(f"counting the steps of {epochs:,} epochs, each packed for it: {packed / 6e7:.0f} minutes or so")


def describe_packing(mix: Mix, recipe: Recipe, num_processes: int) -> str:
    """How packing changes an epoch, for a message."""
    plan = epoch_plan(mix, recipe, 0)
    tokens = np.minimum(mix.train.lengths[plan.rows], recipe.max_length).sum()
    unpacked = steps_per_epoch(mix, recipe.model_copy(update={"packing": False}), num_processes)
    steps = steps_per_epoch(mix, recipe, num_processes)
    return (
        f"packing: {counted(len(plan.rows), 'conversation')} in {counted(len(plan), 'pack')}, "
        f"{len(plan.rows) / len(plan):.1f} in each, {tokens / (len(plan) * recipe.max_length):.1%} full: "
        f"{counted(steps, 'step')} an epoch in place of {unpacked:,}"
    )


def validation_rows(mix: Mix, dataset: int) -> np.ndarray:
    """Rows of the validation split that are of a data set, longest first so that memory runs out at once: int64."""
    rows = np.flatnonzero(mix.validation.dataset == dataset)
    return rows[np.argsort(-mix.validation.lengths[rows], kind="stable")]
