"""Data files: where they are (recipe path, cache_dir, Hugging Face hub) and what they hold, one record at a time.

Formats: JSON Lines and a JSON array of objects, each plain or gzipped, and parquet. Records are streamed, so memory
stays flat whatever the file's size. Whatever is wrong with a file is a `UserError` of one line that names the file and
the line or record. Nothing from the hub is ever executed: only data files are downloaded.
"""

import codecs
import fnmatch
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
CHUNK_BYTES = 1 << 20
BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class HubSource:
    """Where a data set lives on the hub: `files` are fnmatch patterns within the data set repository `repo`."""

    repo: str
    files: tuple[str, ...]
    hint: str = ""  # what to try when the file is not found, put at the end of the error message


# ---- Finding ----


def find_data_file(
    dataset: str, input_file_path: str | None, cache_dir: Path, revision: str | None, hub: HubSource
) -> list[Path]:
    """The files of a data set: a local one, or downloaded to the hub's default cache folder (works offline from it).

    A file named in the recipe is looked up as given (relative to the working directory), under `cache_dir`, then under
    that name in the hub repository. Without one: `cache_dir/<default file>`, `cache_dir/<dataset>.jsonl` and the other
    endings of `LOCAL_SUFFIXES`, then the default files of the hub repository.

    Returns: one or more existing paths, sorted; only hub data in several parts has more than one.
    Raises: UserError naming the data set, what was looked for and each place.
    """
    local = local_candidates(dataset, input_file_path, cache_dir, hub)
    if found := next((path for path in local if os.path.isfile(path)), None):
        return [found]
    places = list(map(str, local))
    if patterns := hub_patterns(input_file_path, hub):
        files, problem = fetch_from_hub(hub.repo, patterns, revision, local_only=False)
        if files:
            return files
        places.append(f"the hub's {hub.repo}" + (f" at revision {revision}" if revision else "") + f" ({problem})")
    wanted = input_file_path or " or ".join(hub.files)
    hint = f"; {hub.hint}" if hub.hint else ""
    raise UserError(f"data set {dataset}: {wanted} not found; looked at {', '.join(places)}{hint}")


def locate_data_file(
    dataset: str, input_file_path: str | None, cache_dir: Path, revision: str | None, hub: HubSource
) -> list[Path] | None:
    """`find_data_file` without the network: the local or already cached paths, or None when a download is needed."""
    for path in local_candidates(dataset, input_file_path, cache_dir, hub):
        if os.path.isfile(path):
            return [path]
    patterns = hub_patterns(input_file_path, hub)
    return (fetch_from_hub(hub.repo, patterns, revision, local_only=True)[0] or None) if patterns else None


def local_candidates(dataset: str, input_file_path: str | None, cache_dir: Path, hub: HubSource) -> list[Path]:
    """Local paths in the order they are tried; of the hub's names only exact ones, `train-*` could be any data set."""
    if input_file_path:
        given = Path(os.path.expanduser(input_file_path))
        return [given] if given.is_absolute() else [given, Path(cache_dir) / given]
    names = [name for name in hub.files if not glob.has_magic(name)] + [dataset + suffix for suffix in LOCAL_SUFFIXES]
    return [Path(cache_dir) / name for name in names]


def hub_patterns(input_file_path: str | None, hub: HubSource) -> list[str]:
    """What to look for in the hub repository; nothing for an absolute path, which can only mean this machine's file."""
    if not input_file_path:
        return list(hub.files)
    given = Path(os.path.expanduser(input_file_path))
    return [] if given.is_absolute() else [glob.escape(name) for name in dict.fromkeys([given.as_posix(), given.name])]


def fetch_from_hub(repo: str, patterns: list[str], revision: str | None, local_only: bool) -> tuple[list[Path], str]:
    """Download the files matching the patterns; returns (sorted paths, why there are none)."""
    from huggingface_hub import snapshot_download  # here: importing it takes a second that --help can do without

    where = {"repo_type": "dataset", "revision": revision, "local_files_only": local_only}
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, **where))
    except Exception as error:  # its own, httpx's and the system's errors: all mean "not from the hub"
        reason = (str(error).strip() or "no details").splitlines()[0]
        return [], f"could not be reached: {type(error).__name__}: {reason}"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for pattern in patterns:
        if matching := sorted(name for name in names if fnmatch.fnmatchcase(name, pattern)):
            return [folder / name for name in matching], ""
    return [], "no such file there"


