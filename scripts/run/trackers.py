"""Where else a run is logged: Weights & Biases, and by Accelerate's own trackers TensorBoard, trackio and MLflow.

A run that goes on is the same run in each of them: wandb, MLflow and trackio know it by what the checkpoint remembers,
TensorBoard by its folder, where what came after the checkpoint is left out. metrics.jsonl is the record: a tracker that
fails in the middle of a run is left, with a line, and the run goes on.
"""

import functools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker

from recipe.keys import Recipe
from recipe.secrets import redact_text
from run.progress import Progress
from run.record_file import redact
from utils.errors import UserError, reason
from utils.launch import say


class Trackers:
    """All that a recipe names, on the first process.

    Attributes:
        wandb_url: of a run that is logged online.
    """

    def __init__(self, recipe: Recipe, progress: Progress):
        """
        Args:
            progress: where the run begins; its wandb_id and tracker_runs become those of its runs there.

        Raises:
            UserError: one of Accelerate's could not be started (an MLflow server that is not there).
        """
        self.wandb = start_wandb(recipe, progress.wandb_id) if recipe.log_wandb else None
        self.wandb_url: str | None = None
        if self.wandb:
            progress.wandb_id = self.wandb.id
            self.wandb_url = None if self.wandb.offline or self.wandb.disabled else self.wandb.url
        starts = {"tensorboard": _start_tensorboard, "trackio": _start_trackio, "mlflow": _start_mlflow}
        self.others: dict[str, GeneralTracker] = {}
        for name, start in starts.items():
            if name in recipe.log_with:
                try:
                    self.others[name] = start(recipe, progress)
                except Exception as error:  # as many kinds as there are trackers
                    raise UserError(f"log_with: {name} could not be started: {reason(error)}") from error

    def log(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        # The step as a metric of its own: wandb drops rows whose `step=` lies behind what it has seen.
        self._of_wandb(lambda run: run.log(metrics))
        values = {name: value for name, value in metrics.items() if name != "step"}
        self._each(lambda tracker: tracker.log(values, step=metrics["step"]))

    def log_table(self, name: str, step: int, columns: list[str], rows: list[list]) -> None:
        """A table, which of the trackers wandb has."""

        def log(run) -> None:
            import wandb

            run.log({"step": step, name: wandb.Table(columns, rows)})

        self._of_wandb(log)

    def finish(self) -> None:
        """End the run in all of them."""
        self._each(lambda tracker: tracker.finish())
        self._of_wandb(lambda run: run.finish())

    def _of_wandb(self, action: Callable[[Any], None]) -> None:
        if not self.wandb:
            return
        try:
            action(self.wandb)
        except Exception as error:
            self.wandb = None
            say(f"\nwandb: no longer logged to, metrics.jsonl has all: {reason(error)}")

    def _each(self, action: Callable[[GeneralTracker], None]) -> None:
        for name, tracker in [*self.others.items()]:
            try:
                action(tracker)
            except Exception as error:  # as many kinds as there are trackers
                del self.others[name]
                say(f"\n{name}: no longer logged to, metrics.jsonl has all: {reason(error)}")


def start_wandb(recipe: Recipe, run_id: str | None):
    """A run of wandb, the one of this id where there is one; offline where nobody is logged in."""
    import wandb

    folder = recipe.output_dir / recipe.log_dir
    folder.mkdir(parents=True, exist_ok=True)
    start = functools.partial(
        wandb.init,
        project=recipe.wandb_project,
        name=_name_of_run(recipe),
        id=run_id,
        resume="allow",
        dir=folder,
        config=redact(recipe.model_dump(mode="json")),
        settings=wandb.Settings(silent=True),
    )
    why = ""
    try:
        # WANDB_MODE wins; verify=False: a key is enough here, whether the server takes it shows at the start.
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False):
            raise wandb.UsageError("nobody is logged in")
        run = start()
    except wandb.Error as error:  # that, a node without the internet, or a key that the server refuses
        why = f"{str(error).splitlines()[0]}, "
        run = start(mode="offline")
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if run.offline:
        say(f"wandb: {why}logging offline to {Path(run.dir).parent} (wandb sync uploads it)")
    elif not run.disabled:
        say(f"wandb: {run.url}")
    return run


def _name_of_run(recipe: Recipe) -> str:
    return redact_text(recipe.output_dir.resolve().name)


def _start_tensorboard(recipe: Recipe, progress: Progress) -> GeneralTracker:
    folder = recipe.output_dir / recipe.log_dir
    # What an earlier start logged after this step is left out of what is shown.
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=progress.step + 1)
    tracker.start()
    # As a text: Accelerate's `store_init_configuration` makes a run of its own of every start, and takes no lists.
    tracker.tracker.add_text("recipe", f"```\n{redact_text(recipe.to_yaml())}\n```", progress.step)
    say(f"tensorboard: tensorboard --logdir {folder / 'tensorboard'}")
    return tracker


def _start_trackio(recipe: Recipe, progress: Progress) -> GeneralTracker:
    # trackio goes on with the latest run of a name: one of another folder of this name has to have another.
    name = progress.tracker_runs.setdefault("trackio", f"{_name_of_run(recipe)}-{secrets.token_hex(3)}")
    tracker = TrackioTracker(recipe.wandb_project, name=name, resume="allow")
    tracker.start()
    tracker.store_init_configuration(redact(recipe.model_dump(mode="json")))
    return tracker


def _start_mlflow(recipe: Recipe, progress: Progress) -> GeneralTracker:
    known = progress.tracker_runs.get("mlflow")
    tracker = MLflowTracker(experiment_name=recipe.wandb_project, run_name=_name_of_run(recipe), run_id=known)
    tracker.start()
    progress.tracker_runs["mlflow"] = tracker.tracker.info.run_id
    if known is None:  # parameters cannot be changed
        tracker.store_init_configuration(redact(recipe.model_dump(mode="json")))
    say(f"mlflow: experiment {recipe.wandb_project}, run {tracker.tracker.info.run_id}")
    return tracker
