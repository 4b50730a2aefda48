"""The files of a checkpoint as its trainer_state/state.json lists them, compared with those that are there."""

import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.files import checksum
from utils.schemas import Schema, read_as

TRAINER_STATE = "trainer_state"


class File(Schema):
    """A file of a checkpoint, as it was written; in format 1 of state.json only its size."""

    model_config = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=0, le=2**63 - 1)]
    checksum: Annotated[str, Field(pattern="^xxh3_128:[0-9a-f]{32}$")] | None = None  # None in format 1

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, value: Any) -> Any:
        return {"bytes": value} if type(value) is int else value


class _Listing(Schema):
    """What of a state.json says which files there are."""

    files: dict[str, File]


def state_file(path: Path) -> Path:
    """The state.json of the checkpoint in a folder."""
    return path / TRAINER_STATE / "state.json"


def is_model_file(name: str) -> bool:
    """Whether a listed name is of the model: of all that is not in trainer_state/."""
    return PurePosixPath(name).parts[0] != TRAINER_STATE


def check_model_files(folder: Path, weights: bool) -> None:
    """See that the model in a folder is the one that a run saved there, where the folder says what that was: it is
    a checkpoint to go on from. Of a model without trainer_state/ nothing is known, so nothing is checked.

    A weight whose bits flipped on a disk is a number like any other, which nothing else would notice.

    Args:
        weights: those, too; else only the small files. A GB takes 0.1 s, and is in memory then for whoever loads it.

    Raises: UserError for the first file that is not there, cut off or changed, or a list that cannot be read.
    """
    if not os.path.lexists(file := state_file(folder)):
        return
    try:
        for name, listed in read_as(_Listing, file, "the state of a run").files.items():
            if is_model_file(name) and (weights or not name.endswith(".safetensors")):
                check_file(folder / name, listed)
    except UserError as problem:
        remedy = f"give another checkpoint, or remove its {TRAINER_STATE}/ if the change is meant"
        raise UserError(f"{problem}: {remedy}") from None


def check_file(path: Path, listed: File, contents: bool = True) -> None:
    """See that a file is there as it was written; without `contents` by its size and its header alone.

    Raises: UserError where it is not.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is not there, or no file")
        if path.stat().st_size != listed.bytes:
            raise UserError(f"{path} has {path.stat().st_size:,} of {listed.bytes:,} bytes")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # reads the header, which has to fit the file
                pass
        if contents and listed.checksum and checksum(path) != listed.checksum:
            raise UserError(f"{path} is changed since it was written: its checksum is another")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {error}") from error
