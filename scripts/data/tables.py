"""CSV, parquet and Arrow, one record at a time, with the columns that are used."""

import csv
import io
import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from data.json_text import ESCAPED_BYTE
from data.kinds import ARROW_FILE, UTF8
from utils.errors import UserError, reason

ROWS_AT_A_TIME = 1000
BUFFER_BYTES = 1 << 20  # of a parquet column, so that a row group of any size is read in flat memory
LONGEST_CELL = 1 << 24  # characters; more is a quote that was left open
MOST_HEADER_LINES = 100
DELIMITERS = "\t,;|"
QUOTED = re.compile(r'"[^"]*(?:"|\Z)')
NOT_IN_JSON = ("TIMESTAMP", "DATE", "TIME", "INTERVAL", "DURATION")  # parquet's types that no source uses


def read_csv(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(place from 1, record) of a table in text, whose first row names the columns; a UserError in place of a bad row.

    All values are text as it stands there, but those of `weight`: "NA" and "007" are not a missing value and 7. The
    delimiter is that of tab, comma, semicolon and bar which the first line has most of outside quotes.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = [text.readline()]
    while "".join(first).count('"') % 2 and len(first) < MOST_HEADER_LINES and (line := text.readline()):
        first.append(line)  # of a name that holds a newline
    csv.field_size_limit(LONGEST_CELL)
    delimiter = max(DELIMITERS, key=QUOTED.sub("", "".join(first)).count)
    rows, number = csv.reader(itertools.chain(first, text), delimiter=delimiter, strict=True), 0
    try:
        header = [name.strip() for name in next(rows)]
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not valid CSV: {error}") from None
    if repeated := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{path}: has the column {repeated[0]!r} twice")
    weights = [(place, name) for place, name in enumerate(header) if name.lower() == "weight"]
    while True:
        number += 1
        problem = None
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"not valid CSV: {error}"
        else:
            if not row:
                number -= 1
                continue
            if len(row) != len(header):
                problem = f"has {len(row)} cells, the first line {len(header)}: is a quote missing around one?"
            elif not (joined := "".join(row)).isascii() and ESCAPED_BYTE.search(joined):
                problem = f"not UTF-8: {UTF8}"
        if problem:
            yield number, UserError(f"{path}, record {number}, line {rows.line_num}: {problem}")
        else:
            yield number, dict(zip(header, row, strict=True)) | {name: _number(row[place]) for place, name in weights}


def _number(text: str) -> float | str | None:
    """Of the column `weight`: a blank cell is none; what is no number stays text, to be refused."""
    try:
        return (text if "_" in text else float(text)) if text.strip() else None  # Python takes 1_0 for 10
    except ValueError:
        return text


def read_parquet(path: Path, fields: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    """(place from 1, record) of a parquet file, as `records.read_records` says."""
    import pyarrow.parquet

    number = 0
    try:
        # pre_buffer, pyarrow's default by now, would keep in memory all of the file that has been read.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            unread, maps = _unread(path, file.schema_arrow.names, fields), _maps(file.schema_arrow)
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=_leaves(file, fields)):
                for record in _rows(path, batch, maps, number):
                    number += 1
                    yield number, record if isinstance(record, UserError) else unread | record
    except UserError:
        raise
    except Exception as error:  # pyarrow's own
        raise UserError(f"{path}: not readable as parquet after record {number}: {reason(error)}") from None


def read_arrow(path: Path, head: bytes, fields: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    """(place from 1, record) of an Arrow file or stream, memory-mapped, as `records.read_records` says."""
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as file:
            if head.startswith(ARROW_FILE):
                opened = pa.ipc.open_file(file)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            else:
                batches = opened = pa.ipc.open_stream(file)
            unread, maps = _unread(path, opened.schema.names, fields), _maps(opened.schema)
            used = [name for name in unread if fields is None or name.lower() in fields]
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
                    part = batch.slice(start, ROWS_AT_A_TIME).select(used)
                    for record in _rows(path, part, maps, number):
                        number += 1
                        yield number, record if isinstance(record, UserError) else unread | record
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not readable as Arrow after record {number}: {reason(error)}") from None


def _rows(path: Path, batch: Any, maps: str | None, before: int) -> list[dict[str, Any] | UserError]:
    """The records of a batch, which `before` come before; a UserError in place of one that Python's values cannot be:
    a map with a key twice, a date after the year 9999."""
    if not batch.num_columns:
        return [{}] * batch.num_rows
    try:
        return batch.to_pylist(maps_as_pydicts=maps)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow's own, and whatever Python makes of its values
        if batch.num_rows == 1:
            return [UserError(f"{path}, record {before + 1}: cannot be read: {reason(error)}")]
    return [row for place in range(batch.num_rows) for row in _rows(path, batch.slice(place, 1), maps, before + place)]


def count_rows(path: Path) -> int:
    """Those of a parquet file, by what is written at its end."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except Exception as error:
        raise UserError(f"{path}: not readable as parquet: {reason(error)}") from None


def _unread(path: Path, names: list[str], fields: Collection[str] | None) -> dict[str, None]:
    """A record with null in every column; UserError where one that is used is there twice."""
    used = [name for name in names if fields is None or name.lower() in fields]
    if repeated := [name for name in used if used.count(name) > 1]:
        raise UserError(f"{path}: has the column {repeated[0]!r} twice")
    return dict.fromkeys(names)


def _maps(schema: Any) -> str | None:
    """How maps, as Spark writes messages, become objects, not pairs; None without any, which is twice as fast."""
    return "strict" if "map<" in str(schema) else None


def _leaves(file: Any, fields: Collection[str] | None) -> list[str]:
    """The paths of the leaves that are read; not those of times within lists and structs, of which some values are
    none of Python's, nor the bytes of pictures and sounds (`datasets` keeps them so, beside their path)."""
    if fields is None:
        return file.schema_arrow.names
    # A leaf's path does not tell the column "a.b" from the field b of the column "a"; the Arrow schema does.
    columns = [name for name in file.schema_arrow.names if name.lower() in fields]
    paths = []
    for leaf in map(file.schema.column, range(len(file.schema))):
        kind, stored = leaf.logical_type.type, leaf.physical_type
        unused = kind in NOT_IN_JSON or stored == "INT96" or leaf.path.endswith(".bytes")
        if leaf.path in columns or (not unused and leaf.path.startswith(tuple(f"{name}." for name in columns))):
            paths.append(leaf.path)
    return paths
