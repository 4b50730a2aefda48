"""A run from its folder to its end: the one owner of where it stands, what it counts, and what it leaves."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from data.mix import Mix
from recipe.keys import Recipe
from run.best import check_metric, link_checkpoints
from run.checkpoint import Checkpoint
from run.folder import check_still_ours
from run.health import StepHealth, one_line_at_minimum_scale
from run.log import RunLog
from run.model_files import config_of_run
from run.processes import Processes
from run.progress import Progress
from run.record import begin_record
from run.report import end_report
from run.resume import check_config, check_data, restore, run_state, starting_point
from run.samples import Samples
from run.saving import Saver
from run.starts import end_start, note_machines
from run.stats import Clock, TrainingStats
from run.watch import Watch, alive, bytes_moved
from training.batches import Batches
from training.engine import Engine
from training.flops import ModelFlops, peak_flops
from training.fragments import is_sharded
from training.host_weights import load_model
from training.model import load_merged
from training.optimizer_state import loss_scale
from training.plan import Position
from training.pretrained import load_pretrained
from utils.errors import UserError, reason
from utils.launch import process_index, say, share_cores, stop_all


class Run:
    """One start of a run.

    Attributes:
        runs_in_record: whether run.json still says that this start runs; False on all processes but the first.
        failure: why it ended where that was no end of its own, as run.json has it; else empty.
        checkpoint: that it goes on from; None from its beginning.
        progress: where it stands.
        clock, stats, health: what its time goes into, what its steps add up to, and what went wrong in them.
    """

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint | None, lock: int | None):
        """
        Args:
            lock: of the output folder, as `lock_output_dir` returns it; None on all processes but the first.
        """
        self.recipe, self.checkpoint, self.lock = recipe, checkpoint, lock
        self.record = recipe.output_dir / "run.json"
        self.runs_in_record, self.failure = False, ""
        self.saver: Saver | None = None  # before there is an engine
        self.log: RunLog | None = None  # before `start`, and when it has ended in its trackers
        self.clock = Clock()
        self.saved_step: int | None = None  # of the last checkpoint of this start
        self.watch = Watch(recipe.stall_minutes, self.record)

    def plan(
        self,
        config: PretrainedConfig,
        tokenizer,
        mix: Mix,
        dtype: torch.dtype,
        allow_changes: bool,
        reproduced: Path | None,
    ) -> Progress:
        """From which step to which it goes with these data, written to run.json with all that a repeat needs.

        Args:
            reproduced: the record of an earlier run that this one repeats.

        Raises:
            UserError: the data or the model are not those of the checkpoint; no evaluation will have
                early_stopping_metric; as `Samples`.
        """
        if self.checkpoint:
            check_data(self.checkpoint, mix, self.recipe, allow_changes)
            check_config(self.checkpoint, config_of_run(self.recipe, config, tokenizer), self.recipe, allow_changes)
        check_metric(self.recipe, {mix.names[index] for index in set(mix.validation.dataset)})
        self.mix, self.tokenizer, self.samples = mix, tokenizer, Samples(self.recipe, tokenizer)
        self.progress = self.watch.progress = starting_point(self.checkpoint, mix, self.recipe)
        if process_index() == 0:
            earlier = reproduced or (self.record if self.checkpoint and self.record.exists() else None)
            begin_record(self.record, self.recipe, mix, dtype, earlier, self.progress.step)
            self.runs_in_record = True
        return self.progress

    def meet(self, accelerator: Accelerator) -> None:
        """The processes have found each other: they note where they are and stand at one point, by what the first has
        read, and watch each other. Every process calls this.

        Raises: UserError as `Processes`.
        """
        self.processes = Processes(accelerator)
        hosts = gather_object([socket.gethostname()])
        self.progress.best = gather_object([self.progress.best])[0]
        if process_index() == 0:
            note_machines(self.record, hosts)
        self.watch.connect()

    def load_model(self, config: PretrainedConfig, tokenizer, dtype: torch.dtype) -> PreTrainedModel:
        """The model as it is at this start: of the checkpoint, or of model_name.  Raises: UserError as `load_model`."""
        self.watch.at("loading the model", alive)
        if not self.checkpoint:
            return load_model(self.recipe, config, tokenizer, dtype)
        with self.checkpoint.model_folder() as folder:
            if not self.recipe.use_peft:  # whose model is not the checkpoint's
                config = config_of_run(self.recipe, config, tokenizer)
            return load_model(self.recipe, config, tokenizer, dtype, checkpoint=folder)

    def attach(self, engine: Engine, batches: Batches, dtype: torch.dtype) -> None:
        """What makes its steps from now on, counts them, and saves what they come to. Every process calls this."""
        self.watch.at("about to begin")
        self.engine, self.batches = engine, batches
        self.saver = Saver(engine, self.tokenizer, self.recipe, self.processes, self.check_folder)
        self.main_process = engine.accelerator.is_main_process
        self.device, flops = engine.accelerator.device, ModelFlops(engine.language_model)
        self.stats = TrainingStats(self.mix, self.device, self.clock, flops, peak_flops(self.device, dtype))
        bad_steps_file = self.recipe.output_dir / "bad_steps.jsonl" if self.main_process else None
        self.health = StepHealth(self.recipe.max_bad_steps, bad_steps_file)

    def start(self) -> None:
        """Put all but the weights where the checkpoint has it, and open metrics.jsonl and the progress bar."""
        if self.checkpoint:
            restore(self.checkpoint, self.recipe, self.engine, self.stats, self.health)
        self.log = RunLog(self.recipe, self.progress, self.main_process)

    def check_folder(self) -> None:
        """Before anything is written.  Raises: UserError, on the first process, where output_dir is another by now."""
        if self.lock is not None:
            check_still_ours(self.recipe, self.lock)

    # ---- A step ----

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around an optimizer step."""
        self.watch.at("training")
        with self.clock.spend("training"), one_line_at_minimum_scale():
            yield

    def end_step(self, position: Position, learning_rate: float, grad_norm: float, updated: bool) -> None:
        """A step is made, or was left out; the data stand at `position` now.

        Raises:
            UserError: on the first process (SystemExit on the others): too many steps went wrong.
        """
        self.check_folder()
        self.health.judge(grad_norm, updated, self.progress, self.stats, self.engine, self.batches)
        self.progress.advance(position, learning_rate, grad_norm)
        self.log.progress_bar.update()

    def write_metrics(self) -> None:
        """A line of metrics.jsonl for the steps since the last one. Every process calls this."""
        self.check_folder()
        metrics, self.progress.unlogged = self.stats.close(self.engine.accelerator) | self.progress.unlogged, {}
        scale = loss_scale(self.engine.accelerator)
        self.log.write(self.progress.as_metrics() | metrics | self.health.metrics(metrics.get("loss"), scale))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation, which is due until `write_evaluation` has its results."""
        self.watch.at("evaluating")
        self.progress.evaluation_due = True
        self.log.progress_bar.set_description("evaluating")
        with self.clock.spend("evaluation"):
            yield
        self.watch.at("training")
        self.log.progress_bar.set_description("training")

    def write_evaluation(self, results: dict[str, float]) -> None:
        """The results of an evaluation, for metrics.jsonl, the curves, the screen and the model card; then what hangs
        on them: replies to look at, and under keep_best a checkpoint. Every process calls this."""
        self.check_folder()
        metric = self.recipe.early_stopping_metric
        if metric not in results and (self.recipe.keep_best or self.recipe.early_stopping_patience):
            stop_all(f"early_stopping_metric = {metric}: no token that is held out is scored")
        is_best = self.progress.end_evaluation(results, metric)
        if self.progress.ends_early:
            self._write_rest()
        self.log.write(self.progress.as_metrics() | results)
        self.log.show_evaluation(self.progress.step, results)
        if self.samples.due(self.progress):
            self.watch.at("replying", lambda: self.samples.passes)
            self.log.progress_bar.set_description("replying")
            with self.clock.spend("samples"):
                replies = self.samples.take(self.engine)
            self.log.progress_bar.set_description("training")
            self.log.write_samples(self.progress.step, self.samples, replies)
            self.watch.at("training")
        if self.main_process and self.saver.is_idle:  # which else links when it is done
            link_checkpoints(self.recipe, self.progress.best)  # one of this very step may be there, of a stop
        if is_best and self.recipe.keep_best:
            self.save()

    def _write_rest(self) -> None:
        """Where no step is left: a line for those that have none yet. (After a signal they get theirs when the run goes
        on, where it was due: what a tracker was told cannot be taken back.)"""
        if self.progress.unlogged:
            self.write_metrics()

    def save(self, stopped: bool = False) -> None:
        """Write a checkpoint, or begin to, unless this step has one since its evaluation was the best. Every process
        calls this.

        Args:
            stopped: whether this is the last that the start does. As after the last step nothing is trained meanwhile,
                so that no copies are made: over 100 GB for a 7B, in the 30 seconds that Slurm gives.
        """
        if self.saved_step == self.progress.step:
            return
        self.check_folder()
        self.watch.at("saving", bytes_moved)
        with self.clock.spend("saving"):
            state = run_state(self.recipe, self.mix, self.engine, self.progress, self.health)
            self.saver.save(state, self.stats, behind=not (stopped or self.progress.is_complete))
        self.saved_step = self.progress.step
        self.watch.at("saved")

    @property
    def save_failed(self) -> bool:
        """Whether a checkpoint that is written behind the training could not be: the next `save`, or the end, says
        why."""
        return self.saver.failed

    # ---- The end ----

    def end(self, stopped: bool, by: str | None) -> None:
        """Write the final model, unless the run was stopped; say what it came to. Every process calls this.

        Args:
            by: name of the signal that this process was stopped by, if any.
        """
        self.check_folder()
        if not stopped:
            self._write_rest()
        pulse = alive if self.recipe.merge_adapter else bytes_moved
        self.watch.at("ending the run", pulse if self.main_process else None)
        self.log.close()
        with self.clock.spend("saving"):
            if stopped:
                self.saver.wait()
            else:
                self.saver.save_final_model(partial(load_merged, self.recipe) if self.recipe.merge_adapter else None)
        if not self.main_process:
            return
        report = end_report(self.recipe, self.progress, self.stats, self.health)
        status, why = ("interrupted", by or "a signal to another process") if stopped else ("finished", "finished")
        url = self.log.trackers.wandb_url
        end_start(self.record, status, why, self.progress.step, report=report, wandb=url)
        self.runs_in_record = False

    def close(self) -> None:
        """This start is over, and why is said: what is still written ends first, watched, or a line says why not."""
        if self.saver:
            if not self.saver.is_idle:
                self.watch.at("ending a checkpoint", bytes_moved)
            try:
                self.saver.wait()
            except (UserError, SystemExit) as error:  # the latter of a process that leaves it to the first to say
                if isinstance(error, UserError) and not (self.failure and self.failure in str(error)):
                    print(f"error: {error}", file=sys.stderr, flush=True)
            except Exception as error:  # another process is gone, most likely
                say(f"the checkpoint that was being written is not: {reason(error)}")
        self.end_trackers()
        self.watch.close()

    def end_trackers(self) -> None:
        """It may take minutes for what they have left to upload; a launcher gives half of one once others have left."""
        log, self.log = self.log, None
        if log and self.main_process:
            self.watch.at("ending the run in its trackers", alive)
            log.trackers.finish(failed=bool(self.failure))
        self.watch.at("leaving the others")

    def final_model(self) -> PreTrainedModel:
        """The model that was trained; where no process has all of it, as it was saved. On the first process."""
        self.watch.at("replying", alive)
        if not is_sharded(self.engine.language_model):
            return self.engine.language_model
        name, trust = str(self.recipe.output_dir), self.recipe.trust_remote_code
        model = load_pretrained(AutoModelForCausalLM, name, trust_remote_code=trust, dtype="auto")
        try:
            return model.to(self.device)
        except torch.OutOfMemoryError:  # a card that holds but a share of it
            share_cores()
            return model
