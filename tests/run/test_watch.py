"""A run that stands still is ended within the recipe's time; one that goes on, however slowly, is not."""

import json
import os
import re
import signal
import time

import pytest
from interruption import metrics, small_recipe
from life import ForkedLife

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
