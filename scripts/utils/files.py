"""Files: read whole, or refused in one line; written whole, or not at all; told apart by their contents."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from utils.errors import UserError, reason

BLOCKS, BLOCK_BYTES = 64, 64 * 1024
MOST_BYTES = 2**31  # of a file that is read whole; JSON of that size would take several times as much memory
# What is there under a name and is no file to read: some of these never end.
NO_FILES = (
    (stat.S_ISDIR, "Is a directory"),
    (stat.S_ISFIFO, "Is a named pipe"),
    (stat.S_ISCHR, "Is a device"),
    (stat.S_ISBLK, "Is a device"),
)
UNFINISHED = ".tmp"  # how the name of a file ends that is being written
# What a file system says that cannot flush a folder, as some over FUSE and CIFS.
NO_FLUSH = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)


def read_text(path: Path, what: str = "file", most: int = MOST_BYTES, errors: str = "strict") -> str:
    """A text file in UTF-8, a byte order mark left out; `errors` says what to do with other bytes, as `bytes.decode`.

    Raises: UserError, naming `what` it is, if it is unreadable, no file that ends, over `most` bytes, or not UTF-8.
    """
    try:
        # Not to wait for a writer: a FIFO that nobody writes to would hold up the open itself.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            mode = about.st_mode
            if stat.S_ISFIFO(mode) and not os.path.lexists(os.path.realpath(path)):
                # The nameless pipe of `<(command)` or of a shell's |: somebody writes to it, and it ends.
                os.set_blocking(file.fileno(), True)
            elif not stat.S_ISREG(mode):
                kind = next((name for test, name in NO_FILES if test(mode)), "not a file")
                raise UserError(f"{path}: cannot read this {what}: {kind}")
            content, too_long = bytearray(), stat.S_ISREG(mode) and about.st_size > most
            while not too_long and (chunk := file.read(2**20)):
                content += chunk
                too_long = len(content) > most
        if too_long:
            raise UserError(f"{path}: cannot read this {what}: over {most:,} bytes")
        return content.decode("utf-8-sig", errors)
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            line = error.object[: error.start].count(b"\n") + 1
            raise UserError(f"{path} line {line}: not UTF-8, as a {what} has to be") from None
        raise UserError(f"{str(path)!r}: cannot read this {what}: {error}") from None  # a NUL byte in its name
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what}: {error.strerror} (looked in {Path.cwd()})") from None


def parse_json(text: str, source: str | Path, line: int | None = None) -> Any:
    """The value of a JSON text, all of `source` or this `line` of it.

    Raises: UserError, with the place, if it is none, or gives a key twice, of which one would be passed over.
    """
    try:
        return json.loads(text, object_pairs_hook=each_key_once)
    except json.JSONDecodeError as error:
        place = f"{source} line {line or error.lineno}, column {error.colno}"
        raise UserError(f"{place}: JSON does not parse: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of more than 4,300 digits, thousands of brackets
        place = f"{source} line {line}" if line else source
        raise UserError(f"{place}: JSON does not parse: {error}") from None


class KeyTwice(ValueError):
    """An object gives a key twice, of which the last would count without a word."""


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON has in braces, for `object_pairs_hook`.  Raises: KeyTwice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise KeyTwice(f"the key {twice[:80]!r} is given twice")
    return found


def read_json(path: Path, what: str = "file") -> Any:
    """The value of a JSON file.  Raises: UserError as `read_text` and `parse_json`."""
    return parse_json(read_text(path, what), path)


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file so that the old or the new one is there, whole, whenever the machine stops.

    `errors` says what to do with half of a surrogate pair, as `str.encode` takes it.
    Raises: OSError when it cannot be written; what was there before is as it was.
    """
    work = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")  # of this process: others may write it, too
    try:
        with open(work, "w", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except OSError:
        work.unlink(missing_ok=True)
        raise
    flush(path.parent)  # the new name, too


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone with a folder among those that lock it; nothing is left in it.

    Where the file system cannot lock a folder, as some over NFS, everybody goes on.
    Raises: OSError where there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def lock_file(path: Path) -> AbstractContextManager:
    """Wait to be alone among the processes that lock this file, of a cache_dir; entered, it is given back at the end.

    Raises: UserError where it cannot be locked: another user's file, a file system that is read-only or has no locks.
    """
    from filelock import FileLock  # here: it imports asyncio, which --help can do without

    lock = FileLock(path, fallback_to_soft=False)  # a soft one outlives a kill, and would be waited for
    try:
        return lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{lock.lock_file}: {reason(error)}: give a cache_dir on another file system") from None


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it; of a link only itself, which `shutil.rmtree` refuses."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


flushed = 0  # by this process: a disk that works through what the system held for it moves nothing else


def flush(*paths: Path) -> None:
    """Wait until files, and the names in folders, are on the disk."""
    global flushed
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            flushed += 1
        except OSError as error:
            if not (path.is_dir() and error.errno in NO_FLUSH):
                raise
        finally:
            os.close(handle)


def checksum(path: Path) -> str:
    """A hash of all of a file's contents, as `xxh3_128:<32 hex digits>`. It tells damage, not ill will.

    A GB that is in memory takes 0.11 s, of which reading it is 0.08 (crc32 takes 0.43, BLAKE2b 1.3).
    """
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return f"xxh3_128:{digest.hexdigest()}"


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes, and a BLAKE2b hash of its contents, of a large file's of a sample (`sampled`)."""
    digest = hashlib.blake2b(digest_size=10)
    for block in sampled(path):
        digest.update(block)
    return {"bytes": path.stat().st_size, "fingerprint": digest.hexdigest()}


def sampled(path: Path) -> Iterator[bytes]:
    """The contents of a file of up to 4 MiB; of a larger one 64 blocks of 64 KiB, evenly spaced from its first byte to
    its last.

    A change that leaves the size and misses every block goes unseen; training changes nearly every weight, a cut or
    exchanged file most bytes. So the fingerprint of 16 GB of weights reads 4 MiB a file instead of 16 GB.
    """
    size = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        if size <= BLOCKS * BLOCK_BYTES:
            yield file.read()
            return
        for block in range(BLOCKS):
            file.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
            yield file.read(BLOCK_BYTES)
