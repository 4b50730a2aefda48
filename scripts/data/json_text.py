"""JSON Lines and JSON, one record at a time: a file is never in memory, nor is a list of records.

Records are the objects of a file of lines, the elements of a list, or those of a list under a key of one object,
`{"version": 1, "data": [...]}`; an object laid out over several lines may be one record, too.
"""

import codecs
import contextlib
import itertools
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from data.kinds import UTF8
from sources.messages_forms import is_message
from utils.errors import UserError
from utils.files import each_key_once

CHUNK_BYTES = 1 << 20
BLANK = re.compile(r"[ \t\r\n]*")
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what the surrogateescape handler makes of a byte that is not UTF-8
# A line that a layout over several lines can begin with: it ends between two tokens.
UNFINISHED = re.compile(r"[{\[,:]\s*\Z")
LINES_LOOKED_AT = 20
CUT_OFF = "the file is cut off"
Numbered = Iterator[tuple[int, Any]]


DECODER = json.JSONDecoder(object_pairs_hook=each_key_once)
TO_ITS_END = json.JSONDecoder(parse_int=str)  # of a value that is JSON, and that the other refuses


def read_lines(path: Path, file: IO[bytes]) -> Numbered:
    """(line, record); a UserError in the place of a line that is no JSON."""
    for number, raw in enumerate(file, start=1):
        try:
            line = raw.removeprefix(codecs.BOM_UTF8).decode()  # at the seams of files that were put together, too
            text = "" if line.isspace() else line.strip(" \t\r\n")
            record, end = DECODER.raw_decode(text) if text else (None, 0)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, BLANK.match(text, end).end())
        except UnicodeDecodeError as error:
            record = UserError(f"{path}, line {number}: not UTF-8 at byte {error.start + 1} of the line: {UTF8}")
        except json.JSONDecodeError as error:
            # A writer that was stopped leaves a last line without its newline.
            what = "not valid JSON" if raw.endswith(b"\n") else "cut off or not valid JSON"
            column = line.index(text) + min(error.pos, len(text)) + 1  # error.colno counts from the newline on
            record = UserError(f"{path}, line {number}: {what}: {error.msg} at column {column}")
        except RecursionError:
            record = UserError(f"{path}, line {number}: nested too deeply")
        except ValueError as error:  # a key twice, a whole number of more than 4,300 digits
            record = UserError(f"{path}, line {number}: {error}")
        if record is not None or text:
            yield number, record


def read_array(path: Path, file: IO[bytes]) -> Numbered:
    """(place, element) of a JSON array; a UserError in the place of one that is refused as `JsonText.value` says."""
    text = JsonText(path, file)
    yield from text.elements()
    text.expect_the_end("array")


def read_object(path: Path, file: IO[bytes], fields: Collection[str]) -> Numbered:
    """The records of an object that is not one of many lines: those of the list that it has under a key, or itself.

    `fields`: those of a record, in lower case. Values other than that list are read, and kept till the end.
    """
    text, holder, whole = JsonText(path, file), None, {}
    for key in text.read_keys():
        if text.next_character() != "[":
            whole[key] = _sound(text.value())
            continue
        elements, seen = text.elements(), []
        for element in elements:
            seen.append(element)
            if not isinstance(element[1], UserError):
                break
        if not seen or not _holds_records(key, seen[-1][1], fields):
            whole[key] = [_sound(value) for _, value in itertools.chain(seen, elements)]
            continue
        if holder is not None:
            raise text.fail(f"holds records under {holder!r} and under {key!r}: make a file of each")
        holder = key
        yield from seen
        yield from elements
    text.expect_the_end("object")
    if holder is None:
        yield 1, whole
    elif both := [key for key in whole if key.lower() in fields]:
        raise text.fail(f"has {both[0]!r}, as a record has, beside the records under {holder!r}: give each its own")


def _sound(value: Any) -> Any:
    if isinstance(value, UserError):
        raise value
    return value


def _holds_records(key: str, first: Any, fields: Collection[str]) -> bool:
    """Whether a list with this first element holds records under this key, and is not itself a field of one."""
    known = [name for name in first if name.lower() in fields] if isinstance(first, dict) else []
    if key.lower() not in fields:
        return bool(known)
    return any(isinstance(first[name], list) for name in known) and not is_message(first)  # which may have `images`


def is_one_object(head: str, whole: bool, fields: Collection[str]) -> bool:
    """Whether text that begins with `{` is to be read by `read_object`: it is no file of lines.

    Args:
        head: the beginning of the text, `whole` if it is all of it.
        fields: those of a record, in lower case.
    """
    line, _, rest = head.partition("\n")
    if rest or whole:
        try:
            only = TO_ITS_END.decode(line)
        except (ValueError, RecursionError):
            return bool(rest.strip()) and bool(UNFINISHED.search(line)) and not _lines_follow(rest)
        lists = {key: value[0] for key, value in only.items() if isinstance(value, list) and value}
        holders = [key for key, first in lists.items() if _holds_records(key, first, fields)]
        return not rest.strip() and bool(holders) and not any(key.lower() in fields for key in only.keys() - holders)
    # One line that is longer than what was looked at: of its keys, those that come before the first long list.
    scan, at = TO_ITS_END.raw_decode, head.index("{") + 1
    try:
        while True:
            key, at = scan(head, BLANK.match(head, at).end())
            at = BLANK.match(head, BLANK.match(head, at).end() + 1).end()
            if head.startswith("[", at):
                first, _ = scan(head, BLANK.match(head, at + 1).end())
                if _holds_records(key, first, fields):
                    return True
            if key.lower() in fields:
                return False
            _, at = scan(head, at)
            at = BLANK.match(head, at).end() + 1
    except (ValueError, RecursionError):
        return False


