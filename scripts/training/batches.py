"""The micro-batches of this process, in training and in evaluation, made ahead by a thread."""

import functools
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.mix import Mix, Split
from recipe.keys import Recipe
from training.collate import Batch, collate
from training.micro_batches import MicroBatch, grouped, rows_of_step, validation_numbers
from training.plan import Position, accumulation_steps, epoch_plan, packs_per_step, validation_rows


@dataclass(frozen=True)
class Batches:
    """The batches of one process of a run.

    Every process gets the same number of micro-batches in a step or an evaluation, since each may be collective; where
    that does not go round, a process gets empty ones (`collate`).
    """

    mix: Mix
    recipe: Recipe
    process: int
    num_processes: int
    pad_token_id: int

    @property
    def accumulated(self) -> int:
        """Micro-batches of a process in a full optimizer step; under `micro_batch_tokens` the most of them."""
        return accumulation_steps(self.recipe, self.num_processes)

    def training_steps(self, start: Position, count: int | None = None) -> Iterator[tuple[Position, list[Batch]]]:
        """So many optimizer steps from a position on, epoch after epoch (None: without end): the position after the
        step, and the list of this process's micro-batches. The last step of an epoch holds what is left."""
        return itertools.islice(self._training_steps(start), count)

    def _training_steps(self, start: Position) -> Iterator[tuple[Position, list[Batch]]]:
        per_step, position = packs_per_step(self.recipe, self.num_processes), start
        while True:
            epoch, plan = position.epoch, epoch_plan(self.mix, self.recipe, position.epoch)
            tokens = plan.tokens(self.mix, self.recipe)
            for first in range(plan.first_pack(position), len(plan), per_step):
                end = min(first + per_step, len(plan))
                position = Position(epoch, int(plan.bounds[end])) if end < len(plan) else Position(epoch + 1)
                chunks = rows_of_step(plan, tokens, first, self.recipe, self.num_processes)
                yield position, list(self._collate(self.mix.train, chunks, epoch))

    def validation(self, dataset: int) -> Iterator[Batch]:
        """The validation batches of one data set, the largest first.

        Conversations over max_length are cut at their start, never at random, and never packed.
        """
        rows = validation_rows(self.mix, dataset)
        chunks = grouped(rows, validation_numbers(self.mix, rows, self.recipe, self.num_processes))
        yield from self._collate(self.mix.validation, chunks, epoch=None)

    def of(self, micro_batch: MicroBatch) -> Batch:
        """The batch of a micro-batch of the plan, with a target where it has none (cut before the first reply): only a
        loss can make NaN of the gradients of a rehearsal."""
        split = self.mix.validation if micro_batch.epoch is None else self.mix.train
        batch = collate(split, micro_batch.rows, self.recipe, self.pad_token_id, micro_batch.epoch)
        zero = torch.tensor([0])
        return batch if len(batch.targets) else replace(batch, scored=zero, targets=zero, dataset=zero, weights=None)

    def _collate(self, split: Split, chunks: list[np.ndarray], epoch: int | None) -> Iterator[Batch]:
        """Of the micro-batches of these rows those of this process."""
        for rows in deal(chunks, self.process, self.num_processes):
            yield collate(split, rows, self.recipe, self.pad_token_id, epoch)

    def step_rows(self, position: Position) -> np.ndarray:
        """Rows of the training split that the step after a position uses, over all processes: int64 [conversations]."""
        plan = epoch_plan(self.mix, self.recipe, position.epoch)
        first = plan.first_pack(position)
        return plan.of_packs(first, first + packs_per_step(self.recipe, self.num_processes))


def deal(chunks: list[np.ndarray], process: int, num_processes: int) -> list[np.ndarray]:
    """This process's share of the chunks, dealt in turn; empty ones fill up the last round."""
    missing = -len(chunks) % num_processes
    return (chunks + [np.empty(0, dtype=np.int64)] * missing)[process::num_processes]


def prefetched(
    steps: Iterator[tuple[Position, list[Batch]]], device: torch.device
) -> Iterator[tuple[Position, list[Batch]]]:
    """The same steps, made two ahead by a thread, so that training does not wait for them.

    For a GPU they are put into pinned memory, from which it fetches them by itself.
    """
    pin = device.type == "cuda"

    def fetch() -> tuple[Position, list[Batch]] | None:
        position, batches = next(steps, (None, []))
        return position and (position, [batch.pin_memory() for batch in batches] if pin else batches)

    # A thread begins on the first GPU, where pinning would take memory for each of the processes. By number, as the
    # device of a process alone has none (`cuda`), which set_device refuses.
    initializer = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if pin else None
    with ThreadPoolExecutor(1, "prefetch", initializer) as thread:
        coming = deque(thread.submit(fetch) for _ in range(2))
        while step := coming.popleft().result():
            coming.append(thread.submit(fetch))
            yield step
