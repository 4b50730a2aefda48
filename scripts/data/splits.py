"""Configurations and splits: which files of a folder or of a hub data set they are, and which rows a slice is.

`datasets` says it: by the data set's README and .huggingface.yaml, else by the names of its files. So a split is here
what it is for `datasets.load_dataset`, of which only the reading is left out. No code of a data set is ever run.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.tables import DELIMITERS
from recipe.load import nearest
from sources.messages import split_names
from utils.errors import UserError, reason

READ_BY_MODULE = ("json", "csv", "parquet", "arrow")  # of the modules of `datasets`, those whose files are read here
# What numbers the parts of a split: -00000-of-00003-<hash>, as in the hub's own files.
PART = re.compile(r"\d*|of|(part|shard|chunk)\d*|[0-9a-f]{16}")
OF_MANY = re.compile(r"(.*?)[-_.](\d+)[-_.]of[-_.](\d+)(.*)")
MOST_LISTED = 10
CARDS = ("README.md", ".huggingface.yaml")  # what the second says counts before what the first does
# Of what a configuration can tell `datasets` of the reading of its files, what makes no other text of them. Records
# under a key (`field`) are found by what they hold.
CHANGES_NO_TEXT = {
    *("version", "description", "features", "field", "chunksize", "batch_size", "block_size", "use_threads"),
    *("low_memory", "memory_map"),
}
# Values that say what is done anyway, beside those that `datasets` has without being told: the delimiter is found by
# the first line, which is the header.
DONE_ANYWAY = {
    **dict.fromkeys(("sep", "delimiter"), (None, *DELIMITERS)),
    "header": (0,),
    "encoding": (None, "utf-8", "utf8", "utf-8-sig", "UTF-8", "UTF8"),
}


class SplitFiles(list[Path]):
    """The data files that a recipe's split is made of, each once.

    Attributes:
        by_name: those of each split that it names, in the order of their rows; of files that have no splits, train's.
            What two patterns match is there twice, as in `datasets`.
    """

    def __init__(self, by_name: dict[str, list[Path]]):
        super().__init__(dict.fromkeys(path for paths in by_name.values() for path in paths))
        self.by_name = by_name


def slices(split: str, rows: dict[str, int]) -> list[tuple[str, int, int]]:
    """The rows, [start, stop), that each part of `train[:5%]+test[90%:]` is of a split, by the rows that each has.

    Raises: UserError for a percentage that `datasets` cannot round as it is told to, or for bounds in the wrong order.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute(rows)
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split}: {reason(error)}") from None
    if backwards := [part for part in parts if part.from_ > part.to]:
        part = backwards[0]
        bounds = f"{part.from_:,} to {part.to:,} of the {rows[part.splitname]:,} rows of {part.splitname}"
        raise UserError(f"split {split}: {bounds} are none: give the smaller bound first")
    return [(part.splitname, part.from_, part.to) for part in parts]


def only_train(split: str | None, config: str | None, path: Path | str) -> None:
    """UserError where another split than train, or a configuration, is asked for of what has none: files."""
    if config is not None:
        raise UserError(f"config {config}: {path} is a file; a folder or a hub data set has configurations")
    if split not in (None, "all") and (others := [name for name in split_names(split) if name != "train"]):
        raise UserError(f"split {others[0]}: {path} is a file, whose rows are the split train")


