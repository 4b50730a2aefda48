"""A folder appears whole or not at all, and nothing is written where it may not be."""

import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest

from publishing.whole_folder import SLACK, check_room, check_target, whole_folder
from utils.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(out: Path, error: BaseException) -> None:
    with whole_folder(out) as work:
        (work / "half").write_text("half")
        raise error


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "no parent", "a link to an empty folder"])
def test_it_takes_its_name_when_it_is_whole(tmp_path, there):
    out = tmp_path / ("deep/er/out" if there == "no parent" else "out")
    if there == "an empty folder":
        out.mkdir()
    elif there.startswith("a link"):
        (tmp_path / "far").mkdir()
        out.symlink_to(tmp_path / "far")
    target = check_target(out, tmp_path / "source")
    with whole_folder(target) as work:
        assert work.parent == target.parent  # the same disk
        assert not out.exists() or not names(out)
        (work / "model").write_text("weights")
    assert names(out) == ["model"]
    assert {name for name in names(target.parent) if name.startswith(".")} == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), RuntimeError("a bug"), UserError("refused")])
def test_nothing_is_left_of_one_that_was_interrupted(tmp_path, error):
    with pytest.raises(type(error)):
        write_half(tmp_path / "out", error)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("failed: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_line(tmp_path, error):
    problem = r"out: could not be written: .*No space left on device.*; nothing is left of it"
    with pytest.raises(UserError, match=problem):
        write_half(tmp_path / "out", error)
    assert names(tmp_path) == []


def test_what_a_killed_one_has_left_goes_at_the_next_try(tmp_path, capsys):
    if not (child := os.fork()):
        with whole_folder(tmp_path / "out") as work:
            (work / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == [f".out.{child}.tmp"]
    for other in (f".out.{os.getpid()}.tmp", ".other.1.tmp", ".out.notes.tmp"):  # somebody is at it; others' files
        (tmp_path / other).mkdir()
    (tmp_path / f".out.{os.getpid()}.tmp").rmdir()
    with whole_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".other.1.tmp", ".out.notes.tmp", "out"]
    assert f"removed .out.{child}.tmp" in capsys.readouterr().out


def test_what_an_earlier_process_of_the_same_number_has_left_goes_too(tmp_path, capsys):
    """As in a container, where each start may have the number 7."""
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    (tmp_path / f".out.{os.getpid()}.tmp" / "half").write_text("half")
    with whole_folder(check_target(tmp_path / "out", tmp_path / "source")) as work:
        assert names(work) == []
    assert names(tmp_path) == ["out"]
    assert f"removed .out.{os.getpid()}.tmp" in capsys.readouterr().out


def test_where_it_may_not_be(tmp_path):
    source = tmp_path / "run" / "checkpoint-5"
    source.mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    (tmp_path / "link").symlink_to(source)
    cases = {
        "run/checkpoint-5": "is .*, lies within it or holds it",
        "run/checkpoint-5/out": "is .*, lies within it or holds it",
        "run/../run/checkpoint-5/x": "is .*, lies within it or holds it",
        "link/out": "is .*, lies within it or holds it",
        "run": "is .*, lies within it or holds it",
        "file": "is no folder",
        "file/out": "cannot write there: .*file is not a folder",
        "full": "holds notes.txt already: give a new folder",
        "x" * 254: "cannot write there: File name too long",  # with what stands beside it until it is whole
        "new/" + "x" * 300 + "/out": "cannot write there: File name too long",
        "/proc/out": "cannot write there: ",
    }
    for name, problem in cases.items():
        with pytest.raises(UserError, match=problem):
            check_target(tmp_path / name, source)
    assert names(tmp_path) == ["file", "full", "link", "run"]
    check_target(tmp_path / "run" / "new" / "exported", source)  # beside the checkpoint
    assert names(tmp_path / "run") == ["checkpoint-5"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_where_nobody_may_write(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"cannot write there: .*closed is not a folder that can be written to"):
        check_target(tmp_path / "closed" / "out", tmp_path / "source")


def test_too_little_room_is_found_before(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10_000_000_000))
    with pytest.raises(UserError, match=r"out: takes 10\.0 GB, 10\.0 GB are free there: give a smaller --dtype"):
        check_room(tmp_path / "out", 10_000_000_001 - SLACK)
    check_room(tmp_path / "out", 10_000_000_000 - SLACK)
