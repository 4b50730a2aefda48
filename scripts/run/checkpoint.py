"""Checkpoints to go on from: what one holds, and opening it; `run/saving.py` writes them.

    checkpoint-<step>/                 the model and tokenizer, as AutoModelForCausalLM and AutoTokenizer read them
    checkpoint-<step>/trainer_state/   state.json: where the run stands, and the checksum of every file
                                       process-<n>.json: a process's random states and sums
                                       optimizer-<process>-<part>.safetensors (training/optimizer_state.py)

What it holds beside the files of its state.json is never read.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from run.best import Best
from run.checkpoint_state import ProcessState, State, read_process_states, read_state
from run.retention import NUMBERED
from training.checkpoint_files import TRAINER_STATE, check_file, state_file
from training.plan import Position
from utils.errors import UserError


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
