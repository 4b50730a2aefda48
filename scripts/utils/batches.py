"""Which example goes where: the order of an epoch, packs, optimizer steps and micro-batches.

All of it is a pure function of (rng_seed, epoch) and the number of processes, computed by every process for itself. So
nothing is communicated, every kept example is used exactly once an epoch, and any step can be reached without replay.
"""

import functools
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from utils.collate import Batch, collate
from utils.mix import Mix
from utils.packing import best_fit_decreasing
from utils.random_streams import ORDER, SUBSET, random_stream
from utils.recipe import Recipe


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


def steps_per_epoch(mix: Mix, recipe: Recipe, num_processes: int, epoch: int = 0) -> int:
    """Optimizer steps of an epoch, the last, incomplete one counted.

    All epochs have as many, but with packing where `fraction` or `size` is drawn.
    """
    return math.ceil(len(epoch_plan(mix, recipe, epoch)) / packs_per_step(recipe, num_processes))


def steps_left(mix: Mix, recipe: Recipe, num_processes: int, position: Position) -> int:
    """Optimizer steps from a position to the end of num_train_epochs."""
    drawn = any(options.fraction or options.size for options in recipe.datasets.chosen().values())
    steps_of = functools.cache(functools.partial(steps_per_epoch, mix, recipe, num_processes))
    fraction, whole = math.modf(recipe.num_train_epochs)
    if position.epoch > whole:
        return 0
    varies = recipe.packing and drawn
    steps = sum(steps_of(epoch if varies else 0) for epoch in range(position.epoch, int(whole)))
    # Rounded, since the fraction of 2.1 is a little over 0.1.
    steps += math.ceil(round(fraction * steps_of(int(whole) if varies else 0), 6)) if fraction else 0
    # Counted from what is left of this epoch: what is used may have been in steps of another size.
    plan = epoch_plan(mix, recipe, position.epoch)
    of_epoch = math.ceil((len(plan) - plan.first_pack(position)) / packs_per_step(recipe, num_processes))
    return max(0, steps - steps_of(position.epoch if varies else 0) + of_epoch)


def packs_per_step(recipe: Recipe, num_processes: int) -> int:
    """Packs (without `packing`: conversations) of a full optimizer step over all processes."""
    if recipe.global_batch_size is not None:
        return recipe.global_batch_size
    return num_processes * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def describe_step(recipe: Recipe, num_processes: int) -> str:
    """What a full step holds, for a message."""
    what = f"packs of up to {recipe.max_length:,} tokens" if recipe.packing else "conversations"
    return f"{packs_per_step(recipe, num_processes)} {what} a step"


def describe_packing(mix: Mix, recipe: Recipe, num_processes: int) -> str:
    """How packing changes an epoch, for a message."""
    plan = epoch_plan(mix, recipe, 0)
    tokens = np.minimum(mix.train.lengths[plan.rows], recipe.max_length).sum()
    unpacked = steps_per_epoch(mix, recipe.model_copy(update={"packing": False}), num_processes)
    return (
        f"packing: {len(plan.rows):,} conversations in {len(plan):,} packs, {len(plan.rows) / len(plan):.1f} in each, "
        f"{tokens / (len(plan) * recipe.max_length):.1%} full: {steps_per_epoch(mix, recipe, num_processes):,} steps "
        f"an epoch in place of {unpacked:,}"
    )


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches of a process in a full optimizer step. Where they do not go round, some of a process are empty."""
    micro_batches = math.ceil(packs_per_step(recipe, num_processes) / recipe.per_device_train_batch_size)
    return math.ceil(micro_batches / num_processes)


def training_steps(
    mix: Mix, recipe: Recipe, process: int, num_processes: int, pad_token_id: int, start: Position
) -> Iterator[tuple[Position, list[Batch]]]:
    """The optimizer steps from a position on, epoch after epoch without end: the position after the step, and the list
    of this process's micro-batches.

    Every process gets the same number of micro-batches in a step, since each backward pass may be collective. The last
    step of an epoch holds what is left; where that does not go round, a process gets an empty micro-batch (`collate`).
    """
    per_step, size = packs_per_step(recipe, num_processes), recipe.per_device_train_batch_size
    position = start
    while True:
        epoch, plan = position.epoch, epoch_plan(mix, recipe, position.epoch)
        for first in range(plan.first_pack(position), len(plan), per_step):
            end = min(first + per_step, len(plan))
            position = Position(epoch, int(plan.bounds[end])) if end < len(plan) else Position(epoch + 1)
            chunks = [plan.of_packs(pack, min(pack + size, end)) for pack in range(first, end, size)]
            chunks = deal(chunks, process, num_processes)
            yield position, [collate(mix.train, chunk, recipe, pad_token_id, epoch) for chunk in chunks]


def prefetched(
    steps: Iterator[tuple[Position, list[Batch]]], device: torch.device
) -> Iterator[tuple[Position, list[Batch]]]:
    """The same steps, made two ahead by a thread, so that training does not wait for them.

    Args:
        device: for a GPU they are put into pinned memory, from which it fetches them by itself.
    """
    pin = device.type == "cuda"

    def fetch() -> tuple[Position, list[Batch]] | None:
        position, batches = next(steps, (None, []))
        return position and (position, [batch.pin_memory() for batch in batches] if pin else batches)

    # A thread begins on the first GPU, where pinning would take memory for each of the processes.
    initializer = functools.partial(torch.cuda.set_device, device) if pin else None
    with ThreadPoolExecutor(1, "prefetch", initializer) as thread:
        coming = deque(thread.submit(fetch) for _ in range(2))
        while step := coming.popleft().result():
            coming.append(thread.submit(fetch))
            yield step


def step_rows(mix: Mix, recipe: Recipe, num_processes: int, position: Position) -> np.ndarray:
    """Rows of the training split that the step after a position uses, over all processes: int64 [conversations]."""
    plan = epoch_plan(mix, recipe, position.epoch)
    first = plan.first_pack(position)
    return plan.of_packs(first, first + packs_per_step(recipe, num_processes))


def validation_batches(
    mix: Mix, recipe: Recipe, dataset: int, process: int, num_processes: int, pad_token_id: int
) -> Iterator[Batch]:
    """The validation batches of one data set for this process, longest first so that memory runs out at once.

    Conversations over max_length are cut at their start, never at random, and never packed. Every process gets the same
    number of batches.
    """
    rows = np.flatnonzero(mix.validation.dataset == dataset)
    rows = rows[np.argsort(-mix.validation.lengths[rows], kind="stable")]
    size = recipe.per_device_eval_batch_size
    for chunk in deal([rows[i : i + size] for i in range(0, len(rows), size)], process, num_processes):
        yield collate(mix.validation, chunk, recipe, pad_token_id, epoch=None)


def deal(chunks: list[np.ndarray], process: int, num_processes: int) -> list[np.ndarray]:
    """This process's share of the chunks, dealt in turn; empty ones fill up the last round."""
    missing = -len(chunks) % num_processes
    return (chunks + [np.empty(0, dtype=np.int64)] * missing)[process::num_processes]
