"""Files at a URL: by http, s3 and whatever else fsspec has, kept under `cache_dir`."""

import errno
import glob
import hashlib
import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import psutil

from data.records import JSON, TABLES
from utils.errors import UserError, reason
from utils.files import checksum, lock_file, remove_tree, write_whole

URL = re.compile(r"[a-z][a-z0-9+.-]*://")
NEWEST = "newest.json"  # the names of the files that were fetched last, in the folder of a URL
LOCK, PART, LAUNCH = ".lock", ".part", ".launch"  # the last holds whose processes fetched them
# Of what a file system tells of a file, what changes whenever its content does: in lower case, without - and _.
VERSIONS = {
    *("etag", "contentmd5", "digest", "md5", "md5hash", "crc32c", "checksum", "sha", "sha1", "sha256", "hex"),
    *("blobid", "lfs", "xethash", "versionid", "generation"),
    *("lastmodified", "mtime", "modified", "modify", "modificationtime", "updated"),
}
CSV_TYPES = ("text/csv", "application/csv", "text/tab-separated-values")
SILENT_SECONDS = 120  # after which a server that sends nothing is given up
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EMFILE)


def is_url(path: str | None) -> bool:
    return bool(path and URL.match(path))


def fetch_url(url: str, cache_dir: Path, download: bool) -> list[Path] | None:
    """The files at a URL, or that a pattern matches where its file system can list them (not http).

    They are fetched where they are not here in the version that is there now, by its date, ETag or hash; where the
    server tells none of these, they are fetched anew each time. Earlier versions are removed. What cannot be reached,
    or not be kept, is taken as it was fetched last, with a line that says so. Of the processes that a launcher starts
    on a machine the first one fetches, and the others have the same files.

    Returns: their paths here, sorted; None where `download` is off and they are not here.
    Raises: UserError when they cannot be had.
    """
    folder = Path(cache_dir) / "downloads" / hashlib.blake2b(url.encode(), digest_size=10).hexdigest()
    if not download:
        return _newest(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / LOCK)
    except OSError as error:
        return _fetched_last(url, folder, "kept", _of_disk(error, folder))
    except UserError as error:
        return _fetched_last(url, folder, "kept", str(error))
    with lock:
        try:
            if (launch := _launch()) and (kept := _newest(folder)) and launch == _text(folder / LAUNCH):
                return kept  # by another process of this launch, which has to have the same data
            found = _fetch(url, folder)
            if launch:
                write_whole(folder / LAUNCH, launch)
            return found
        except UserError:
            raise
        except ImportError as error:  # of s3fs, gcsfs, ...
            raise UserError(f"{url}: {reason(error)}") from None
        except Exception as error:  # aiohttp's, botocore's, fsspec's own
            if isinstance(error, OSError) and _is_ours(error, folder):
                if error.errno in NOT_WRITABLE:
                    return _fetched_last(url, folder, "kept", _of_disk(error, folder))
                raise UserError(_of_disk(error, folder)) from None
            # fsspec's http says FileNotFoundError of whatever went wrong: the cause is beneath it.
            said = reason(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            return _fetched_last(url, folder, "reached", said)
        finally:
            (folder / PART).unlink(missing_ok=True)


def check_scheme(url: str) -> None:
    """UserError where nothing that is installed here reads URLs of this kind."""
    import fsspec

    try:
        fsspec.get_filesystem_class(urlsplit(url).scheme)
    except (ImportError, ValueError) as error:  # of a package that is missing, of a protocol that is none
        raise UserError(f"{url}: {reason(error)}") from None


def _launch() -> str | None:
    """What the processes that a launcher started on this machine have in common: itself. None without a launcher."""
    if "LOCAL_RANK" not in os.environ:
        return None
    try:
        launcher = psutil.Process(os.getppid())
        return f"{platform.node()} {launcher.pid} {launcher.create_time()}"
    except psutil.Error:  # gone, or hidden
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _fetched_last(url: str, folder: Path, tried: str, said: str) -> list[Path]:
    """What is here, with a line that says why it may be old; UserError where there is nothing."""
    if kept := _newest(folder):
        print(f"{url}: could not be {tried}, taken as it was fetched last: {said}", flush=True)
        return kept
    raise UserError(f"{url}: cannot be fetched: {said}" if tried == "reached" else said) from None


def _of_disk(error: OSError, folder: Path) -> str:
    return f"{error.filename or folder}: {error.strerror or error}"


def _is_ours(error: OSError, folder: Path) -> bool:
    """Whether the disk here is the trouble, not the server, whose errors have numbers, too (a connection reset)."""
    return error.errno in OF_THE_DISK or str(error.filename or "").startswith(str(folder))


def _fetch(url: str, folder: Path) -> list[Path]:
    """With the folder's lock held."""
    from fsspec.core import url_to_fs

    can_list = not url.startswith(("http://", "https://"))
    system, path = url_to_fs(url) if can_list else url_to_fs(url, client_kwargs=_of_http())
    names = sorted(system.glob(path)) if can_list and glob.has_magic(path) else [path]
    names = [name for name in names if name == path or system.isfile(name)]
    if not names:
        raise FileNotFoundError("no file there matches")
    found = []
    for name in names:
        info = system.info(name)
        if info.get("type") == "directory":
            raise UserError(f"{url}: is a folder: name its files by a pattern, {url.rstrip('/')}/*.jsonl")
        told = {key: str(value) for key, value in info.items() if value and re.sub("[-_]", "", key.lower()) in VERSIONS}
        part = folder / PART  # one, since whoever fetches holds the lock: what a kill leaves is written over
        if not told:
            system.get_file(name, str(part))
            told = {"content": checksum(part)}
        told["size"] = str(info.get("size"))
        version = hashlib.blake2b(json.dumps([name, told], sort_keys=True).encode(), digest_size=10).hexdigest()
        here = folder / version / _file_name(name if can_list else urlsplit(name), info)
        if not here.exists():
            if "content" not in told:
                system.get_file(name, str(part))
            here.parent.mkdir(exist_ok=True)
            os.replace(part, here)
        found.append(here)
    if _newest(folder) != found:
        write_whole(folder / NEWEST, json.dumps([str(path.relative_to(folder)) for path in found]))
    kept = {folder / LOCK, folder / LAUNCH, folder / NEWEST, *(path.parent for path in found)}
    for other in folder.iterdir():
        if other not in kept:
            with suppress(OSError):  # of another user
                remove_tree(other)
    return found


def _of_http() -> dict[str, Any]:
    """How aiohttp is asked: by the proxy that the environment names, as the hub's client is, and for as long as
    something comes. (By itself it gives a whole file 5 minutes: 3 GB at 10 MB a second.)"""
    from aiohttp import ClientTimeout

    return {"trust_env": True, "timeout": ClientTimeout(total=None, sock_connect=30, sock_read=SILENT_SECONDS)}


def _file_name(name: str | SplitResult, info: dict[str, Any]) -> str:
    """What a file is called here: as it is there, with an ending of CSV where only the server, the query or the address
    that it redirects to tells it."""
    path, query = (name, "") if isinstance(name, str) else (name.path, name.query)
    called = path.rstrip("/").rpartition("/")[2] or "data"
    if called.lower().endswith((*TABLES, *JSON, ".parquet", ".arrow")):
        return called
    types = {str(value).partition(";")[0] for key, value in info.items() if key.lower() in ("mimetype", "contenttype")}
    led_to = urlsplit(str(info.get("url") or ""))  # by redirects
    asked = [value for _, value in parse_qsl(f"{query}&{led_to.query}")]  # format=csv, file=chats.csv
    is_csv = not types.isdisjoint(CSV_TYPES) or any(f".{one}".lower().endswith(TABLES) for one in [*asked, led_to.path])
    return f"{called}.csv" if is_csv else called


def _newest(folder: Path) -> list[Path] | None:
    try:
        paths = [folder / name for name in json.loads(_text(folder / NEWEST) or "")]
    except ValueError:
        return None
    return paths if all(path.is_file() for path in paths) else None
