"""How a step is cut into micro-batches, by number or by tokens, and the largest ones that a run will see."""

import heapq
import itertools
import math
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from data.mix import Mix, Split
from recipe.keys import Recipe
from training.plan import EpochPlan, Position, epoch_plan, packs_per_step, validation_rows
from utils.tables import counted


def micro_batch_numbers(tokens: np.ndarray, size: int, recipe: Recipe, num_processes: int) -> np.ndarray:
    """Cut the packs of a step, or the conversations of an evaluation, into micro-batches.

    By number they come in their order, `size` in each. Under `micro_batch_tokens` none has more tokens than that,
    padding included, and the processes have as few and as equal ones as the rules below find. What is in the step does
    not depend on it.

    `tokens`, int64 [packs], are those of each, at most max_length.
    Returns: int64 [packs], the micro-batch of each, from 0. Number i is of process i % num_processes, the processes'
    i // num_processes-th; a number that no pack has is an empty one.
    """
    limit = recipe.micro_batch_tokens
    if limit is None or not len(tokens):
        return np.arange(len(tokens)) // size
    return (_even if recipe.padding_free else _even_padded)(tokens, limit, num_processes)


def _even(tokens: np.ndarray, limit: int, num_processes: int) -> np.ndarray:
    """As `micro_batch_numbers`, for micro-batches without padding.

    Longest first, each to the process with the fewest tokens so far that has room, into its emptiest micro-batch: the
    process with the most has at most 4/3 of what it must have where the limit stops nothing (Graham 1969), on the
    seed's lengths 0.3 % more than after swapping what helps. Best fit decreasing saves a micro-batch in 0 to 11 of 248
    steps there. Where one finds no room, each micro-batch holds limit // max_length others or more, so that
    `accumulation_steps` is a bound. Tokens stand for time: by the FLOPs of the 7B the idle share is 0.5 % more at most.
    """
    sizes = tokens.tolist()
    longest_first = np.argsort(-tokens, kind="stable").tolist()
    # No two that are over half of the limit fit together.
    fewest = max(math.ceil(sum(sizes) / limit), sum(2 * size > limit for size in sizes))
    for rounds in itertools.count(math.ceil(fewest / num_processes)):
        numbers = _longest_first(sizes, longest_first, limit, num_processes, rounds)
        if numbers:
            return np.array(numbers)


def _longest_first(sizes: list[int], order: list[int], limit: int, num_processes: int, rounds: int) -> list[int] | None:
    """The micro-batch of each, with so many of every process; None where this rule finds no room for one."""
    held = [[(0, number) for number in range(rounds)] for _ in range(num_processes)]  # heaps: tokens, micro-batch
    processes = [(0, process) for process in range(num_processes)]  # likewise: tokens, process
    place = [(0, 0)] * len(sizes)
    for item in order:
        size, full = sizes[item], []
        while processes:
            total, process = heapq.heappop(processes)
            least, number = held[process][0]
            if least + size <= limit:
                heapq.heapreplace(held[process], (least + size, number))
                heapq.heappush(processes, (total + size, process))
                place[item] = process, number
                break
            full.append((total, process))
        else:
            return None
        for entry in full:
            heapq.heappush(processes, entry)
    # The largest of each process together, then the second: ZeRO-2 waits for the slowest at every micro-batch.
    turn = [{number: turn for turn, (_, number) in enumerate(sorted(own, reverse=True))} for own in held]
    return [turn[process][number] * num_processes + process for process, number in place]


