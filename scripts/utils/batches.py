"""Which example goes where: the order of an epoch, optimizer steps, micro-batches and windows.

All of it is a pure function of (rng_seed, epoch) and the number of processes, computed by every process for itself. So
nothing is communicated, every kept example is used exactly once an epoch, and any step can be reached without replay.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from utils.mix import Mix, Split
from utils.recipe import Recipe


@dataclass(frozen=True)
class Position:
    """How far a run has come in its data: so many conversations of an epoch (from 0) are used, fewer than it has."""

    epoch: int = 0
    conversations: int = 0


# What a random draw is for, so that no two of them share a stream.
ORDER, SUBSET, WINDOW = range(3)


def training_rows(mix: Mix, recipe: Recipe, epoch: int) -> np.ndarray:
    """Rows of the training split that an epoch uses, in its order: int64 [conversations].

    `fraction` and `size` are drawn anew each epoch. Under `sort_by_length` the rows come in micro-batches of similar
    lengths, the micro-batches shuffled.
    """
    rows = []
    for index, options in enumerate(recipe.datasets.chosen().values()):
        own = np.flatnonzero(mix.train.dataset == index)
        # At least one row: a small fraction of a small data set is not to drop it, or leave an epoch without a step.
        wanted = options.size if options.size is not None else max(1, round(len(own) * (options.fraction or 1.0)))
        if wanted < len(own):
            own = np.sort(_rng(recipe, SUBSET, epoch, index).choice(own, wanted, replace=False))
        rows.append(own)
    rng = _rng(recipe, ORDER, epoch)
    order = rng.permutation(np.concatenate(rows))
    if not recipe.sort_by_length:
        return order
    order = order[np.argsort(mix.train.lengths[order], kind="stable")]  # ties stay as shuffled
    size = recipe.per_device_train_batch_size
    whole = len(order) // size * size  # the one incomplete micro-batch stays last, so that the others stay aligned
    return np.concatenate([rng.permutation(order[:whole].reshape(-1, size)).ravel(), order[whole:]])


def steps_per_epoch(mix: Mix, recipe: Recipe, num_processes: int) -> int:
    """Optimizer steps of one epoch, the last, incomplete one counted."""
    return math.ceil(len(training_rows(mix, recipe, 0)) / conversations_per_step(recipe, num_processes))


def steps_left(mix: Mix, recipe: Recipe, num_processes: int, position: Position) -> int:
    """Optimizer steps from a position to the end of num_train_epochs."""
    conversations, per_step = len(training_rows(mix, recipe, 0)), conversations_per_step(recipe, num_processes)
    per_epoch = math.ceil(conversations / per_step)
    of_epoch = per_epoch - math.ceil((conversations - position.conversations) / per_step)
    return max(0, math.ceil(recipe.num_train_epochs * per_epoch) - position.epoch * per_epoch - of_epoch)


def conversations_per_step(recipe: Recipe, num_processes: int) -> int:
    """Conversations of a full optimizer step over all processes."""
    if recipe.global_batch_size is not None:
        return recipe.global_batch_size
    return num_processes * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps


def accumulation_steps(recipe: Recipe, num_processes: int) -> int:
    """Micro-batches of a process in a full optimizer step. Where they do not go round, some of a process are empty."""
    micro_batches = math.ceil(conversations_per_step(recipe, num_processes) / recipe.per_device_train_batch_size)
    return math.ceil(micro_batches / num_processes)


def training_steps(
    mix: Mix, recipe: Recipe, process: int, num_processes: int, pad_token_id: int, start: Position
) -> Iterator[tuple[Position, list[dict[str, torch.Tensor]]]]:
    """The optimizer steps from a position on, epoch after epoch without end: the position after the step, and the list
    of this process's micro-batches.

    Every process gets the same number of micro-batches in a step, since each backward pass may be collective. The last
    step of an epoch holds what is left; where that does not go round, a process gets an empty micro-batch (`collate`).
    """
    per_step, size = conversations_per_step(recipe, num_processes), recipe.per_device_train_batch_size
    position = start
    while True:
        epoch, rows = position.epoch, training_rows(mix, recipe, position.epoch)
        for used in range(position.conversations, len(rows), per_step):
            step, end = rows[used : used + per_step], used + per_step
            position = Position(epoch, end) if end < len(rows) else Position(epoch + 1)
            chunks = deal([step[i : i + size] for i in range(0, len(step), size)], process, num_processes)
            yield position, [collate(mix.train, chunk, recipe, pad_token_id, epoch) for chunk in chunks]


def step_rows(mix: Mix, recipe: Recipe, num_processes: int, position: Position) -> np.ndarray:
    """Rows of the training split that the step after a position uses, over all processes: int64 [conversations]."""
    used = position.conversations
    return training_rows(mix, recipe, position.epoch)[used : used + conversations_per_step(recipe, num_processes)]


def validation_batches(
    mix: Mix, recipe: Recipe, dataset: int, process: int, num_processes: int, pad_token_id: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The validation batches of one data set for this process, longest first so that memory runs out at once.

    Conversations over max_length are cut at their start, never at random. Every process gets the same number.
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


def collate(
    split: Split, rows: np.ndarray, recipe: Recipe, pad_token_id: int, epoch: int | None
) -> dict[str, torch.Tensor]:
    """One batch, padded on the right to its longest example.

    Args:
        rows: examples of the split; none gives a batch of one padded row of length 2 without a target.
        epoch: draws the windows of examples over max_length; None takes their first max_length tokens.

    Returns:
        input_ids, attention_mask, labels: int64 [batch, length]; labels hold the token itself where it is scored, else
        -100. dataset: int64 [scored tokens], the data set of each, in the order of rows and positions.
        lengths: int64 [examples], their real tokens.
    """
    examples = [cut(split, row, recipe, epoch) for row in rows]
    shape = max(1, len(examples)), max([len(ids) for ids, _ in examples], default=2)
    input_ids, labels = np.full(shape, pad_token_id), np.full(shape, -100)
    attention_mask = np.zeros(shape, dtype=np.int64)
    for i, (ids, scored) in enumerate(examples):
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = np.where(scored, ids, -100)
        attention_mask[i, : len(ids)] = 1
    if not examples:
        attention_mask[:] = 1  # a row that may attend to nothing would be NaN in some attention kernels
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "dataset": np.repeat(split.dataset[rows], [scored.sum() for _, scored in examples]),
        "lengths": np.array([len(ids) for ids, _ in examples]),
    }
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


def cut(split: Split, row: int, recipe: Recipe, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and scored of one example, at most max_length tokens of it; the first of a window is never a target."""
    ids, scored = split.tokens(row)
    start = window_start(scored, row, recipe, epoch)
    scored = scored[start : start + recipe.max_length].copy()
    scored[0] = False
    return ids[start : start + recipe.max_length], scored


def window_start(scored: np.ndarray, row: int, recipe: Recipe, epoch: int | None) -> int:
    """Where the window of max_length tokens starts that an epoch sees of an example.

    A longer example is cut to a random window with probability random_offset_probability, else to its start; never at
    random for epoch None (validation). A window without a target would teach nothing, so only those with one are drawn.

    Args:
        scored: bool [tokens], the whole example's.
    """
    length = recipe.max_length
    if len(scored) <= length or epoch is None:
        return 0
    rng = _rng(recipe, WINDOW, epoch, row)
    if rng.random() >= recipe.random_offset_probability:
        return 0
    # A window [o, o + length) holds a target when one lies in [o + 1, o + length).
    targets = np.concatenate([[0], np.cumsum(scored)])
    held = targets[length:] - targets[1 : len(scored) - length + 2]
    return int(rng.choice(np.flatnonzero(held > 0))) if held.any() else 0


def _rng(recipe: Recipe, *stream: int) -> np.random.Generator:
    return np.random.default_rng([recipe.rng_seed, *stream])
