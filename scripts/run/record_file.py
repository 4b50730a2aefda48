"""OUTPUT_DIR/run.json on the disk: written whole or not at all, read back, and never with a secret in it.

`run/record.py` says what stands in it. Light, since `run/command_line.py` reads it for `--reproduce` before torch is
loaded.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from recipe.keys import Recipe
from recipe.load import checked_recipe
from utils.errors import UserError
from utils.files import read_json, write_whole

FORMAT = 1  # of the record; a newer one is refused
REDACTED = "[redacted]"

# Names whose values are secret, as options (--hub_token X), as keys of JSON, and as environment variables.
SECRET_NAME = re.compile(r"(key|token|password|passwd|secret)$", re.IGNORECASE)
# A commit is 40 hexadecimal digits too: one stays under these names and in the hub's cache (snapshots/<commit>/).
COMMIT_NAME = re.compile(r"(commit|revision)$")
WANDB_KEY_OR_COMMIT = re.compile(r"(?<!snapshots/)(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])", re.IGNORECASE)
SECRETS = [
    (re.compile(r"(hf|api_org)_[A-Za-z0-9]{20,}"), REDACTED),  # Hugging Face: a user's, an organization's
    (re.compile(r"wandb_v\d_\w{20,}"), REDACTED),
    (re.compile(r"(gh[opsu]|github_pat)_\w{20,}"), REDACTED),
    (re.compile(r"(?<=:/)(/?)[^\s/]+@"), rf"\1{REDACTED}@"),  # user:password@ of a URL, one slash left of it as a path
    (  # ...token=X within a text, as in a signed URL
        re.compile(
            r"((?:(?:api|access|secret|auth)[_-]?key|token|password|passwd|secret)[\"']?\s*[=:]\s*)[^\s,}&]+", re.I
        ),
        rf"\1{REDACTED}",
    ),
]


def redact_text(text: str, name: str = "") -> str:
    """The text with what looks like a secret in it replaced; all of it where its name says that it is one."""
    if SECRET_NAME.search(name):
        return REDACTED
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text if COMMIT_NAME.search(name) else WANDB_KEY_OR_COMMIT.sub(REDACTED, text)


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


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises: UserError when it is missing, cannot be read, is not a run's record, or is of a newer format than this.
    """
    record = read_json(path, "record of a run")
    number = record.get("format") if isinstance(record, dict) else None
    if not isinstance(number, int) or not isinstance(record.get("recipe"), dict):
        raise UserError(f"{path}: not a record of a run (sft.py writes one as OUTPUT_DIR/run.json)")
    if number > FORMAT:
        raise UserError(f"{path}: its format is {number}, newer than the {FORMAT} that these scripts know: update them")
    return record


def update_status(path: Path, status: Literal["interrupted", "finished", "failed"], **more: Any) -> None:
    """Say in a record how its run ended, and when; `more` are further keys, as its `report` at its end.

    Raises: UserError as `read_record` and `write_record`.
    """
    write_record({**read_record(path), "status": status, "ended": utc_now(), **redact(more)}, path)


def recorded_recipe(path: Path, overrides: Mapping[str, str]) -> Recipe:
    """The recipe of a record, for an output folder beside the recorded one.

    Raises: UserError as `read_record` and `checked_recipe`, or where the record leaves a secret out.
    """
    values = read_record(path)["recipe"]
    if "output_dir" in values:
        values["output_dir"] = f"{values['output_dir']}-reproduced"
    recipe = checked_recipe(values, {}, path, overrides)
    if left_out := next((line.strip() for line in recipe.to_yaml().splitlines() if REDACTED in line), None):
        raise UserError(f"{path}: {left_out}: left out of the record, as it looks like a secret: give it as an option")
    return recipe