def _even_padded(lengths: np.ndarray, limit: int, num_processes: int) -> np.ndarray:
    """As `micro_batch_numbers`, for padded micro-batches, which are as large as their rows times the longest.

    Neighbours by length go together, from the longest on, as many as a micro-batch takes: the fewest micro-batches that
    there can be. Then the same within the smallest limit with which each process has no more of them.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order].tolist()

    def starts(limit: int) -> list[int]:
        found = [0]
        while (first := found[-1] + limit // descending[found[-1]]) < len(descending):
            found.append(first)
        return found

    rounds = math.ceil(len(starts(limit)) / num_processes)
    low, high = descending[0], limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(starts(middle)) <= rounds * num_processes else (middle + 1, high)
    first = starts(high)
    rows = np.diff(first, append=len(descending))
    size = rows * np.array(descending)[first]
    numbers, held = np.empty(len(first), dtype=np.int64), np.zeros(num_processes, dtype=np.int64)
    by_size = np.argsort(-size, kind="stable")
    for begin in range(0, len(by_size), num_processes):  # in each round the largest goes where there is least so far
        together = by_size[begin : begin + num_processes]
        process = np.argsort(held, kind="stable")[: len(together)]
        numbers[together] = begin + process
        held[process] += size[together]
    return np.repeat(numbers, rows)[np.argsort(order)]


def rows_of_step(plan: EpochPlan, tokens: np.ndarray, first: int, recipe: Recipe, num_processes: int) -> list:
    """Rows, int64 [conversations], of each micro-batch of the step that begins at the pack `first`, by their numbers.

    `tokens`: `plan.tokens`, once for all steps.
    """
    end = min(first + packs_per_step(recipe, num_processes), len(plan))
    numbers = micro_batch_numbers(tokens[first:end], recipe.per_device_train_batch_size, recipe, num_processes)
    return grouped(plan.of_packs(first, end), np.repeat(numbers, np.diff(plan.bounds[first : end + 1])))


def validation_numbers(mix: Mix, rows: np.ndarray, recipe: Recipe, num_processes: int) -> np.ndarray:
    """As `micro_batch_numbers`, for rows of the validation split."""
    tokens = np.minimum(mix.validation.lengths[rows], recipe.max_length)
    return micro_batch_numbers(tokens, recipe.per_device_eval_batch_size, recipe, num_processes)


def grouped(rows: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    """The rows of each number, from 0 to the highest, in their order."""
    if not len(rows):
        return []
    return np.split(rows[np.argsort(numbers, kind="stable")], np.cumsum(np.bincount(numbers))[:-1])


def shapes(tokens: np.ndarray, numbers: np.ndarray, padding_free: bool) -> np.ndarray:
    """Of each micro-batch its rows and the tokens in each, padding included: int64 [2, micro-batches].

    `tokens`, int64, and their micro-batches `numbers` are those of conversations, or without padding of packs.
    """
    if padding_free:
        total = np.bincount(numbers, tokens).astype(np.int64)
        return np.stack([np.ones_like(total), total])
    longest = np.zeros(numbers.max() + 1, dtype=np.int64)
    np.maximum.at(longest, numbers, tokens)
    return np.stack([np.bincount(numbers), longest])


class MicroBatch(NamedTuple):
    """A micro-batch of the plan, of which `collate.collate` makes the batch."""

    rows: np.ndarray  # int64 [conversations], of the training or the validation split
    epoch: int | None  # as `collate` takes it; None for validation
    shape: tuple[int, int]  # of the tensor that it becomes: (1, tokens), or (conversations, the longest) where padded
    of_epochs: int | None = None  # it is the largest of only so many epochs, and a later one may hold a larger

    @property
    def tokens(self) -> int:
        """Padding included."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """For a message."""
        each = "" if self.shape[0] == 1 else f" of {self.shape[1]:,} each, padded"
        return f"{counted(len(self.rows), 'conversation')}, {self.tokens:,} tokens{each}"


def largest_micro_batches(
    mix: Mix, recipe: Recipe, num_processes: int, steps: int, start: Position
) -> tuple[MicroBatch, MicroBatch | None]:
    """The training and the evaluation micro-batch that will need the most memory; None where nothing is held out.

    That is the one with the most tokens, padding included, after cutting to max_length; of several, the one with the
    most scored tokens. A cut conversation counts as scored all over, up to its targets, since its window is random.
    `steps` are those from `start` to the end of the run, at least 1. Where they are more than `_planned_epochs`, the
    training micro-batch is that of these, and says so unless none can be larger.
    """
    per_step, size = packs_per_step(recipe, num_processes), recipe.per_device_train_batch_size
    position, best, unplanned = start, None, _planned_epochs(mix)
    while steps > 0 and unplanned:
        plan = epoch_plan(mix, recipe, position.epoch)
        first = plan.first_pack(position)
        end = min(first + steps * per_step, len(plan))
        tokens, numbers, count = plan.tokens(mix, recipe), [], 0
        for pack in range(first, end, per_step):
            numbers.append(count + micro_batch_numbers(tokens[pack : pack + per_step], size, recipe, num_processes))
            count = int(numbers[-1].max()) + 1
        steps -= len(numbers)
        of_rows = np.repeat(np.concatenate(numbers), np.diff(plan.bounds[first : end + 1]))
        found = _largest(mix.train, plan.of_packs(first, end), of_rows, recipe, position.epoch)
        best = found if best is None or found[0] > best[0] else best
        position, unplanned = Position(position.epoch + 1), unplanned - 1
    train = best[1]
    if steps > 0 and train.tokens < _most_tokens(mix, recipe):
        train = train._replace(of_epochs=position.epoch - start.epoch)
    held_out = []
    for dataset in np.unique(mix.validation.dataset):
        rows = validation_rows(mix, dataset)
        numbers = validation_numbers(mix, rows, recipe, num_processes)
        held_out.append(_largest(mix.validation, rows, numbers, recipe, None))
    return train, max(held_out, key=itemgetter(0))[1] if held_out else None


def _planned_epochs(mix: Mix) -> int:
    """So many epochs are looked through for the largest micro-batch: 10, and more up to 10 million conversations.

    These take 1 to 13 s on one core: 7,700 epochs of 300 conversations, 33 of 300,000. The same on every process.
    """
    return max(10, 10**7 // (len(mix.train.lengths) + 1000))  # an epoch itself takes as long as 1,000


def _most_tokens(mix: Mix, recipe: Recipe) -> int:
    """No training micro-batch of any epoch has more, padding included."""
    lengths = np.sort(np.minimum(mix.train.lengths, recipe.max_length))
    size = recipe.per_device_train_batch_size
    if recipe.micro_batch_tokens is not None:
        return recipe.micro_batch_tokens
    if recipe.packing:
        return size * recipe.max_length
    return int(lengths[-size:].sum() if recipe.padding_free else size * lengths[-1])


def _largest(
    split: Split, rows: np.ndarray, numbers: np.ndarray, recipe: Recipe, epoch: int | None
) -> tuple[tuple[int, int], MicroBatch]:
    """Of the micro-batches of `rows`, numbered by `numbers`, the largest, after its padded and scored tokens."""
    lengths = np.minimum(split.lengths[rows], recipe.max_length)
    found = shapes(lengths, numbers, recipe.padding_free)
    scored = np.bincount(numbers, np.minimum(split.targets[rows], lengths - 1))
    best = np.lexsort((scored, found.prod(0)))[-1]
    batch = MicroBatch(rows[numbers == best], epoch, tuple(found[:, best].tolist()))
    return (batch.tokens, int(scored[best])), batch
