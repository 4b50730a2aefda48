"""trainer_state/state.json and process-<n>.json: what they have to hold, and reading them.

Where a value decides what is trained on, it has to fit the others: a step within the recipe's plan, skipped steps among
the steps, sums for each data set. state.json has the checksum of every other file of the checkpoint, and last its own.
"""

import json
import random
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xxhash
from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from recipe.keys import Recipe
from run.health import WINDOW
from run.record_file import without_former_keys
from training.adapter_files import ADAPTER_CONFIG
from training.checkpoint_files import TRAINER_STATE, File, is_model_file, state_file
from utils.errors import UserError
from utils.files import read_json
from utils.schemas import Schema, checked, read_as

FORMAT = 2  # of trainer_state/; tests/fixtures keeps a checkpoint of each. 1 had sizes in place of checksums

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Amount = Annotated[float, Field(ge=0)]
Word = Annotated[int, Field(ge=0, le=2**32 - 1)]  # of a random generator
Byte = Annotated[int, Field(ge=0, le=255)]


class Exact(Schema):
    """All keys are known."""

    model_config = ConfigDict(extra="forbid")


class PositionState(Exact):
    """A `training.plan.Position`."""

    epoch: Count
    conversations: Count


class Health(Exact):
    """`StepHealth.state_dict`."""

    skipped: Count
    bad: Count
    bad_in_a_row: Count
    norm_spikes: Count
    norm_peak: Amount
    norms: Annotated[list[Amount], Field(max_length=WINDOW)]
    losses: Annotated[list[float], Field(max_length=WINDOW)]


class NoScale(Exact):
    """Of a run without fp16."""


class DeepSpeedScale(Exact):
    """`loss_scale_state` of DeepSpeed's scaler."""

    by: Literal["deepspeed"]
    cur_scale: Annotated[float, Field(gt=0)]
    cur_iter: Count
    last_overflow_iter: Annotated[int, Field(ge=-1)]
    cur_hysteresis: int


class TorchScale(Exact):
    """`loss_scale_state` of torch's scaler."""

    by: Literal["torch"]
    scale: Annotated[float, Field(gt=0)]
    growth_factor: Annotated[float, Field(gt=1)]
    backoff_factor: Annotated[float, Field(gt=0, lt=1)]
    growth_interval: Count
    growth_tracker: Count = Field(alias="_growth_tracker")


class BestEvaluation(Exact):
    """A `best.Best`."""

    metric: str
    step: Count | None
    value: float | None
    evaluations_since: Count

    @model_validator(mode="after")
    def _of_one_evaluation(self) -> "BestEvaluation":
        if (self.step is None) != (self.value is None):
            raise ValueError("the best evaluation has a step without a value, or a value without a step")
        return self


def _whose_scale(value: Any) -> str | None:
    return str(value.get("by", "nobody")) if isinstance(value, dict) else None


class State(Exact):
    """state.json: where a run stands, and every other file of the checkpoint."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    step: Count
    position: PositionState
    num_processes: Annotated[int, Field(ge=1, le=2**20)]
    recipe: Recipe
    data: dict[str, str]
    health: Health
    loss_scale: Annotated[
        Annotated[NoScale, Tag("nobody")]
        | Annotated[DeepSpeedScale, Tag("deepspeed")]
        | Annotated[TorchScale, Tag("torch")],
        Discriminator(_whose_scale),
    ]
    results: dict[str, Annotated[float, Field(allow_inf_nan=True)]]  # of a model that diverged, too
    evaluation_due: bool
    wandb_id: str | None
    tracker_runs: dict[str, str] = Field({})  # this and the next two not in the first checkpoints of format 2
    unlogged: dict[str, Annotated[float, Field(allow_inf_nan=True)]] = Field({})
    best: BestEvaluation | None = None
    files: dict[str, File]
    checksum: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "State":
        if not self.health.bad <= self.health.skipped <= self.step:
            raise ValueError(f"step {self.step}: {self.health.skipped} steps skipped, {self.health.bad} of them bad")
        if self.best and (self.best.step or 0) > self.step:
            raise ValueError(f"step {self.step}: the best evaluation was after step {self.best.step}")
        limit = self.recipe.max_steps
        if limit is not None and self.step > limit:
            raise ValueError(f"step {self.step}: the recipe's max_steps is {limit}")
        if limit is None and self.position.epoch > self.recipe.num_train_epochs + 1:
            raise ValueError(f"position.epoch {self.position.epoch}: of {self.recipe.num_train_epochs:g} epochs")
        if self.data.keys() != self.recipe.datasets.chosen().keys():
            raise ValueError("data: not those of the recipe's mix")
        if self.format == 1 and any(listed.checksum for listed in self.files.values()):
            raise ValueError("files: of format 1 have no checksum")
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
                raise ValueError(f"files: {name!r} is no file of a checkpoint")
        model, config = ("adapter_model", ADAPTER_CONFIG) if self.recipe.use_peft else ("model", "config.json")
        needed = [config, *(process_file(process) for process in range(self.num_processes))]
        if missing := [name for name in needed if name not in self.files]:
            raise ValueError(f"files: {missing[0]} is not among them")
        for what, folder in {model: ".", "optimizer": TRAINER_STATE}.items():
            if not any(_is_part(name, what, folder) for name in self.files):
                raise ValueError(f"files: none of the {what}'s is among them")
        return self

    @property
    def optimizer_files(self) -> list[str]:
        """Names below the checkpoint's folder."""
        return [name for name in self.files if _is_part(name, "optimizer", TRAINER_STATE)]

    @property
    def model_files(self) -> list[str]:
        """Names below the checkpoint's folder: all that is not in trainer_state/."""
        return [*filter(is_model_file, self.files)]


