"""Files are there whole, the old or the new, whatever happens meanwhile."""

import contextlib
import errno
import os
import stat
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from utils.errors import UserError
from utils.files import parse_json, read_json, read_text, write_whole


def write_often(path) -> None:
    for number in range(200):
        write_whole(path, f"{os.getpid()} {number}" * 1000)


def test_several_writers_do_not_hurt_each_other(tmp_path):
    with ProcessPoolExecutor(3) as pool:
        for done in [pool.submit(write_often, tmp_path / "file") for _ in range(3)]:
            done.result()
    text = (tmp_path / "file").read_text()
    writer, _, _ = text.partition(" 199")
    assert text == f"{writer} 199" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_that_cannot_flush_folders_is_none_the_worse(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n x}', "file.json line 2, column 2: JSON does not parse"),
        (b"\n\n\xff", "file.json line 3: not UTF-8"),
        (b"[" * 100_000, "file.json: JSON does not parse"),
        (b"1" * 5000, "file.json: JSON does not parse"),
    ],
)
def test_what_is_no_json_is_one_line_with_the_place(tmp_path, content, message):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_json(tmp_path / "file.json")
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbf5")
    assert read_text(tmp_path / "file") == "5"
    assert parse_json("5", "here") == 5


def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    os.symlink("loop", tmp_path / "loop")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)  # without the disk space
    for path, reason in [
        (tmp_path / "fifo", "Is a named pipe"),
        (tmp_path / "link", "Is a named pipe"),
        ("/dev/zero", "Is a device"),
        (tmp_path, "Is a directory"),
        (tmp_path / "huge", "over 2,147,483,648 bytes"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
        (f"{tmp_path}/a\0b", "null"),
    ]:
        with pytest.raises(UserError, match=f"cannot read this record: .*{reason}"):
            read_json(path, "record")


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd here")
def test_the_nameless_pipe_of_a_shell_is_read(tmp_path):
    """`sft.py <(sed s/a/b/ recipe.yaml)`, also where its writer is slow; with a limit to what it can be sent."""
    for sent, most in (("a: 1\n" * 30_000, 2**20), ("a: 1\n", 4)):
        reader, writer = os.pipe()
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read_text, f"/dev/fd/{reader}", "recipe", most)
            time.sleep(0.1)
            with contextlib.suppress(BrokenPipeError), open(writer, "w") as file:
                file.write(sent)
            if most > 4:
                assert reading.result() == sent
            else:
                with pytest.raises(UserError, match="over 4 bytes"):
                    reading.result()
        os.close(reader)
