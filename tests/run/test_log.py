"""What a run leaves behind while it trains: the numbers, metrics.jsonl, the curves, Weights & Biases."""

import json
import math
import random
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_script
from interruption import MEASURED, metrics, run_here, small_recipe
from mixes import make_progress
from PIL import Image

from recipe.keys import Recipe
from run import curves, lines
from run.checkpoint import read_checkpoint
from run.curves import MOST_BINS, Curves
from run.lines import best_point
from run.log import RunLog
from run.stats import Clock, TrainingStats
from training.collate import Batch
from training.memory import peak_memory

MIX = SimpleNamespace(names=["first", "second", "third"])


def make_recipe(folder: Path, **keys) -> Recipe:
    values = {"model_name": "none", "output_dir": str(folder), "datasets": ["vicuna"], "log_wandb": False}
    return Recipe.model_validate(values | keys)


@pytest.fixture
def log(tmp_path):
    log = RunLog(make_recipe(tmp_path), make_progress(3), main_process=True)
    yield log
    log.progress_bar.close()


def micro_batch(datasets: list[int], lengths: list[int]) -> Batch:
    dataset = torch.tensor(datasets, dtype=torch.int64)
    ids = torch.zeros(1, sum(lengths), dtype=torch.int64)
    return Batch(ids, scored=dataset, targets=dataset, dataset=dataset, lengths=tuple(lengths))


# ---- the numbers ----


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """Accelerator.reduce on one process."""
    return tensor


@pytest.fixture
def clock():
    """The seconds of a run, set by hand."""
    return Clock()


def make_stats(clock: Clock, steps: list[list[tuple]] = (), peak: float | None = None) -> TrainingStats:
    """With these micro-batches of each step: data sets, lengths, losses, the micro-batch's share of the step's loss.

    A token takes 100 FLOPs, and the device can do `peak` a second.
    """
    flops = SimpleNamespace(of=lambda batch: 100 * sum(batch.lengths))
    stats = TrainingStats(MIX, torch.device("cpu"), clock, flops, peak)
    for step in steps:
        for datasets, lengths, losses, loss in step:
            stats.add(micro_batch(datasets, lengths), torch.tensor(losses), torch.tensor(loss))
        stats.end_step()
    return stats


STEPS = [
    [([0, 0, 1], [7, 5], [1.0, 2.0, 6.0], 1.5), ([1], [4], [2.0], 0.5)],
    [([1, 0], [3], [1.0, 0.5], 3.0), ([], [], [], 0.0)],  # one of its micro-batches is empty
]
ALONE = SimpleNamespace(reduce=alone, num_processes=1)


def test_stats_against_a_hand_computation(clock):
    stats = make_stats(clock, STEPS, peak=1000)
    clock.seconds |= {"training": 3.0, "data": 2.0, "evaluation": 40.0, "saving": 9.0}  # these two are no training
    assert without_memory(stats.close(ALONE)) == {
        "loss": pytest.approx((1.5 + 0.5 + 3.0) / 2),  # the mean over the steps of each step's loss
        "loss_first": pytest.approx((1.0 + 2.0 + 0.5) / 3),
        "share_first": pytest.approx(3 / 6),
        "loss_second": pytest.approx((6.0 + 2.0 + 1.0) / 3),
        "share_second": pytest.approx(3 / 6),
        "tokens": 19,
        "tokens_per_second": pytest.approx(19 / 5),
        "tokens_per_second_per_device": pytest.approx(19 / 5),
        "data_wait_share": pytest.approx(2 / 5),
        "mfu": pytest.approx(19 * 100 / 5 / 1000),
    }
    # After a line everything but the count of tokens starts anew.
    stats.add(micro_batch([2], [6]), torch.tensor([4.0], requires_grad=True), torch.tensor(4.0))
    stats.end_step()
    clock.seconds["training"] += 0.75
    clock.seconds["data"] += 0.25
    assert without_memory(stats.close(ALONE)) == {
        "loss": 4.0,
        "loss_third": 4.0,
        "share_third": 1.0,
        "tokens": 25,
        "tokens_per_second": 6.0,
        "tokens_per_second_per_device": 6.0,
        "data_wait_share": 0.25,
        "mfu": 0.6,
    }


