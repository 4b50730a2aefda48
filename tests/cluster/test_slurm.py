"""A real Slurm starts, warns, preempts, cancels and queues a run again; what comes out is as if nobody had stopped it.

`make test-slurm` has all of it; CI the first.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from interruption import metrics, small_recipe
from slurm import Job, Slurm, why_not

from run.retention import list_checkpoints, step_of

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
LONG = pytest.mark.soak  # beyond what CI has time for
ENOUGH = 480  # seconds for a run with its starts, where the cores are shared
STEPS = 200  # seconds of two processes
MANY = 20_000
LAUNCH = "recipes/launch.slurm"


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="slurm-") as folder, Slurm(Path(folder)) as slurm:
        yield slurm


class Trial:
    """A run of `STEPS` steps by Slurm, and the same run by hand."""

    def __init__(self, slurm: Slurm, folder: Path, model: Path, **keys):
        self.slurm, self.folder, self.output = slurm, folder, folder / "output"
        keys = {"max_steps": STEPS, "num_train_epochs": 99, "logging_steps": 1, "save_steps": 10_000, **keys}
        keys |= {"eval_steps": 10_000, "output_dir": str(self.output)}
        self.recipe = small_recipe(folder, model, **keys)

    def submit(self, *options, arguments=(), script=LAUNCH) -> Job:
        log = f"--output={self.folder}/job.log"
        name = f"--job-name={os.path.relpath(self.folder / 'logs', ROOT)}"
        job = self.slurm.submit("--gpus-per-node=1", log, name, *options, script, self.recipe, *arguments)
        self.logs = self.folder / f"logs-{job.number}"
        return job

    def steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait(self, condition, job: Job | None = None, seconds: float = ENOUGH) -> None:
        """Until a condition holds; a failure where the job has ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert not (job and job.is_over()), self.said()
            time.sleep(0.1)

    def record(self) -> dict:
        return json.loads((self.output / "run.json").read_text())

    def said(self) -> str:
        """All that the job and its processes have printed."""
        files = [self.folder / "job.log", *sorted(self.logs.glob("*"))]
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in files if path.exists())

    def assert_as_untouched(self) -> None:
        whole = self.folder / "whole"
        run_script(self.recipe, "--output_dir", whole, launch="ddp2", output_dir=whole)
        assert metrics(self.output) == metrics(whole)


def test_a_run_is_warned_saves_is_queued_again_and_finishes(slurm, tmp_path, tiny_model):
    trial = Trial(slurm, tmp_path, tiny_model)
    job = trial.submit()
    trial.wait(lambda: trial.steps() > 3, job)
    assert "mem=2000M" in (job.value("AllocTRES") or job.value("TRES"))  # all that two machines have
    slurm.ask("scancel", "--batch", "--signal=USR1", job.number)  # as Slurm does it ahead of the limit
    trial.wait(job.is_over)
    assert job.value("JobState") == "COMPLETED", trial.said()
    assert job.starts() == 2
    assert len(list_checkpoints(trial.output)) == 1
    assert "SIGUSR1: saving after this step" in trial.said()
    assert f"start 1: 2 machines of 1 processes, first 127.0.0.1, port {20000 + job.number}, from " in trial.said()
    assert {f"start-{n}-machine-{m}.log" for n in (0, 1) for m in (0, 1)} < {path.name for path in trial.logs.iterdir()}
    assert trial.record()["status"] == "finished"
    trial.assert_as_untouched()


@LONG
def test_the_time_limit(slurm, tmp_path, tiny_model):
    """Slurm's own warning, up to 30 seconds sooner than it is asked for; a limit is a minute at the least."""
    trial = Trial(slurm, tmp_path, tiny_model, max_steps=MANY)
    job = trial.submit("--time=2", "--signal=B:USR1@45")
    trial.wait(lambda: job.starts() == 2)
    (saved,) = list_checkpoints(trial.output)
    assert "USR1: the time limit is near" in trial.said()
    trial.wait(lambda: trial.steps() > step_of(saved) + 3, job)
    assert "going on from" in trial.said()
    slurm.ask("scancel", job.number)
    trial.wait(job.is_over)


@LONG
def test_a_start_that_was_warned_leaves_the_next_alone(slurm, tmp_path, tiny_model):
    """What waited for its save would queue the job again, though that goes on by then."""
    trial = Trial(slurm, tmp_path, tiny_model, max_steps=MANY)
    script = tmp_path / "mine.slurm"
    script.write_text((ROOT / LAUNCH).read_text().replace("WARNING=300 ", "WARNING=40 ", 1))
    job = trial.submit("--nodes=1", script=script)
    trial.wait(lambda: trial.steps() > 3, job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job.number)
    trial.wait(lambda: "start 1: " in trial.said(), job)
    time.sleep(40)
    assert "the save takes too long" not in trial.said()
    assert job.starts() == 2
    slurm.ask("scancel", job.number)
    trial.wait(job.is_over)