# ---- Reading ----


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream the records of a .jsonl, .json or .parquet file, the first two possibly gzipped.

    Text is a JSON array if its first character that is not blank is `[`, else JSON Lines, whatever the name says.

    Yields: (number from 1, record); the number is the line in JSON Lines, the place in the array or table elsewhere.
    Raises: UserError when the file is missing, empty, cut off, not UTF-8, not JSON, or holds anything but objects.
    """
    path = Path(path)
    count = 0
    try:
        for count, record in _read_parquet(path) if path.suffix == ".parquet" else _read_text(path):
            if not isinstance(record, dict):
                raise UserError(f"{path}, record {count}: not an object but {_kind(record)}")
            yield count, record
    except EOFError:
        raise UserError(f"{path}: cut off: the gzip data ends in the middle, after record {count}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip data after record {count}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not count:
        raise UserError(f"{path}: holds no records")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except pyarrow.ArrowException as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not readable as parquet after record {number}: {message}") from None


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        magic = file.read(2)
    # By its content too: a gzipped file that lost its ending is common among browser downloads.
    return gzip.open(path, "rb") if path.suffix == ".gz" or magic == b"\x1f\x8b" else open(path, "rb")


def _read_text(path: Path) -> Iterator[tuple[int, Any]]:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    with _open(path) as file:
        first = b""
        while not first:
            if not (chunk := file.read(4096)):
                raise UserError(f"{path}: the file is empty")
            first = chunk.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    with _open(path) as file:
        yield from _read_array(path, file) if first == b"[" else _read_lines(path, file)


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            if line.strip():
                yield number, json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8 at byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            # A writer that was stopped leaves a last line without its newline.
            what = "not valid JSON" if raw.endswith(b"\n") else "cut off or not valid JSON"
            raise UserError(f"{path}, line {number}: {what}: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise UserError(f"{path}, line {number}: nested too deeply") from None


def _read_array(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """A JSON array, one element at a time: holds one chunk and one element, never the file."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    scan = json.JSONDecoder().raw_decode
    text, at, line, ended = "", 0, 1, False  # unread text, place in it, line number of its start, end of file seen

    def more(size: int) -> None:
        nonlocal text, at, line, ended
        line += text.count("\n", 0, at)
        chunk = file.read(size)
        ended = not chunk
        try:
            text = text[at:] + decode(chunk, ended)
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 at or after line {line + text.count(chr(10), at)}") from None
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
                record, at = scan(text, at)
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
        yield number, record


# ---- Fields ----


def _kind(value: Any) -> str:
    names = {str: "a string", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def required_field(
    record: dict[str, Any], name: str, kind: type, path: Path, number: int, inside: str = "", nullable: bool = False
) -> Any:
    """`record[name]`, checked to be a `kind` (str, dict, list, bool).

    Args:
        inside: what the record is within its file's record, e.g. "METADATA", for the message.
        nullable: let null through, as None; the field must be there all the same.
    Raises: UserError naming file, record number and field, and the fields that are there; also for a string with half
        of a surrogate pair (`\\ud83d` alone), which JSON can write but no UTF-8 text, hence no tokenizer, can hold.
    """
    full = f"{inside}.{name}" if inside else name
    if name not in record:
        there = ", ".join(map(str, record)) or "none"
        raise UserError(f"{path}, record {number}: no field {full!r}; fields there: {there}")
    value = record[name]
    if value is None and nullable:
        return None
    if not isinstance(value, kind):
        raise UserError(f"{path}, record {number}: field {full!r} is {_kind(value)}, not {_kind(kind())}")
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}, record {number}: field {full!r} holds half of a surrogate pair") from None
    return value
