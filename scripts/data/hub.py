"""Data files of the Hugging Face hub: found by name, or by what `datasets` says a split is; works offline."""

import fnmatch
import glob
from pathlib import Path

from data.splits import check_whole, files_of_splits, say_taken
from sources.messages import split_names
from sources.source import HubSource
from utils.errors import UserError, reason

README, NOT_THERE = "README.md", "no such file there"


def fetch_from_hub(repo: str, patterns: list[str], revision: str | None, local_only: bool) -> tuple[list[Path], str]:
    """Download the files of the first pattern that matches any.

    Returns: (sorted paths, why there are none).
    """
    from huggingface_hub import snapshot_download  # here: importing it takes a second that --help can do without

    try:
        folder = Path(
            snapshot_download(
                repo, repo_type="dataset", allow_patterns=patterns, revision=revision, local_files_only=local_only
            )
        )
    except Exception as error:  # its own, httpx's and the system's errors: all mean "not from the hub"
        return [], _why_not(error)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for pattern in patterns:
        if matching := sorted(name for name in names if fnmatch.fnmatchcase(name, pattern)):
            return [folder / name for name in matching], ""
    return [], NOT_THERE


def fetch_split(hub: HubSource, revision: str | None, local_only: bool) -> tuple[list[Path], str]:
    """Download the files of a split, and nothing else but the README that says what it is.

    Where the hub cannot be reached: from its cache, by the README in it; else from the cache of `datasets`, as
    `datasets.load_dataset` left them.

    Returns: (paths in the order of `datasets`, why there are none).
    Raises: UserError when there is no such configuration or split, or only a part of it.
    """
    from huggingface_hub import snapshot_download

    where, problem = {"repo_type": "dataset", "revision": revision}, NOT_THERE
    if not local_only:
        try:
            names = _listed_on_hub(hub, revision)
            patterns = [README, *map(glob.escape, names)]
            folder = Path(snapshot_download(hub.repo, allow_patterns=patterns, **where))
            if names and all((folder / name).is_file() for name in names):
                say_taken(names, f"the hub's {hub.repo}")
                return [folder / name for name in names], ""
        except UserError:
            raise
        except FileNotFoundError as error:
            return [], f"{NOT_THERE}: {reason(error)}"
        except Exception as error:
            problem = _why_not(error)
    try:
        folder = Path(snapshot_download(hub.repo, local_files_only=True, **where))
    except Exception as error:
        return _from_datasets_cache(hub, revision), problem if problem != NOT_THERE else _why_not(error)
    readme = folder / README
    try:
        called = f"the hub's {hub.repo}, in its cache"
        files = files_of_splits(
            str(folder), readme if readme.is_file() else None, hub.config, hub.split, hub.data_files, called
        )
    except FileNotFoundError:
        return _from_datasets_cache(hub, revision), problem
    check_whole(files, called)
    if not local_only:
        say_taken([Path(file).relative_to(folder).as_posix() for file in files], called)
    return [Path(file) for file in files], ""


def _listed_on_hub(hub: HubSource, revision: str | None) -> list[str]:
    """The names of the files that a split is, in its repository."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().repo_info(hub.repo, repo_type="dataset", revision=revision)
    readme = None
    if any(sibling.rfilename == README for sibling in info.siblings):
        readme = Path(hf_hub_download(hub.repo, README, repo_type="dataset", revision=info.sha))
    base = f"hf://datasets/{hub.repo}@{info.sha}"
    files = files_of_splits(base, readme, hub.config, hub.split, hub.data_files, f"the hub's {hub.repo}")
    if elsewhere := [file for file in files if not file.startswith(f"{base}/")]:
        raise UserError(f"the hub's {hub.repo}: {elsewhere[0]} is not in it: give it by input_file_path")
    return [file.removeprefix(f"{base}/") for file in files]


def _from_datasets_cache(hub: HubSource, revision: str | None) -> list[Path]:
    """The Arrow files that `datasets` once made of a split; none where there are none of this revision."""
    from datasets.naming import filenames_for_dataset_split
    from datasets.packaged_modules.cache.cache import Cache

    own = {"data_files": hub.data_files} if hub.data_files is not None else {}
    try:
        cached = Cache(
            repo_id=hub.repo,
            dataset_name=hub.repo.rpartition("/")[2],
            config_name=hub.config,
            version="auto",
            hash="auto",
            **own,
        )
    except (ValueError, OSError):
        return []
    if revision not in (None, "main") and not cached.hash.startswith(revision):
        return []
    there = cached.info.splits or {}
    paths = []
    for name in there if hub.split == "all" else split_names(hub.split or "train"):
        if name not in there:
            raise UserError(
                f"the hub's {hub.repo}, in the cache of datasets: has no split {name!r}: {', '.join(there)}"
            )
        paths += filenames_for_dataset_split(
            cached.cache_dir, cached.dataset_name, name, "arrow", shard_lengths=there[name].shard_lengths
        )
    return [Path(path) for path in paths]


def _why_not(error: Exception) -> str:
    said = (str(error).strip() or "no details").splitlines()[0]
    return f"could not be reached: {type(error).__name__}: {said}"
