"""Checkpoints: whole or absent, verified, and only as many as the recipe keeps.

    checkpoint-<step>/                 the model and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them
    checkpoint-<step>/trainer_state/   state.json: where the run stands, and the checksum of every file
                                       process-<n>.json: a process's random states and sums
                                       optimizer-<process>-<part>.safetensors (training/optimizer_state.py)

A checkpoint is written as .checkpoint-<step>, by every process its part, and takes its name when all of it is verified
and on the disk. What it holds beside the files of its state.json is never read.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import PreTrainedModel

from recipe.keys import Recipe
from run.best import Best, keep_checkpoints
from run.checkpoint_state import (
    FORMAT,
    ProcessState,
    State,
    process_file,
    read_process_states,
    read_state,
    sealed,
)
from run.model_files import as_readable_as_others, save_model
from run.retention import NUMBERED, remove_folder
from run.stats import TrainingStats
from training.adapter_files import ADAPTER_FILES
from training.checkpoint_files import TRAINER_STATE, check_file, state_file
from training.engine import Engine
from training.optimizer_state import random_state, save_optimizer
from training.plan import Position
from utils.errors import UserError
from utils.files import UNFINISHED, checksum, flush, remove_tree
from utils.launch import stop_all


@dataclass
class Checkpoint:
    """A whole checkpoint that a run can go on from.

    Attributes:
        state: its state.json.
        processes: what each process that wrote it wrote of itself.
    """

    path: Path
    state: State
    processes: list[ProcessState]

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.state.step

    @property
    def position(self) -> Position:
        """How far it has come in the data."""
        return Position(**self.state.position.model_dump())

    def best(self, metric: str) -> Best | None:
        """The best evaluation up to here; None where it was another metric's."""
        best = self.state.best
        return Best(**best.model_dump()) if best and best.metric == metric else None

    @property
    def optimizer_files(self) -> list[Path]:
        return [self.path / name for name in self.state.optimizer_files]

    @contextmanager
    def model_folder(self) -> Iterator[Path]:
        """A folder of links to the model's files: transformers takes what it finds, and somebody may have added some
        (a model.safetensors beside the parts of one is read in their place, an adapter_config.json on top)."""
        with tempfile.TemporaryDirectory() as folder:
            links = Path(folder) / self.path.name
            for name in self.state.model_files:
                (links / name).parent.mkdir(parents=True, exist_ok=True)
                (links / name).symlink_to(os.path.abspath(self.path / name))
            yield links


def read_checkpoint(path: Path, contents: bool = True) -> Checkpoint:
    """Open a checkpoint to go on from, after checking that all of it is there, as it was written.

    Args:
        contents: compare checksums; off for one that this very process has just made them of.

    Raises:
        UserError: it holds no trainer_state, one of a later format, is not whole, is changed, or has the number of
            another step; the message says which, with the file.
    """
    if not os.path.lexists(state_file(path)):
        raise UserError(f"{path}: holds no {TRAINER_STATE}/, so that no run can go on from it")
    try:
        state = read_state(path)
        for name, listed in state.files.items():
            check_file(path / name, listed, contents)
        processes = read_process_states(path, state)
    except UserError as problem:
        text = str(problem).replace(f"{path}/", "")
        raise UserError(text if text.startswith(str(path)) else f"{path}: not whole: {text}") from None
    for name in (path.name, path.resolve().name):  # a link's own, and of what it leads to
        if NUMBERED.fullmatch(name) and name != f"checkpoint-{state.step}":
            raise UserError(
                f"{path}: {name} holds the state after step {state.step}: its name has to be checkpoint-{state.step}"
            )
    return Checkpoint(path, state, processes)


