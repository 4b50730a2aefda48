"""A prepared data set as it is kept: a folder whose files are taken only where each is as it was written.

examples.arrow holds its conversations in the order of its files, split.npy which of them are trained on (int8
[conversations]: `TRAIN`, `VALIDATION` or `LEFT_OUT`), weights.npy what each counts in the loss (float64
[conversations]; only where some record has a weight), report.json what was read and dropped, and the checksums of all.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ConfigDict, Field

from data.arrow_arrays import numbers, starts_of, texts
from data.reading import LEFT_OUT, TRAIN
from sources.source import MOST_WEIGHT, Conversation
from utils.errors import UserError, reason
from utils.files import checksum
from utils.schemas import Schema, read_as

EXAMPLES, SPLIT, WEIGHTS, REPORT = "examples.arrow", "split.npy", "weights.npy", "report.json"
SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "input_ids": pa.large_list(pa.int32()),
        "scored": pa.large_list(pa.bool_()),
        "length": pa.int64(),
        "targets": pa.int64(),
    }
)
Count = Annotated[int, Field(ge=0)]


class Report(Schema):
    """What was read of a data set."""

    model_config = ConfigDict(extra="forbid")

    rows_read: Count
    dropped: dict[str, Count]  # reason -> how many
    used: dict[str, Count]  # fields that a conversation was made of, where the source has a choice -> how many
    unused: dict[str, Count]  # field that could matter and is not used -> records that have it
    bad_records: Count
    first_bad_record: str | None
    conversations: Count
    # 20 hex digits that stand for the input_ids, scored flags, split and weights of all its conversations in order:
    # equal where the data are equal, whatever files, cache or version of this code made them.
    fingerprint: Annotated[str, Field(pattern=r"\A[0-9a-f]{20}\z")]


class Sealed(Schema):
    """All of report.json."""

    model_config = ConfigDict(extra="forbid")

    folder: str  # the folder's own name, which is the key of what is in it
    files: dict[str, str]  # the other files' names -> checksums
    report: Report
    checksum: str = ""  # of what is above

    def own_checksum(self) -> str:
        text = json.dumps(self.model_dump(exclude={"checksum"}), sort_keys=True)
        return f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"


@dataclass
class Prepared:
    """One data set, opened."""

    table: pa.Table  # of SCHEMA, memory-mapped
    codes: np.ndarray  # int8 [conversations]
    weights: np.ndarray  # float64 [conversations], over 0; all 1 where no record has one
    report: dict[str, Any]  # the fields of `Report`


def record_batch(examples: list[tuple[Conversation, tuple[np.ndarray, np.ndarray]]]) -> pa.RecordBatch:
    """Rows of SCHEMA from conversations and what they were encoded to."""
    messages = [message for conversation, _ in examples for message in conversation.messages]
    fields = [texts([message.role for message in messages]), texts([message.content for message in messages])]
    turns = pa.StructArray.from_arrays(fields, fields=list(SCHEMA.field("messages").type.value_type))
    per_row = numbers(starts_of([len(conversation.messages) for conversation, _ in examples], np.int32))
    lengths = [len(ids) for _, (ids, _) in examples]
    starts = numbers(starts_of(lengths, np.int64))
    input_ids, scored = (np.concatenate(parts) for parts in zip(*(encoded for _, encoded in examples), strict=True))
    columns = [
        pa.ListArray.from_arrays(per_row, turns),
        pa.LargeListArray.from_arrays(starts, numbers(input_ids)),
        pa.LargeListArray.from_arrays(starts, numbers(scored)),
        numbers(np.array(lengths)),
        numbers(np.array([int(np.count_nonzero(scored)) for _, (_, scored) in examples])),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def seal(work: Path, folder: Path, report: dict[str, Any]) -> None:
    """Write report.json to `work`, which holds the other files and is to become `folder`."""
    files = {name: checksum(work / name) for name in (EXAMPLES, SPLIT, WEIGHTS) if (work / name).exists()}
    sealed = Sealed(folder=folder.name, files=files, report=Report(**report))
    sealed = sealed.model_copy(update={"checksum": sealed.own_checksum()})
    (work / REPORT).write_text(json.dumps(sealed.model_dump(), indent=2) + "\n", encoding="utf-8")


def open_prepared(folder: Path) -> Prepared | None:
    """The data set in a folder; None where there is none.

    All of it is read once: 0.1 s for a GB that the system still has in memory.
    Raises: UserError naming the first file that is not as it was written.
    """
    if not os.path.lexists(folder):
        return None
    sealed = read_as(Sealed, folder / REPORT, "the report of prepared data")
    if sealed.checksum != sealed.own_checksum():
        raise UserError(f"{folder / REPORT}: is not as it was written")
    if sealed.folder != folder.name:
        raise UserError(f"{folder / REPORT}: is of {sealed.folder}")
    weighted = WEIGHTS in sealed.files
    for name in (EXAMPLES, SPLIT, *[WEIGHTS] * weighted):
        path = folder / name
        if not path.is_file():  # a FIFO would be waited for
            raise UserError(f"{path}: is {'no file' if os.path.lexists(path) else 'missing'}")
        try:
            if checksum(path) != sealed.files.get(name):
                raise UserError(f"{path}: is not as it was written")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        with pa.memory_map(str(folder / EXAMPLES)) as file:
            table = pa.ipc.open_stream(file).read_all()
        codes = np.load(folder / SPLIT)
        weights = np.load(folder / WEIGHTS) if weighted else np.ones(len(codes))
    except (pa.ArrowException, ValueError, EOFError) as error:
        raise UserError(f"{folder}: {reason(error)}") from None
    whole = table.schema == SCHEMA and codes.dtype == np.int8 and codes.shape == (len(table),)
    whole = whole and len(table) == sealed.report.conversations and np.isin(codes, range(TRAIN, LEFT_OUT + 1)).all()
    whole = whole and weights.dtype == np.float64 and weights.shape == codes.shape
    if not (whole and ((weights > 0) & (weights <= MOST_WEIGHT)).all()):
        raise UserError(f"{folder}: its files are not of one data set")
    return Prepared(table, codes, weights, sealed.report.model_dump())