@LONG
def test_preemption(slurm, tmp_path, tiny_model):
    """A job of more weight takes the machines; the run saves within its grace, waits, and goes on behind it."""
    trial = Trial(slurm, tmp_path, tiny_model)
    job = trial.submit()
    trial.wait(lambda: trial.steps() > 3, job)
    slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    trial.wait(job.is_over)
    assert job.value("JobState") == "COMPLETED", trial.said()
    assert job.starts() == 2
    assert "SIGTERM: saving after this step" in trial.said()
    assert list_checkpoints(trial.output)
    trial.assert_as_untouched()


@LONG
def test_scancel_saves_and_ends(slurm, tmp_path, tiny_model):
    """It is not queued again, and another sbatch goes on where it stopped."""
    trial = Trial(slurm, tmp_path, tiny_model)
    job = trial.submit()
    trial.wait(lambda: trial.steps() > 3, job)
    slurm.ask("scancel", job.number)
    trial.wait(job.is_over)
    time.sleep(10)
    assert job.value("JobState") == "CANCELLED", trial.said()
    assert job.starts() == 1
    assert "cancelled; the run is interrupted" in trial.said()
    assert len(list_checkpoints(trial.output)) == 1
    again = trial.submit()
    trial.wait(again.is_over)
    assert again.value("JobState") == "COMPLETED", trial.said()
    trial.assert_as_untouched()


@LONG
def test_an_error_is_not_tried_again(slurm, tmp_path, tiny_model):
    trial = Trial(slurm, tmp_path, tiny_model)
    (tmp_path / "sums.jsonl").write_text("{")
    job = trial.submit()
    trial.wait(job.is_over)
    assert job.value("JobState") == "FAILED"
    assert job.starts() == 1
    assert "is not queued again" in trial.said()
    assert "error: " in trial.said()
    misspelt = trial.submit(arguments=["--learning_rat", "1"])
    trial.wait(misspelt.is_over)
    assert "did you mean learning_rate?" in trial.said()


@LONG
def test_an_error_at_a_later_start_is_not_tried_again(slurm, tmp_path, tiny_model):
    """Though run.json still says of the start before that it was interrupted. With little of the environment, and a
    recipe whose name has a space."""
    trial = Trial(slurm, tmp_path, tiny_model, max_steps=MANY)
    trial.recipe = trial.recipe.rename(tmp_path / "my recipe.yaml")
    job = trial.submit("--nodes=1", "--export=NONE")
    trial.wait(lambda: trial.steps() > 3, job)
    slurm.ask("scancel", "--batch", "--signal=USR1", job.number)
    trial.wait(lambda: "queued again" in trial.said(), job)
    (tmp_path / "sums.jsonl").write_text("{")
    trial.wait(job.is_over)
    assert job.value("JobState") == "FAILED", trial.said()
    assert job.starts() == 2
    assert "is not queued again" in trial.said()
    assert trial.record()["status"] == "interrupted"


@LONG
def test_jobs_of_an_array_are_queued_again_one_by_one(slurm, tmp_path, tiny_model):
    """The number of one of them is that of the array: what is said to it is heard by all."""
    trial = Trial(slurm, tmp_path, tiny_model, max_steps=MANY)
    own = f'\nset -- "$@" --output_dir "{tmp_path}/$SLURM_ARRAY_TASK_ID"\nWARNING='
    script = tmp_path / "mine.slurm"
    script.write_text((ROOT / LAUNCH).read_text().replace("\nWARNING=", own, 1))
    logs = [f"--output={tmp_path}/job-%a.log", f"--job-name={os.path.relpath(tmp_path / 'logs', ROOT)}"]
    job = slurm.submit("--gpus-per-node=1", "--nodes=1", "--array=0-1", *logs, script, trial.recipe)
    trained = [tmp_path / str(task) / "metrics.jsonl" for task in range(2)]
    trial.wait(lambda: all(path.exists() for path in trained))
    slurm.ask("scancel", "--batch", "--signal=USR1", f"{job.number}_1")
    trial.wait(lambda: "start 1" in (tmp_path / "job-1.log").read_text())
    assert "USR1" not in (tmp_path / "job-0.log").read_text()
    assert "start 1" not in (tmp_path / "job-0.log").read_text()
    slurm.ask("scancel", job.number)
    trial.wait(lambda: not slurm.ask("squeue", "-h", "-o", "%A"))


@LONG
def test_starts_without_a_new_checkpoint_are_given_up(slurm, tmp_path, tiny_model):
    """Each is warned before it has trained a step: what is queued again three times stays where it is."""
    trial = Trial(slurm, tmp_path, tiny_model)
    job = trial.submit()
    for start in range(3):
        trial.wait(lambda start=start: (trial.logs / f"start-{start}-machine-0.log").exists(), job)
        slurm.ask("scancel", "--batch", "--signal=USR1", job.number)
        slurm.ask("scancel", "--signal=TERM", job.number)
    trial.wait(job.is_over)
    assert job.value("JobState") == "FAILED", trial.said()
    assert "3 starts without a checkpoint after ''" in trial.said()
