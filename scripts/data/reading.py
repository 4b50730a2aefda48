"""Reading a data set: its conversations one after the other, what was dropped and why, and which are held out.

Text is never kept: a split is drawn over counts and record numbers, so a source may be larger than the memory.
`fraction` and `size` are the sampler's, as they are drawn anew each epoch.
"""

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.records import count_records, read_records
from data.splits import SplitFiles, slices
from recipe.load import nearest
from sources.registry import find_source
from sources.source import Conversation, Record, Remarks, Source
from utils.errors import UserError
from utils.tables import counted

TRAIN, VALIDATION, LEFT_OUT = range(3)  # left out by max_val_set
SPLIT_SEED = 287631038922  # of torch's random_split
SKLEARN_SEED = 666  # of scikit-learn's train_test_split
SHUFFLE_SEED = 42
MOST_REASONS = 20  # why something was dropped; then without what they quote, such as a speaker's name


class Reading:
    """One pass over a data set: iterate it to the end, then ask for the split.

    `rng_seed` is for what the original drew without a seed. The counts are final when the pass is.
    """

    def __init__(self, name: str, options: Any, paths: list[Path], rng_seed: int):
        self.name, self.options, self.rng_seed = name, options, rng_seed
        self.paths = paths if isinstance(paths, SplitFiles) else SplitFiles({"train": paths})
        self.source: Source = find_source(name, options)
        self.rows_read = 0  # records in the files (trees, conversations or rows), those skipped included
        self.dropped: Counter = Counter()  # reason -> how many trees, threads, conversations or rows: its first word
        self.used: Counter = Counter()  # fields that a conversation was made of, of a source with a choice -> records
        self.unused: Counter = Counter()  # field that could matter -> records that had it, and it was not used
        self.bad_records = 0  # places passed over under `on_bad_records: skip`; a cut-off file's end counts as one
        self.first_bad_record: str | None = None  # what was wrong with the first of them
        self._records = array("q")  # of each unit of the split, the place of its record among all
        self._sizes = array("q")  # its conversations

    def __iter__(self) -> Iterator[Conversation]:
        """The conversations in the order of the files; UserError for a damaged file, or a field missing."""
        skip = self._skip if self.options.on_bad_records == "skip" else None
        absent: Counter = Counter()  # field that the options name -> records without it
        values: dict[str, Any] = {}
        remarks = Remarks()  # of one record at a time, not counted when it turns out to be bad
        for path, number, values in self._rows(skip):
            record = Record(values, path, number, self.rows_read + 1)
            remarks.used = ()
            if remarks or remarks.unused or remarks.absent:
                remarks.forget()
            try:
                unit = self.source.read(record, self.options, remarks, self.rng_seed)
                unit = _weighted(unit, record.weight, remarks)
            except (UserError, RecursionError) as error:
                problem = error if isinstance(error, UserError) else record.error("nested too deeply")
                if not skip:
                    raise problem from None
                skip(problem)
                continue
            self.rows_read += 1
            for reason, count in remarks.items():
                many = len(self.dropped) >= MOST_REASONS and reason not in self.dropped
                self.dropped[reason.partition(" (")[0] if many else reason] += count
            if remarks.unused or remarks.absent:
                self.unused.update(remarks.unused)
                absent.update(remarks.absent)
            if unit is not None:
                if remarks.used:
                    self.used[remarks.used] += 1
                self._records.append(self.rows_read - 1)
                self._sizes.append(len(unit))
                yield from unit
        for field, count in absent.items():
            if count == self.rows_read - self.bad_records:
                hint = nearest(field, values, otherwise="")
                raise UserError(f"data set {self.name}: no record has the field {field!r}, which `columns` names{hint}")

    def _rows(self, skip: Callable[[UserError], None] | None) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """File, number in it and values of each record that is asked for: those of the split, one part after the other,
        so that what two of them have comes twice, as in `datasets`."""
        fields = {*self.source.fields, "weight"}
        split, by_name = self.source.hub.split, self.paths.by_name
        if split in (None, "all"):
            parts = [(name, 0, None) for name in by_name]
        elif "[" not in split:
            parts = [(name.strip(), 0, None) for name in split.split("+")]
        else:
            passed_over = skip and (lambda _: None)  # counted when they are read, as those of the slice are
            counts = {
                name: sum(count_records(path, passed_over, fields) for path in paths) for name, paths in by_name.items()
            }
            parts = slices(split, counts)
        for name, start, stop in parts:
            yield from _part(by_name[name], start, stop, skip, fields)

    def _skip(self, problem: UserError) -> None:
        self.rows_read += 1
        self.bad_records += 1
        # It may quote what no terminal or file can take.
        self.first_bad_record = self.first_bad_record or str(problem).encode(errors="backslashreplace").decode()

    def split(self, kept: np.ndarray | None = None) -> np.ndarray:
        """TRAIN, VALIDATION or LEFT_OUT for each conversation: int8 [conversations]; UserError with none to train on.

        `kept` (bool [conversations]) are those to answer for; the others, without a scored token, are dropped now.
        """
        sizes, records = np.array(self._sizes, dtype=np.int64), np.array(self._records, dtype=np.int64)
        units = np.arange(len(sizes))  # in the order in which they are split
        if self.source.shuffled:
            order = list(range(self.rows_read))
            random.Random(SHUFFLE_SEED).shuffle(order)
            units = np.argsort(np.argsort(order)[records])
        codes = np.full(len(sizes), TRAIN, dtype=np.int8)
        codes[units[_validation_places(self.source.split, len(units), self.options.val_split)]] = VALIDATION
        codes = np.repeat(codes, sizes)

        limit = self.options.max_val_set
        validation = np.flatnonzero(codes == VALIDATION)
        if limit is not None and len(validation) > limit:
            place = np.repeat(np.argsort(units), sizes)  # of each conversation's unit in that order
            validation = validation[np.argsort(place[validation], kind="stable")]
            drawn = random.Random(f"{self.rng_seed} {self.name} max_val_set").sample(range(len(validation)), limit)
            codes[np.delete(validation, drawn)] = LEFT_OUT
        if kept is not None and not kept.all():
            self.dropped["conversation with no scored token"] += int((~kept).sum())
            codes = codes[kept]
        if not (codes == TRAIN).any():
            where = ", ".join(map(str, self.paths))
            if not self.rows_read:
                raise UserError(f"data set {self.name}: split {self.source.hub.split}: none of the rows of {where}")
            raise UserError(f"data set {self.name}: no conversation left to train on in {where}; {self.losses()}")
        return codes

    def losses(self) -> str:
        """What did not become a conversation, in words."""
        reasons = ", ".join(counted(count, reason) for reason, count in self.dropped.items()) or "nothing"
        said = [f"dropped: {reasons}"]
        if self.unused:
            said.append("not used: " + ", ".join(f"{name} of {count:,}" for name, count in self.unused.items()))
        if self.bad_records:
            said.append(f"skipped: {self.bad_records:,} bad, the first: {self.first_bad_record}")
        return "; ".join(said)


