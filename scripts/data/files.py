"""Data files: where they are, from the recipe's path, cache_dir, a URL and the Hugging Face hub.

Nothing from the hub is ever executed: only data files are downloaded. `data/records.py` reads them.
"""

import glob
import os
from collections import Counter
from pathlib import Path

from data.downloads import fetch_url, is_url
from data.hub import fetch_from_hub, fetch_split
from data.splits import (
    CARDS,
    SplitFiles,
    check_whole,
    files_of_splits,
    listed,
    only_train,
    saved_files,
    say_taken,
    say_twice,
)
from recipe.keys import Recipe
from sources.registry import find_source
from sources.source import HubSource
from utils.errors import UserError

LOCAL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def source_files(name: str, recipe: Recipe, download: bool = True) -> SplitFiles | None:
    """`find_data_file` for a data set of the recipe's mix."""
    options = recipe.datasets.chosen()[name]
    hub = find_source(name, options).hub
    return find_data_file(name, options.input_file_path, recipe.cache_dir, options.revision, hub, download)


def find_data_file(
    dataset: str,
    given: str | list[str] | None,
    cache_dir: Path,
    revision: str | None,
    hub: HubSource,
    download: bool = True,
) -> SplitFiles | None:
    """The files of a data set: local ones, or downloaded to the hub's default cache folder (works offline from it).

    What a recipe names is looked up as given (relative to the working directory), then under `cache_dir`: a file, a
    folder, of which the files of its split are taken, or a pattern; then as a file of that very name in the hub
    repository. It may be a list of them; a URL is fetched. Without a name: `cache_dir/<default file>`,
    `cache_dir/<dataset>.jsonl` and the other endings of `LOCAL_SUFFIXES`, then the default files of the hub
    repository, or those of its split.

    Returns: one or more existing paths, of each split in the order in which they are read. With `download` off the
        network is left alone: None where the files are neither here nor in a cache.
    Raises: UserError naming the data set, what was looked for and each place; or a split or configuration that is
        asked for of a file, which has none.
    """
    if isinstance(given, list):
        found = [find_data_file(dataset, one, cache_dir, revision, hub, download) for one in given]
        if None in found:
            return None
        paths = [path for paths in found for path in paths]
        if len({*paths}) < len(paths):
            twice = Counter(paths).most_common(1)[0][0]
            raise UserError(f"data set {dataset}: {twice} is named twice in input_file_path")
        names = dict.fromkeys(name for paths in found for name in paths.by_name)
        return SplitFiles({name: [path for paths in found for path in paths.by_name.get(name, [])] for name in names})
    try:
        if is_url(given):
            only_train(hub.split, hub.config, given)
            paths = fetch_url(given, cache_dir, download)
            return paths and SplitFiles({"train": paths})
        files = _find(dataset, given, cache_dir, revision, hub, download)
        if files and download:
            say_twice(dataset, files)
        return files
    except UserError as error:
        raise UserError(f"data set {dataset}: {error}{f'; {hub.hint}' if hub.hint else ''}") from None


def _find(
    dataset: str, given: str | None, cache_dir: Path, revision: str | None, hub: HubSource, download: bool
) -> SplitFiles | None:
    local = local_candidates(dataset, given, cache_dir, hub)
    for path in local:
        if found := _local_files(path, hub, download):
            return found
    places = list(map(str, local))
    of_split = f"files of {hub.data_files or 'its split ' + (hub.split or 'train')}"
    wanted = given or " or ".join(hub.files) or of_split
    if may_be_on_hub(given, hub):
        if given or hub.files:
            paths, problem = fetch_from_hub(hub.repo, hub_patterns(given, hub), revision, local_only=not download)
            files = SplitFiles({"train": paths})
        else:
            files, problem = fetch_split(hub, revision, local_only=not download)
        if files:
            if given:
                only_train(hub.split, hub.config, given)
            return files
        places.append(f"the hub's {hub.repo}" + (f" at revision {revision}" if revision else "") + f" ({problem})")
    if not download:
        return None
    raise UserError(f"{wanted} not found; looked at {', '.join(places)}")


def _local_files(path: Path, hub: HubSource, download: bool) -> SplitFiles:
    """What is there under a name of this machine: a file, the files of a folder's split, or those of a pattern."""
    if os.path.isfile(path):
        only_train(hub.split, hub.config, path)
        return SplitFiles({"train": [path]})
    if os.path.isdir(path):
        if (found := saved_files(path, hub.split)) is None:
            base, cards = path.resolve(), [path / name for name in CARDS if (path / name).is_file()]
            try:
                by = "a pattern in input_file_path"
                files, left_out = files_of_splits(str(base), cards, hub.config, hub.split, None, str(path), by)
            except FileNotFoundError as error:
                raise UserError(f"{path}: has no data file of this split: {error}") from None
            found = SplitFiles({name: [*map(Path, own)] for name, own in files.items()})
            names, others = ([os.path.relpath(file, base) for file in some] for some in (found, left_out))
            check_whole(names, str(path))
            if download:
                say_taken(names, others, str(path))
        return found
    if not glob.has_magic(str(path)):
        return SplitFiles({})
    found = sorted(glob.glob(str(path), recursive=True))
    matching = [Path(name) for name in found if os.path.isfile(name)]
    if matching:
        only_train(hub.split, hub.config, path)
    elif folders := [name for name in found if os.path.isdir(name)]:
        raise UserError(f"{path}: matches only folders ({listed(folders)}): name their files, {path}/*.jsonl")
    return SplitFiles({"train": matching})


def local_candidates(dataset: str, input_file_path: str | None, cache_dir: Path, hub: HubSource) -> list[Path]:
    """Local paths in the order they are tried; of the hub's names only exact ones, `train-*` could be any data set."""
    if input_file_path:
        given = Path(os.path.expanduser(input_file_path))
        return [given] if given.is_absolute() else [given, Path(cache_dir) / given]
    if hub.config or hub.split or hub.data_files:  # of the hub's repository, which no file here stands for
        return []
    names = [name for name in hub.files if not glob.has_magic(name)] + [dataset + suffix for suffix in LOCAL_SUFFIXES]
    return [Path(cache_dir) / name for name in names]


def may_be_on_hub(input_file_path: str | list[str] | None, hub: HubSource) -> bool:
    """Whether the network is asked: not for an absolute path, which can only mean this machine's."""
    if isinstance(input_file_path, list):
        return any(may_be_on_hub(path, hub) for path in input_file_path)
    return is_url(input_file_path) or (bool(hub.repo) and not os.path.isabs(os.path.expanduser(input_file_path or "")))


def hub_patterns(input_file_path: str | None, hub: HubSource) -> list[str]:
    """What to look for in the hub repository, by name: of a file that a recipe names its own, `*` being no pattern."""
    if not input_file_path:
        return list(hub.files)
    given = Path(os.path.expanduser(input_file_path))
    return [glob.escape(name) for name in dict.fromkeys([given.as_posix(), given.name])]