def save_checkpoint(engine: Engine, tokenizer, recipe: Recipe, state: dict[str, Any], stats: TrainingStats) -> None:
    """Write checkpoint-<step>, then remove what is over save_total_limit. Every process calls this.

    Args:
        state: where the run stands, the same on every process; its `step` names the checkpoint.
        stats: this process's.

    Raises:
        UserError: it cannot be written (a full disk); those before it stay as they were. On every process.
    """
    accelerator = engine.accelerator
    name = f"checkpoint-{state['step']}"
    work, whole = recipe.output_dir / f".{name}", recipe.output_dir / name
    written: dict[str, dict[str, Any]] = {}  # by this process, as state.json lists it

    def make_folder() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()  # not its parents: an output_dir that is gone was taken away from this run
        (work / TRAINER_STATE).mkdir()

    def write_model() -> None:
        save_model(engine.language_model, tokenizer, work)
        take_note(path for path in work.rglob("*") if path.is_file())

    def write_state() -> None:
        own = work / process_file(accelerator.process_index)
        process = {"stats": stats.state_dict(), "random": random_state()}
        own.write_text(json.dumps(process), encoding="utf-8")
        take_note([own, *save_optimizer(work / TRAINER_STATE, accelerator, engine.language_model, engine.optimizer)])

    def take_note(paths: Iterable[Path]) -> None:
        for path in paths:
            listed = {"bytes": path.stat().st_size, "checksum": checksum(path)}
            written[path.relative_to(work).as_posix()] = listed

    def publish() -> None:
        if recipe.save_only_model:
            (work / TRAINER_STATE).rmdir()
        else:
            files = {name: listed for part in parts for name, listed in part.items()}
            values = sealed({"format": FORMAT, **state, "files": dict(sorted(files.items()))})
            state_file(work).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            read_checkpoint(work, contents=False)
        as_readable_as_others(work)
        flush(work, *work.rglob("*"))
        if os.path.lexists(whole):  # of before the run was taken back to an earlier step, and then over this one again
            remove_folder(whole, hidden=f"{work.name}.replaced")
        os.replace(work, whole)
        flush(recipe.output_dir)
        keep_checkpoints(recipe, whole, state.get("best") and Best(**state["best"]))

    def as_one(action: Callable[[], None], main_process_only: bool = False) -> None:
        """Do a part of the work; where it fails on any process, all stop, the first with the reason."""
        problem = None
        if accelerator.is_main_process or not main_process_only:
            try:
                action()
            except Exception as error:
                if not is_disk_error(error):
                    raise
                problem = f"{error} (process {accelerator.process_index})"
        problems = [problem for problem in gather_object([problem]) if problem]
        if not problems:
            return
        if accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)  # and so gives its room back
        stop_all(f"{whole} could not be written: {problems[0]}; the checkpoints before it are whole")

    as_one(make_folder, main_process_only=True)
    as_one(write_model, main_process_only=True)
    if not recipe.save_only_model:
        as_one(write_state)
    parts = gather_object([written])
    as_one(publish, main_process_only=True)


def save_final_model(model: PreTrainedModel, tokenizer, folder: Path, merge: Callable | None = None) -> None:
    """Write the final model into the output folder itself, its files appearing only when all of them are whole.

    Args:
        merge: what makes of a folder with an adapter the whole model that is to be written; None writes what was
            trained.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    work = folder / ".final"
    try:
        shutil.rmtree(work, ignore_errors=True)
        if merge:
            save_model(model, tokenizer, work / "adapter")
            model = merge(work / "adapter", tokenizer)
            shutil.rmtree(work / "adapter")
        save_model(model, tokenizer, work)
        flush(work, *work.rglob("*"))
        # Of an earlier end of this run, made with another merge_adapter: a whole model with an adapter beside it is
        # loaded with that on top.
        merged = (work / "config.json").exists()
        for stale in ADAPTER_FILES if merged else ("config.json", "generation_config.json", "model*.safetensors*"):
            for path in folder.glob(stale):
                path.unlink()
        for path in sorted(work.iterdir()):
            os.replace(path, folder / path.name)
        work.rmdir()
    except Exception as error:
        if not is_disk_error(error):
            raise
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"{folder}: the final model could not be written: {error}") from error


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what a killed run had half written or half removed; returns the names."""
    leftovers = [*folder.glob(".checkpoint-*"), *folder.glob(".final"), *folder.glob("checkpoint-*/.trainer_state")]
    for path in leftovers:
        remove_tree(path)
    files = [*folder.glob(f".*{UNFINISHED}")]
    for path in files:
        path.unlink()
    return [path.relative_to(folder).as_posix() for path in leftovers + files]


def is_disk_error(error: Exception) -> bool:
    """Whether a write failed for the disk's sake. The Rust libraries have no errno, only its text."""
    return isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error)
