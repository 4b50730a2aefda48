"""What is known of a model from the files beside it: the run that made it, and its evaluations.

Whatever is damaged is left out with a line that says so: a card says less then, and a run does not fail for it.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel, ValidationError, model_validator

from evaluation.chat_model import fingerprint
from evaluation.model import EvaluatedModel
from evaluation.result_files import ResultFile, results_in
from recipe.keys import Recipe
from recipe.load import load_recipe
from recipe.secrets import redact_text
from run.lines import metrics_lines
from run.record_file import read_record
from sources.registry import find_source
from training.weight_files import cached_name
from utils.errors import UserError
from utils.launch import say

DEMO_DATA = "recipes/demo_data/"  # what the demo reads under the names of the seed's data sets is this collection's own
ROOT = Path(__file__).parents[2]
SHIPPED = DEMO_DATA, "ds_configs/"  # whose files all who have the collection have
ABSOLUTE_PATH = re.compile(r"(?<![\w/.<])~?(?:/[^\s/'\",;:()|`<>]+)+/?")


class _Part(BaseModel):
    """What a card tells of a part of run.json; null is as good as absent, and so is what it does not tell of."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


class _File(_Part):
    path: str


class _Data(_Part):
    conversations: dict[str, int] = {}
    files: list[_File] = []


class _Model(_Part):
    files: dict[str, Any] | None = None  # of a folder; a model of the hub has none


class _Command(_Part):
    launcher: dict[str, str] = {}


class _Git(_Part):
    commit: str | None = None
    dirty: bool = False


class _Hardware(_Part):
    GPUs: list[str] = []


class RunRecord(_Part):
    """run.json (`run/record.py`), as far as a card tells of it; of an earlier version's, what it has."""

    command: _Command = _Command()
    data: dict[str, _Data] = {}
    model: _Model | None = None
    deepspeed: dict[str, Any] | None = None
    deepspeed_config: dict[str, Any] | None = None
    dtype: str | None = None
    num_processes: int | None = None
    packages: dict[str, str] = {}
    git: _Git = _Git()
    hardware: _Hardware = _Hardware()
    wandb: str | None = None
    averaged: list[str] = []  # of the mean of several checkpoints their names (average_checkpoints.py)


@dataclass(frozen=True)
class TrainedRun:
    """The run that wrote a model.

    Attributes:
        record: its run.json; None without one.
        epochs, tokens: trained on up to the model's step, by metrics.jsonl; None where that is not known.
        validation: the last evaluation up to then, by the names of metrics.jsonl.
    """

    folder: Path
    recipe: Recipe
    record: RunRecord | None = None
    epochs: float | None = None
    tokens: int | None = None
    validation: dict[str, Any] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """The hub name of the model that was fine-tuned, also of a folder of the hub's cache; None for any other
        folder of this machine, and for random weights."""
        if self.recipe.from_scratch:
            return None
        name, recorded = self.recipe.model_name, self.record and self.record.model
        is_folder = recorded.files is not None if recorded else os.path.exists(name)
        return cached_name(Path(name)) if is_folder or not is_hub_name(name) else name

    def hub_data_set(self, name: str) -> str | None:
        """The hub name of a data set of the mix; None for data of one's own, which only this machine has."""
        files = [PurePath(file.path).as_posix() for file in self.data(name).files]
        repo = find_source(name, self.recipe.datasets.chosen()[name]).hub.repo
        given = self.recipe.datasets.chosen()[name].input_file_path or ""
        of_the_demo = any(DEMO_DATA in path for path in files or ([given] if isinstance(given, str) else given))
        return repo if repo and is_hub_name(repo) and not of_the_demo else None

    def data(self, name: str) -> _Data:
        """What run.json tells of a data set of the mix."""
        return self.record.data.get(name, _Data()) if self.record else _Data()


def find_run(model: EvaluatedModel) -> TrainedRun | None:
    """The run that a model is of; None where no recipe is beside it, or none that can be read."""
    if model.recipe_file is None:
        return None
    folder = model.recipe_file.parent
    try:
        recipe = load_recipe(model.recipe_file)
    except UserError as problem:
        say(f"warning: the card leaves out the run: {problem}")
        return None
    epochs, tokens, validation = None, None, {}
    for _, line in metrics_lines(folder / "metrics.jsonl"):
        if model.step is None or line["step"] <= model.step:
            epochs, tokens = line.get("epoch", epochs), line.get("tokens", tokens)
            validation = line if "eval_loss" in line else validation
    return TrainedRun(folder, recipe, _find_record(folder / "run.json"), epochs, tokens, validation)


def _find_record(path: Path) -> RunRecord | None:
    try:
        return RunRecord.model_validate(read_record(path)) if path.exists() else None
    except (UserError, ValidationError) as problem:
        why = problem if isinstance(problem, UserError) else f"{path}: {problem.errors()[0]['loc']} is damaged"
        say(f"warning: the card leaves out the record of the run: {why}")
        return None


def find_results(model: EvaluatedModel) -> dict[str, ResultFile]:
    """The evaluations of these very weights in CHECKPOINT/eval, by name."""
    folder = model.folder / "eval"
    files, problems = results_in(folder)
    own = fingerprint(model) if files else None
    others = [name for name, file in files.items() if file.checkpoint.fingerprint != own]
    for problem in [*problems, *(f"{folder}: {name} is of other weights than those beside it" for name in others)]:
        say(f"warning: the card leaves out a result: {problem}")
    return {name: file for name, file in files.items() if name not in others}


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a model or data set on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~")) and name.count("/") == 1


def shareable_recipe(recipe: Recipe, base_model: str | None) -> dict[str, Any]:
    """The values of a recipe as others may see them: no secret, and of a path on this machine only its last part, but
    for files of the collection, which are named as in its folder.

    Options of a data set that say nothing (null) are left out.
    """
    values = recipe.values()
    paths = {"cache_dir", "output_dir", "log_dir", "deepspeed_config", "sample_prompts"}
    if base_model:
        values["model_name"] = base_model
    else:
        paths.add("model_name")
    if recipe.resume_from_checkpoint not in ("auto", "never"):
        paths.add("resume_from_checkpoint")
    for name in paths:
        values[name] = values[name] and shareable_path(values[name])
    values["datasets"] = [
        {
            name: {
                key: shareable_path(value) if key == "input_file_path" else value
                for key, value in options.items()
                if value is not None
            }
        }
        for entry in values["datasets"]
        for name, options in entry.items()
    ]
    return redacted(values)


def redacted(value: Any, name: str = "") -> Any:
    """What looks like a secret replaced, in every text of a structure."""
    if isinstance(value, dict):
        return {key: redacted(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [redacted(entry, name) for entry in value]
    return redact_text(value, name) if isinstance(value, str) else value


def shareable_text(text: str) -> str:
    """A text without secrets, and without the folders of the absolute paths in it."""
    return ABSOLUTE_PATH.sub(lambda path: _last_part(path[0]), redact_text(text))


def shareable_path(path: str | list[str]) -> str | list[str]:
    """Of a path its last part; of a file of the collection its place there."""
    if isinstance(path, list):
        return [shareable_path(one) for one in path]
    within = os.path.relpath(path, ROOT) if os.path.isabs(path) else os.path.normpath(path)
    return within if within.startswith(SHIPPED) and (ROOT / within).exists() else _last_part(path)


def _last_part(path: str) -> str:
    return PurePath(path).name or "."
