"""Writing checkpoints and the final model: whole or absent, by all processes, and behind the training.

A checkpoint is written as .checkpoint-<step>, by every process its part, and takes its name when all of it is verified
and on the disk. Under `save_in_background` the training waits only while what is to be written is copied to memory of
the host; a thread does the rest, one checkpoint at a time. (safetensors, file operations and checksums let Python go on
meanwhile: with 0.8.0 another thread was held up for at most 13 ms of 5 s.)
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from recipe.keys import Recipe
from run.best import Best, keep_checkpoints
from run.checkpoint import read_checkpoint
from run.checkpoint_state import FORMAT, process_file, sealed
from run.model_files import as_readable_as_others, save_model, save_trained
from run.processes import Processes
from run.snapshot import HostCopies, Snapshot, Weights, take_snapshot, trained_weights
from run.stats import TrainingStats
from training.adapter_files import ADAPTER_FILES
from training.checkpoint_files import TRAINER_STATE, state_file
from training.engine import Engine
from training.memory import background_copies_fit, free_memory, show_bytes
from training.optimizer_state import save_optimizer
from utils.errors import UserError
from utils.files import checksum, flush, remove_tree
from utils.launch import say, stop_all


class Saver:
    """Writes the checkpoints of a run, one at a time. Made and called by every process at once."""

    def __init__(
        self,
        engine: Engine,
        tokenizer,
        recipe: Recipe,
        processes: Processes,
        check_folder: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            check_folder: called by the first process before it writes; raises UserError where that is not to be.
        """
        self.engine, self.recipe, self.processes, self._check_folder = engine, recipe, processes, check_folder
        self.tokenizer = copy.deepcopy(tokenizer)  # whose padding and truncation a call of the run's own may change
        # Whether the training goes on meanwhile; None: not known before there is something to copy.
        self._in_background: bool | None = None if recipe.save_in_background else False
        device = engine.accelerator.device
        # Else it would begin on the first GPU, where it would take memory for each of the processes.
        initializer = partial(torch.cuda.set_device, torch.cuda.current_device()) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "save", initializer)
        self._copies = HostCopies(device)
        self._writing: Future | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written by this process."""
        return self._writing is None or self._writing.done()

    @property
    def failed(self) -> bool:
        """Whether what is written behind the training could not be: `wait` raises why."""
        return self.is_idle and self._writing is not None and self._writing.exception() is not None

    def wait(self) -> None:
        """For the checkpoint that is being written.  Raises: UserError as `save`."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def save(self, state: dict[str, Any], stats: TrainingStats, behind: bool = True) -> None:
        """Begin to write a checkpoint, when the one before is written; or write it.

        Args:
            state: where the run stands, the same on every process; its `step` names the checkpoint.
            stats: this process's.
            behind: whether there is more to do meanwhile; the same on every process.

        Raises:
            UserError: it, or the one before, cannot be written (a full disk); those before stay as they were. On every
                process.
        """
        self.wait()
        snapshot = take_snapshot(self.engine, self.recipe, state, stats)
        if behind and self._in_background is None:
            self._in_background = self._fits(snapshot)
        own = self.engine.outline, self.tokenizer, self.recipe, snapshot, self.processes, self._check_folder
        writer = CheckpointWriter(*own)
        if not (behind and self._in_background):
            writer.write()
            return
        self._copies.copy(snapshot)
        self._writing = self._thread.submit(writer.write)

    def save_final_model(self, merge: Callable[[Path, Any], PreTrainedModel] | None = None) -> None:
        """Wait for the last checkpoint, then write the final model.  Args, Raises: as `write_final_model`."""
        self.wait()
        weights, folder = trained_weights(self.engine), self.recipe.output_dir
        write_final_model(self.engine.outline, self.tokenizer, folder, weights, self.processes, merge)

    def _fits(self, snapshot: Snapshot) -> bool:
        """Whether the copies of all processes fit into each machine's memory; the same on every process."""
        found = self.processes.gather((os.uname().nodename, snapshot.bytes, free_memory()))
        for machine in dict.fromkeys(name for name, *_ in found):
            size = sum(size for name, size, _ in found if name == machine)
            free = min(free for name, _, free in found if name == machine)
            if not background_copies_fit(size, free):
                say(
                    f"save_in_background: the {show_bytes(size)} of a checkpoint's copies do not fit into the "
                    f"{show_bytes(free)} of memory that are free on {machine}: training waits for each save"
                )
                return False
        return True