def without_memory(metrics: dict[str, float]) -> dict[str, float]:
    """And that it is there, in GiB: of this process, which has loaded PyTorch."""
    assert 0.1 < metrics.pop("peak_memory_gib") < 100
    return metrics


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_the_process_held_at_most():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(lines["VmHWM"].split()[0]) * 1024, rel=0.01)


def test_without_a_known_peak_no_utilisation_is_made_up(clock):
    assert "mfu" not in make_stats(clock, STEPS).close(ALONE)


def test_stats_add_up_over_processes(clock):
    shares = ([0, 1], [5], [1.0, 2.0], 0.6), ([1], [3], [5.0], 1.4)
    both = [make_stats(clock, [[batch]], peak=100) for batch in shares]
    clock.seconds["training"] += 2
    sent = []
    both[1].close(SimpleNamespace(reduce=lambda tensor: sent.append(tensor) or tensor, num_processes=2))
    together = SimpleNamespace(reduce=lambda tensor: tensor + sent[0], num_processes=2)
    assert without_memory(both[0].close(together)) == {
        "loss": pytest.approx(2.0),  # each process holds its share of the step's loss
        "loss_first": 1.0,
        "share_first": pytest.approx(1 / 3),
        "loss_second": 3.5,
        "share_second": pytest.approx(2 / 3),
        "tokens": 8,
        "tokens_per_second": 4.0,
        "tokens_per_second_per_device": 2.0,
        "data_wait_share": 0.0,
        "mfu": 8 * 100 / 2 / (2 * 100),
    }


def test_counts_stay_exact_over_many_tokens(clock):
    stats = make_stats(clock)
    stats.sums[-1] = 2**24  # where fp32 stops counting
    stats.add(micro_batch([0], [1]), torch.ones(1), torch.tensor(1.0))
    stats.end_step()
    assert stats.close(ALONE)["tokens"] == 2**24 + 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_step_that_is_left_out_does_not_count(clock, loss):
    stats = make_stats(clock, STEPS[:1], peak=1000)
    stats.add(micro_batch([0], [40]), torch.tensor([loss]), torch.tensor(loss))
    assert str(stats.step_loss(ALONE)) == str(loss)
    stats.end_step(counts=False)
    expected = make_stats(clock, STEPS[:1], peak=1000)
    assert without_memory(stats.close(ALONE)) == without_memory(expected.close(ALONE))
    stats.end_step(counts=False)
    assert set(stats.close(ALONE)) == {"tokens"} | MEASURED  # no step, no loss


def test_the_sums_go_on_where_they_were(clock):
    whole = make_stats(clock, STEPS, peak=1000)
    first = make_stats(clock, STEPS[:1])
    clock.seconds["data"] += 2
    state = json.loads(json.dumps(first.state_dict()))
    resumed = make_stats(Clock(), peak=1000)
    resumed.load_state_dict([state])
    assert resumed.clock.seconds == clock.seconds
    resumed.clock.seconds["training"] += 2
    clock.seconds["training"] += 2
    for datasets, lengths, losses, loss in STEPS[1]:
        resumed.add(micro_batch(datasets, lengths), torch.tensor(losses), torch.tensor(loss))
    resumed.end_step()
    found = without_memory(resumed.close(ALONE))
    assert found == without_memory(whole.close(ALONE))
    assert (found["tokens_per_second"], found["data_wait_share"], found["mfu"]) == (19 / 4, 0.5, 0.475)


def test_a_checkpoint_from_before_these_were_counted_can_be_gone_on_from(clock):
    clock.seconds["data"] += 2
    state = make_stats(clock, STEPS[:1]).state_dict()
    del state["waited"], state["flops"]
    resumed = make_stats(Clock())
    resumed.load_state_dict([state])
    resumed.clock.seconds["training"] += 2
    assert resumed.close(ALONE)["data_wait_share"] == 0


def test_another_number_of_processes_takes_over_all_sums(clock):
    """The first of them; with the others' it would count twice."""
    states = [make_stats(clock, [[batch]]).state_dict() for batch in STEPS[0]]
    assert [state["flops"] for state in states] == [1200, 400]
    first, second = make_stats(Clock()), make_stats(Clock())
    first.load_state_dict(states)
    second.load_state_dict(states, with_sums=False)
    expected = make_stats(clock, STEPS[:1])
    assert torch.equal(first.sums, expected.sums)
    assert (second.sums == 0).all()
    assert (first.flops, second.flops) == (1600, 0)
    assert first.steps == second.steps == 1
    other_mix = TrainingStats(SimpleNamespace(names=["first"]), torch.device("cpu"), Clock())
    other_mix.load_state_dict(states)  # sums of other data sets say nothing
    assert (other_mix.sums == 0).all()


