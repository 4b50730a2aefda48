"""What is refused of a recipe before a run, though each of its values is of the right kind.

Not by its schema (`recipe/keys.py`), by which what earlier runs have written is still read.
"""

import errno
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from recipe.dataset_keys import Datasets
from recipe.keys import Recipe
from recipe.secrets import secret_in
from utils.requirements import remedy

NOT_IN_A_PROJECT = "/\\#?%:"  # by wandb 0.31, sdk/wandb_settings.py, which raises after the model has been loaded
LONGEST_PROJECT = 128
# A data set `scale` would have the loss_scale of fp16 for its loss_<dataset> in metrics.jsonl (run/health.py).
RESERVED_DATASETS = ("spike", "scale")
LONGEST_NAME = 255  # bytes of a name on Linux's and macOS's file systems
Problem = tuple[tuple[str, ...], str]  # of a key, and what is wrong with it


def texts_of(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text in the values of a recipe, keys too, by the key that it stands under; list items by their list's."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield (key, str(name))
            yield from texts_of(entry, (*key, str(name)))
    elif isinstance(value, list):
        for entry in value:
            yield from texts_of(entry, key)


def secrets_of(values: dict[str, Any]) -> list[Problem]:
    """The secrets among the values of a recipe, for messages that do not show them.

    They are refused, not hidden: recipe.yaml is to repeat the run, so what it leaves out would have to be found again;
    and the same values go into every checkpoint's state, the model card and Weights & Biases.
    """
    found = []
    for key, text in texts_of(values):
        if secret := secret_in(text, ".".join(key)):
            # A key that is a secret itself is not shown.
            shown = tuple(part for part in key if not secret_in(part))
            what = f"holds what looks like {secret.what}; a recipe is kept with its run, and uploaded"
            found.append((shown, f"{what}: it belongs into {secret.belongs}"))
    return list(dict.fromkeys(found))


def problems_of(recipe: Recipe, values: dict[str, Any]) -> list[Problem]:
    """What a run could not work with.

    Args:
        values: those that the recipe was made of.
    """
    found = [
        (key, f"is empty: give {_in_place_of_nothing(key)}") for key, text in texts_of(values) if _is_empty(key, text)
    ]
    paths = {"output_dir": recipe.output_dir, "cache_dir": recipe.cache_dir}
    if not _problem_of_path(recipe.output_dir):
        paths["log_dir"] = recipe.output_dir / recipe.log_dir
    if recipe.resume_from_checkpoint not in ("auto", "never"):
        paths["resume_from_checkpoint"] = Path(recipe.resume_from_checkpoint)
    found += [((key,), problem) for key, path in paths.items() if (problem := _problem_of_path(path))]
    if os.path.isfile(os.path.join(recipe.model_name, "adapter_config.json")):
        found.append((("model_name",), f"= {recipe.model_name}: an adapter: merge it first, by scripts/export.py"))
    log_dir = os.path.normpath(recipe.log_dir)
    if os.path.isabs(os.path.expanduser(log_dir)) or log_dir.split(os.sep)[0] == os.pardir:
        found.append((("log_dir",), f"= {recipe.log_dir}: is outside of output_dir: give a folder's name"))
    found += _problems_of_trackers(recipe)
    for name in recipe.datasets.chosen():
        if name in RESERVED_DATASETS:
            found.append((("datasets", name), f"loss_{name} is a metric of its own: give the data set another name"))
    return found


def _problems_of_trackers(recipe: Recipe) -> Iterator[Problem]:
    if recipe.log_wandb and not find_spec("wandb"):
        yield ("log_wandb",), f"= true: wandb is not installed: {remedy('requirements.txt')}; or give false"
    for name in dict.fromkeys(recipe.log_with):
        if name == "wandb" and not recipe.log_wandb:
            yield ("log_with",), "names wandb beside log_wandb: false: give log_wandb: true, or leave it out"
        elif name != "wandb" and not find_spec(name):
            yield ("log_with",), f"names {name}, which is not installed: pip install {name}, or leave it out"
    project = recipe.wandb_project
    if recipe.log_wandb and (wrong := sorted({letter for letter in project if letter in NOT_IN_A_PROJECT})):
        yield ("wandb_project",), f"= {project}: no project of wandb's has {' '.join(wrong)}"
    if recipe.log_wandb and len(project) > LONGEST_PROJECT:
        yield ("wandb_project",), f"has over {LONGEST_PROJECT} characters, which wandb does not take"
    # Accelerate 1.15 looks for MLflow's experiment by a filter within such quotes.
    if "mlflow" in recipe.log_with and "'" in project:
        yield ("wandb_project",), f"= {project}: an experiment of MLflow's cannot be looked for by a name with '"


def _is_empty(key: tuple[str, ...], text: str) -> bool:
    return not text and bool(key) and key[0] in Recipe.model_fields


def _in_place_of_nothing(key: tuple[str, ...]) -> str:
    schema = Recipe if len(key) == 1 else Datasets.options_of(key[1])
    kind = schema.model_fields[key[-1]].annotation if key[-1] in schema.model_fields else str
    return ". for the current folder" if kind is Path else "null for none" if type(None) in get_args(kind) else "a text"


def _problem_of_path(path: Path) -> str | None:
    """Why nothing can be kept at a path, where that is its name's or a link's fault."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        return f"= {str(path)[:60]}...: {os.strerror(errno.ENAMETOOLONG)}"
    try:
        os.stat(path / "/".join(["x" * 60] * 3))  # as long as what a run writes below it
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return f"= {str(path)[:60]}{'...' * (len(str(path)) > 60)}: {error.strerror}"
    return None