def _lines_follow(rest: str) -> bool:
    """Whether one of the next lines is a record of its own, so that the first is a damaged line.

    In a list that is laid out with a record a line each ends in a comma, or is followed by the end of the list.
    """
    lines = [line.strip() for line in rest.split("\n", LINES_LOOKED_AT)] + [""]
    for line, following in itertools.pairwise(lines):
        if line.startswith("{") and line.endswith("}") and following[:1] in ("", "{"):
            with contextlib.suppress(ValueError, RecursionError):
                TO_ITS_END.decode(line)
                return True
    return False


class JsonText:
    """A JSON text that is read from its start, a value at a time: holds one chunk and one value."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file = path, file
        self.number = 0  # of the element that is read
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._at, self._line, self._ended = "", 0, 1, False  # unread text, place, its first line, all seen
        self._bad_bytes = False  # seen anywhere yet

    def read_keys(self) -> Iterator[str]:
        """The keys of an object; after each, its value is to be read.  Raises: UserError for one that stands twice."""
        seen = set()
        self.next_character()
        self._at += 1  # the brace, seen by the caller
        if self._closed("}", first=True):
            return
        while True:
            if (found := self.next_character()) != '"':
                raise self.fail("not valid JSON: expected a key in double quotes" if found else CUT_OFF)
            key = _sound(self.value())
            if key in seen:
                raise self.fail(f"the key {key!r} is given twice")
            seen.add(key)
            if self.next_character() != ":":
                raise self.fail(f"not valid JSON: expected ':' after the key {key!r}")
            self._at += 1
            yield key
            if self._closed("}"):
                return

    def elements(self) -> Numbered:
        """(place from 1, value) of an array."""
        self.next_character()
        self._at += 1  # the bracket, seen by the caller
        self.number, first = 0, True
        while not self._closed("]", first):
            first = False
            self.number += 1
            if not self.next_character():
                raise self.fail(f"{CUT_OFF}: the array has no end")
            yield self.number, self.value()

    def _closed(self, bracket: str, first: bool = False) -> bool:
        """Move behind what ends the array or object, or behind the comma before what follows in it."""
        found = self.next_character()
        if found == bracket:
            self._at += 1
            return True
        if not first:
            if found and found != ",":
                raise self.fail(f"not valid JSON: expected ',' or {bracket!r} after the record")
            self._at += bool(found)
        return False

    def expect_the_end(self, of: str) -> None:
        if self.next_character():
            raise self.fail(f"more text after the end of the {of}")

    def next_character(self) -> str:
        """Move to the next character that is not blank; "" at the end of the file."""
        while True:
            self._at = BLANK.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(CHUNK_BYTES)

    def value(self) -> Any:
        """The value that begins here; a UserError, not raised, for one with bytes that are not UTF-8, a key twice in
        an object, or a whole number of more than 4,300 digits, behind which reading can go on."""
        size, scan, refused = CHUNK_BYTES, DECODER.raw_decode, None
        while True:
            try:
                value, end = scan(self._text, self._at)
                if end < len(self._text) or self._ended or self._text[end - 1] in '"}]':
                    break  # a number goes on in the next chunk
                self._more(size)
            except RecursionError:
                raise self.fail("nested too deeply") from None
            except json.JSONDecodeError as error:
                # Unfinished or wrong? What is unfinished fails at the end of the text, within the longest literal or
                # escape, or in a string that is open. Anything else is wrong now, without reading on.
                open_string = error.msg.startswith("Unterminated string")
                if not open_string and error.pos < len(self._text) - 16:
                    raise self.fail(f"not valid JSON: {error.msg}", error.pos) from None
                if self._ended:
                    cut_off = open_string or not self._text[error.pos :].strip()
                    what = CUT_OFF if cut_off else f"cut off or not valid JSON: {error.msg}"
                    raise self.fail(what, error.pos) from None
                self._more(size)
                size *= 2  # so that one long value is not scanned from its start for every chunk of it
            except ValueError as error:  # a key twice, a whole number of more than 4,300 digits
                scan, refused = TO_ITS_END.raw_decode, str(error)
        if refused:
            value = self.fail(refused)
        if self._bad_bytes and (escaped := ESCAPED_BYTE.search(self._text, self._at, end)):
            value = self.fail(f"not UTF-8: {UTF8}", escaped.start())
        self._at = end
        return value

    def fail(self, what: str, where: int | None = None) -> UserError:
        line = self._line + self._text.count("\n", 0, self._at if where is None else where)
        return UserError(f"{self.path}, record {self.number or 1}, line {line}: {what}")

    def _more(self, size: int) -> None:
        self._line += self._text.count("\n", 0, self._at)
        chunk = _read_up_to(self.file, size)
        self._ended = not chunk
        new = self._decode(chunk, self._ended)
        self._bad_bytes = self._bad_bytes or bool(not new.isascii() and ESCAPED_BYTE.search(new))
        self._text = self._text[self._at :] + new
        self._at = 0


def _read_up_to(file: IO[bytes], size: int) -> bytes:
    """`file.read(size)`, but first returns what comes before the end of data cut off; the next call raises it."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := file.read1(size)):
            parts.append(part)
            size -= len(part)
    except (EOFError, OSError):
        if not parts:
            raise
    return b"".join(parts)