class CheckpointWriter:
    """Writes checkpoint-<step> of what each process has in its snapshot, then removes what is over save_total_limit.

    Made and called by every process at once, also in a thread.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        recipe: Recipe,
        snapshot: Snapshot,
        processes: Processes,
        check_folder: Callable[[], None],
    ):
        """
        Args:
            model: for its names and its configs, an `Engine.outline`: in a thread, none that is trained meanwhile.
            check_folder: as of `Saver`: a folder that is another by now gets no checkpoint.
        """
        self.model, self.tokenizer, self.recipe, self.snapshot = model, tokenizer, recipe, snapshot
        self.processes, self.check_folder = processes, check_folder
        self.whole = recipe.output_dir / f"checkpoint-{snapshot.state['step']}"
        self.work = self.whole.with_name(f".{self.whole.name}")
        self.written: dict[str, dict[str, Any]] = {}  # by this process, as state.json lists it

    def write(self) -> None:
        """Raises: UserError as `Saver.save`."""
        self._as_one(self._make_folder)
        self._as_one(self._write_model)
        if not self.recipe.save_only_model:
            self._as_one(self._write_trainer_state)
        parts = self.processes.gather(self.written)
        self._as_one(lambda: self._publish(parts))

    def _as_one(self, action: Callable[[], None]) -> None:
        """Do a part of the work; where it fails on any process, all stop, the first with the reason."""
        problem = None
        try:
            action()
        except Exception as error:
            if not is_disk_error(error) and not isinstance(error, UserError):
                raise
            problem = f"{self._reason_of(error)} (process {self.processes.index})"
        problems = [problem for problem in self.processes.gather(problem) if problem]
        if not problems:
            return
        if self.processes.is_first:
            shutil.rmtree(self.work, ignore_errors=True)  # and so gives its room back
        stop_all(f"{self.whole} could not be written: {problems[0]}; the checkpoints before it are whole")

    def _reason_of(self, error: Exception) -> Exception:
        """Where the folder was taken away, that: it is why a file is not found there."""
        try:
            self.check_folder()
        except UserError as taken_away:
            return taken_away
        return error

    def _make_folder(self) -> None:
        if self.processes.is_first:
            self.check_folder()
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()  # not its parents: an output_dir that is gone was taken away from this run
            (self.work / TRAINER_STATE).mkdir()

    def _write_model(self) -> None:
        save_trained(self.model, self.tokenizer, self.work, self.snapshot.weights, self.processes)
        if self.processes.is_first:
            self._take_note(path for path in self.work.rglob("*") if path.is_file())

    def _write_trainer_state(self) -> None:
        own = self.work / process_file(self.processes.index)
        own.write_text(json.dumps(self.snapshot.process), encoding="utf-8")
        folder = self.work / TRAINER_STATE
        self._take_note([own, *save_optimizer(folder, self.processes.index, self.snapshot.optimizer)])

    def _take_note(self, paths: Iterable[Path]) -> None:
        for path in paths:
            listed = {"bytes": path.stat().st_size, "checksum": checksum(path)}
            self.written[path.relative_to(self.work).as_posix()] = listed

    def _publish(self, parts: list[dict[str, dict[str, Any]]]) -> None:
        """Give it its name, now that all processes have `written` their parts."""
        if not self.processes.is_first:
            return
        work, whole, state = self.work, self.whole, self.snapshot.state
        if self.recipe.save_only_model:
            (work / TRAINER_STATE).rmdir()
        else:
            files = {name: listed for part in parts for name, listed in part.items()}
            values = sealed({"format": FORMAT, **state, "files": dict(sorted(files.items()))})
            state_file(work).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            read_checkpoint(work, contents=False)
        as_readable_as_others(work)
        flush(work, *work.rglob("*"))
        self.check_folder()
        replaced = work.with_name(f"{work.name}.replaced")
        if was_there := os.path.lexists(whole):  # a run taken back to an earlier step, or a stop before an evaluation
            shutil.rmtree(replaced, ignore_errors=True)
            whole.rename(replaced)
        os.replace(work, whole)  # at once: no moment without this step, but for the one between two renames
        flush(self.recipe.output_dir)
        if was_there:
            remove_tree(replaced)
        keep_checkpoints(self.recipe, whole, state.get("best") and Best(**state["best"]))


def write_final_model(
    model: PreTrainedModel,
    tokenizer,
    folder: Path,
    weights: Weights,
    processes: Processes,
    merge: Callable[[Path, Any], PreTrainedModel] | None = None,
) -> None:
    """Write the final model into the output folder itself, its files appearing only when all of them are whole. Every
    process calls this.

    Args:
        merge: what makes of a folder with an adapter, and the tokenizer, the whole model that is to be written; None
            writes what was trained.

    Raises:
        UserError: it cannot be written (a full disk). On the first process.
    """
    work = folder / ".final"
    try:
        if processes.is_first:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        save_trained(model, tokenizer, work / "adapter" if merge else work, weights, processes)
        if not processes.is_first:
            return
        if merge:
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


def is_disk_error(error: Exception) -> bool:
    """Whether a write failed for the disk's sake. The Rust libraries have no errno, only its text."""
    return isinstance(error, (OSError, SafetensorError)) or "(os error " in str(error)
