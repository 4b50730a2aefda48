"""Data files: where they are, from the recipe's path, cache_dir and the Hugging Face hub.

Nothing from the hub is ever executed: only data files are downloaded. `data/records.py` reads them.
"""

import fnmatch
import glob
import os
from pathlib import Path

from recipe.keys import Recipe
from sources.registry import find_source
from sources.source import HubSource
from utils.errors import UserError

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def source_files(name: str, recipe: Recipe, download: bool = True) -> list[Path] | None:
    """`find_data_file` for a data set of the recipe's mix."""
    options = recipe.datasets.chosen()[name]
    hub = find_source(name, options).hub
    return find_data_file(name, options.input_file_path, recipe.cache_dir, options.revision, hub, download)


def find_data_file(
    dataset: str, given: str | None, cache_dir: Path, revision: str | None, hub: HubSource, download: bool = True
) -> list[Path] | None:
    """The files of a data set: a local one, or downloaded to the hub's default cache folder (works offline from it).

    A file named in the recipe is looked up as given (relative to the working directory), under `cache_dir`, then under
    that name in the hub repository. Without one: `cache_dir/<default file>`, `cache_dir/<dataset>.jsonl` and the other
    endings of `LOCAL_SUFFIXES`, then the default files of the hub repository.

    Returns: one or more existing paths, sorted; only hub data in several parts has more than one. With `download` off
        the network is left alone: None where the files are neither here nor in the hub's cache.
    Raises: UserError naming the data set, what was looked for and each place.
    """
    local = local_candidates(dataset, given, cache_dir, hub)
    if found := next((path for path in local if os.path.isfile(path)), None):
        return [found]
    places = list(map(str, local))
    if patterns := hub_patterns(given, hub):
        files, problem = fetch_from_hub(hub.repo, patterns, revision, local_only=not download)
        if files:
            return files
        places.append(f"the hub's {hub.repo}" + (f" at revision {revision}" if revision else "") + f" ({problem})")
    if not download:
        return None
    wanted = given or " or ".join(hub.files)
    hint = f"; {hub.hint}" if hub.hint else ""
    raise UserError(f"data set {dataset}: {wanted} not found; looked at {', '.join(places)}{hint}")


def local_candidates(dataset: str, input_file_path: str | None, cache_dir: Path, hub: HubSource) -> list[Path]:
    """Local paths in the order they are tried; of the hub's names only exact ones, `train-*` could be any data set."""
    if input_file_path:
        given = Path(os.path.expanduser(input_file_path))
        return [given] if given.is_absolute() else [given, Path(cache_dir) / given]
    names = [name for name in hub.files if not glob.has_magic(name)] + [dataset + suffix for suffix in LOCAL_SUFFIXES]
    return [Path(cache_dir) / name for name in names]


def hub_patterns(input_file_path: str | None, hub: HubSource) -> list[str]:
    """What to look for in the hub repository; nothing for an absolute path, which can only mean this machine's."""
    if not hub.repo:
        return []
    if not input_file_path:
        return list(hub.files)
    given = Path(os.path.expanduser(input_file_path))
    return [] if given.is_absolute() else [glob.escape(name) for name in dict.fromkeys([given.as_posix(), given.name])]


def fetch_from_hub(repo: str, patterns: list[str], revision: str | None, local_only: bool) -> tuple[list[Path], str]:
    """Download the files matching the patterns; returns (sorted paths, why there are none)."""
    from huggingface_hub import snapshot_download  # here: importing it takes a second that --help can do without

    where = {"repo_type": "dataset", "revision": revision, "local_files_only": local_only}
    try:
        folder = Path(snapshot_download(repo, allow_patterns=patterns, **where))
    except Exception as error:  # its own, httpx's and the system's errors: all mean "not from the hub"
        reason = (str(error).strip() or "no details").splitlines()[0]
        return [], f"could not be reached: {type(error).__name__}: {reason}"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for pattern in patterns:
        if matching := sorted(name for name in names if fnmatch.fnmatchcase(name, pattern)):
            return [folder / name for name in matching], ""
    return [], "no such file there"