def test_the_clock_counts_what_it_is_told():
    clock, spent = Clock(), {"saving": 0.0, "data": 0.0, "loop": 0.0}

    def spend(what: str) -> None:
        started = time.perf_counter()
        time.sleep(0.03)
        spent[what] += time.perf_counter() - started

    def batches():
        for number in range(3):
            spend("data")
            yield number

    started = time.perf_counter()
    with clock.spend("saving"):
        spend("saving")
    for _ in clock.waiting(batches()):
        spend("loop")
    whole = time.perf_counter() - started
    assert clock.seconds["saving"] >= spent["saving"]
    assert clock.seconds["data"] >= spent["data"]
    assert clock.seconds["saving"] + clock.seconds["data"] <= whole - spent["loop"]  # not what it did with them
    assert clock.seconds["training"] == clock.seconds["evaluation"] == 0


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
    read = Curves(tmp_path / "metrics.jsonl")
    read.read_on()
    assert read.curves["loss"].points() == [(1, 1 / 3), (2, 0.1 + 0.2)]
    assert read.curves["grad_norm"].points() == [(1, 2.0)]
    assert read.curves.keys() == {"loss", "learning_rate", "grad_norm", "eval_vicuna_loss"}
    assert best_point(tmp_path / "metrics.jsonl", "loss") == (2, 0.1 + 0.2)
    assert best_point(tmp_path / "metrics.jsonl", "eval_loss") is None


def test_other_processes_write_nothing(tmp_path, capsys):
    log = RunLog(make_recipe(tmp_path, log_wandb=True), make_progress(3), main_process=False)
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
    Curves(metrics).draw(image)
    assert image.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert image.stat().st_size > 10_000


def test_no_metrics_no_curves(tmp_path):
    Curves(tmp_path / "metrics.jsonl").draw(tmp_path / "training.png")
    assert not list(tmp_path.iterdir())


def long_run(path: Path, first: int, end: int) -> None:
    """A line every 10 steps, as a run of many steps writes them."""
    with open(path, "a", encoding="utf-8") as file:
        for line in range(first, end):
            noise = random.Random(line).gauss(0, 1)
            loss = 2 + 3 * math.exp(-line / 5000) + 0.2 * noise
            values = {"loss": loss, "loss_vicuna": loss + 0.1, "learning_rate": 1 / (line + 9), "grad_norm": 2**noise}
            file.write(json.dumps({"step": 10 * line + 1, **values, "tokens": line, "loss_scale": 65536.0}) + "\n")


def test_a_drawing_takes_as_long_however_long_the_run_is(tmp_path, monkeypatch):
    """At 100,000 lines it took 16 s of each evaluation: only what is new is read, and so many points are drawn."""
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "training.png"
    drawn, parsed = Curves(metrics), []
    parse = json.loads
    monkeypatch.setattr(lines.json, "loads", lambda text: parsed.append(text) or parse(text))
    for first, end in ((0, 100), (100, 30_000), (30_000, 30_007)):
        long_run(metrics, first, end)
        parsed.clear()
        started = time.process_time()
        drawn.draw(image)
        seconds = time.process_time() - started
        assert len(parsed) == end - first
        assert all(len(curve.points()) <= 2 * MOST_BINS + 1 for curve in drawn.curves.values())
    assert seconds < 4
    assert drawn.read == metrics.stat().st_size
    assert image.stat().st_size > 10_000


def test_a_thinned_drawing_looks_the_same(tmp_path, monkeypatch):
    long_run(tmp_path / "metrics.jsonl", 0, 20_000)
    for name, most in (("thinned", MOST_BINS), ("all", 10**9)):
        monkeypatch.setattr(curves, "MOST_BINS", most)
        Curves(tmp_path / "metrics.jsonl").draw(tmp_path / f"{name}.png")
    thinned, every = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), int) for name in ("thinned", "all"))
    assert thinned.shape == every.shape == (880, 1650)
    assert (abs(thinned - every) > 64).mean() < 0.005


