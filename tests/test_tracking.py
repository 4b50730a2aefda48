"""What a run leaves behind while it trains: the numbers, metrics.jsonl, the curves, Weights & Biases."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from utils import tracking
from utils.errors import UserError
from utils.recipe import Recipe
from utils.tracking import RunLog, TrainingStats, plot, read_metrics

MIX = SimpleNamespace(names=["first", "second", "third"])


def make_recipe(folder: Path, **keys) -> Recipe:
    values = {"model_name": "none", "output_dir": str(folder), "datasets": ["vicuna"], "log_wandb": False}
    return Recipe.model_validate(values | keys)


@pytest.fixture
def log(tmp_path):
    log = RunLog(make_recipe(tmp_path), total_steps=3, main_process=True)
    yield log
    log.progress.close()


def micro_batch(datasets: list[int], lengths: list[int]) -> dict[str, torch.Tensor]:
    return {"dataset": torch.tensor(datasets, dtype=torch.int64), "lengths": torch.tensor(lengths, dtype=torch.int64)}


# ---- the numbers ----


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """Accelerator.reduce on one process."""
    return tensor


@pytest.fixture
def clock(monkeypatch):
    """The seconds that TrainingStats reads, set by hand."""
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: clock.now)
    return clock


def test_stats_against_a_hand_computation(clock):
    stats = TrainingStats(MIX, torch.device("cpu"))
    stats.add(micro_batch([0, 0, 1], [7, 5]), torch.tensor([1.0, 2.0, 6.0]), torch.tensor(1.5))
    stats.add(micro_batch([1], [4]), torch.tensor([2.0], requires_grad=True), torch.tensor(0.5))
    clock.now += 2
    with stats.paused():  # evaluation is not training time
        clock.now += 40
    # The second step; one of its micro-batches is empty.
    stats.add(micro_batch([1, 0], [3]), torch.tensor([1.0, 0.5]), torch.tensor(3.0))
    stats.add(micro_batch([], []), torch.tensor([]), torch.tensor(0.0))
    clock.now += 3
    assert stats.close(SimpleNamespace(reduce=alone), step=2) == {
        "loss": pytest.approx((1.5 + 0.5 + 3.0) / 2),  # the mean over the steps of each step's loss
        "loss_first": pytest.approx((1.0 + 2.0 + 0.5) / 3),
        "share_first": pytest.approx(3 / 6),
        "loss_second": pytest.approx((6.0 + 2.0 + 1.0) / 3),
        "share_second": pytest.approx(3 / 6),
        "tokens": 19,
        "tokens_per_second": pytest.approx(19 / 5),
    }
    # After a line everything but the count of tokens starts anew.
    stats.add(micro_batch([2], [6]), torch.tensor([4.0]), torch.tensor(4.0))
    clock.now += 1
    assert stats.close(SimpleNamespace(reduce=alone), step=3) == {
        "loss": 4.0,
        "loss_third": 4.0,
        "share_third": 1.0,
        "tokens": 25,
        "tokens_per_second": 6.0,
    }


def test_stats_add_up_over_processes(clock):
    both = [TrainingStats(MIX, torch.device("cpu")) for _ in range(2)]
    both[0].add(micro_batch([0, 1], [5]), torch.tensor([1.0, 2.0]), torch.tensor(0.6))
    both[1].add(micro_batch([1], [3]), torch.tensor([5.0]), torch.tensor(1.4))
    clock.now += 2
    sent = []
    both[1].close(SimpleNamespace(reduce=lambda tensor: sent.append(tensor) or tensor), step=1)
    assert both[0].close(SimpleNamespace(reduce=lambda tensor: tensor + sent[0]), step=1) == {
        "loss": pytest.approx(2.0),  # each process holds its share of the step's loss
        "loss_first": 1.0,
        "share_first": pytest.approx(1 / 3),
        "loss_second": 3.5,
        "share_second": pytest.approx(2 / 3),
        "tokens": 8,
        "tokens_per_second": 4.0,
    }


def test_counts_stay_exact_over_many_tokens():
    stats = TrainingStats(MIX, torch.device("cpu"))
    stats.by_dataset[1, 0] = 2**24  # where fp32 stops counting
    stats.add(micro_batch([0, 0, 0, 1], [4]), torch.ones(4), torch.tensor(1.0))
    assert stats.by_dataset[1].tolist() == [2**24 + 3, 1, 0]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    stats = TrainingStats(MIX, torch.device("cpu"))
    stats.add(micro_batch([0], [4]), torch.tensor([loss]), torch.tensor(loss))
    with pytest.raises(UserError, match="not a finite number between steps 1 and 7"):
        stats.close(SimpleNamespace(reduce=alone), step=7)


# ---- metrics.jsonl and the curves ----


def test_lines_are_json_in_full_precision_and_come_back(log, tmp_path):
    lines = [
        {"step": 1, "epoch": 0.1, "loss": 1 / 3, "learning_rate": 1e-5, "grad_norm": 2.0},
        {"step": 2, "epoch": 0.2, "loss": 0.1 + 0.2, "learning_rate": 2e-5, "grad_norm": float("inf")},
        {"step": 2, "epoch": 0.2, "eval_vicuna_loss": 0.5, "eval_loss": float("nan")},
    ]
    for line in lines:
        log.write(line)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in written]
    assert parsed == [lines[0], lines[1] | {"grad_norm": None}, lines[2] | {"eval_loss": None}]
    curves = read_metrics(tmp_path / "metrics.jsonl")
    assert curves["loss"] == [(1, 1 / 3), (2, 0.1 + 0.2)]
    assert curves["grad_norm"] == [(1, 2.0)]
    assert "step" not in curves


def test_other_processes_write_nothing(tmp_path, capsys):
    log = RunLog(make_recipe(tmp_path, log_wandb=True), total_steps=3, main_process=False)
    log.write({"step": 1, "loss": 1.0})
    log.show_evaluation(1, {"eval_loss": 1.0, "eval_accuracy": 0.5})
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_an_evaluation_is_shown_data_set_by_data_set(log, capsys):
    log.show_evaluation(
        1200, {"eval_vicuna_loss": 1.25, "eval_vicuna_accuracy": 0.5, "eval_loss": 2, "eval_accuracy": 1}
    )
    assert [" ".join(line.split()) for line in capsys.readouterr().out.strip().splitlines()] == [
        "validation after step 1,200",
        "vicuna loss 1.2500 token accuracy 50.00%",
        "all loss 2.0000 token accuracy 100.00%",
    ]


LINES = [
    {"step": 1, "epoch": 0.1, "loss": 2.0, "loss_vicuna": 2.0, "learning_rate": 0.0, "grad_norm": 0.5, "tokens": 9},
    {"step": 2, "epoch": 0.2, "loss": 1.5, "loss_vicuna": 1.5, "learning_rate": 1e-5, "grad_norm": 1.0, "tokens": 18},
    {"step": 2, "epoch": 0.2, "eval_vicuna_loss": 1.0, "eval_vicuna_accuracy": 0.5, "eval_loss": 1.0},
]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_curves(tmp_path, count):
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "training.png"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in LINES[:count]))
    plot(metrics, image)
    assert image.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert image.stat().st_size > 10_000


def test_no_metrics_no_curves(tmp_path):
    plot(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    assert not list(tmp_path.iterdir())


# ---- Weights & Biases ----


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """Nobody is logged in: an empty home folder and no setting of wandb's."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield
    import wandb

    wandb.teardown()  # it reads the environment once


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "nobody is logged in, "),
        ({"WANDB_MODE": "offline"}, ""),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"WANDB_API_KEY": "0" * 40}, "Timed out, "),
    ],
    ids=["nobody", "asked", "bad key", "no network"],
)
def test_wandb_logs_offline_and_says_where(tmp_path, capsys, monkeypatch, environment, reason):
    import wandb

    def no_network(mode=None, **kwargs):
        if mode is None and "WANDB_API_KEY" in environment:  # wandb itself tries for a minute and a half
            raise wandb.errors.CommError("Timed out\nConsider increasing the timeout")
        return init(mode=mode, **kwargs)

    init = wandb.init
    monkeypatch.setattr(wandb, "init", no_network)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    log = RunLog(make_recipe(tmp_path / "out", log_wandb=True, log_dir="wandb_files"), 2, main_process=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    for line in LINES:
        log.write(line)
    log.close()
    (run,) = (tmp_path / "out" / "wandb_files" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said.startswith("wandb: ")
    assert reason in said
    assert said.endswith(f"logging offline to {run} (wandb sync uploads it)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


@pytest.mark.usefixtures("nobody")
def test_wandb_can_be_switched_off_from_outside(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = RunLog(make_recipe(tmp_path / "out", log_wandb=True), 2, main_process=True)
    log.write(LINES[0])
    log.close()
    assert capsys.readouterr().out == ""


def test_without_log_wandb_it_is_not_imported(tmp_path):
    code = f"""
import sys
sys.path.insert(0, "scripts")
sys.argv = ["sft.py"]
import sft
from utils.recipe import Recipe
recipe = Recipe(model_name="none", output_dir={str(tmp_path)!r}, datasets=["vicuna"], log_wandb=False)
log = sft.RunLog(recipe, 2, True)
log.write({{"step": 1, "loss": 1.0}})
log.close()
print([name for name in sys.modules if name.split(".")[0] == "wandb"])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert "wandb" not in result.stderr.lower()
