"""Where else a run is logged: Weights & Biases, and by Accelerate's own trackers TensorBoard, trackio and MLflow.

A run that goes on is the same run in each of them: wandb, MLflow and trackio know it by what the checkpoint remembers,
TensorBoard by its folder, where what came after the checkpoint is left out. metrics.jsonl is the record: a tracker that
fails in the middle of a run is left, with a line, and the run goes on; no step waits for one.
"""

import functools
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker

from recipe.keys import Recipe
from recipe.secrets import redact_text
from run.progress import Progress
from run.record_file import redact
from utils.errors import UserError, reason
from utils.launch import say

LONGEST_END = 300  # seconds that a run which has ended waits for a tracker to upload what it has left


class TrackerThread:
    """A tracker in a thread of its own.

    MLflow tries a request 8 times, up to 120 s each: a server that hangs would hold up the steps until the other
    processes give up. It knows its run by the thread, so that all is done in this one.

    Attributes:
        tracker: what the thread works on.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker]):
        """Raises: as `start`."""
        self.name = name
        self._actions: SimpleQueue[Callable[[GeneralTracker], None] | None] = SimpleQueue()
        started = Future()
        # A daemon, which no process waits for that ends by an error.
        self._thread = Thread(target=self._work, args=(start, started), name=name, daemon=True)
        self._thread.start()
        self.tracker: GeneralTracker = started.result()

    def _work(self, start: Callable[[], GeneralTracker], started: Future) -> None:
        try:
            tracker = start()
        except BaseException as error:  # the other thread's to raise
            started.set_exception(error)
            return
        started.set_result(tracker)
        while action := self._actions.get():
            try:
                action(tracker)
            except Exception as error:  # as many kinds as there are trackers
                say(f"\n{self.name}: no longer logged to, metrics.jsonl has all: {reason(error)}")
                return

    def do(self, action: Callable[[GeneralTracker], None]) -> None:
        """Soon, unless one before it failed."""
        if self._thread.is_alive():
            self._actions.put(action)

    def finish(self, failed: bool) -> None:
        """End the run there, when all that is to be done is."""
        self.do(lambda tracker: _end(self.name, tracker, failed))
        self._actions.put(None)
        self._thread.join(LONGEST_END)
        if self._thread.is_alive():
            say(f"{self.name}: not done {LONGEST_END} s after the run: left, metrics.jsonl has all")


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
            UserError: one could not be started (an MLflow server that is not there).
        """
        starts = {"tensorboard": _start_tensorboard, "trackio": _start_trackio, "mlflow": _start_mlflow}
        starts = {name: start for name, start in starts.items() if name in recipe.log_with}
        if recipe.log_wandb:
            starts = {"wandb": _start_wandb, **starts}
        self.threads: dict[str, TrackerThread] = {}
        for name, start in starts.items():
            try:
                self.threads[name] = TrackerThread(name, functools.partial(start, recipe, progress))
            except Exception as error:  # as many kinds as there are trackers, and their settings in the environment
                key = "log_wandb" if name == "wandb" else "log_with"
                raise UserError(f"{key}: {name} could not be started: {reason(error)}") from error
        run = self.threads["wandb"].tracker.tracker if recipe.log_wandb else None
        self.wandb_url = None if run is None or run.offline or run.disabled else run.url

    def log(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        values = {name: value for name, value in metrics.items() if name != "step"}
        for thread in self.threads.values():
            thread.do(lambda tracker: tracker.log(values, step=metrics["step"]))

    def log_table(self, name: str, step: int, columns: list[str], rows: list[list]) -> None:
        """A table, which of the trackers wandb has."""
        if thread := self.threads.get("wandb"):
            thread.do(lambda tracker: tracker.log_table(name, columns, rows, step=step))

    def finish(self, failed: bool = False) -> None:
        """End the run in all of them, as one that `failed` where they tell that."""
        for thread in self.threads.values():
            thread.finish(failed)


def _end(name: str, tracker: GeneralTracker, failed: bool) -> None:
    """TensorBoard and trackio have no word for a run that failed."""
    if failed and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    else:
        tracker.finish()


class _WandbTracker(GeneralTracker):
    """A run of wandb's as a tracker of Accelerate's (whose own gives wandb the step)."""

    name, requires_logging_directory, main_process_only = "wandb", False, False

    def __init__(self, run: Any):
        self.tracker = run
        super().__init__()

    def log(self, values: dict[str, Any], step: int) -> None:
        # The step as a metric of its own: wandb drops rows whose `step=` lies behind what it has seen.
        self.tracker.log({"step": step, **values})

    def log_table(self, name: str, columns: list[str], rows: list[list], step: int) -> None:
        import wandb

        self.log({name: wandb.Table(columns, rows)}, step)

    def finish(self) -> None:
        self.tracker.finish()


def _start_wandb(recipe: Recipe, progress: Progress) -> GeneralTracker:
    """The run of the progress's wandb_id where there is one; offline where nobody is logged in."""
    import wandb

    folder = recipe.output_dir / recipe.log_dir
    folder.mkdir(parents=True, exist_ok=True)
    start = functools.partial(
        wandb.init,
        project=recipe.wandb_project,
        name=_name_of_run(recipe),
        id=progress.wandb_id,
        resume="allow",
        dir=folder,
        config=redact(recipe.model_dump(mode="json")),
        # By default it waits for ever. Not as long as LONGEST_END, so that it is wandb that gives up.
        settings=wandb.Settings(silent=True, finish_timeout=0.9 * LONGEST_END),
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
    progress.wandb_id = run.id
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if run.offline:
        say(f"wandb: {why}logging offline to {Path(run.dir).parent} (wandb sync uploads it)")
    elif not run.disabled:
        say(f"wandb: {run.url}")
    return _WandbTracker(run)


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
    # trackio (0.43) asks of each value whether it is a Figure of this module, where that is loaded. While the thread of
    # run/log.py imports it for the first curves it is half there, and trackio would leave out the lines of that second.
    import matplotlib.figure  # noqa: F401

    # trackio goes on with the latest run of a name: one of another folder of this name has to have another.
    name = progress.tracker_runs.setdefault("trackio", f"{_name_of_run(recipe)}-{secrets.token_hex(3)}")
    tracker = TrackioTracker(recipe.wandb_project, name=name, resume="allow")
    tracker.start()
    tracker.store_init_configuration(redact(recipe.model_dump(mode="json")))
    return tracker


def _start_mlflow(recipe: Recipe, progress: Progress) -> GeneralTracker:
    known = progress.tracker_runs.get("mlflow")
    if known and not _is_in_mlflow(known):
        say(f"mlflow: the run {known}, of which the checkpoint tells, is not there: another one is begun")
        known = None
    tracker = MLflowTracker(experiment_name=recipe.wandb_project, run_name=_name_of_run(recipe), run_id=known)
    tracker.start()
    progress.tracker_runs["mlflow"] = tracker.tracker.info.run_id
    if known is None:  # parameters cannot be changed
        tracker.store_init_configuration(redact(recipe.model_dump(mode="json")))
    say(f"mlflow: experiment {recipe.wandb_project}, run {tracker.tracker.info.run_id}")
    return tracker


def _is_in_mlflow(run_id: str) -> bool:
    """Not where it was deleted, or MLFLOW_TRACKING_URI is another by now."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return MlflowClient().get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
