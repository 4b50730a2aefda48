"""Configurations and splits: which files of a folder or of a hub data set they are, and which rows a slice is.

`datasets` says it: by the data set's README, else by the names of its files. So a split is here what it is for
`datasets.load_dataset`, of which only the reading is left out. No code of a data set is ever run.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.load import nearest
from sources.messages import split_names
from utils.errors import UserError, reason

READ_BY_MODULE = ("json", "csv", "parquet", "arrow")  # of the modules of `datasets`, those whose files are read here
# What numbers the parts of a split: -00000-of-00003-<hash>, as in the hub's own files.
PART = re.compile(r"\d*|of|(part|shard|chunk)\d*|[0-9a-f]{16}")
OF_MANY = re.compile(r"(.*?)[-_.](\d+)[-_.]of[-_.](\d+)(.*)")
MOST_LISTED = 10


def slices(split: str, rows: int) -> list[tuple[int, int]]:
    """The rows, [start, stop), that each part of `train[:5%]+train[90%:]` is of a split with so many.

    Raises: UserError for a percentage that `datasets` cannot round as it is told to.
    """
    from datasets import ReadInstruction

    (name,) = split_names(split)
    try:
        return [(part.from_, part.to) for part in ReadInstruction.from_spec(split).to_absolute({name: rows})]
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split}: {reason(error)}") from None


def only_train(split: str | None, config: str | None, path: Path | str) -> None:
    """UserError where another split than train, or a configuration, is asked for of what has none: files."""
    if config is not None:
        raise UserError(f"config {config}: {path} is a file; a folder or a hub data set has configurations")
    if split and (others := [name for name in split_names(split) if name not in ("train", "all")]):
        raise UserError(f"split {others[0]}: {path} is a file, whose rows are the split train")


def saved_files(folder: Path, split: str | None) -> list[Path] | None:
    """The Arrow files of a folder that `save_to_disk` wrote; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        there = _of_json(folder / "dataset_dict.json", "splits")
        return [path for name in _wanted(split, there, folder) for path in saved_files(folder / name, None) or []]
    if not (folder / "state.json").is_file():
        return None
    only_train(split, None, folder)
    paths = [folder / part["filename"] for part in _of_json(folder / "state.json", "_data_files")]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]}: is missing, which state.json names: save the data set anew")
    return paths


def _of_json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not as `datasets` writes it: {reason(error)}") from None


def files_of_splits(
    base: str, readme: Path | None, config: str | None, split: str | None, data_files: Any, called: str
) -> list[str]:
    """The files of a folder or repository that a split is, in the order in which `datasets` reads them.

    Args:
        base: a folder, or `hf://datasets/ORG/NAME@COMMIT`.
        readme: its README.md, which may say what its configurations and splits are.
        data_files: patterns in place of what the README says.
        called: what it is called in errors.
    Raises:
        UserError: there is no such configuration or split, or its files are none that are read.
        FileNotFoundError: there is no such file.
    """
    from datasets.data_files import DataFilesList
    from datasets.load import infer_module_for_data_files_list
    from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS, _MODULE_TO_EXTENSIONS

    base, patterns, guessed = _patterns(base, readme, config, data_files, called)
    found: list[str] = []
    for name in _wanted(split, patterns, called):
        files = DataFilesList.from_patterns(patterns[name], base, allowed_extensions=_ALL_ALLOWED_EXTENSIONS)
        if not files:
            raise FileNotFoundError(f"no file matches {', '.join(map(str, patterns[name]))}")
        if zipped := [file for file in files if file.endswith(".zip")]:
            raise UserError(f"{called}: {zipped[0].rpartition('/')[2]} is a zip archive: unpack it")
        module, _ = infer_module_for_data_files_list(files)
        if module not in READ_BY_MODULE:
            shown = listed([file.rpartition("/")[2] for file in files])
            raise UserError(f"{called}: the split {name} is of no kind that is read: {shown}")
        found += files.filter(extensions=_MODULE_TO_EXTENSIONS[module])
    if guessed and split is None:
        kinds = dict.fromkeys(_stem(file.removeprefix(f"{base}/")) for file in found)
        if len(kinds) > 1:
            raise UserError(
                f"{called}: its README names no splits, and its file names {len(kinds)}: {listed(list(kinds))}: "
                "take one by `data_files`, or all by `split: train`"
            )
    return list(dict.fromkeys(found))


def _patterns(
    base: str, readme: Path | None, config: str | None, data_files: Any, called: str
) -> tuple[str, dict[str, list[str]], bool]:
    """Of a configuration: its folder, the patterns of each split, and whether they are guessed by words of names."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if data_files is not None:
        return base, sanitize_patterns(data_files), False
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data) if readme else {}
        default = configs.get_default_config_name() if configs else "default"
    except Exception as error:  # of YAML, and what `datasets` and huggingface_hub make of values
        raise UserError(f"{called}: its README.md cannot be made sense of: {reason(error)}") from None
    if not configs and config not in (None, "default"):
        there = "its README.md names none" if readme else "it has no README.md that could name one"
        raise UserError(f"{called}: has no configuration {config!r}: {there}")
    if configs and (config or default) not in configs:
        what = f"no configuration {config!r}" if config else "several configurations"
        hint = nearest(config, configs, "") if config else f": give one by `config`: {', '.join(configs)}"
        raise UserError(f"{called}: has {what}{hint}")
    given = configs[config or default] if configs else {}
    base = f"{base}/{given['data_dir']}" if given.get("data_dir") else base
    if given.get("data_files") is not None:
        return base, sanitize_patterns(given["data_files"]), False
    patterns = get_data_patterns(base)
    by_word = all("[0-9]" not in pattern for own in patterns.values() for pattern in own)
    return base, {str(name): own for name, own in patterns.items()}, by_word and patterns != DEFAULT_PATTERNS_ALL


def _wanted(split: str | None, there: Iterable[str], called: Any) -> list[str]:
    """The splits that are asked for, of those that there are."""
    there = list(there)
    names = split_names(split or "train")
    names = there if names == ["all"] else names
    for name in names:
        if name not in there:
            hint = nearest(name, there, "") if split else f": give one by `split`: {', '.join(there)}"
            raise UserError(f"{called}: has no split {name!r}{hint}")
    return names


def check_whole(files: Iterable[str], called: str) -> None:
    """UserError where only some of `-00000-of-00003` and its like are there, as after a download that was stopped."""
    parts: dict[tuple[str, ...], set[str]] = {}
    for file in files:
        if match := OF_MANY.fullmatch(file):
            parts.setdefault((match[1], match[3]), set()).add(match[2])
    for (stem, count), seen in parts.items():
        if len(seen) < int(count):
            raise UserError(f"{called}: only {len(seen)} of {int(count)} parts of {stem} are here: download the rest")


def _stem(file: str) -> str:
    """The path of a file without its endings and what numbers the parts of a split: `data/train-00000-of-00003`."""
    folder, _, name = file.rpartition("/")
    kept = [word for word in re.split(r"[\W_]+", name.partition(".")[0]) if not PART.fullmatch(word)]
    return "/".join(filter(None, [folder, "-".join(kept)]))


def say_taken(names: list[str], where: str) -> None:
    """Say which files of a folder or repository a split is; only where files are looked for to be read."""
    if os.environ.get("RANK", "0") == "0":  # utils.launch would bring torch for it
        print(f"files of {where}: {listed(names)}", flush=True)


def listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + f" and {len(names) - MOST_LISTED:,} more" * (len(names) > MOST_LISTED)