def saved_files(folder: Path, split: str | None) -> SplitFiles | None:
    """The Arrow files of a folder that `save_to_disk` wrote; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        there = _of_json(folder / "dataset_dict.json", "splits")
        return SplitFiles({name: saved_files(folder / name, None) or [] for name in _wanted(split, there, folder)})
    if not (folder / "state.json").is_file():
        return None
    only_train(split, None, folder)
    paths = [folder / part["filename"] for part in _of_json(folder / "state.json", "_data_files")]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]}: is missing, which state.json names: save the data set anew")
    return SplitFiles({"train": paths})


def _of_json(path: Path, name: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not as `datasets` writes it: {reason(error)}") from None


def files_of_splits(
    base: str, cards: list[Path], config: str | None, split: str | None, data_files: Any, called: str, remedy: str
) -> tuple[dict[str, list[str]], list[str]]:
    """The files of a folder that each split of those asked for is, in the order in which `datasets` reads them.

    Args:
        base: the folder.
        cards: those of `CARDS` that there are, which may say what its configurations and splits are.
        data_files: patterns in place of what they say.
        called: what it is called in errors.
        remedy: by what a recipe names its files instead.
    Returns: the files of each split by its name; and those that are left out since most are of another kind.
    Raises:
        UserError: there is no such configuration or split, or its files are none that are read, or not as it says.
        FileNotFoundError: there is no such file.
    """
    from datasets.data_files import DataFilesList
    from datasets.load import infer_module_for_data_files_list
    from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS, _MODULE_TO_EXTENSIONS

    folder = Path(base)
    given, card = _configuration(cards, config, called) if data_files is None else ({}, "")
    base, patterns, guessed = _patterns(base, given, data_files)
    found: dict[str, list[str]] = {}
    left_out: list[str] = []
    for name in _wanted(split, patterns, called):
        try:
            files = DataFilesList.from_patterns(patterns[name], base, allowed_extensions=_ALL_ALLOWED_EXTENSIONS)
        except FileNotFoundError as error:  # it lists 200 endings
            said = str(error).partition(" with any supported")[0].replace(f"{base}/", "")
            raise FileNotFoundError(said) from None
        if not files:
            raise _nothing_read(folder)
        if zipped := [file for file in files if file.endswith(".zip")]:
            raise UserError(f"{called}: {zipped[0].rpartition('/')[2]} is a zip archive: unpack it")
        module, _ = infer_module_for_data_files_list(files)
        if module not in READ_BY_MODULE:
            shown = listed([file.rpartition("/")[2] for file in files])
            raise UserError(f"{called}: the split {name} is of no kind that is read: {shown}")
        kept = files.filter(extensions=_MODULE_TO_EXTENSIONS[module])
        _check_arguments(given, module, f"{called}: its {card}", remedy)
        found[name] = [*kept]
        left_out += [file for file in files if file not in {*kept}]
    if guessed and split is None:
        kinds = dict.fromkeys(_stem(file.removeprefix(f"{base}/")) for files in found.values() for file in files)
        if len(kinds) > 1:
            raise UserError(
                f"{called}: {' and '.join(CARDS)} name no splits, and its file names {len(kinds)}: "
                f"{listed(list(kinds))}: take one by {remedy}, or all by `split: train`"
            )
    return found, list(dict.fromkeys(left_out))


def _configuration(cards: list[Path], config: str | None, called: str) -> tuple[dict[str, Any], str]:
    """What is said of a configuration, or of the default one, and by which card; nothing where none says any."""
    import yaml
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import metadata_load

    said, said_by, names = {}, "", " or ".join(card.name for card in cards)
    try:
        for card in cards:
            own = (metadata_load(card) if card.suffix == ".md" else yaml.safe_load(card.read_bytes())) or {}
            said, said_by = said | own, card.name if "configs" in own else said_by
        configs = MetadataConfigs.from_dataset_card_data(said)
        default = configs.get_default_config_name() if configs else "default"
        if default is None and len(described := DatasetInfosDict.from_dataset_card_data(said)) == 1:
            (default,) = described
    except Exception as error:  # of YAML, and what `datasets` and huggingface_hub make of values
        raise UserError(f"{called}: its {names} cannot be made sense of: {reason(error)}") from None
    if not configs and config not in (None, "default"):
        there = f"its {names} names none" if cards else "it has no README.md that could name one"
        raise UserError(f"{called}: has no configuration {config!r}: {there}")
    if configs and (config or default) not in configs:
        what = f"no configuration {config!r}" if config else "several configurations"
        hint = nearest(config, configs, "") if config else f": give one by `config`: {', '.join(configs)}"
        raise UserError(f"{called}: has {what}{hint}")
    return (configs[config or default] if configs else {}), said_by


def _check_arguments(given: dict[str, Any], module: str, card: str, remedy: str) -> None:
    """UserError where a configuration says how its files are to be read, and they are not read so here."""
    arguments = given.keys() - {"data_files", "data_dir", "default", *CHANGES_NO_TEXT}
    if not arguments:
        return
    from datasets.load import import_main_class
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    known = import_main_class(_PACKAGED_DATASETS_MODULES[module][0]).BUILDER_CONFIG_CLASS
    for name in sorted(name for name in arguments if hasattr(known, name)):  # another one `datasets` ignores, too
        done = (getattr(known, name), *DONE_ANYWAY.get(name, ()))
        if not any(type(given[name]) is type(value) and given[name] == value for value in done):  # false is not 0
            raise UserError(
                f"{card} says that its files are to be read with {name}: {given[name]!r}, which they are not here: "
                f"name them themselves, by {remedy}, and their fields by `columns`"
            )


def _nothing_read(folder: Path) -> FileNotFoundError:
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    what = f"none of its files has an ending of what is read ({listed(there)})" if there else "it holds no file"
    return FileNotFoundError(f"{what}: name them by a pattern" if there else what)


def _patterns(base: str, given: dict[str, Any], data_files: Any) -> tuple[str, dict[str, list[str]], bool]:
    """Of a configuration: its folder, the patterns of each split, and whether they are guessed by words of names."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns, sanitize_patterns

    if data_files is not None:
        return base, sanitize_patterns(data_files), False
    base = f"{base}/{given['data_dir']}" if given.get("data_dir") else base
    if given.get("data_files") is not None:
        return base, sanitize_patterns(given["data_files"]), False
    try:
        patterns = get_data_patterns(base)
    except FileNotFoundError:
        raise _nothing_read(Path(base)) from None
    by_word = all("[0-9]" not in pattern for own in patterns.values() for pattern in own)
    return base, {str(name): own for name, own in patterns.items()}, by_word and patterns != DEFAULT_PATTERNS_ALL


