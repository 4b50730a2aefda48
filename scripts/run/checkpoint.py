"""Checkpoints: whole or absent, verified, and only as many as the recipe keeps.

    checkpoint-<step>/                 the model and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them
    checkpoint-<step>/trainer_state/   state.json: where the run stands, and the size of every file
                                       process-<n>.json: a process's random states and sums
                                       optimizer-<process>-<part>.safetensors (training/optimizer_state.py)

A checkpoint is written as .checkpoint-<step>, by every process its part, and takes its name when all of it is verified
and on the disk.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from recipe.keys import Recipe
from run.model_files import as_readable_as_others, save_model
from run.retention import NUMBERED, prune, remove_folder
from run.stats import TrainingStats
from training.engine import Engine
from training.optimizer_state import random_state, save_optimizer
from training.plan import Position
from utils.errors import UserError
from utils.files import UNFINISHED, flush, read_json, read_text, remove_tree
from utils.launch import stop_all

FORMAT = 1  # of trainer_state/; tests/fixtures keeps a checkpoint of each


@dataclass
class Checkpoint:
    """A whole checkpoint that a run can go on from.

    Attributes:
        state: its state.json.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.state["step"]

    @property
    def position(self) -> Position:
        """How far it has come in the data."""
        return Position(**self.state["position"])

    def process_state(self, process: int) -> dict[str, Any]:
        """What process `process` wrote of itself."""
        return read_json(self.path / "trainer_state" / f"process-{process}.json")


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint to go on from, after checking that all of it is there.

    Raises:
        UserError: it holds no trainer_state, one of a later format, is not whole, or has the number of another step;
            the message says which.
    """
    file = path / "trainer_state" / "state.json"
    if not file.exists():
        raise UserError(f"{path}: holds no trainer_state/, so that no run can go on from it")
    try:
        state = json.loads(read_text(file))
        if state["format"] > FORMAT:
            raise UserError(f"{path}: of a later version of this collection (format {state['format']})")
        for name, size in state["files"].items():
            if (path / name).stat().st_size != size:
                raise UserError(f"{path}: not whole: {name} has {(path / name).stat().st_size:,} of {size:,} bytes")
            if name.endswith(".safetensors"):
                with safe_open(path / name, framework="pt"):  # reads the header, which has to fit the file
                    pass
        step = state["step"]
        if type(step) is not int or step < 0:
            raise UserError(f"{path}: not whole: its step is {step!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path}: not whole: {error}") from error
    for name in (path.name, path.resolve().name):  # a link's own, and of what it leads to
        if NUMBERED.fullmatch(name) and name != f"checkpoint-{step}":
            raise UserError(f"{path}: {name} holds the state after step {step}: its name has to be checkpoint-{step}")
    return Checkpoint(path, state)


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

    def make_folder() -> None:
        shutil.rmtree(work, ignore_errors=True)
        (work / "trainer_state").mkdir(parents=True)

    def write_model() -> None:
        save_model(engine.language_model, tokenizer, work)

    def write_state() -> None:
        save_optimizer(work / "trainer_state", accelerator, engine.language_model, engine.optimizer)
        file = work / "trainer_state" / f"process-{accelerator.process_index}.json"
        process = {"stats": stats.state_dict(), "random": random_state()}
        file.write_text(json.dumps(process), encoding="utf-8")

    def publish() -> None:
        if recipe.save_only_model:
            (work / "trainer_state").rmdir()
        else:
            files = [path for path in sorted(work.rglob("*")) if path.is_file()]
            sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in files}
            text = json.dumps({"format": FORMAT, **state, "files": sizes}, indent=1)
            (work / "trainer_state" / "state.json").write_text(text + "\n", encoding="utf-8")
            read_checkpoint(work)
        as_readable_as_others(work)
        flush(work, *work.rglob("*"))
        if os.path.lexists(whole):  # of before the run was taken back to an earlier step, and then over this one again
            remove_folder(whole, hidden=f"{work.name}.replaced")
        os.replace(work, whole)
        flush(recipe.output_dir)
        prune(recipe, whole)

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
    as_one(publish, main_process_only=True)


def save_final_model(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write the final model into the output folder itself, its files appearing only when all of them are whole.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    work = folder / ".final"
    try:
        shutil.rmtree(work, ignore_errors=True)
        save_model(model, tokenizer, work)
        flush(work, *work.rglob("*"))
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
