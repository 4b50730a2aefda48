"""Data files of the Hugging Face hub: found by name, or by what `datasets` says a split is; works offline."""

import fnmatch
import glob
import tempfile
from pathlib import Path

from data.splits import CARDS, SplitFiles, check_whole, files_of_splits, listed, say_taken
from sources.messages import split_names
from sources.source import HubSource
from utils.errors import UserError, reason

NOT_THERE = "no such file there"
CONVERTED = "refs/convert/parquet"  # the branch in which the hub keeps what it made of a data set itself


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


def fetch_split(hub: HubSource, revision: str | None, local_only: bool) -> tuple[SplitFiles | None, str]:
    """Download the files of a split, and nothing else but the README that says what it is.

    Where the hub cannot be reached: from its cache, by the README and the list of files in it; else from the cache of
    `datasets`, as `datasets.load_dataset` left them.

    Returns: (paths in the order of `datasets`, why there are none).
    Raises: UserError when there is no such configuration or split, or only a part of it.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    where, called, problem = {"repo_type": "dataset", "revision": revision}, f"the hub's {hub.repo}", ""
    if not local_only:
        try:
            info = HfApi().repo_info(hub.repo, **where)
            there = [sibling.rfilename for sibling in info.siblings]
            cards = [name for name in CARDS if name in there]
            cards = [Path(hf_hub_download(hub.repo, card, repo_type="dataset", revision=info.sha)) for card in cards]
            of_splits, left_out = _names_of_split(hub, there, cards, called)
            names = _all_of(of_splits)
            patterns = [*CARDS, *map(glob.escape, names)]
            folder = Path(snapshot_download(hub.repo, allow_patterns=patterns, **where))
            say_taken(names, left_out, called)
            return _within(folder, of_splits), ""
        except UserError:
            raise
        except FileNotFoundError as error:
            return None, f"{NOT_THERE}: {error}"
        except Exception as error:  # its own, httpx's and the system's errors: all mean "not from the hub"
            problem = _why_not(error)
    called += ", in its cache"
    try:
        folder = Path(snapshot_download(hub.repo, local_files_only=True, allow_patterns=[*CARDS], **where))
    except Exception as error:
        return _from_datasets_cache(hub, revision), problem or _why_not(error)
    cards = [folder / name for name in CARDS if (folder / name).is_file()]
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    try:
        of_splits, left_out = _names_of_split(hub, _cached_list(hub.repo, revision) or sorted(here), cards, called)
    except FileNotFoundError:
        of_splits, left_out = {}, []
    except UserError:  # of a script, say, which `datasets` may have run when it still did
        if paths := _from_datasets_cache(hub, revision):
            return paths, ""
        raise
    names = _all_of(of_splits)
    if not here & {*names}:
        return _from_datasets_cache(hub, revision), problem or NOT_THERE
    if missing := [name for name in names if name not in here]:
        raise UserError(f"{called}: {len(missing)} of {len(names)} files are missing: {listed(missing)}: download them")
    check_whole(names, called)
    if not local_only:
        say_taken(names, left_out, called)
    return _within(folder, of_splits), ""


def _all_of(of_splits: dict[str, list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in of_splits.values() for name in names))


def _within(folder: Path, of_splits: dict[str, list[str]]) -> SplitFiles:
    return SplitFiles({split: [folder / name for name in names] for split, names in of_splits.items()})


def _names_of_split(
    hub: HubSource, there: list[str], cards: list[Path], called: str
) -> tuple[dict[str, list[str]], list[str]]:
    """The names of each split's files among all of a repository's, and of those that are left out, as `files_of_splits`
    finds them in a folder of empty files of these names."""
    if (script := f"{hub.repo.rpartition('/')[2]}.py") in there and hub.data_files is None:
        raise UserError(
            f"{called}: is a script ({script}), which is not run: name its files by `data_files`, or take what the hub "
            f"made of it by `revision: {CONVERTED}`"
        )
    with tempfile.TemporaryDirectory() as made:
        base = Path(made).resolve()
        for path in (base / name for name in there if ".." not in name.split("/")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        own = (hub.config, hub.split, hub.data_files)
        of_splits, others = files_of_splits(str(base), cards, *own, called, "`data_files`")
    if elsewhere := [file for file in _all_of(of_splits) if not file.startswith(f"{base}/")]:
        raise UserError(f"{called}: {elsewhere[0]} is not in it: give it by input_file_path")
    *lists, left_out = ([file.removeprefix(f"{base}/") for file in some] for some in [*of_splits.values(), others])
    return dict(zip(of_splits, lists, strict=True)), left_out


def _cached_list(repo: str, revision: str | None) -> list[str] | None:
    """The names of a repository's files, as the hub's client keeps them since its version 2; None where it did not."""
    from huggingface_hub import get_cached_repo_tree

    try:
        return [file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=revision)]
    except Exception:  # its own, where there is none
        return None


def _from_datasets_cache(hub: HubSource, revision: str | None) -> SplitFiles | None:
    """The Arrow files that `datasets` once made of a split; None where there are none of this revision."""
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
    except (ValueError, OSError) as error:
        if "multiple" in str(error):
            raise UserError(
                f"the hub's {hub.repo}, in the cache of datasets: give its `config`: {reason(error)}"
            ) from None
        return None
    if revision not in (None, "main") and not cached.hash.startswith(revision):
        return None
    there = cached.info.splits or {}
    paths: dict[str, list[Path]] = {}
    for name in there if hub.split == "all" else split_names(hub.split or "train"):
        if name not in there:
            raise UserError(
                f"the hub's {hub.repo}, in the cache of datasets: has no split {name!r}: {', '.join(there)}"
            )
        files = filenames_for_dataset_split(
            cached.cache_dir, cached.dataset_name, name, "arrow", shard_lengths=there[name].shard_lengths
        )
        paths[name] = [Path(path) for path in files]
    return SplitFiles(paths)


def _why_not(error: Exception) -> str:
    said = (str(error).strip() or "no details").splitlines()[0]
    return f"could not be reached: {type(error).__name__}: {said}"