class Clock(Exact):
    """Seconds, as `stats.Clock` has them."""

    data: Amount
    training: Amount
    evaluation: Amount
    saving: Amount
    samples: Amount = 0.0  # not in the first checkpoints of format 2


class Stats(Exact):
    """`TrainingStats.state_dict`."""

    sums: list[float]
    tokens: Count
    steps: Count
    seconds: Amount
    waited: Amount | None = None  # not in the first checkpoints of format 1
    flops: Amount = 0.0
    clock: Clock


class NumpyKey(Exact):
    key: list[Word]
    pos: Annotated[int, Field(ge=0, le=624)]  # which numpy 2.5 does not look at


class NumpyRandom(Exact):
    bit_generator: Literal["MT19937"]
    state: NumpyKey
    has_gauss: Literal[0, 1]
    gauss: float


class Random(Exact):
    """`training.optimizer_state.random_state`."""

    python: list[Any]
    numpy: NumpyRandom
    torch: list[Byte]
    cuda: list[Byte] | None = None

    @model_validator(mode="after")
    def _can_be_set(self) -> "Random":
        # In generators of no account: those of the process are set when all of the checkpoint has been taken over.
        if len(self.python) != 3 or self.python[0] != random.Random.VERSION:
            raise ValueError("python: no state of this generator")
        attempts = {
            "python": lambda: random.Random().setstate((self.python[0], tuple(self.python[1]), self.python[2])),
            "numpy": lambda: np.random.RandomState().set_state(self.numpy.model_dump()),
            "torch": lambda: torch.Generator().set_state(torch.tensor(self.torch, dtype=torch.uint8)),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
            except Exception as error:  # TypeError, ValueError, OverflowError, RuntimeError: as each sees fit
                raise ValueError(f"{name}: no state of that generator") from error
        return self


class ProcessState(Exact):
    """process-<n>.json: what one process wrote of itself."""

    stats: Stats
    random: Random


def process_file(process: int) -> str:
    """The name of a process's file, below the checkpoint's folder."""
    return f"{TRAINER_STATE}/process-{process}.json"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a state.json with their own checksum last."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True)  # of the values, so that blanks and the order of keys are free
    return {**rest, "checksum": f"xxh3_128:{xxhash.xxh3_128_hexdigest(text.encode())}"}


def read_state(path: Path) -> State:
    """The state of the checkpoint in a folder.

    Raises: UserError when its state.json is damaged, of a later format, or holds what no run writes.
    """
    file = state_file(path)
    values = read_json(file, "state of a run")
    number = values.get("format") if isinstance(values, dict) else None
    if type(number) is int and number > FORMAT:
        raise UserError(f"{path}: of a later version of this collection (format {number})")
    known = values
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        known = known | {"recipe": without_former_keys(values["recipe"])}
    state = checked(State, known, file, "the state of a run")
    if number != 1 and (state.checksum is None or any(listed.checksum is None for listed in state.files.values())):
        raise UserError(f"{file}: not the state of a run: a checksum is missing")
    if number != 1 and sealed(values)["checksum"] != state.checksum:
        raise UserError(f"{file}: changed since it was written: its checksum is another")
    return state


def read_process_states(path: Path, state: State) -> list[ProcessState]:
    """What each process of a checkpoint wrote.  Raises: UserError as `read_state`."""
    found = []
    for process in range(state.num_processes):
        file = path / process_file(process)
        own = read_as(ProcessState, file, "the state of a process")
        if len(own.stats.sums) != 2 * len(state.data) + 2 or own.stats.steps > state.step:
            raise UserError(f"{file}: not the state of a process: stats are not of {len(state.data)} data sets")
        found.append(own)
    return found


def _is_part(name: str, what: str, folder: str) -> bool:
    path = PurePosixPath(name)
    return str(path.parent) == folder and path.match(f"{what}*.safetensors")
