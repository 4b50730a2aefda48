"""The prepared mix: every conversation of every data set, tokenized once, in memory-mapped Arrow files.

Preparation runs before any process group exists. Whichever process comes first does it, under a file lock; the others
wait for the lock, not in a collective that would time out, and read the same files. The folder's name is a hash of
everything that changes its content, and it appears under that name only when it is whole.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from utils import data_files, dialogue, sources
from utils.data_files import find_data_file
from utils.dialogue import encode
from utils.errors import UserError
from utils.launch import say
from utils.recipe import DatasetOptions, Recipe
from utils.sources import SOURCES, Conversation, load_source

SPLITS = ("train", "validation")
ROWS_AT_A_TIME = 1000
SCHEMA = pa.schema(
    {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "input_ids": pa.large_list(pa.int32()),
        "scored": pa.large_list(pa.bool_()),
        "length": pa.int64(),
        "targets": pa.int64(),
    }
)


@dataclass
class Split:
    """Examples of one split, those of the first data set first.

    Attributes:
        dataset: int64 [examples], the index of each example's data set in `Mix.names`.
        lengths: int64 [examples], tokens, whole conversations.
        targets: int64 [examples], scored tokens.
    """

    dataset: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    tables: list[pa.Table]

    def __len__(self) -> int:
        return len(self.dataset)

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids (int32 [tokens]) and scored (bool [tokens]) of one example, not cut to max_length."""
        values = self._values(row)
        return values["input_ids"].values.to_numpy(), values["scored"].values.to_numpy(zero_copy_only=False)

    def messages(self, row: int) -> list[dict[str, str]]:
        """The conversation of one example: [{"role", "content"}]."""
        return self._values(row)["messages"].as_py()

    def _values(self, row: int) -> dict[str, pa.Scalar]:
        dataset = self.dataset[row]
        first = np.searchsorted(self.dataset, dataset)
        table = self.tables[dataset]
        return {name: table[name][int(row - first)] for name in SCHEMA.names}


@dataclass
class Mix:
    """All data sets of a recipe."""

    names: list[str]
    train: Split
    validation: Split


def prepare_mix(recipe: Recipe, tokenizer) -> Mix:
    """Tokenize what is not prepared yet, and open all of it.

    Raises:
        UserError: a data file is missing or broken, or a data set has no training conversation left.
    """
    root = prepared_folder(recipe)
    tables: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    for name, options in recipe.datasets.chosen().items():
        paths = find_data_file(name, options.input_file_path, recipe.cache_dir, options.revision, SOURCES[name].hub)
        folder = root / f"{name}-{_fingerprint(name, options, paths, recipe, tokenizer)}"
        if not folder.exists():
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    _prepare(folder, name, options, paths, recipe, tokenizer)
        for split in SPLITS:
            with pa.memory_map(str(folder / f"{split}.arrow")) as file:
                tables[split].append(pa.ipc.open_stream(file).read_all())
    return Mix(list(recipe.datasets.chosen()), _split(tables["train"]), _split(tables["validation"]))


def prepared_folder(recipe: Recipe) -> Path:
    """Where prepared data are kept: cache_dir/prepared, or .cache/prepared when that is read-only."""
    folder = recipe.cache_dir / "prepared"
    there = folder if folder.exists() else recipe.cache_dir
    # The mode bits as well: root may write anywhere, also where somebody asked for the opposite.
    if there.exists() and not (there.stat().st_mode & 0o222 and os.access(there, os.W_OK)):
        folder = Path(".cache") / "prepared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir = {recipe.cache_dir}: cannot make {folder}: {error.strerror}") from error
    return folder


def _fingerprint(name: str, options: DatasetOptions, paths: list[Path], recipe: Recipe, tokenizer) -> str:
    """A hash of all that the prepared data depend on: files, tokenizer, rules and the code that applies them."""
    digest = hashlib.blake2b(digest_size=10)
    code = [__file__, data_files.__file__, dialogue.__file__, sources.__file__, sources.FILTER_PHRASES_FILE]
    for path in [*paths, *code]:
        try:
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"data set {name}: {path}: cannot read this file: {error.strerror}") from error
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    keys = ("label_masking", "use_system_tag", "system_property_dropout", "system_add_length", "rng_seed")
    rules = {
        "dataset": name,
        "eos": tokenizer.eos_token,
        "options": options.model_dump(mode="json", exclude={"fraction", "size", "input_file_path", "revision"}),
        **{key: getattr(recipe, key) for key in keys},
    }
    digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()


def _prepare(folder: Path, name: str, options: DatasetOptions, paths: list[Path], recipe: Recipe, tokenizer) -> None:
    """Read, split and tokenize one data set into `folder`, which appears only when it is whole; under its lock."""
    data = load_source(name, options, paths, recipe.rng_seed)
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed, since the lock is ours
    work.mkdir()
    try:
        for split in SPLITS:
            with pa.ipc.new_stream(work / f"{split}.arrow", SCHEMA) as writer:
                examples = zip(getattr(data, split), _encode(getattr(data, split), recipe, tokenizer), strict=True)
                while batch := list(itertools.islice(examples, ROWS_AT_A_TIME)):
                    writer.write_batch(_record_batch(batch))
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in data.dropped.items() if count)
    say(
        f"prepared {name}: {data.rows_read:,} rows, {len(data.train):,} training and {len(data.validation):,} "
        f"validation conversations{f' (dropped: {dropped})' if dropped else ''}"
    )


def _encode(conversations: list[Conversation], recipe: Recipe, tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return encode(
        tokenizer,
        conversations,
        label_masking=recipe.label_masking,
        use_system_tag=recipe.use_system_tag,
        system_property_dropout=recipe.system_property_dropout,
        system_add_length=recipe.system_add_length,
        seed=recipe.rng_seed,
    )


def _record_batch(examples: list[tuple[Conversation, tuple[np.ndarray, np.ndarray]]]) -> pa.RecordBatch:
    """Rows of SCHEMA from conversations and what they were encoded to."""
    columns = {
        "messages": [conversation.as_dicts() for conversation, _ in examples],
        "input_ids": [ids for _, (ids, _) in examples],
        "scored": [scored for _, (_, scored) in examples],
        "length": [len(ids) for _, (ids, _) in examples],
        "targets": [int(scored.sum()) for _, (_, scored) in examples],
    }
    return pa.record_batch(columns, schema=SCHEMA)


def _split(tables: list[pa.Table]) -> Split:
    columns = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in ("length", "targets")}
    dataset = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return Split(dataset, columns["length"], columns["targets"], tables)
