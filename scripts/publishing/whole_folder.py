"""A folder that is written whole or not at all: under another name beside the target's, until all of it is there."""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from publishing.weights import decimal_bytes
from run.saving import is_disk_error
from utils.errors import UserError
from utils.files import UNFINISHED, flush, remove_tree
from utils.launch import say

SLACK = 20_000_000  # bytes for what stands beside the weights: tokenizers take up to 17 MB (Llama 3)


def check_target(out: Path, source: Path) -> Path:
    """Where to write: `out`, links resolved. A folder is made there and removed again: nothing is changed.

    Args:
        source: the folder that is read.

    Raises: UserError where something is there already, it lies within `source` or around it, or it cannot be written
        there.
    """
    real, read = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if real == read or read in real.parents or real in read.parents:
        raise UserError(f"{out}: is {source}, lies within it or holds it: give a folder elsewhere")
    if os.path.lexists(real) and not real.is_dir():
        raise UserError(f"{out}: is no folder: give the name of a new one")
    nearest = next(path for path in (real, *real.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot write there: {nearest} is not a folder that can be written to")
    if real == nearest and (held := sorted(os.listdir(real))):
        raise UserError(f"{out}: holds {', '.join(held[:4])}{', ...' * (len(held) > 4)} already: give a new folder")
    if real == nearest and not os.access(real.parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot write there: {real.parent} is not a folder that can be written to")
    work = _work_of(real)
    made = [path for path in (work, *work.parents) if not os.path.lexists(path)]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # below /proc are no folders, and a name can be too long
        raise UserError(f"{out}: cannot write there: {error.strerror}") from error
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
    return real


def check_room(out: Path, size: int) -> None:
    """UserError where the disk that `out` will lie on has no room for weights of so many bytes."""
    real = Path(os.path.realpath(out))
    free = shutil.disk_usage(next(path for path in (real, *real.parents) if os.path.lexists(path))).free
    if size + SLACK > free:
        raise UserError(
            f"{out}: takes {decimal_bytes(size + SLACK)}, {decimal_bytes(free)} are free there: "
            "give a smaller --dtype, or a folder on another disk"
        )


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to be filled, which takes its name when the block ends; where the block fails, is
    interrupted or ends the process, it is removed. What a killed process has left of an earlier try goes first.

    Raises: UserError where it cannot be written.
    """
    work = _work_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        work.mkdir()
        yield work
        flush(work, *work.rglob("*"))
        os.rename(work, target)
        flush(target.parent)
    except Exception as error:
        if not is_disk_error(error):
            raise
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{target}: could not be written: {problem}; nothing is left of it") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _work_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}{UNFINISHED}")


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{UNFINISHED}"):
        number = re.fullmatch(rf"\.{re.escape(target.name)}\.(\d+){re.escape(UNFINISHED)}", path.name)
        # In a container a killed process and the next one often have one number.
        if number and (int(number[1]) == os.getpid() or not psutil.pid_exists(int(number[1]))):
            remove_tree(path)
            say(f"removed {path.name}, which an interrupted start had not finished")
