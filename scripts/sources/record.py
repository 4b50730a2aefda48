"""One record of a data file: its fields, checked, and its place, so that an error can name it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class Record:
    """One record of a data file with its place, so that an error can name it."""

    values: dict[str, Any]
    path: Path
    number: int  # in its file
    index: int  # over all files, from 1

    def get(self, name: str, kind: type = str, nullable: bool = False) -> Any:
        return required_field(self.values, name, kind, self.path, self.number, nullable=nullable)

    def inside(self, values: Any, where: str, name: str, kind: type = str, nullable: bool = False) -> Any:
        """A field of something within the record, e.g. of one message of a tree."""
        if not isinstance(values, dict):
            raise self.error(f"an entry of {where!r} is not an object")
        return required_field(values, name, kind, self.path, self.number, where, nullable)

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}, record {self.number}: {what}")


def kind_of(value: Any) -> str:
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
        raise UserError(f"{path}, record {number}: field {full!r} is {kind_of(value)}, not {kind_of(kind())}")
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}, record {number}: field {full!r} holds half of a surrogate pair") from None
    return value
