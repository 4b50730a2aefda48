"""The steps of a run: how many, what each holds, and which of its micro-batches will need the most memory.

A pure function of the recipe, the mix and the number of processes, like `training/epochs.py`.
"""

import functools
import math
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from data.mix import Mix, Split
from recipe.keys import Recipe
from training.epochs import Position, epoch_plan


def packs_per_step(recipe: Recipe, num_processes: int) -> int:
    """Packs (without `packing`: conversations) of a full optimizer step over all processes."""
    if recipe.global_batch_size is not None:
        return recipe.global_batch_size
    return num_processes * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def describe_step(recipe: Recipe, num_processes: int) -> str:
    """What a full step holds, for a message."""
    what = f"packs of up to {recipe.max_length:,} tokens" if recipe.packing else "conversations"
    return f"{packs_per_step(recipe, num_processes)} {what} a step"


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches of a process in a full optimizer step. Where they do not go round, some of a process are empty."""
    micro_batches = math.ceil(packs_per_step(recipe, num_processes) / recipe.per_device_train_batch_size)
    return math.ceil(micro_batches / num_processes)


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


def micro_batch_starts(packs: int, per_step: int, size: int) -> np.ndarray:
    """Where each micro-batch begins among packs that are cut into steps, each step into micro-batches: int64."""
    place = np.arange(packs)
    return place[place % per_step % size == 0]


def validation_rows(mix: Mix, dataset: int) -> np.ndarray:
    """Rows of the validation split that are of a data set, longest first so that memory runs out at once: int64."""
    rows = np.flatnonzero(mix.validation.dataset == dataset)
    return rows[np.argsort(-mix.validation.lengths[rows], kind="stable")]


class MicroBatch(NamedTuple):
    """A micro-batch of the plan.

    Attributes:
        rows: int64 [conversations], of the training or the validation split; `collate.collate` makes the batch of them.
        epoch: as `collate` takes it; None for validation.
        shape: of the tensor that it becomes: (1, tokens), or where it is padded (conversations, the longest).
    """

    rows: np.ndarray
    epoch: int | None
    shape: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Padding included."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """For a message."""
        each = "" if self.shape[0] == 1 else f" of {self.shape[1]:,} each, padded"
        return f"{len(self.rows)} conversation{'s' * (len(self.rows) > 1)}, {self.tokens:,} tokens{each}"


def largest_micro_batches(
    mix: Mix, recipe: Recipe, num_processes: int, steps: int, start: Position
) -> tuple[MicroBatch, MicroBatch | None]:
    """The training and the evaluation micro-batch that will need the most memory; None where nothing is held out.

    That is the one with the most tokens, padding included, after cutting to max_length; of several, the one with the
    most scored tokens. A cut conversation counts as scored all over, up to its targets, since its window is random.

    Args:
        steps: optimizer steps from `start` to the end of the run, at least 1.
    """
    per_step, position = packs_per_step(recipe, num_processes), start
    size, found = recipe.per_device_train_batch_size, []
    while steps > 0:
        plan = epoch_plan(mix, recipe, position.epoch)
        packs = np.arange(len(plan))[plan.first_pack(position) :][: steps * per_step]
        steps -= math.ceil(len(packs) / per_step)
        first = plan.bounds[packs[micro_batch_starts(len(packs), per_step, size)]]
        rows = plan.of_packs(packs[0], packs[-1] + 1)
        found.append(_largest(mix.train, rows, first - first[0], recipe, position.epoch))
        position = Position(position.epoch + 1)
    held_out = []
    for dataset in np.unique(mix.validation.dataset):
        rows = validation_rows(mix, dataset)
        first = micro_batch_starts(len(rows), len(rows), recipe.per_device_eval_batch_size)
        held_out.append(_largest(mix.validation, rows, first, recipe, None))
    return max(found, key=itemgetter(0))[1], max(held_out, key=itemgetter(0))[1] if held_out else None


def _largest(
    split: Split, rows: np.ndarray, first: np.ndarray, recipe: Recipe, epoch: int | None
) -> tuple[tuple[int, int], MicroBatch]:
    """Of the micro-batches of `rows` that start at `first` (int64) the largest, after its padded and scored tokens."""
    lengths = np.minimum(split.lengths[rows], recipe.max_length)
    sizes = np.diff(first, append=len(rows))
    if recipe.padding_free:
        shapes = np.stack([np.ones_like(sizes), np.add.reduceat(lengths, first)])
    else:
        shapes = np.stack([sizes, np.maximum.reduceat(lengths, first)])
    scored = np.add.reduceat(np.minimum(split.targets[rows], lengths - 1), first)
    best = np.lexsort((scored, shapes.prod(0)))[-1]
    batch = MicroBatch(rows[first[best] : first[best] + sizes[best]], epoch, tuple(shapes[:, best].tolist()))
    return (batch.tokens, int(scored[best])), batch
