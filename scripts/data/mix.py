"""The prepared mix: every conversation of every data set, tokenized once, in memory-mapped Arrow files.

A data set's folder (`data/prepared.py`) is written as the source is read, so that memory stays flat whatever the
source's size.

Preparation runs before any process group exists. Whichever process comes first does it, under a file lock; the others
wait for the lock, not in a collective that would time out, and read the same files. The folder's name is a hash of
everything that changes its content, and it appears under that name only when it is whole. What is found damaged there
is made anew.
"""

import gc
import hashlib
import itertools
import json
import os
import shutil
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import sources
from data.arrow_arrays import booleans, integers
from data.dialogue import encode
from data.files import source_files
from data.prepared import EXAMPLES, SCHEMA, SPLIT, WEIGHTS, Prepared, open_prepared, record_batch, seal
from data.reading import TRAIN, VALIDATION, Reading
from data.splits import SplitFiles
from data.text_encoder import TextEncoder, fast_text_encoder
from recipe.keys import Recipe
from sources.registry import SOURCES
from sources.source import keys_that_change
from utils.errors import UserError
from utils.files import lock_file, remove_tree

ROOM = Path(__file__).parent
ROWS_AT_A_TIME = 1000
CHARACTERS_AT_A_TIME = 2**29  # of up to 4 bytes, since Arrow's texts lie at offsets of 32 bits
ENCODING_KEYS = {"label_masking", "use_system_tag", "system_property_dropout", "system_add_length"}


@dataclass
class Split:
    """Examples of one split, those of the first data set first."""

    dataset: np.ndarray  # int64 [examples], the index of each example's data set in `Mix.names`
    position: np.ndarray  # int64 [examples], its row in that data set's table
    lengths: np.ndarray  # int64 [examples], tokens, whole conversations
    targets: np.ndarray  # int64 [examples], scored tokens
    tables: list[pa.Table]  # of each data set, of SCHEMA, memory-mapped
    weights: np.ndarray | None = None  # float64 [examples], the record's times the data set's; None where all are 1

    def __len__(self) -> int:
        return len(self.dataset)

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids (int32 [tokens]) and scored (bool [tokens]) of one example, not cut to max_length."""
        ids, scored = self._value(row, "input_ids"), self._value(row, "scored")
        return integers(ids.values), booleans(scored.values)

    def messages(self, row: int) -> list[dict[str, str]]:
        """The conversation of one example: [{"role", "content"}]."""
        return self._value(row, "messages").as_py()

    @cached_property
    def relative_weights(self) -> np.ndarray:
        """The weights as parts of the largest: nothing else of them counts, and fp32 holds sums of these."""
        return np.ones(len(self)) if self.weights is None else self.weights / (self.weights.max(initial=0) or 1)

    def select(self, rows: np.ndarray) -> "Split":
        """The examples of these rows (int64 or bool), in this order, over the same tables."""
        columns = (self.dataset, self.position, self.lengths, self.targets)
        weights = None if self.weights is None else self.weights[rows]
        return Split(*(column[rows] for column in columns), self.tables, weights)

    def _value(self, row: int, column: str) -> pa.Scalar:
        return self.tables[self.dataset[row]][column][int(self.position[row])]


@dataclass
class Mix:
    """All data sets of a recipe."""

    names: list[str]
    train: Split
    validation: Split
    # Of each data set by name, the fields of `data.prepared.Report`.
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each data set, that of its tokens, scored positions and split."""
        return {name: report["fingerprint"] for name, report in self.reports.items()}


def prepare_mix(recipe: Recipe, tokenizer) -> Mix:
    """Tokenize what is not prepared yet, and open all of it.

    Raises: UserError when a data file is missing or broken, or a data set has no training conversation left.
    """
    root = prepared_folder(recipe)
    tokenizer_json = tokenizer.backend_tokenizer.to_str().encode()
    paths, folders = {}, {}
    for name in recipe.datasets.chosen():
        paths[name] = source_files(name, recipe)
        key = _cache_key(name, paths[name], recipe, tokenizer.eos_token, tokenizer_json)
        folders[name] = root / f"{name}-{key}"

    opened = {name: _open_whole(folder) for name, folder in folders.items()}
    missing = [name for name in folders if not opened[name]]
    missing.sort(key=lambda name: sum(path.stat().st_size for path in paths[name]), reverse=True)
    with ThreadPoolExecutor(1) as thread:  # loads the encoder while the first data set, the largest, is read
        loading = thread.submit(fast_text_encoder, tokenizer) if missing else None
        for name in missing:
            folder = folders[name]
            with lock_file(Path(f"{folder}.lock")):
                opened[name] = _open_whole(folder, name)
                if not opened[name]:
                    _prepare(folder, name, paths[name], recipe, tokenizer, loading)
                    opened[name] = open_prepared(folder)

    reports = {name: one.report for name, one in opened.items()}
    weights = [options.weight for options in recipe.datasets.chosen().values()]
    train, validation = (_split(list(opened.values()), weights, which) for which in (TRAIN, VALIDATION))
    return Mix(list(opened), train, validation, reports)


def _open_whole(folder: Path, locked_for: str | None = None) -> Prepared | None:
    """The data set in a folder; None where there is none, or it is damaged. Then, with its lock held for the data set
    of this name, it is removed, with a line that says so."""
    try:
        return open_prepared(folder)
    except UserError as error:
        if locked_for:
            print(f"prepared data of {locked_for}: {error}: made anew", flush=True)
            _remove(folder)
        return None


