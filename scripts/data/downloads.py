"""Files at a URL: by http, s3 and whatever else fsspec has, kept under `cache_dir`."""

import glob
import hashlib
import json
import os
import re
from pathlib import Path

from filelock import FileLock

from utils.errors import UserError, reason

URL = re.compile(r"[a-z][a-z0-9+.-]*://")
NEWEST = "newest.json"  # the names of the files that were fetched last, in the folder of a URL


def is_url(path: str | None) -> bool:
    return bool(path and URL.match(path))


def fetch_url(url: str, cache_dir: Path, download: bool) -> list[Path] | None:
    """The files at a URL, or that a pattern matches where its file system can list them (not http).

    They are fetched where they are not here in the version that is there now, by its size, date and ETag. What cannot
    be reached is taken as it was fetched last, with a line that says so.

    Returns: their paths here, sorted; None where `download` is off and they are not here.
    Raises: UserError when they cannot be had.
    """
    folder = Path(cache_dir) / "downloads" / hashlib.blake2b(url.encode(), digest_size=10).hexdigest()
    if not download:
        return _newest(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            return _fetch(url, folder)
    except ImportError as error:  # of s3fs, gcsfs, ...
        raise UserError(f"{url}: {reason(error)}") from None
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError | ConnectionError | TimeoutError):
            raise UserError(f"{folder}: {error.strerror or error}") from None
        problem = error
    except Exception as error:  # aiohttp's, botocore's, fsspec's own
        problem = error
    if kept := _newest(folder):
        print(f"{url}: could not be reached, taken as it was fetched last: {reason(problem)}", flush=True)
        return kept
    raise UserError(f"{url}: cannot be fetched: {reason(problem)}") from None


def _fetch(url: str, folder: Path) -> list[Path]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    can_list = not url.startswith(("http://", "https://"))
    names = sorted(system.glob(path)) if can_list and glob.has_magic(path) else [path]
    names = [name for name in names if name == path or system.isfile(name)]
    if not names:
        raise FileNotFoundError("no file there matches")
    found = []
    for name in names:
        info = system.info(name)
        if info.get("type") == "directory":
            raise UserError(f"{url}: is a folder: name its files by a pattern, {url.rstrip('/')}/*.jsonl")
        told = {key: str(value) for key, value in info.items() if key.lower() in TOLD}
        version = hashlib.blake2b(json.dumps([name, told], sort_keys=True).encode(), digest_size=10).hexdigest()
        here = folder / version / (name.partition("?")[0].rstrip("/").rpartition("/")[2] or "data")
        if not here.exists():
            here.parent.mkdir(exist_ok=True)
            work = here.with_name(f".{here.name}.{os.getpid()}")
            system.get_file(name, str(work))
            os.replace(work, here)
        found.append(here)
    (folder / NEWEST).write_text(json.dumps([str(path.relative_to(folder)) for path in found]), encoding="utf-8")
    return found


# Of what a file system tells of a file, what changes with its content.
TOLD = {
    "size",
    "etag",
    "last-modified",
    "lastmodified",
    "mtime",
    "modified",
    "updated",
    "created",
    "md5",
    "content-md5",
}


def _newest(folder: Path) -> list[Path] | None:
    try:
        paths = [folder / name for name in json.loads((folder / NEWEST).read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return None
    return paths if all(path.is_file() for path in paths) else None
