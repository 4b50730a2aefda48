"""What data files hold, one record at a time: `data/kinds.py` lists the kinds.

A file is what it begins with, whatever its name says: downloads and exports lose endings, and get wrong ones. Only
CSV, which begins with anything, goes by its name. Records are streamed, so memory stays flat whatever the file's size.
Whatever is wrong with a file is a `UserError` of one line that names the file and the line or record; under
`on_bad_records: skip` it is reported and passed over.
"""

import codecs
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.json_text import is_one_object, read_array, read_lines, read_object
from data.kinds import (
    ARROW_FILE,
    ARROW_STREAM,
    COMPRESSED,
    PARQUET,
    READ,
    compression_of,
    open_unpacked,
    refuse_other_kinds,
)
from data.tables import count_rows, read_arrow, read_csv, read_parquet
from sources.source import kind_of
from utils.errors import UserError

LOOKED_AT = 1 << 18  # bytes of a text, to tell how it is laid out
PACKED_ENDINGS = ("", ".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
TABLES = tuple(ending + packed for ending in (".csv", ".tsv") for packed in PACKED_ENDINGS)
JSON = tuple(ending + packed for ending in (".json", ".jsonl", ".ndjson") for packed in PACKED_ENDINGS)


def read_records(
    path: Path, skip: Callable[[UserError], None] | None = None, fields: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the records of a file of any kind that is read.

    Text that begins with `[` is a JSON array, with `{` JSON Lines or one object; else it is CSV if its name says so.

    Args:
        fields: those that are used, in lower case; None for all. Another column of parquet or Arrow is not read, and
            None in each record. They also tell what a record is in `{"data": [...]}`.
        skip: called with what is wrong with a record, in place of raising it. Reading then goes on after a bad line of
            JSON Lines or CSV, bad bytes, a key twice or a row that cannot be read; a broken array, a parquet or Arrow
            file that is no such file further on, or data cut off end there.
    Yields: (number from 1, record); the number is the line in JSON Lines, the place in the array or table elsewhere.
    Raises: UserError when the file is missing, empty, cut off, not UTF-8, of no kind that is read, or holds anything
        but objects; with `skip` only when it cannot be read, is damaged where it is unpacked, or no record is whole.
    """
    number, whole = 0, False
    problem = ended = None  # the last one that was skipped; what ended the reading
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        compression = compression_of(head)
        for number, record in _read(path, head, fields):
            if isinstance(record, dict):
                whole = True
                yield number, record
                continue
            if not isinstance(record, UserError):
                record = UserError(f"{path}, record {number}: not an object but {kind_of(record)}")
            if not skip:
                raise record
            problem = record
            skip(problem)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "errno", None):
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not isinstance(error, EOFError) and "Truncated" not in str(error):
            # never skipped: it may have garbled what was read before it showed
            raise UserError(f"{path}: damaged {compression} data after record {number}: {error}") from None
        ended = UserError(f"{path}: cut off: the {compression} data ends in the middle, after record {number}")
    except UserError as error:
        ended = error
    if ended and not (skip and whole):
        raise ended from None
    if ended:
        skip(ended)
    if not whole:
        raise problem or UserError(f"{path}: holds no records")


def count_records(
    path: Path, skip: Callable[[UserError], None] | None = None, fields: Collection[str] | None = None
) -> int:
    """How many `read_records` would give; by what a parquet file says of itself, else by reading it, errors and all."""
    with suppress(OSError), open(path, "rb") as file:  # what cannot be opened `read_records` says
        if file.read(4) == PARQUET:
            return count_rows(path)
    return sum(1 for _ in read_records(path, skip, fields))


def _read(path: Path, head: bytes, fields: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith(PARQUET):
        return read_parquet(path, fields)
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return read_arrow(path, head, fields)
    if not head.startswith(tuple(COMPRESSED)):
        refuse_other_kinds(path, head)
    for ending, kind, start in ((".parquet", "parquet", "PAR1"), (".arrow", "Arrow", "ARROW1 or four bytes FF")):
        if path.suffix == ending:
            raise UserError(
                f"{path}: is no {kind} file, which begins with {start}: download it anew, or name it .jsonl"
            )
    return _read_text(path, compression_of(head), fields)


def _read_text(path: Path, compression: str | None, fields: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    head, whole = _head(path, compression)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not start:
        raise UserError(f"{path}: the file is empty")
    if compression:
        refuse_other_kinds(path, head, compression)
    name = path.name.lower()
    with open_unpacked(path, compression) as file:
        if start.startswith(b"["):
            yield from read_array(path, file)
        elif start.startswith(b"{") and is_one_object(start.decode(errors="replace"), whole, fields or ()):
            yield from read_object(path, file, fields or ())
        elif not start.startswith(b"{") and name.endswith(TABLES):
            yield from read_csv(path, file)
        elif start.startswith(b"{") or name.endswith(JSON) or (not path.suffix and b"\n{" in start):
            yield from read_lines(path, file)
        else:
            raise UserError(
                f"{path}: is of no kind that is read: no JSON, nor by its name CSV: if it is CSV, give it a name that "
                f"ends in .csv (what is read: {READ})"
            )


def _head(path: Path, compression: str | None) -> tuple[bytes, bool]:
    """The first bytes of a text, and whether they are all of it."""
    parts, size = [], 0
    with open_unpacked(path, compression) as file:
        try:
            while size < LOOKED_AT:
                if not (part := file.read1(LOOKED_AT - size)):
                    return b"".join(parts), True
                parts.append(part)
                size += len(part)
        except (EOFError, OSError, zlib.error, lzma.LZMAError):
            if not parts:
                raise
    return b"".join(parts), False
