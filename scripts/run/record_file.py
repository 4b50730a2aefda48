"""OUTPUT_DIR/run.json on the disk: written whole or not at all, read back, and never with a secret in it.

`run/record.py` says what stands in it. Light, since `run/command_line.py` reads it for `--reproduce` before torch is
loaded.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from recipe.keys import Recipe
from recipe.load import checked_recipe
from recipe.secrets import REDACTED, redact_text
from utils.errors import UserError
from utils.files import read_json, write_whole
from utils.schemas import Schema, checked

FORMAT = 1  # of the record; a newer one is refused
Ending = Literal["interrupted", "finished", "failed", "stalled"]  # how a start has ended, of run.json's `status`
MOST_DEPTH = 20  # of mappings and lists within each other; a run's has 5, Python's own limit is at 1,000


def redact(value: Any, name: str = "") -> Any:
    """What can be written as JSON: secrets replaced throughout, paths as text, and no number that is not finite."""
    if isinstance(value, dict):
        return {redact_text(str(key)): redact(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact(entry, name) for entry in value]
    if isinstance(value, str | os.PathLike):
        return redact_text(os.fspath(value), name)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def utc_now() -> str:
    """ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a record whole, or leave what was there before as it was and raise a UserError."""
    try:
        write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")  # ASCII, since a path need not be UTF-8
    except OSError as error:
        raise UserError(f"{path}: cannot write the record of this run: {error.strerror}") from error


class Record(Schema):
    """What stands in run.json, as far as it is read back; `run/record.py` has more of it."""

    format: Annotated[int, Field(ge=1)]
    status: Literal["running", Ending]
    recipe: dict[str, Any]
    starts: list[dict[str, Any]] | None = None
    num_processes: Annotated[int, Field(ge=1, le=2**20)]
    data: dict[str, dict[str, Any]] | None = None
    model: dict[str, Any] | None = None
    deepspeed_config: dict[str, Any] | None = None
    dtype: str | None = None
    packages: dict[str, str] | None = None
    git: dict[str, Any] | None = None
    hardware: dict[str, Any] | None = None


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises: UserError when it is missing, cannot be read, is not a run's record, or is of a newer format than this.
    """
    what = "record of a run"
    record = read_json(path, what)
    number = record.get("format") if isinstance(record, dict) else None
    if type(number) is int and number > FORMAT:
        raise UserError(f"{path}: its format is {number}, newer than the {FORMAT} that these scripts know: update them")
    checked(Record, record, path, f"a {what} (sft.py writes one as OUTPUT_DIR/run.json)")
    if (depth := _depth(record)) > MOST_DEPTH:
        raise UserError(f"{path}: not a {what}: nested {depth} deep")
    return record


def _depth(value: Any) -> int:
    depth, layer = 0, [value]
    while layer := [inner for outer in layer for inner in _inside(outer)]:
        depth += 1
    return depth


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def without_former_keys(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe that a run has written down, without the keys that recipes no longer have."""
    return {key: value for key, value in values.items() if key in Recipe.model_fields}


def recorded_recipe(path: Path, overrides: Mapping[str, str]) -> Recipe:
    """The recipe of a record, for an output folder beside the recorded one.

    Raises: UserError as `read_record` and `checked_recipe`, or where the record leaves a secret out.
    """
    values = read_record(path)["recipe"]
    if "output_dir" in values:
        values["output_dir"] = f"{values['output_dir']}-reproduced"
    recipe = checked_recipe(values, {}, path, overrides, for_a_run=True)
    if left_out := next((line.strip() for line in recipe.to_yaml().splitlines() if REDACTED in line), None):
        raise UserError(f"{path}: {left_out}: left out of the record, as it looks like a secret: give it as an option")
    return recipe