def _remove(folder: Path) -> None:
    try:
        if os.path.lexists(folder):
            remove_tree(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made anew: {error.strerror}: give another cache_dir") from None


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


def _cache_key(name: str, paths: SplitFiles, recipe: Recipe, eos: str, tokenizer_json: bytes) -> str:
    """A hash of all that the prepared data depend on: files, tokenizer, rules and the code that applies them."""
    digest = hashlib.blake2b(digest_size=10)
    for path in [*paths, *code_files(name)]:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError as error:
            raise UserError(f"data set {name}: {path}: cannot read this file: {error.strerror}") from error
    digest.update(tokenizer_json)
    options, places = recipe.datasets.chosen()[name], {path: place for place, path in enumerate(paths)}
    rules = {
        "dataset": name,
        "files": {split: [places[path] for path in own] for split, own in paths.by_name.items()},
        "eos": eos,
        "options": options.model_dump(mode="json", include=keys_that_change("data", type(options))),
        **recipe.model_dump(mode="json", include=keys_that_change("data", Recipe)),
    }
    digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()


def code_files(name: str) -> list[Path]:
    """What decides how a data set is prepared: all of this room, its source, and what the sources share."""
    others = SOURCES.keys() - {name if name in SOURCES else "messages"}
    own_of_another = tuple(f"{other}_" for other in others)  # messages_forms.py is of messages alone
    of_sources = [
        path
        for path in Path(sources.__path__[0]).iterdir()
        if path.stem not in others and not path.stem.startswith(own_of_another)
    ]
    return sorted(
        path for path in [*ROOM.iterdir(), *of_sources] if path.suffix in (".py", ".txt") and path.name[0] != "."
    )


def _prepare(
    folder: Path, name: str, paths: list[Path], recipe: Recipe, tokenizer, loading: Future[TextEncoder]
) -> None:
    """Read, tokenize and split one data set into `folder`, which appears only when it is whole; under its lock."""
    source = Reading(name, recipe.datasets.chosen()[name], paths, recipe.rng_seed)
    work = folder.with_name(f".{folder.name}")
    _remove(work)  # left by a run that was killed, since the lock is ours
    work.mkdir()
    kept: list[bool] = []  # of each conversation, whether any token is scored; else there is nothing to learn
    weights = array("d")  # of those
    content = hashlib.blake2b(digest_size=10)
    frozen = gc.get_freeze_count()  # by whoever called this
    if not frozen:  # else the collector looks through all that the libraries made, again and again: a fifth of the time
        gc.freeze()
    try:
        with pa.ipc.new_stream(work / EXAMPLES, SCHEMA) as writer:
            conversations, again = itertools.tee(source)  # encode reads ahead by one batch
            encoded = encode(
                tokenizer,
                again,
                **recipe.model_dump(include=ENCODING_KEYS),
                train_on=source.options.train_on,
                seed=recipe.rng_seed,
                batch_size=ROWS_AT_A_TIME,
                encode_texts=lambda texts: loading.result()(texts),
            )
            examples = zip(conversations, encoded, strict=True)
            while batch := list(itertools.islice(examples, ROWS_AT_A_TIME)):
                teaches = [bool(scored.any()) for _, (_, scored) in batch]
                batch = list(itertools.compress(batch, teaches))
                characters = sum(len(message.content) for conversation, _ in batch for message in conversation.messages)
                rows = ROWS_AT_A_TIME if characters < CHARACTERS_AT_A_TIME else 1
                for first in range(0, len(batch), rows):
                    writer.write_batch(record_batch(batch[first : first + rows]))
                kept += teaches
                weights.extend(conversation.weight for conversation, _ in batch)
                for _, (ids, scored) in batch:
                    content.update(len(ids).to_bytes(8, "little"))  # where one conversation ends and the next begins
                    content.update(ids)
                    content.update(scored)
        codes = source.split(np.array(kept, dtype=bool))
        np.save(work / SPLIT, codes)
        content.update(codes)
        spread = ""
        if any(weight != 1 for weight in weights):
            np.save(work / WEIGHTS, weights)
            content.update(weights)
            spread = f" of weights from {min(weights):g} to {max(weights):g}"
        report = {
            "rows_read": source.rows_read,
            "dropped": dict(source.dropped),
            "used": {", ".join(fields): count for fields, count in source.used.items()},
            "unused": dict(source.unused),
            "bad_records": source.bad_records,
            "first_bad_record": source.first_bad_record,
            "conversations": len(codes),
            "fingerprint": content.hexdigest(),
        }
        seal(work, folder, report)
        work.rename(folder)
    finally:
        if not frozen:
            gc.unfreeze()
        shutil.rmtree(work, ignore_errors=True)
    print(  # not only on the first process: any of them may be the one that prepares
        f"prepared {name}: {source.rows_read:,} rows, {(codes == TRAIN).sum():,} training and "
        f"{(codes == VALIDATION).sum():,} validation conversations{spread} ({source.losses()})",
        flush=True,
    )


def _split(opened: list[Prepared], weights: list[float], which: int) -> Split:
    """The examples of one split; `weights` are those of the data sets."""
    positions = [np.flatnonzero(one.codes == which) for one in opened]
    dataset, chosen = np.repeat(range(len(opened)), [*map(len, positions)]), list(zip(opened, positions, strict=True))
    lengths, targets = (
        np.concatenate([integers(one.table[name].combine_chunks())[own] for one, own in chosen])
        for name in ("length", "targets")
    )
    counted = np.concatenate([one.weights[own] for one, own in chosen]) * np.array(weights)[dataset]
    tables, positions = [one.table for one in opened], np.concatenate(positions)
    return Split(dataset, positions, lengths, targets, tables, None if (counted == 1).all() else counted)
