"""A run that stands still is ended within the recipe's time; one that goes on, however slowly, is not."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from forking import call_forked
from interruption import metrics, run_here, small_recipe
from life import ForkedLife

from recipe.load import load_recipe
from run.watch import EXIT_STALLED

STALL = 0.1  # minutes
MANY = 100_000


class Standing(ForkedLife):
    """A run of two processes that goes on until something happens to it."""

    def __init__(self, folder, model, launch="ddp2", **keys):
        keys = {"stall_minutes": STALL, "max_steps": MANY, "num_train_epochs": 2 * MANY, "logging_steps": 1, **keys}
        recipe = small_recipe(folder, model, eval_steps=MANY, save_steps=MANY, **keys)
        super().__init__([recipe], folder / "output", launch, {}, folder / "log.txt")

    def __enter__(self) -> "Standing":
        return self

    def steps(self) -> int:
        path = self.output_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def record(self) -> dict:
        return json.loads((self.output_dir / "run.json").read_text())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hung", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_process_hangs(tmp_path, tiny_model, hung):
    """It does not run any more, so the other ends the run, and says who was last heard when."""
    other = 1 - hung
    with Standing(tmp_path, tiny_model) as run:
        assert run.wait_for(lambda run: run.steps() > 3)
        frozen = run.workers()[hung]
        run.signal([frozen], signal.SIGSTOP)
        stood = time.monotonic()
        assert run.wait_for(lambda run: "no progress" in run.printed())
        assert 60 * STALL - 1 < time.monotonic() - stood < 60 * STALL + 20
        run.signal([frozen], signal.SIGCONT)
        assert run.wait() == 1
        step = run.steps()
    said = run.printed()
    who = f"process {other}: " if other else ""
    pattern = rf"^error: {who}no progress for {STALL:g} minutes \(stall_minutes\), after step (\d+): ended$"
    (after,) = map(int, re.findall(pattern, said, flags=re.MULTILINE))
    assert step - after in (0, 1)  # one that was frozen may have come to the end of its step
    host = os.uname().nodename
    assert f"process {other} on {host} (pid " in said
    assert "): training, for " in said
    (silent,) = [line for line in said.splitlines() if line.startswith(f"  process {hung} on ")]
    assert float(silent.partition("last heard ")[2].split()[0]) > 60 * STALL - 2
    assert f"where process {other} stands:" in said
    assert 'sft.py", line ' in said.partition(f"where process {other} stands:")[2]
    record = run.record()
    assert record["status"] == "stalled"
    (start,) = record["starts"]
    assert start["why"].startswith("no progress for 0.1 minutes")
    assert (start["from_step"], start["step"], start["machines"]) == (0, after, [host])
    assert len(metrics(run.output_dir)) == step


@pytest.mark.timeout(300)
def test_a_pause_of_all_processes_is_no_standstill(tmp_path, tiny_model):
    """As by `scontrol suspend`, or a laptop that sleeps."""
    with Standing(tmp_path, tiny_model, stall_minutes=0.05) as run:
        assert run.wait_for(lambda run: run.steps() > 3)
        run.signal(run.workers(), signal.SIGSTOP)
        stood = run.steps()
        time.sleep(6)
        run.signal(run.workers(), signal.SIGCONT)
        assert run.wait_for(lambda run: run.steps() > stood + 3)
        assert "no progress" not in run.printed()
        run.signal(run.workers(), signal.SIGTERM)
        run.wait()
    assert run.record()["starts"][0]["why"] == "SIGTERM"


# ---- The end of a process ----


def watched_run(stall_minutes: float):
    """A run that is watched, which trains nothing."""
    from run.run import Run

    recipe = load_recipe("recipes/demo.yaml").model_copy(update={"stall_minutes": stall_minutes})  # less than it takes
    run = Run(recipe, None, None)
    run.watch.start("training")
    return run


def ends_while_a_checkpoint_hangs() -> None:
    run = watched_run(0.01)
    run.saver = SimpleNamespace(is_idle=False, wait=lambda: time.sleep(60))
    run.close()


def hangs_as_it_ends() -> None:
    """The interpreter joins the threads that are left (of a drawing, say), calls what is registered, and then tears the
    libraries down."""
    from run import watch

    watch.SHORTEST_END = 0.5
    watched_run(1 / 60).close()
    time.sleep(60)


@pytest.mark.parametrize(("hanging", "status"), [(ends_while_a_checkpoint_hangs, EXIT_STALLED), (hangs_as_it_ends, 1)])
def test_what_hangs_at_the_end_is_ended(hanging, status):
    with pytest.raises(RuntimeError, match=f"it died with {status}$"):
        call_forked(hanging)


def replies_at_its_end() -> int:
    run = watched_run(0.01)
    run.watch.at("leaving the others")
    run.engine = SimpleNamespace(language_model=SimpleNamespace(parameters=list))
    run.final_model()
    time.sleep(2)
    return len(run.watch._threads)


def test_replies_at_the_end_take_as_long_as_they_need():
    assert call_forked(replies_at_its_end)


def threads_left() -> list[str]:
    """Of a watch that talks to itself all the time."""
    from run import watch

    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    watch.gather_object, watch.SHORTEST_BEAT, watch.LONGEST_BEAT = (lambda values: values), 0.0, 0.0
    one = watch.Watch(10, Path("run.json"))
    one.start("training")
    one.connect()
    deadline = time.monotonic() + 60
    while one.signs[0].doing != "training":  # as it has heard from itself
        assert time.monotonic() < deadline
        time.sleep(0.01)
    one.close()
    return [thread.name for thread in threading.enumerate() if thread.name in ("_judge", "_tell")]


def test_no_thread_of_the_watch_outlives_it():
    """One that comes back from within torch to an interpreter that is ending aborts it, and the launcher of another
    machine then stands still for 300 seconds."""
    assert call_forked(threads_left) == []


def test_a_process_that_dies_as_all_leave_takes_nothing_along(tmp_path, tiny_model, monkeypatch):
    """So it looks to the first process, whose model, card and record are whole by then."""

    def lost(engine) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.77.0.2]:4121")

    recipe, output = small_recipe(tmp_path, tiny_model, max_steps=2), tmp_path / "output"
    with monkeypatch.context() as patch:
        patch.setattr("training.engine.Engine.close", lost)
        assert run_here(recipe, output_dir=output).returncode == 2
    assert json.loads((output / "run.json").read_text())["starts"][-1]["why"] == "finished"
    assert (output / "README.md").exists()
    again = run_here(recipe, output_dir=output)
    assert again.returncode == 0
    assert "is finished: nothing to do" in again.stdout
