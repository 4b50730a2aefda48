"""What data files hold, one record at a time: JSON Lines and JSON arrays, each plain or gzipped, and parquet.

A file is what it begins with, whatever its name says: downloads and exports lose endings, and get wrong ones. Records
are streamed, so memory stays flat whatever the file's size. Whatever is wrong with a file is a `UserError` of one line
that names the file and the line or record; under `on_bad_records: skip` it is reported and passed over.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any

from data.kinds import GZIP, PARQUET, refuse_other_kinds
from sources.source import kind_of
from utils.errors import UserError, reason

CHUNK_BYTES = 1 << 20
BLANK = re.compile(r"[ \t\r\n]*")
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what the surrogateescape handler makes of a byte that is not UTF-8

NOT_IN_JSON = ("TIMESTAMP", "DATE", "TIME", "DECIMAL", "INTERVAL", "DURATION")  # parquet's types that no source uses


def read_records(
    path: Path, skip: Callable[[UserError], None] | None = None, fields: Collection[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the records of a file of JSON or parquet, the former possibly gzipped.

    Text is a JSON array if its first character that is not blank is `[`, else JSON Lines.

    Args:
        fields: those that are used, in lower case; None for all. Another column of a parquet file is not read, and
            None in each record.
        skip: called with what is wrong with a record, in place of raising it. Reading then goes on after a bad line of
            JSON Lines or bad bytes; a broken array or parquet file or a cut-off gzip ends there.
    Yields: (number from 1, record); the number is the line in JSON Lines, the place in the array or table elsewhere.
    Raises: UserError when the file is missing, empty, cut off, not UTF-8, not JSON, or holds anything but objects; with
        `skip` only when it cannot be read, is damaged gzip, or no record is whole.
    """
    number, whole = 0, False
    problem = ended = None  # the last one that was skipped; what ended the reading
    try:
        for number, record in _read(path, fields):
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
    except EOFError:
        ended = UserError(f"{path}: cut off: the gzip data ends in the middle, after record {number}")
    except (gzip.BadGzipFile, zlib.error) as error:  # never skipped: it may have garbled what was read before it showed
        raise UserError(f"{path}: damaged gzip data after record {number}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UserError as error:
        ended = error
    if ended and not (skip and whole):
        raise ended from None
    if ended:
        skip(ended)
    if not whole:
        raise problem or UserError(f"{path}: holds no records")


def _read(path: Path, fields: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path}: the file is empty")
    if head.startswith(PARQUET):
        yield from _read_parquet(path, fields)
        return
    refuse_other_kinds(path, head)
    if path.suffix == ".parquet":
        raise UserError(f"{path}: is no parquet file, which begins with PAR1: download it anew, or name it .jsonl")
    with gzip.open(path, "rb") if head.startswith(GZIP) else open(path, "rb") as file:
        yield from _read_text(path, file)


def _read_parquet(path: Path, fields: Collection[str] | None) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            used = [name for name in names if fields is None or name.lower() in fields]
            if repeated := [name for name in used if used.count(name) > 1]:
                raise UserError(f"{path}: has the column {repeated[0]!r} twice")
            unread = dict.fromkeys(names)
            for batch in file.iter_batches(batch_size=1000, columns=_columns(file.schema, fields)):
                for record in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    number += 1
                    yield number, unread | record
    except UserError:
        raise
    except Exception as error:  # pyarrow's own, and whatever Python makes of its values: dates after the year 9999, ...
        raise UserError(f"{path}: not readable as parquet after record {number}: {reason(error)}") from None


def _columns(schema: Any, fields: Collection[str] | None) -> list[str]:
    """The paths of the leaves that are read; not those of times and decimals within lists and structs, of which some
    values are none of Python's."""
    paths = []
    for leaf in map(schema.column, range(len(schema))):
        top, *inner = leaf.path.split(".")
        unused = inner and (leaf.logical_type.type in NOT_IN_JSON or leaf.physical_type == "INT96")
        if fields is None or (top.lower() in fields and not unused):
            paths.append(leaf.path)
    return paths


def _read_text(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    first = b""
    while not first:
        if not (chunk := file.read1(4096)):
            raise UserError(f"{path}: the file is empty")
        if file.tell() == len(chunk):
            refuse_other_kinds(path, chunk, within_gzip=isinstance(file, gzip.GzipFile))
        first = chunk.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    yield from _read_array(path, file) if first == b"[" else _read_lines(path, file)


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Yields a UserError in the place of a line that is no record."""
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.removeprefix(codecs.BOM_UTF8).decode()  # at the seams of files that were put together, too
            record = json.loads(line) if line.strip() else None
        except UnicodeDecodeError as error:
            record = UserError(f"{path}, line {number}: not UTF-8 at byte {error.start + 1} of the line")
        except json.JSONDecodeError as error:
            # A writer that was stopped leaves a last line without its newline.
            what = "not valid JSON" if raw.endswith(b"\n") else "cut off or not valid JSON"
            record = UserError(f"{path}, line {number}: {what}: {error.msg} at column {error.colno}")
        except RecursionError:
            record = UserError(f"{path}, line {number}: nested too deeply")
        except ValueError as error:  # a whole number of more than 4,300 digits
            record = UserError(f"{path}, line {number}: {error}")
        if record is not None or line.strip():
            yield number, record


def _read_array(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """A JSON array, one element at a time: holds one chunk and one element, never the file.

    Yields a UserError in the place of an element with bytes that are not UTF-8.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    scan = json.JSONDecoder().raw_decode
    text, at, line, ended = "", 0, 1, False  # unread text, place in it, line number of its start, end of file seen
    bad_bytes = False  # seen anywhere yet

    def more(size: int) -> None:
        nonlocal text, at, line, ended, bad_bytes
        line += text.count("\n", 0, at)
        chunk = _read_up_to(file, size)
        ended = not chunk
        new = decode(chunk, ended)
        bad_bytes = bad_bytes or bool(not new.isascii() and ESCAPED_BYTE.search(new))
        text = text[at:] + new
        at = 0

    def next_character() -> str:
        """Move to the next character that is not blank; "" at the end of the file."""
        nonlocal at
        while True:
            at = BLANK.match(text, at).end()
            if at < len(text) or ended:
                return text[at : at + 1]
            more(CHUNK_BYTES)

    def fail(what: str, where: int) -> UserError:
        return UserError(f"{path}, record {number}, line {line + text.count(chr(10), 0, where)}: {what}")

    number = 0
    next_character()
    at += 1  # the opening bracket, seen by the caller
    while True:
        found = next_character()
        if found == "]":
            at += 1
            if next_character():
                raise fail("more text after the end of the array", at)
            return
        if number:
            if found and found != ",":
                raise fail("not valid JSON: expected ',' or ']' after the record", at)
            at += bool(found)
            found = next_character()
        number += 1
        if not found:
            raise fail("the file is cut off: the array has no end", at)
        size = CHUNK_BYTES
        while True:
            try:
                record, end = scan(text, at)
                break
            except RecursionError:
                raise fail("nested too deeply", at) from None
            except json.JSONDecodeError as error:
                # Unfinished or wrong? What is unfinished fails at the end of the text, within the longest literal or
                # escape, or in a string that is open. Anything else is wrong now, without reading on.
                open_string = error.msg.startswith("Unterminated string")
                if not open_string and error.pos < len(text) - 16:
                    raise fail(f"not valid JSON: {error.msg}", error.pos) from None
                if ended:
                    cut_off = open_string or not text[error.pos :].strip()
                    what = "the file is cut off" if cut_off else f"cut off or not valid JSON: {error.msg}"
                    raise fail(what, error.pos) from None
                more(size)
                size *= 2  # so that one long element is not scanned from its start for every chunk of it
            except ValueError as error:  # a whole number of more than 4,300 digits
                raise fail(str(error), at) from None
        if bad_bytes and (escaped := ESCAPED_BYTE.search(text, at, end)):
            record = fail("not UTF-8", escaped.start())
        at = end
        yield number, record


def _read_up_to(file: IO[bytes], size: int) -> bytes:
    """`file.read(size)`, but first returns what comes before the end of a cut-off gzip; the next call raises it."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := file.read1(size)):
            parts.append(part)
            size -= len(part)
    except EOFError:
        if not parts:
            raise
    return b"".join(parts)