def _part(
    paths: list[Path],
    start: int,
    stop: int | None,
    skip: Callable[[UserError], None] | None,
    fields: Collection[str],
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """File, number in it and values of the records [start, stop) of some files; what is bad before them is no part."""
    place = 0
    if start == stop:
        return

    def skip_within(problem: UserError) -> None:
        if place >= start:
            skip(problem)

    for path in paths:
        for number, values in read_records(path, skip and skip_within, fields):
            if place >= start:
                yield path, number, values
            place += 1
            if place == stop:
                return


def _weighted(unit: list[Conversation] | None, weight: float, dropped: Counter) -> list[Conversation] | None:
    """The conversations of a record with its weight; none of weight 0, but their place in the split."""
    if not unit or weight == 1:
        return unit
    if weight == 0:
        dropped["record of weight 0"] += 1
        return []
    return [replace(conversation, weight=weight) for conversation in unit]


def _validation_places(split: str, count: int, val_split: float) -> np.ndarray:
    """Which of `count` units are held out; a share that rounds to nothing or everything holds out none or all."""
    fewest = 1 if split == "random_split" else 2  # scikit-learn holds out one of one and refuses to train on none
    if count < fewest or val_split == 0:
        return np.empty(0, dtype=np.int64)
    if split == "random_split":
        import torch

        generator = torch.Generator().manual_seed(SPLIT_SEED)
        sizes = [1.0 - val_split, val_split]
        held_out = torch.utils.data.random_split(range(count), sizes, generator=generator)[1].indices
        return np.array(held_out, dtype=np.int64)
    # What scikit-learn's train_test_split(shuffle=True) draws, without the second that importing it takes.
    return np.random.RandomState(SKLEARN_SEED).permutation(count)[: math.ceil(count * val_split)]