@pytest.mark.parametrize("every", [1, 10, 997])
def test_a_thinned_curve_keeps_its_peaks_and_its_end(every, monkeypatch):
    monkeypatch.setattr(curves, "MOST_BINS", 16)
    values = np.random.default_rng(0).normal(size=500).tolist()
    points = [(every * step + 1, value) for step, value in enumerate(values)]
    curve = curves.Curve()
    for count, point in enumerate(points, 1):
        curve.add(*point)
        kept = curve.points()
        assert len(kept) <= 2 * 16 + 1
        assert kept == sorted(kept)
        assert set(kept) <= set(points[:count])
        if count <= 16:
            assert kept == points[:count]
        assert {min(points[:count], key=lambda p: p[1]), max(points[:count], key=lambda p: p[1]), point} <= set(kept)
    # In each stretch of the axis, the lowest and the highest: no peak is lost.
    for number in {step // curve.width for step, _ in points}:
        own = [value for step, value in points if step // curve.width == number]
        assert {min(own), max(own)} <= {value for step, value in kept if step // curve.width == number}


def test_a_line_that_is_being_written_waits(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    read = Curves(metrics)
    read.read_on()
    assert read.curves["loss"].points() == [(1, 2.0)]
    with open(metrics, "a") as file:
        file.write('ss": 1.0}\n')
    read.read_on()
    assert read.curves["loss"].points() == [(1, 2.0), (2, 1.0)]


def test_a_data_set_of_any_name_is_shown_and_drawn_in_its_colour(log, tmp_path, capsys):
    names = ["loss", "my_loss_set", "loss_x", "x", "accuracy"]
    results = {f"eval_{name}_{what}": 0.5 for name in names for what in ("loss", "accuracy")}
    log.write({"step": 1, **{f"loss_{name}": 1.0 for name in names}, "loss_spike": 1, "loss_scale": 65536.0})
    log.write({"step": 1, **results, "eval_loss": 2.0, "eval_accuracy": 1.0})
    log.show_evaluation(1, results | {"eval_loss": 2.0, "eval_accuracy": 1.0})
    shown = [line.split()[0] for line in capsys.readouterr().out.strip().splitlines()]
    assert shown == ["validation", *names, "all"]
    assert {"loss_spike", "loss_scale"}.isdisjoint(log.curves.curves)
    for name in names:
        for metric in (f"loss_{name}", f"eval_{name}_loss", f"eval_{name}_accuracy"):
            assert curves._dataset_of(metric) == name


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
    log = RunLog(
        make_recipe(tmp_path / "out", log_wandb=True, log_dir="wandb_files"), make_progress(2), main_process=True
    )
    (tmp_path / "out").mkdir(exist_ok=True)
    for line in LINES:
        log.write(line)
    log.close()
    log.trackers.finish()
    (run,) = (tmp_path / "out" / "wandb_files" / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said.startswith("wandb: ")
    assert reason in said
    assert said.endswith(f"logging offline to {run} (wandb sync uploads it)")
    assert log.trackers.wandb_url is None  # the card has no link then
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def records(run: Path) -> list:
    """What wandb has written down of an offline run, as it would upload it: all, which its own process may still be
    writing when the run has finished."""
    begun = time.monotonic()
    while True:
        found = records_so_far(run)
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() - begun < 60, found
        time.sleep(0.05)


def records_so_far(run: Path) -> list:
    """Its file has seven bytes, then LevelDB's log format: blocks of 32 KiB, made of chunks, each a checksum, its
    length and its kind (1: a whole record; 2, 3, 4: the first, a middle, the last part of one)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("*.wandb")
    data, at, record, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):
            break
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(record))
            record = b""
    return found


@pytest.mark.usefixtures("nobody")
def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, tiny_model, monkeypatch):
    """Its rows have the step as a metric of their own, so that none is dropped for lying behind."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe, output = small_recipe(tmp_path, tiny_model, log_wandb=True), tmp_path / "out"
    assert run_here(recipe, output_dir=output, steps=8).returncode == 75
    wandb_id = read_checkpoint(output / "checkpoint-8").state.wandb_id
    assert run_here(recipe, output_dir=output).returncode == 0
    runs = sorted((output / "base" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(runs) == 2
    steps = []
    for run in runs:
        found = records(run)
        assert {record.run.run_id for record in found if record.HasField("run")} == {wandb_id}
        assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]  # also of the stop
        defined = [record.metric for record in found if record.HasField("metric")]
        assert {(metric.name or metric.glob_name, metric.step_metric) for metric in defined} >= {
            ("step", ""),
            ("*", "step"),
        }
        for record in found:
            if record.HasField("history"):
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                steps.append(int(row["step"]))
    assert steps == [line["step"] for line in metrics(output)]


@pytest.mark.usefixtures("nobody")
def test_what_may_be_a_secret_is_not_uploaded(tmp_path, monkeypatch):
    """Not even what only may be one, as 40 digits of a commit or of an older key; recipe.yaml keeps it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    digits = "0123456789abcdef0123456789abcdef01234567"
    data = [{"vicuna": {"input_file_path": f"data-{digits}.json"}}]
    recipe = make_recipe(tmp_path / f"out-{digits}", log_wandb=True, datasets=data, cache_dir=digits)
    log = RunLog(recipe, make_progress(2), main_process=True)
    log.write(LINES[0])
    log.close()
    log.trackers.finish()
    (run,) = (recipe.output_dir / "base" / "wandb").glob("offline-run-*")
    found = [record.run for record in records(run) if record.HasField("run")]
    # The config comes with the run or, where wandb is slow to begin, behind it.
    configs = [each.config for each in found] + [each.config for each in records(run) if each.HasField("config")]
    values = {item.key: json.loads(item.value_json) for config in configs for item in config.update}
    assert values["cache_dir"] == "[redacted]"
    assert values["datasets"]["vicuna"]["input_file_path"] == "data-[redacted].json"
    assert values["learning_rate"] == recipe.learning_rate
    assert {each.display_name for each in found} == {"out-[redacted]"}
    assert not [record for record in records(run) if record.HasField("run") and digits in json.dumps(values)]


@pytest.mark.usefixtures("nobody")
def test_wandb_can_be_switched_off_from_outside(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = RunLog(make_recipe(tmp_path / "out", log_wandb=True), make_progress(2), main_process=True)
    log.write(LINES[0])
    log.close()
    log.trackers.finish()
    assert capsys.readouterr().out == ""


def test_without_log_wandb_it_is_not_imported(tmp_path):
    script = tmp_path / "log.py"
    script.write_text(f"""
import sys
import sft
from recipe.keys import Recipe
from run.log import RunLog
from run.progress import Progress
recipe = Recipe(model_name="none", output_dir={str(tmp_path)!r}, datasets=["vicuna"], log_wandb=False)
log = RunLog(recipe, Progress(2, 10, True), True)
log.write({{"step": 1, "loss": 1.0}})
log.close()
print([name for name in sys.modules if name.split(".")[0] == "wandb"])
""")
    result = run_script(script=str(script), output_dir=tmp_path)
    assert result.stdout.strip() == "[]"
    assert "wandb" not in result.stderr.lower()


def test_no_step_waits_for_a_drawing_and_the_last_has_all_points(log, tmp_path, monkeypatch):
    begun, go_on, drawn = threading.Event(), threading.Event(), []

    def slow(curves, image):
        begun.set()
        assert go_on.wait(60)
        curves.read_on()
        drawn.append(curves.curves["loss"].last)

    monkeypatch.setattr(Curves, "draw", slow)
    for step in (1, 2, 3):
        log.write({"step": step, "epoch": 0.1, "loss": 1.0 * step})
        log.draw()  # which the first holds up for ever
    assert begun.wait(60)
    assert drawn == []
    go_on.set()
    log.close()
    assert len(drawn) == 2
    assert drawn[-1] == (3, 3.0)


def test_a_drawing_that_fails_is_said_and_nothing_of_it_is_left(log, tmp_path, capsys):
    (tmp_path / "training.png").mkdir()
    log.write(LINES[0])
    log.draw()
    log.close()
    assert capsys.readouterr().out.count("training.png could not be drawn: Is a directory") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "training.png"]


def test_whatever_matplotlib_says_a_run_goes_on(log, tmp_path, monkeypatch, capsys):
    """As where MPLBACKEND is none."""
    monkeypatch.setattr(Curves, "draw", lambda *_: 1 / 0)
    log.write(LINES[0])
    log.draw()
    log.close()
    assert capsys.readouterr().out.count("training.png could not be drawn: ZeroDivisionError: division by zero") == 2
