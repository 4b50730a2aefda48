"""Data files: where they are, from the recipe's path, cache_dir and the Hugging Face hub.

Nothing from the hub is ever executed: only data files are downloaded. `data/records.py` reads them.
"""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from recipe.keys import Recipe
from sources.registry import find_source
from sources.source import HubSource
from utils.errors import UserError

# In the order in which they are looked for on the hub.
HUB_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz")
OTHER_SPLITS = {"test", "tests", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout"}
# What numbers the parts of a split: -00000-of-00003-<hash>, as in the hub's own files.
PART = re.compile(r"\d*|of|(part|shard|chunk)\d*|[0-9a-f]{16}")
MOST_LISTED = 10
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
    hint = f"; {hub.hint}" if hub.hint else ""
    local = local_candidates(dataset, given, cache_dir, hub)
    if found := next((path for path in local if os.path.isfile(path)), None):
        return [found]
    places = list(map(str, local))
    if may_be_on_hub(given, hub):
        try:
            files, problem = fetch_from_hub(hub.repo, hub_patterns(given, hub), revision, local_only=not download)
        except UserError as error:
            raise UserError(f"data set {dataset}: {error}{hint}") from None
        if files:
            return files
        places.append(f"the hub's {hub.repo}" + (f" at revision {revision}" if revision else "") + f" ({problem})")
    if not download:
        return None
    wanted = given or " or ".join(hub.files) or "a file of its training split"
    raise UserError(f"data set {dataset}: {wanted} not found; looked at {', '.join(places)}{hint}")


def local_candidates(dataset: str, input_file_path: str | None, cache_dir: Path, hub: HubSource) -> list[Path]:
    """Local paths in the order they are tried; of the hub's names only exact ones, `train-*` could be any data set."""
    if input_file_path:
        given = Path(os.path.expanduser(input_file_path))
        return [given] if given.is_absolute() else [given, Path(cache_dir) / given]
    names = [name for name in hub.files if not glob.has_magic(name)] + [dataset + suffix for suffix in LOCAL_SUFFIXES]
    return [Path(cache_dir) / name for name in names]


def may_be_on_hub(input_file_path: str | None, hub: HubSource) -> bool:
    """Whether the hub is asked: not for an absolute path, which can only mean this machine's."""
    return bool(hub.repo) and not os.path.isabs(os.path.expanduser(input_file_path or ""))


def hub_patterns(input_file_path: str | None, hub: HubSource) -> list[str]:
    """What to look for in the hub repository; nothing where it is whatever its training split has."""
    if not input_file_path:
        return list(hub.files)
    given = Path(os.path.expanduser(input_file_path))
    return [glob.escape(name) for name in dict.fromkeys([given.as_posix(), given.name])]


def fetch_from_hub(repo: str, patterns: list[str], revision: str | None, local_only: bool) -> tuple[list[Path], str]:
    """Download the files of the first pattern that matches any; without patterns those of the training split, with a
    line that lists them.

    Returns: (sorted paths, why there are none).
    Raises: UserError for several training splits.
    """
    from huggingface_hub import HfApi, snapshot_download  # here: importing it takes a second that --help can do without

    where, wanted, problem = {"repo_type": "dataset", "revision": revision}, patterns, ""
    if not patterns and not local_only:
        try:  # before anything is downloaded, since a data set may have a hundred languages
            wanted = [glob.escape(name) for name in training_split(HfApi().list_repo_files(repo, **where))]
            if not wanted:
                return [], "no such file there"
        except UserError:
            raise
        except Exception as error:  # its own, httpx's and the system's errors: all mean "not from the hub"
            problem = _why_not(error)
    try:
        only_here = local_only or bool(problem)
        folder = Path(snapshot_download(repo, allow_patterns=wanted or None, local_files_only=only_here, **where))
    except Exception as error:
        return [], problem or _why_not(error)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if not patterns:
        chosen = training_split(names)
        if chosen and not local_only and os.environ.get("RANK", "0") == "0":  # utils.launch would bring torch for it
            print(f"files of the hub's {repo}: {_listed(chosen)}", flush=True)
        return [folder / name for name in chosen], "no such file there"
    for pattern in patterns:
        if matching := sorted(name for name in names if fnmatch.fnmatchcase(name, pattern)):
            return [folder / name for name in matching], ""
    return [], "no such file there"


def _why_not(error: Exception) -> str:
    reason = (str(error).strip() or "no details").splitlines()[0]
    return f"could not be reached: {type(error).__name__}: {reason}"


def training_split(names: Iterable[str]) -> list[str]:
    """The files of a hub data set that are its training split: `train` is a word of their path, of which none speaks of
    another split; in the first format that there is.

    Raises: UserError for more than one such split, as of several configurations, since a mix of them is seldom meant.
    """
    words = {name: set(re.findall(r"[^\W_]+", name.lower())) for name in names}
    train = [name for name, own in words.items() if "train" in own and not own & OTHER_SPLITS]
    for suffix in HUB_SUFFIXES:
        if chosen := sorted(name for name in train if name.endswith(suffix)):
            splits = dict.fromkeys(_split_of(name.removesuffix(suffix)) for name in chosen)
            if len(splits) > 1:
                raise UserError(f"{len(splits)} training splits on the hub, take one: {_listed(list(splits))}")
            return chosen
    return []


def _split_of(stem: str) -> str:
    """The path of a file without its suffix and what numbers the parts of a split: `data/train-00000-of-00003`."""
    folder, _, name = stem.rpartition("/")
    kept = [word for word in re.split(r"[\W_]+", name) if not PART.fullmatch(word)]
    return "/".join(filter(None, [folder, "-".join(kept)]))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + f" and {len(names) - MOST_LISTED:,} more" * (len(names) > MOST_LISTED)