def _wanted(split: str | None, there: Iterable[str], called: Any) -> list[str]:
    """The splits that are asked for, of those that there are."""
    there = list(there)
    names = there if split == "all" else split_names(split or "train")
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
            raise UserError(
                f"{called}: only {len(seen)} of {int(count)} parts of {stem} are here: download the rest, or "
                "name those that are here by a pattern"
            )


def _stem(file: str) -> str:
    """The path of a file without its endings and what numbers the parts of a split: `data/train-00000-of-00003`."""
    folder, _, name = file.rpartition("/")
    kept = [word for word in re.split(r"[\W_]+", name.partition(".")[0]) if not PART.fullmatch(word)]
    return "/".join(filter(None, [folder, "-".join(kept)]))


def say_taken(names: list[str], left_out: list[str], where: str) -> None:
    """Say which files of a folder or repository a split is; only where files are looked for to be read."""
    if os.environ.get("RANK", "0") == "0":  # utils.launch would bring torch for it
        others = f"; left out, as they are of another kind: {listed(left_out)}" if left_out else ""
        print(f"files of {where}: {listed(names)}{others}", flush=True)


def say_twice(dataset: str, files: SplitFiles) -> None:
    """Say which files of a data set are read more than once, since two patterns or splits have them."""
    counts = Counter(path for paths in files.by_name.values() for path in paths)
    if (again := [path.name for path in files if counts[path] > 1]) and os.environ.get("RANK", "0") == "0":
        what = "two patterns or splits have them, and what is held out may be trained on as well"
        print(f"warning: data set {dataset}: read more than once: {listed(again)}: {what}", flush=True)


def listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + f" and {len(names) - MOST_LISTED:,} more" * (len(names) > MOST_LISTED)
