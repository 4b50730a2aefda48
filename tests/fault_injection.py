"""Faults: a run killed at places of one's choice, a save cut off, a disk that fails.

A run is watched from outside, by its output folder and by what it prints. Where a kill is aimed at a place (inside a
save, say), all its processes are first frozen with SIGSTOP, a random moment after the run got there; only if it is
still there is it killed, else it goes on to the next such place. So every kill is where the table says it was. Within
the writing of a file a run is killed by the kernel, which allows none so large (RLIMIT_FSIZE).
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from life import Life, newest_step


def half_written(output_dir: Path) -> Path | None:
    """The checkpoint that is being written."""
    for path in output_dir.glob(".checkpoint-*"):
        if int(path.name.removeprefix(".checkpoint-")) > newest_step(output_dir):  # not an old one being removed
            return path
    return None


# ---- where a run can be ----


@dataclass
class Place:
    """A part of a run that kills are aimed at.

    Attributes:
        is_there: whether the run is in it now.
        spread: seconds; the kill falls at a random moment of them after the run got there.
        exactly: whether the run has to be in it still at that moment.
    """

    is_there: Callable[[Life], bool]
    spread: float
    exactly: bool = True


def has_begun(life: Life) -> bool:
    """Whether it trains: from then on nothing that can be seen is a leftover of the life before."""
    return "training:" in life.printed()


def is_doing(life: Life, what: str) -> bool:
    """By the description before the progress bar, which is `training` or `evaluating`."""
    printed = life.printed()
    return printed.rfind(f"{what}:") > max(printed.rfind(f"{other}:") for other in {"training", "evaluating"} - {what})


def places(prepared: Path, start_seconds: float) -> dict[str, Place]:
    """
    Args:
        prepared: folder of the prepared data.
        start_seconds: from a start to the first step, as this machine is now.
    """

    def saving(life: Life, optimizer: bool) -> bool:
        work = half_written(life.output_dir)
        return bool(work) and has_begun(life) and optimizer == any(work.glob("trainer_state/optimizer-*"))

    def evaluated(life: Life) -> bool:
        return "validation after step" in life.printed() and newest_step(life.output_dir) == life.checkpoint

    def publishing(life: Life) -> bool:
        return has_begun(life) and any(life.output_dir.glob(".checkpoint-*/trainer_state/state.json"))

    return {
        "start": Place(lambda life: True, 0.9 * start_seconds, exactly=False),
        "preparation": Place(lambda life: any(path.is_dir() for path in prepared.glob(".*")), 0.05),
        "training": Place(has_begun, 0.5, exactly=False),
        "evaluation": Place(lambda life: is_doing(life, "evaluating"), 0.04),  # of a tenth of a second or so
        "evaluated": Place(evaluated, 0),  # written to metrics.jsonl, but no checkpoint says so yet
        "save: model": Place(lambda life: saving(life, optimizer=False), 0.01),
        "save: optimizer": Place(lambda life: saving(life, optimizer=True), 0.005),
        # Verifying, flushing, renaming, removing the oldest: some milliseconds altogether.
        "save: publish": Place(publishing, 0.01, exactly=False),
        "final": Place(lambda life: has_begun(life) and (life.output_dir / ".final").exists(), 0),
    }


# ---- how it is killed ----


def _kill_all(life: Life, rng: random.Random) -> None:
    life.signal(life.processes(), signal.SIGKILL)


def _kill_worker(life: Life, rng: random.Random) -> None:
    victim = rng.choice(life.workers())
    victim.kill()
    life.go_on()


def _kill_launcher(life: Life, rng: random.Random) -> None:
    life.launcher.kill()
    life.go_on()


def _terminate_launcher(life: Life, rng: random.Random) -> None:
    life.launcher.terminate()
    life.go_on()


def _terminate_all(life: Life, rng: random.Random) -> None:
    life.signal(life.processes(), signal.SIGTERM)
    life.go_on()


WAYS: dict[str, Callable[[Life, random.Random], None]] = {
    "SIGKILL all": _kill_all,
    "SIGKILL worker": _kill_worker,
    "SIGKILL launcher": _kill_launcher,
    "SIGTERM launcher": _terminate_launcher,
    "SIGTERM all": _terminate_all,
}


IN_A_WRITE = "within a write"  # by itself: tests/lingering.py


@dataclass
class Death:
    """What a kill did: where and how, after how many seconds, from which checkpoint to which, and what it left over."""

    place: str
    way: str
    after: float
    returncode: int
    checkpoint_before: int
    checkpoint_after: int
    leftovers: list[str]
    printed: str

    def __str__(self) -> str:
        steps = f"checkpoint {self.checkpoint_before} -> {self.checkpoint_after}"
        left = f", left {' '.join(self.leftovers)}" if self.leftovers else ""
        return f"{self.place:<16} {self.way:<17} after {self.after:5.1f} s  status {self.returncode:4d}  {steps}{left}"


def kill_at(life: Life, name: str, place: Place, way: str, rng: random.Random) -> Death:
    """Kill a life at a random moment of a place, and wait until nothing of it is left.

    Raises:
        AssertionError: it ended before.
    """
    while True:
        reached = life.wait_for(place.is_there)
        if reached:
            time.sleep(rng.uniform(0, place.spread))
            life.freeze()
        # What is frozen has not ended: whatever ends it from here on is our signal. (Early in a start there is nobody
        # but the launcher.)
        alive = not life.is_over() and (name == "start" or life.workers())
        assert alive, f"it ended before the kill, aimed at {name}\n{life.printed()[-3000:]}"
        if not place.exactly or place.is_there(life):
            break
        life.go_on()
    after = life.age()
    WAYS[way](life, rng)
    return await_death(life, name, way, after)


def await_death(life: Life, name: str, way: str, after: float | None = None) -> Death:
    """Wait until nothing is left of a life that has been killed `after` some seconds, or that dies by itself there."""
    returncode = life.wait()
    after, folder = after or life.age(), life.output_dir
    leftovers = [path.name for path in [*folder.glob(".checkpoint-*"), *folder.glob(".final")]]
    return Death(name, way, after, returncode, life.checkpoint, newest_step(folder), sorted(leftovers), life.printed())


class CutOff(BaseException):
    """Stands for a kill within this process: nothing that handles errors handles it."""


@contextmanager
def cut_off_at(operation: int) -> Iterator[None]:
    """Raise CutOff in place of that operation on files, counted from 1; later ones fail likewise."""
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    seen, armed = 0, True

    def count(event: str, _) -> None:
        nonlocal seen
        if armed and event in operations:
            seen += 1
            if seen >= operation:
                raise CutOff

    sys.addaudithook(count)  # which stays until Python ends
    try:
        yield
    finally:
        armed = False


# ---- a disk that fails ----


class SmallDisk:
    """A file system in memory, mounted for a test; as a user without that right there is none, and the test is skipped.

    Attributes:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path, megabytes: int):
        self.folder, self.read_only = folder, False
        folder.mkdir()
        try:
            self._run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            pytest.skip(f"cannot mount a small file system here: {str(reason).strip()}")

    def _run(self, *command) -> None:
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)

    def fill(self, leave: int = 0) -> None:
        """Take all its room but so many bytes."""
        room = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - leave)))

    def make_read_only(self) -> None:
        """By a second mount over the first, which would not change while a file on it is open for writing."""
        self._run("mount", "--bind", self.folder, self.folder)
        self._run("mount", "-o", "remount,bind,ro", self.folder)
        self.read_only = True

    def mend(self) -> None:
        """Make it one to be written on, with room."""
        if self.read_only:
            self._run("umount", self.folder)
        self.read_only = False
        (self.folder / "filler").unlink(missing_ok=True)

    def unmount(self) -> None:
        self.mend()
        self._run("umount", self.folder)


def fail_at(life: Life, is_there: Callable[[Life], bool], fail: Callable[[], None]) -> list[str]:
    """Let a disk fail under a run once it is somewhere, and wait for its end; returns its error lines."""
    assert life.wait_for(is_there), life.printed()[-3000:]
    life.freeze()
    fail()
    life.go_on()
    assert life.wait() != 0, life.printed()[-3000:]
    return re.findall(r"^error: .*$", life.printed(), flags=re.MULTILINE)
