"""The best evaluation of a run, when there has been none for too long, and the links to checkpoints: best and last."""

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from recipe.keys import Recipe
from recipe.load import nearest
from run.lines import metrics_lines
from run.retention import NUMBERED, list_checkpoints, prune, step_of
from utils.errors import UserError
from utils.files import UNFINISHED
from utils.launch import say_once

LINKS = ("best", "last")  # in output_dir
OTHERWISE = " (eval_loss, eval_accuracy, eval_<dataset>_loss, eval_<dataset>_accuracy)"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by one metric; of equals the earliest.

    Attributes:
        step, value: its; None while no evaluation had a finite number.
        evaluations_since: how many came after it; while there is none, all of them.
    """

    metric: str
    step: int | None
    value: float | None
    evaluations_since: int = 0


def is_better(metric: str, value: float, than: float) -> bool:
    """By the metric's kind: of an accuracy more is better, of a loss less."""
    return value > than if metric.endswith("_accuracy") else value < than


def judge(best: Best | None, metric: str, step: int, value: float) -> Best:
    """The best evaluation after one more, of which None is before the first. What is no finite number is no better."""
    best = best or Best(metric, None, None)
    if math.isfinite(value) and (best.value is None or is_better(metric, value, best.value)):
        return Best(metric, step, value)
    return Best(metric, best.step, best.value, best.evaluations_since + 1)


def best_until(metrics: Path, metric: str, step: int) -> Best | None:
    """The best evaluation up to a step by the lines of a metrics.jsonl: of a metric that was not judged by then."""
    best = None
    for _, line in metrics_lines(metrics, having=f'"{metric}"'):
        if line["step"] <= step and metric in line:
            best = judge(best, metric, line["step"], math.nan if line[metric] is None else line[metric])
    return best


def check_metric(recipe: Recipe, held_out: Collection[str]) -> None:
    """See that an evaluation will have early_stopping_metric, and that there is one where it is needed.

    Args:
        held_out: the data sets that have a validation split.

    Raises: UserError, with the nearest metric that there is.
    """
    kinds = ("loss", "accuracy")
    known = [f"eval_{kind}" for kind in kinds] + [
        f"eval_{name}_{kind}" for name in recipe.datasets.chosen() for kind in kinds
    ]
    metric = recipe.early_stopping_metric
    if metric not in known:
        raise UserError(f"early_stopping_metric = {metric}: no metric of this run's{nearest(metric, known, OTHERWISE)}")
    asked = [name for name in ("sample_every", "keep_best", "early_stopping_patience") if getattr(recipe, name)]
    if asked and not held_out:
        raise UserError(f"{asked[0]}: needs evaluations, and nothing is held out: give a data set a val_split")
    for name in recipe.datasets.chosen():
        if metric in (f"eval_{name}_loss", f"eval_{name}_accuracy") and name not in held_out:
            raise UserError(f"early_stopping_metric = {metric}: nothing of {name} is held out: give it a val_split")


# ---- The links ----


def is_others(link: Path) -> bool:
    """Whether what is there under the name of a link of ours is none: a folder, or a link to something else."""
    ours = link.is_symlink() and NUMBERED.fullmatch(os.readlink(link))
    return os.path.lexists(link) and not ours


def best_checkpoint(folder: Path, metric: str, best: Best | None) -> Path | None:
    """Of a run's checkpoints the one whose evaluation is the best; None where none was evaluated.

    Args:
        best: which counts even where its line of metrics.jsonl is gone.
    """
    values = {best.step: best.value} if best and best.value is not None else {}
    for _, line in metrics_lines(folder / "metrics.jsonl", having=f'"{metric}"'):
        if line.get(metric) is not None:
            values.setdefault(line["step"], line[metric])
    evaluated = [path for path in list_checkpoints(folder) if step_of(path) in values]
    chosen = None
    for path in evaluated:  # by step, so that of equals the earliest is taken
        if chosen is None or is_better(metric, values[step_of(path)], values[step_of(chosen)]):
            chosen = path
    return chosen


def best_and_last(recipe: Recipe, best: Best | None) -> dict[str, Path | None]:
    """The checkpoints that the links of a run lead to, by their names; without what is somebody else's."""
    folder, newest = recipe.output_dir, list_checkpoints(recipe.output_dir)[-1:]
    found = best_checkpoint(folder, recipe.early_stopping_metric, best), (newest or [None])[0]
    return {name: path for name, path in zip(LINKS, found, strict=True) if not is_others(folder / name)}


def link_checkpoints(recipe: Recipe, best: Best | None) -> None:
    """Have OUTPUT_DIR/last lead to the newest checkpoint, and OUTPUT_DIR/best to the best that is there.

    The links are relative, so that the folder can be moved, and one is replaced by the next at once. Where there is no
    such checkpoint there is no link; what somebody else has put there stays; and on a file system without links a line
    says so.
    """
    folder = recipe.output_dir
    for name, path in best_and_last(recipe, best).items():
        link = folder / name
        if (path.name if path else None) == (os.readlink(link) if link.is_symlink() else None):
            continue
        try:
            if path is None:
                link.unlink()
                continue
            work = folder / f".{name}.{os.getpid()}{UNFINISHED}"
            work.unlink(missing_ok=True)
            work.symlink_to(path.name)
            os.replace(work, link)
        except OSError as error:  # no reason to stop: the checkpoints themselves are there
            say_once(f"\n{folder}: no links best and last there: {error.strerror}; the end says which they are")


def keep_checkpoints(recipe: Recipe, newest: Path, best: Best | None) -> None:
    """When a checkpoint is whole: remove what is over the limits, under keep_best not the best, and link what stays."""
    spared = best_checkpoint(recipe.output_dir, recipe.early_stopping_metric, best) if recipe.keep_best else None
    prune(recipe, newest, spared)
    link_checkpoints(recipe, best)
