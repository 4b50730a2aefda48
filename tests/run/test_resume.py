"""A run that is stopped and started again ends as one that never was: bit for bit, and whoever goes on with it.

Most runs take place within the test's process (`interruption.run_here`), with real signals; those of several processes
are launched.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from interruption import SCRIPT, metrics, run_here, small_recipe
from mutations import reseal, rewrite_state
from safetensors.torch import load_file, save_file

from recipe.load import load_recipe
from run import folder as folder_module
from run.checkpoint import read_checkpoint
from run.checkpoint_state import FORMAT
from run.folder import RECIPE_HEADER, claim_output_dir
from run.resume import changed_keys, find_checkpoint, is_finished, restore
from run.retention import list_checkpoints, step_of
from run.run import Run
from utils.errors import UserError

FIXTURES = ROOT / "tests" / "fixtures"  # of every format so far; make_checkpoint.py there says what they hold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def model(folder, tiny_model):
    """With dropout, so that a random state that is not restored shows."""
    model = shutil.copytree(tiny_model, folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_dropout": 0.1}))
    return model


@pytest.fixture(scope="module")
def recipe(folder, model):
    return small_recipe(folder, model)


@pytest.fixture(scope="module")
def whole(folder, recipe):
    """The run that nobody interrupts."""
    run = run_here(recipe, output_dir=folder / "whole")
    assert run.returncode == 0, run.stderr
    assert [line["step"] for line in metrics(run.output_dir) if "loss" in line] == [1, 3, 6, 9, 12, 15, 18, 20]
    return run.output_dir


@pytest.fixture(scope="module")
def stopped(folder, recipe):
    """A run that was stopped after step 7, with checkpoints 5 and 7; to be copied."""
    run = run_here(recipe, output_dir=folder / "stopped", steps=7)
    assert run.returncode == 75
    return run.output_dir


@pytest.fixture
def output(stopped, tmp_path):
    """A copy of it of the test's own."""
    return shutil.copytree(stopped, tmp_path / "output", symlinks=True)


def assert_same_end(output: Path, whole: Path) -> None:
    """The same metrics, each step once, and the same weights, bit for bit."""
    assert metrics(output) == metrics(whole)
    weights, expected = load_file(output / "model.safetensors"), load_file(whole / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert json.loads((output / "run.json").read_text())["status"] == "finished"


# ---- bit for bit ----

STOPS = {
    "within an epoch, twice, and in the second": [{"steps": 4}, {"steps": 3}, {"steps": 8}],  # after 4, 7 and 15
    "in an evaluation, and where it is made up for": [
        {"steps": 2},
        {"evaluation_batches": 2},  # the one after step 4
        {"evaluation_batches": 3},  # again
        {"evaluation_batches": 7, "by": "SIGINT"},  # that one is done; the one after step 8
    ],
    "after the last step": [{"steps": 20, "by": "SIGUSR1"}],
    "by a power cut": [{"steps": 8, "by": "death"}, {"steps": 1, "by": "death"}],  # back to checkpoint-5, twice
    "in the last evaluation": [{"evaluation_batches": 4 * 4 + 2}],  # four of 4 batches are before it
}


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_an_interrupted_run_is_the_same_run(tmp_path, recipe, whole, stops):
    for stop in stops:
        run = run_here(recipe, output_dir=tmp_path, **stop)
        assert run.returncode == (None if stop.get("by") == "death" else 75), run.stderr
        assert not (tmp_path / "model.safetensors").exists()
    run = run_here(recipe, output_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("held_out", [True, False])
def test_a_signal_when_nothing_is_left_but_the_final_model_changes_nothing(
    tmp_path, model, recipe, whole, held_out, monkeypatch
):
    """It comes after the last evaluation, or where nothing is held out in the last step."""
    if held_out:
        write_evaluation = Run.write_evaluation

        def and_a_signal(self, results):
            write_evaluation(self, results)
            if not self.progress.steps_left:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Run, "write_evaluation", and_a_signal)
        run = run_here(recipe, output_dir=tmp_path / "run")
        assert_same_end(tmp_path / "run", whole)
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
            "checkpoint-5",
            "checkpoint-10",
            "checkpoint-15",
            "checkpoint-20",
        ]
    else:
        nothing = [option for name in ("sums", "words") for option in (f"--datasets.{name}.val_split", 0)]
        run = run_here(small_recipe(tmp_path, model), *nothing, "--max_steps", 4, output_dir=tmp_path / "run", steps=4)
        assert list_checkpoints(tmp_path / "run") == []
    assert run.returncode == 0, run.stderr
    assert "SIGTERM: saving after this step" in run.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("same", [True, False])
def test_of_two_starts_in_a_fresh_folder_the_second_looks_again_under_the_lock(
    tmp_path, recipe, stopped, whole, same, monkeypatch
):
    """The first has come and gone between the second's look at the folder and its lock."""
    output, lock = tmp_path / "output", folder_module._lock

    def others_first(path):
        if not (output / "recipe.yaml").exists():
            shutil.copytree(stopped, output, dirs_exist_ok=True)
        lock(path)

    monkeypatch.setattr(folder_module, "_lock", others_first)
    run = run_here(recipe, *([] if same else ["--learning_rate", 1e-3]), output_dir=output)
    if same:
        assert run.returncode == 0, run.stderr
        assert "going on from" in run.stdout
        assert_same_end(output, whole)
    else:
        assert run.returncode == 2
        assert "checkpoint-7 belongs to another recipe: learning_rate" in run.errors[0]
        assert metrics(output) == metrics(stopped)


def test_killed_before_the_first_checkpoint_by_an_earlier_version_it_begins_again(tmp_path, recipe, whole):
    """Whose recipe.yaml had keys that are no more, or not yet some of today's."""
    assert run_here(recipe, output_dir=tmp_path, steps=3, by="death").returncode is None
    text = (tmp_path / "recipe.yaml").read_text()
    assert RECIPE_HEADER in text
    (tmp_path / "recipe.yaml").write_text(text + "samples_mixing: false\nuse_custom_sampler: false\n")
    run = run_here(recipe, output_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    assert_same_end(tmp_path, whole)


def test_from_the_end_of_an_epoch(tmp_path, recipe, whole):
    """The checkpoint of save_strategy: epoch; what was logged after it is trained and logged again."""
    keys = ("--save_strategy", "epoch")
    assert run_here(recipe, *keys, output_dir=tmp_path, steps=14, by="death").returncode is None
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10"]
    assert metrics(tmp_path)[-1]["step"] == 12
    run = run_here(recipe, *keys, output_dir=tmp_path)
    assert "after step 10" in run.stdout
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]
    assert_same_end(tmp_path, whole)
    # Killed between the last checkpoint and the final model.
    (tmp_path / "model.safetensors").unlink()
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "after step 20" in run_here(recipe, *keys, output_dir=tmp_path).stdout
    assert_same_end(tmp_path, whole)


def test_two_runs_are_equal(tmp_path, recipe, whole):
    run_here(recipe, output_dir=tmp_path)
    assert_same_end(tmp_path, whole)


def launched(launch: str, recipe: Path, *keys, output_dir: Path, code: int = 0, **moment):
    """A run in processes of its own; `code` is the first process's, which a launcher turns into 1."""
    run = run_script(
        *(json.dumps(moment), recipe, *keys, "--output_dir", output_dir),
        launch=launch,
        output_dir=output_dir,
        check=False,
        script=SCRIPT,
    )
    expected = code if launch == "python" or not code else 1
    assert run.returncode == expected, f"{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
    assert ("start the same command again" in run.stdout) == (code == 75)
    return run


def test_a_process_of_its_own_and_the_tests_agree(tmp_path, recipe, whole):
    launched("python", recipe, output_dir=tmp_path, code=75, steps=6, by="SIGINT")
    launched("python", recipe, output_dir=tmp_path)
    assert_same_end(tmp_path, whole)


BY_TOKENS, SOAK = ("--micro_batch_tokens", 60), pytest.mark.soak


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("launch", "cut", "batches"),  # of an evaluation, on each process
    [
        ("ddp2", (), 2),
        ("zero2x2", (), 2),
        ("zero2x2", BY_TOKENS, 6),
        ("fsdp2x2", ("--dtype", "bf16", "--optimizer_state_dtype", "bf16"), 2),
        pytest.param("zero3x2", BY_TOKENS, 6, marks=SOAK),
    ],
    ids=["ddp2", "zero2x2", "zero2x2, by tokens", "fsdp2x2 in bf16", "zero3x2, by tokens"],
)
def test_two_processes(tmp_path, recipe, launch, cut, batches):
    """A signal that one process alone hears stops both, in the same step; and nothing is lost."""
    keys = ("--gradient_accumulation_steps", 1, *cut)
    launched(launch, recipe, *keys, output_dir=tmp_path / "whole")
    output = tmp_path / "output"
    # The second process in the evaluation after step 8, then the first in the second epoch.
    moment = {"evaluation_batches": batches + 1, "process": 1, "by": "SIGUSR1"}
    launched(launch, recipe, *keys, output_dir=output, code=75, **moment)
    assert list_checkpoints(output)[-1].name == "checkpoint-8"
    launched(launch, recipe, *keys, output_dir=output, code=75, steps=6, process=0, by="SIGTERM")
    assert list_checkpoints(output)[-1].name == "checkpoint-14"
    launched(launch, recipe, *keys, output_dir=output)
    assert_same_end(output, tmp_path / "whole")


def test_moments_in_bf16_go_on_bit_for_bit_and_in_fp32_where_that_is_allowed(tmp_path, recipe):
    keys = ("--max_steps", 8, "--optimizer_state_dtype")
    assert run_here(recipe, *keys, "bf16", output_dir=tmp_path / "whole").returncode == 0
    assert run_here(recipe, *keys, "bf16", output_dir=tmp_path / "bf16", steps=3).returncode == 75
    shutil.copytree(tmp_path / "bf16", tmp_path / "fp32")
    run = run_here(recipe, *keys, "bf16", output_dir=tmp_path / "bf16")
    assert run.returncode == 0, run.stderr
    assert "Adam's moments in bf16" in run.stdout
    assert_same_end(tmp_path / "bf16", tmp_path / "whole")

    run = run_here(recipe, *keys, "fp32", output_dir=tmp_path / "fp32")
    assert run.returncode == 2
    assert "optimizer_state_dtype: bf16 then, fp32 now" in run.stderr
    run = run_here(recipe, *keys, "fp32", "--allow_changes", output_dir=tmp_path / "fp32", steps=2)
    assert run.returncode == 75, run.stderr
    assert run_here(recipe, *keys, "bf16", "--allow_changes", output_dir=tmp_path / "fp32").returncode == 0
    stored = {
        step: load_file(tmp_path / "fp32" / f"checkpoint-{step}" / "trainer_state" / "optimizer-00000-000.safetensors")
        for step in (3, 5)
    }
    dtypes = {step: {tensor.dtype for tensor in tensors.values()} for step, tensors in stored.items()}
    assert dtypes == {3: {torch.bfloat16}, 5: {torch.float32}}
    losses = [[line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("fp32", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- another number of processes ----


@pytest.mark.timeout(900)
def test_other_processes_go_on_with_the_same_steps(tmp_path, recipe, tiny_model):
    """ZeRO-2 on two processes, then one process without it, then ZeRO-2 and DDP on two."""
    keys = ("--model_name", tiny_model, "--global_batch_size", 4)  # no dropout: the random states begin anew
    run_here(recipe, *keys, output_dir=tmp_path / "whole")
    output = tmp_path / "zero2x2"
    launched("zero2x2", recipe, *keys, output_dir=output, code=75, steps=4)
    run = run_here(recipe, *keys, output_dir=output, steps=7)
    assert run.returncode == 75, run.stderr
    assert "written by 2 processes, 1 now: 4 conversations in a step, as before" in run.stdout
    shutil.copytree(output, tmp_path / "ddp2")
    for launch in ("zero2x2", "ddp2"):
        run = launched(launch, recipe, *keys, output_dir=tmp_path / launch)
        assert "written by 1 process, 2 now: 4 conversations in a step, as before" in run.stdout
        assert_close(metrics(tmp_path / launch), metrics(tmp_path / "whole"))


def assert_close(lines: list[dict], expected: list[dict]) -> None:
    """Equal keys; losses to 1e-3 of each other (measured: 1e-6), counts exactly."""
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
        assert (line["step"], line["epoch"], line.get("tokens")) == (other["step"], other["epoch"], other.get("tokens"))


@pytest.mark.timeout(900)
def test_half_precision_under_zero_keeps_its_fp32_weights(tmp_path, recipe, tiny_model, monkeypatch):
    """In bf16 the engine's fp32 weights are part of the checkpoint, for the engine and for a process without it."""
    keys = ("--model_name", tiny_model, "--global_batch_size", 4, "--dtype", "bf16")
    launched("zero2x2", recipe, *keys, output_dir=tmp_path / "whole")
    output = tmp_path / "output"
    launched("zero2x2", recipe, *keys, output_dir=output, code=75, steps=7)
    stored = load_file(output / "checkpoint-7" / "trainer_state" / "optimizer-00000-000.safetensors")
    assert {key.split("/")[0] for key in stored} == {"weights", "exp_avg", "exp_avg_sq"}
    shutil.copytree(output, tmp_path / "alone")
    launched("zero2x2", recipe, *keys, output_dir=output)
    assert_same_end(output, tmp_path / "whole")

    # As a model's file is in a dtype with fewer bits than this run's: what computes has to come from the fp32 weights.
    path = tmp_path / "alone" / "checkpoint-7" / "model.safetensors"
    coarse = {name: own.to(torch.float8_e4m3fn).to(own.dtype) for name, own in load_file(path).items()}
    save_file(coarse, path, {"format": "pt"})
    reseal(path.parent)
    layers = []

    def restore_and_look(checkpoint, recipe, engine, *others) -> None:
        restore(checkpoint, recipe, engine, *others)
        layers.extend(
            (layer.half_weight.clone(), layer.weight.detach().clone()) for layer in engine.half_weights.layers
        )

    monkeypatch.setattr("run.run.restore", restore_and_look)
    run = run_here(recipe, *keys, output_dir=tmp_path / "alone")
    assert run.returncode == 0, run.stderr
    assert len(layers) == 9
    for half, weight in layers:
        assert torch.equal(half, weight.bfloat16())
        assert not torch.equal(half.float(), weight)  # fp32 indeed
    for line, expected in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "whole"), strict=True):
        for name in {"loss", "eval_loss"} & line.keys():
            assert line[name] == pytest.approx(expected[name], rel=2e-2)  # 8 bits


@pytest.mark.timeout(600)
def test_without_a_global_batch_size_it_says_what_changes(tmp_path, recipe, tiny_model):
    keys = ("--model_name", tiny_model)
    run_here(recipe, *keys, output_dir=tmp_path, steps=7)
    run = launched("ddp2", recipe, *keys, output_dir=tmp_path)
    line = "8 conversations in a step where there were 4 (global_batch_size keeps their number)"
    assert f"written by 1 process, 2 now: {line}; random states begin anew" in run.stdout
    # Twelve conversations were left of the first epoch: two steps of 8 and 4... and five of the second.
    assert metrics(tmp_path)[-1]["step"] == 7 + 2 + 5
    assert metrics(tmp_path)[-1]["epoch"] == 2


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_a_checkpoint_of_every_format_can_be_gone_on_from(tmp_path, number):
    """It was written by two processes under ZeRO-2; tolerances are for other machines and versions of PyTorch."""
    fixture = FIXTURES / f"checkpoint_format_{number}"
    output = shutil.copytree(fixture / "run", tmp_path / "output")
    assert read_checkpoint(output / "checkpoint-5").state.format == number
    keys = ("--output_dir", output, "--cache_dir", tmp_path / "cache")
    run = run_here(fixture.relative_to(ROOT) / "recipe.yaml", *keys, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert f"going on from {output}/checkpoint-5, after step 5" in run.stdout
    lines = metrics(output)
    expected = [json.loads(line) for line in (fixture / "expected.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in {"loss", "eval_loss", "tokens", "learning_rate", "epoch"} & other.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-4), (line["step"], name)


# ---- is it the same run? ----


def test_a_changed_recipe_is_refused_and_its_keys_are_named(recipe, output, whole, folder):
    keys = ("--learning_rate", 3e-3, "--datasets.words.fraction", 0.5)
    before = sorted(path.name for path in output.rglob("*"))
    run = run_here(recipe, *keys, output_dir=output)
    assert run.returncode == 2
    (error,) = run.errors
    assert f"{output}/checkpoint-7 belongs to another recipe" in error
    assert "learning_rate: 0.01 then, 0.003 now; datasets.words.fraction: 0.3 then, 0.5 now" in error
    assert "--allow_changes" in error
    assert sorted(path.name for path in output.rglob("*")) == before

    run = run_here(recipe, *keys, "--allow_changes", output_dir=output)
    assert run.returncode == 0, run.stderr
    assert "changed: learning_rate: 0.01 then, 0.003 now" in run.stdout
    lines = metrics(output)
    assert lines[:4] == metrics(whole)[:4]
    assert max(line.get("learning_rate", 0) for line in lines[4:]) <= 3e-3
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


def test_a_start_that_is_refused_is_none_that_runs(recipe, output, tmp_path, monkeypatch):
    """It has a line of its own in run.json: what ended the start before is not written over."""

    def refuse(*_):
        raise UserError("no room")

    earlier = json.loads((output / "run.json").read_text())["starts"]
    monkeypatch.setattr("run.preflight.preflight", refuse)
    for folder, before in ((output, earlier), (tmp_path / "new", [])):
        run = run_here(recipe, output_dir=folder)
        assert (run.returncode, run.errors) == (2, ["error: no room"])
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"], record["starts"][:-1]) == ("failed", before)
        last = record["starts"][-1]
        assert (last["why"], last["machines"], last["processes"]) == ("no room", [os.uname().nodename], 1)
        assert last["step"] == last["from_step"] == (before[-1]["step"] if before else 0)
        assert last["started"] <= last["ended"]


def test_changed_data_are_refused(recipe, output, tmp_path, folder):
    data = tmp_path / "sums.jsonl"
    data.write_text((folder / "sums.jsonl").read_text())
    place = ("--datasets.sums.input_file_path", data, "--max_steps", 20)
    run = run_here(recipe, *place, output_dir=output, steps=1)
    assert run.returncode == 2  # for max_steps: data in another place are the same
    assert "max_steps: None then, 20 now" in run.errors[0]
    assert "sums" not in run.errors[0]
    assert run_here(recipe, *place[:2], output_dir=output, steps=1).returncode == 75

    data.write_text(data.read_text().replace("That is 8.", "That is 9."))
    run = run_here(recipe, *place[:2], output_dir=output)
    assert run.returncode == 2
    assert "the data of sums are not those that" in run.errors[0]
    run = run_here(recipe, *place[:2], "--allow_changes", output_dir=output)
    assert run.returncode == 0
    assert "the data of sums are not those that" in run.stdout


def test_a_mix_may_be_made_smaller(recipe, output):
    """28 of the epoch's 38 conversations are used; it has 16 now."""
    run = run_here(recipe, "--datasets.sums.fraction", 0.3, "--allow_changes", output_dir=output)
    assert run.returncode == 0, run.stderr
    assert metrics(output)[-1]["epoch"] == 2


def test_keys_that_do_not_matter_are_free(recipe, output, whole, tmp_path):
    """Another cut of the same step, other places, other intervals."""
    free = {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "eval_steps": 5,
        "save_steps": 8,
        "logging_steps": 4,
        "cache_dir": tmp_path / "cache",
        "max_bad_steps": 3,
    }
    run = run_here(recipe, *[text for key, value in free.items() for text in (f"--{key}", value)], output_dir=output)
    assert run.returncode == 0, run.stderr
    assert "changed" not in run.stdout
    ends = [next(line for line in reversed(metrics(each)) if "loss" in line) for each in (output, whole)]
    assert ends[0]["tokens"] == ends[1]["tokens"]


def test_micro_batches_may_be_cut_by_tokens_from_a_start_on_and_no_more_from_another(tmp_path, recipe, tiny_model):
    """The steps stay what they are: the same run to rounding, and by tokens all along bit for bit."""
    # Without dropout, which would be drawn for other batches; for epsilon see test_training.py.
    same = ("--model_name", tiny_model, "--adam_epsilon", 1e-5)
    by_tokens = (*same, "--micro_batch_tokens", 60)
    whole = run_here(recipe, *same, output_dir=tmp_path / "whole")
    run_here(recipe, *by_tokens, output_dir=tmp_path / "by_tokens")
    assert metrics(tmp_path / "by_tokens") != metrics(tmp_path / "whole")

    stopped, switched = tmp_path / "stopped", tmp_path / "switched"
    assert run_here(recipe, *by_tokens, output_dir=stopped, steps=7).returncode == 75
    run = run_here(recipe, *by_tokens, output_dir=stopped)
    assert run.returncode == 0, run.stderr
    assert "up to 60 tokens x up to 4 accumulated = 4 conversations a step" in run.stdout
    assert_same_end(stopped, tmp_path / "by_tokens")

    for keys, steps, code in ((same, 3, 75), (by_tokens, 5, 75), (same, 4, 75), (by_tokens, None, 0)):
        run = run_here(recipe, *keys, output_dir=switched, steps=steps)
        assert run.returncode == code, run.stderr
        assert "changed" not in run.stdout
    for ours, expected in zip(metrics(switched), metrics(whole.output_dir), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    weights, expected = load_file(switched / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=0)


def make(recipe: Path, **keys):
    return load_recipe(recipe, {key: str(value) for key, value in keys.items()})


@pytest.mark.parametrize(
    ("then", "now", "changed"),
    [
        ({}, {}, []),
        ({}, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}, []),
        ({}, {"micro_batch_tokens": 48, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}, []),
        ({}, {"global_batch_size": 8}, []),  # two processes of 2 x 2
        ({}, {"global_batch_size": 16}, ["global_batch_size: None then, 16 now"]),
        ({}, {"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps: 2 then, 4 now"]),
        # What is averaged, or sorted, by micro-batch.
        (
            {"sort_by_length": True},
            {"sort_by_length": True, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
            ["gradient_accumulation_steps: 2 then, 1 now", "per_device_train_batch_size: 2 then, 4 now"],
        ),
        (
            {"loss_normalization": "micro_batch"},
            {"loss_normalization": "micro_batch", "global_batch_size": 8, "per_device_train_batch_size": 4},
            ["global_batch_size: None then, 8 now", "per_device_train_batch_size: 2 then, 4 now"],
        ),
        ({}, {"optimizer_state_dtype": "bf16"}, ["optimizer_state_dtype: fp32 then, bf16 now"]),
        ({}, {"rng_seed": 3, "dtype": "bf16"}, ["dtype: fp32 then, bf16 now", "rng_seed: 2703368087 then, 3 now"]),
        (
            {},
            {"datasets": "[sums: {source: messages, input_file_path: elsewhere.jsonl}]"},
            ["datasets.words: in the mix then, not now"],
        ),
        (
            {"datasets": "[sums: {source: messages, input_file_path: a.jsonl, size: 3}]"},
            {"datasets": "[sums: {source: messages, input_file_path: b.jsonl, size: 4}, vicuna]"},
            ["datasets.vicuna: not in the mix then", "datasets.sums.size: 3 then, 4 now"],
        ),
    ],
)
def test_changed_keys(recipe, then, now, changed):
    found = changed_keys(make(recipe, **then), make(recipe, **now), num_processes=2)
    assert sorted(found) == sorted(changed)


def test_a_finished_run_says_so_and_can_be_trained_on(recipe, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "output")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for dry in ([], ["--dry_run"]):
        run = run_here(recipe, *dry, output_dir=output)
        assert run.returncode == 0
        said = run.stdout.partition("# ---- what was found of it ----\n")[2] if dry else run.stdout
        assert said == f"the run in {output} is finished: nothing to do; another --output_dir starts another\n"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    more = ("--num_train_epochs", 2.5)
    run = run_here(recipe, *more, output_dir=output)
    assert run.returncode == 2
    assert "num_train_epochs: 2.0 then, 2.5 now" in run.errors[0]
    run = run_here(recipe, *more, "--allow_changes", output_dir=output)
    assert run.returncode == 0, run.stderr
    assert metrics(output)[: len(metrics(whole))] == metrics(whole)
    assert metrics(output)[-1]["step"] == 25
    assert json.loads((output / "run.json").read_text())["report"]["steps"] == 25


def test_a_finished_run_whose_model_is_gone(recipe, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "output")
    for path in [*output.glob("*.safetensors")]:
        path.unlink()
    for dry in ([], ["--dry_run"]):
        run = run_here(recipe, *dry, output_dir=output)
        assert (run.returncode, len(run.errors)) == (2, 1)
        assert run.errors[0].startswith(f"error: {output}/run.json: the run is finished, but its model is gone: ")
    (output / "run.json").unlink()
    assert run_here(recipe, output_dir=output).returncode == 0
    assert_same_end(output, whole)


# ---- which checkpoint ----


def test_a_run_killed_before_its_first_checkpoint_begins_again(recipe, tmp_path, whole):
    assert run_here(recipe, output_dir=tmp_path, steps=4, by="death").returncode is None
    assert len(metrics(tmp_path)) == 2
    with pytest.raises(UserError, match=r"holds another run \(metrics.jsonl"):  # another recipe
        find_checkpoint(make(recipe, output_dir=tmp_path, learning_rate=1), allow_changes=False)
    with pytest.raises(UserError, match=r"holds another run \(metrics.jsonl"):
        find_checkpoint(make(recipe, output_dir=tmp_path, resume_from_checkpoint="never"), allow_changes=False)
    run = run_here(recipe, output_dir=tmp_path)
    assert "going on" not in run.stdout
    assert_same_end(tmp_path, whole)


def test_of_a_finished_run_without_checkpoints_it_says_what_is_another(recipe, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert is_finished(make(recipe, output_dir=folder))
    other = make(recipe, output_dir=folder, learning_rate=0.02, max_grad_norm=1.0)
    words = r"holds another run \(metrics.jsonl, .*; in its recipe learning_rate: 0.01 then, 0.02 now; max_grad_norm: "
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            find_checkpoint(other, allow_changes=False)
        words = r"holds another run \(metrics.jsonl, [^;]*; give another --output_dir, or remove it$"
        (folder / "run.json").write_text("{")


def test_never_begins_in_an_empty_folder_only(recipe, output, tmp_path):
    for keys, returncode in ((("--output_dir", output), 2), ((), 75)):
        run = run_here(recipe, "--resume_from_checkpoint", "never", *keys, output_dir=tmp_path / "new", steps=1)
        run = run_here(recipe, "--resume_from_checkpoint", "never", output_dir=keys[1] if keys else tmp_path, steps=1)
        assert run.returncode == returncode
    assert "holds another run (metrics.jsonl" in run.errors[0] if run.errors else True


def test_a_checkpoint_of_another_folder(recipe, output, tmp_path, whole):
    """It is begun from; started again, the run goes on from its own."""
    new, keys = tmp_path / "new", ("--resume_from_checkpoint", output / "checkpoint-5")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    run = run_here(recipe, *keys, output_dir=new, steps=2, by="death")  # before it has a checkpoint of its own
    assert f"going on from {output}/checkpoint-5, after step 5" in run.stdout
    run = run_here(recipe, *keys, output_dir=new, steps=7)
    assert f"going on from {output}/checkpoint-5, after step 5" in run.stdout
    run = run_here(recipe, *keys, output_dir=new)
    assert f"going on from {new}/checkpoint-12, after step 12" in run.stdout
    assert_same_end(new, whole)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_checkpoint_of_the_same_folder(recipe, output, whole):
    keys = ("--resume_from_checkpoint", output / "checkpoint-5")
    run = run_here(recipe, *keys, output_dir=output)
    assert run.returncode == 2
    assert f"{output} holds newer ones (checkpoint-7): move them away" in run.errors[0]
    (output / "checkpoint-7").rename(output / "elsewhere")
    assert run_here(recipe, *keys, output_dir=output).returncode == 0
    assert_same_end(output, whole)


@pytest.mark.parametrize("own", [True, False])
def test_a_checkpoint_that_is_not_there(recipe, output, tmp_path, own):
    asked = output / "checkpoint-9" if own else tmp_path / "none" / "checkpoint-9"
    there = output if own else tmp_path / "new"
    with pytest.raises(UserError, match=f"{asked}: holds no trainer_state"):
        find_checkpoint(make(recipe, output_dir=there, resume_from_checkpoint=asked), allow_changes=False)


# ---- whole or absent ----


def damage(checkpoint: Path, how: str) -> None:
    state = checkpoint / "trainer_state" / "state.json"
    model, optimizer = checkpoint / "model.safetensors", next(checkpoint.glob("trainer_state/optimizer-*.safetensors"))
    values = json.loads(state.read_text())
    if how == "model cut off":
        model.write_bytes(model.read_bytes()[:-10])
    elif how == "optimizer cut off":
        optimizer.write_bytes(optimizer.read_bytes()[:1000])
    elif how == "header broken":
        model.write_bytes(b"\xff" * 8 + model.read_bytes()[8:])
    elif how == "model missing":
        model.unlink()
    elif how == "process missing":
        (checkpoint / "trainer_state" / "process-0.json").unlink()
    elif how == "no state":
        shutil.rmtree(checkpoint / "trainer_state")
    elif how == "later format":
        state.write_text(json.dumps(values | {"format": 99}))
    else:
        content = {"cut off": state.read_text()[:300], "zeros": "\0" * 300, "null": "null", "no object": "[1]"}
        content |= {"no files": json.dumps(values | {"files": None}), "format": json.dumps(values | {"format": "x"})}
        state.write_text(content[how.removeprefix("state ")])


DAMAGES = {
    "model cut off": "not whole: model.safetensors has",
    "optimizer cut off": "not whole: trainer_state/optimizer-00000-000.safetensors has 1,000 of",
    "header broken": "not whole: ",
    "model missing": "not whole: .*model.safetensors",
    "process missing": "not whole: .*process-0.json",
    "no state": "holds no trainer_state",
    "later format": "of a later version of this collection",
    "state cut off": "not whole: ",
    "state zeros": "not whole: ",
    "state null": "not whole: ",
    "state no object": "not whole: ",
    "state no files": "not whole: ",
    "state format": "not whole: ",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(recipe, output, how, capsys):
    damage(output / "checkpoint-7", how)
    changed = make(recipe, output_dir=output)
    found = find_checkpoint(changed, allow_changes=False)
    assert found.path == output / "checkpoint-5"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"passed over: {output}/checkpoint-7: ")
    assert re.search(DAMAGES[how], line)
    # It gives up its name, so that save_total_limit does not count it, but not what is in it.
    (output / ".checkpoint-9").mkdir()
    (output / ".final").mkdir()
    claim_output_dir(changed, found)
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-5", "checkpoint-7.set-aside"]
    assert set(capsys.readouterr().out.splitlines()) == {
        "removed .checkpoint-9, which an interrupted run had not finished",
        "removed .final, which an interrupted run had not finished",
        f"{output}/checkpoint-7 was passed over, and is now checkpoint-7.set-aside",
    }
    assert metrics(output)[-1]["step"] == 4  # the lines up to step 5


def test_damaged_again(recipe, output):
    damage(output / "checkpoint-7", "state null")
    values = make(recipe, output_dir=output)
    for _ in range(2):
        shutil.copytree(output / "checkpoint-7", output / "checkpoint-8")
        claim_output_dir(values, find_checkpoint(values, allow_changes=False))
        (output / "checkpoint-7.set-aside").rename(output / "checkpoint-7")
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-5", "checkpoint-7"]
    assert (output / "checkpoint-8.set-aside" / "model.safetensors").exists()


def test_from_the_checkpoint_before_a_damaged_one(recipe, output, whole):
    damage(output / "checkpoint-7", "model cut off")
    run = run_here(recipe, "--save_total_limit", 2, output_dir=output)
    assert "passed over" in run.stdout
    assert_same_end(output, whole)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-15", "checkpoint-20"]


def test_no_whole_checkpoint_at_all(recipe, output):
    for path in list_checkpoints(output):
        damage(path, "model missing")
    line = r"holds another run \(metrics.jsonl, .*checkpoint-5, checkpoint-7\); .*: .*/checkpoint-7: not whole: "
    with pytest.raises(UserError, match=line):
        find_checkpoint(make(recipe, output_dir=output), allow_changes=False)


# ---- name and step agree ----


def renumber(output: Path, how: str) -> None:
    """Give a run of checkpoints 5 and 7 one whose number is not that of its step."""
    seven = output / "checkpoint-7"
    if how == "moved":
        seven.rename(output / "checkpoint-9")
    elif how == "a smaller step in its state":
        rewrite_state(seven, step=6)
    elif how.startswith("copied"):
        names = {"far ahead": "checkpoint-9999", "in other digits": "checkpoint-0007", "in Arabic ones": "checkpoint-٩"}
        shutil.copytree(seven, output / names[how.removeprefix("copied ")])
    elif how == "linked":
        (output / "checkpoint-9").symlink_to("checkpoint-7")
    elif how == "linked to nothing":
        (output / "checkpoint-9").symlink_to("checkpoint-8")
    elif how == "linked to itself":
        (output / "checkpoint-9").symlink_to("checkpoint-9")
    elif how == "a file":
        (output / "checkpoint-9").write_text("")
    elif how == "links to another number":
        for path in list_checkpoints(output):
            path.rename(output / f"checkpoint-1{step_of(path)}")
            path.symlink_to(f"checkpoint-1{step_of(path)}")


# How, and the step that the next start goes on from.
NUMBERS = {
    "moved": 5,
    "a smaller step in its state": 5,
    "copied far ahead": 7,
    "copied in other digits": 7,
    "copied in Arabic ones": 7,
    "linked": 7,
    "linked to nothing": 7,
    "linked to itself": 7,
    "a file": 7,
}


@pytest.mark.parametrize("how", NUMBERS)
def test_a_checkpoint_under_another_number_is_passed_over_and_set_aside(recipe, output, whole, how):
    """And the run ends as one that nobody disturbed; the one in use keeps its name and all that is in it."""
    step = NUMBERS[how]
    used = output / f"checkpoint-{step}"
    before = set(used.rglob("*"))
    renumber(output, how)
    run = run_here(recipe, "--keep_trainer_state", 9, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert f"going on from {used}, after step {step}" in run.stdout
    assert before == set(used.rglob("*"))
    (aside,) = [path.name for path in output.glob("*.set-aside")]
    assert f"{output}/{aside.removesuffix('.set-aside')} was passed over, and is now {aside}" in run.stdout
    assert_same_end(output, whole)
    assert [step_of(path) for path in list_checkpoints(output)] == sorted({5, step, 10, 15, 20})


@pytest.mark.parametrize("how", ["moved", "links to another number"])
def test_where_no_number_agrees_nothing_is_touched_at_any_start(recipe, output, how):
    """As a requeue makes one start after another."""
    shutil.rmtree(output / "checkpoint-5")
    renumber(output, how)
    (output / ".lock").unlink()  # which each start makes
    before = {path: path.lstat().st_mtime_ns for path in output.rglob("*")}
    for _ in range(2):
        run = run_here(recipe, output_dir=output)
        assert run.returncode == 2
        (error,) = run.errors
        assert "holds another run (metrics.jsonl" in error
        name = "checkpoint-9" if how == "moved" else "checkpoint-17"
        assert f"{name} holds the state after step 7: its name has to be checkpoint-7" in error
        (output / ".lock").unlink()
        assert {path: path.lstat().st_mtime_ns for path in output.rglob("*")} == before
    (output / "checkpoint-7").unlink(missing_ok=True)
    (output / name).rename(output / "checkpoint-7")
    assert "after step 7" in run_here(recipe, output_dir=output, steps=1).stdout


def test_what_was_set_aside_is_a_run_that_is_there(recipe, output, tmp_path):
    """Though it be all that is left of it: the next start, of whatever kind, does not begin from step 1."""
    elsewhere = shutil.copytree(output / "checkpoint-5", tmp_path / "other" / "checkpoint-5")
    shutil.rmtree(output / "checkpoint-5")
    (output / "checkpoint-7").rename(output / "checkpoint-7.set-aside")
    lines = metrics(output)
    for asked in ("auto", "never", elsewhere):
        run = run_here(recipe, "--resume_from_checkpoint", asked, output_dir=output)
        assert run.returncode == 2
        assert "checkpoint-7.set-aside); give another --output_dir" in run.errors[0]
    assert metrics(output) == lines
    for path in output.iterdir():  # without any other trace of a run but the recipe
        if path.name not in ("recipe.yaml", "checkpoint-7.set-aside"):
            path.unlink()
    assert "run (checkpoint-7.set-aside); give another" in run_here(recipe, output_dir=output).errors[0]
    (output / "checkpoint-7.set-aside").rename(output / "checkpoint-7")
    assert "after step 7" in run_here(recipe, output_dir=output, steps=1).stdout


@pytest.mark.parametrize("step", ["7", 7.0, True, None, -7, [7]])
def test_a_step_that_is_no_number(recipe, output, step, capsys):
    rewrite_state(output / "checkpoint-7", step=step)
    found = find_checkpoint(make(recipe, output_dir=output), allow_changes=False)
    assert found.path == output / "checkpoint-5"
    line = (
        f"passed over: {output}/checkpoint-7: not whole: trainer_state/state.json: not the state of a run: step should"
    )
    assert line in capsys.readouterr().out


def test_a_checkpoint_may_lie_on_another_disk_under_its_own_number(recipe, output, tmp_path, whole):
    """Linked to; save_total_limit takes the link away and leaves the checkpoint."""
    (tmp_path / "disk").mkdir()
    away = Path(shutil.move(output / "checkpoint-7", tmp_path / "disk" / "checkpoint-7"))
    (output / "checkpoint-7").symlink_to(away)
    keys = ("--resume_from_checkpoint", output / "checkpoint-7", "--save_total_limit", 2)
    run = run_here(recipe, *keys, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert f"going on from {output}/checkpoint-7, after step 7" in run.stdout
    assert_same_end(output, whole)
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-15", "checkpoint-20"]
    assert read_checkpoint(away).step == 7


@pytest.mark.parametrize("number", [7, 9])
def test_beside_a_link_to_itself(recipe, output, number):
    (output / "checkpoint-9").symlink_to("checkpoint-9")
    line = "holds newer ones .checkpoint-9" if number == 7 else "checkpoint-9: holds no trainer_state"
    asked = output / f"checkpoint-{number}"
    with pytest.raises(UserError, match=line):
        find_checkpoint(make(recipe, output_dir=output, resume_from_checkpoint=asked), allow_changes=False)


@pytest.mark.parametrize(("name", "agrees"), [("best", True), ("checkpoint-8", False), ("checkpoint-007", False)])
def test_one_that_is_asked_for_has_its_own_number_or_none(recipe, output, tmp_path, name, agrees):
    asked = shutil.copytree(output / "checkpoint-7", tmp_path / "kept" / name)
    for path in (asked, Path(os.path.relpath(asked)), asked / "trainer_state" / ".."):
        values = make(recipe, output_dir=tmp_path / "new", resume_from_checkpoint=path)
        if agrees:
            assert find_checkpoint(values, allow_changes=False).step == 7
        else:
            line = f"{name} holds the state after step 7: its name has to be checkpoint-7$"
            with pytest.raises(UserError, match=line):
                find_checkpoint(values, allow_changes=False)


def test_the_one_in_use_is_never_moved(recipe, output, tmp_path, capsys):
    """By whatever way it is named; a link to it under another number is."""
    linked = tmp_path / "linked"
    linked.symlink_to(output)
    (output / "kept").symlink_to("checkpoint-7")
    for way in (output / "checkpoint-7", linked / "checkpoint-7", output / "kept", linked / ".." / "output" / "kept"):
        (output / "checkpoint-9").symlink_to("checkpoint-7")
        values = make(recipe, output_dir=output, resume_from_checkpoint=way)
        claim_output_dir(values, find_checkpoint(values, allow_changes=False))
        assert [path.name for path in list_checkpoints(output)] == ["checkpoint-5", "checkpoint-7"]
        assert "checkpoint-9 was passed over" in capsys.readouterr().out
    assert metrics(output)[-1]["step"] == 6


# ---- the folder ----


def test_claiming_writes_a_recipe_that_repeats_the_run(recipe, tmp_path):
    values = make(recipe, output_dir=tmp_path / "deep" / "out", learning_rate=2e-5)
    claim_output_dir(values, None)
    assert load_recipe(values.output_dir / "recipe.yaml") == values
    claim_output_dir(values, None)  # nothing has been trained yet


def test_claiming_removes_what_a_killed_run_left(recipe, tmp_path, capsys):
    (tmp_path / ".checkpoint-5").mkdir()
    (tmp_path / ".checkpoint-5" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    claim_output_dir(make(recipe, output_dir=tmp_path), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt", "recipe.yaml"]
    assert capsys.readouterr().out == "removed .checkpoint-5, which an interrupted run had not finished\n"


@pytest.mark.parametrize("held", ["metrics.jsonl", "config.json", "checkpoint-10", "recipe.yaml"])
def test_another_run_is_not_written_over(recipe, tmp_path, held):
    (tmp_path / "recipe.yaml").write_text("the other's" if held == "recipe.yaml" else f"{RECIPE_HEADER}the other's")
    if held.startswith("checkpoint"):
        (tmp_path / held).mkdir()
    elif held != "recipe.yaml":
        (tmp_path / held).write_text("{}")
    with pytest.raises(UserError, match=held) as refusal:
        find_checkpoint(make(recipe, output_dir=tmp_path), allow_changes=False)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_that_cannot_be_made(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="output_dir"):
            claim_output_dir(make(recipe, output_dir=folder), None)


@pytest.mark.parametrize("cut", ['{"step": 6, "lo', '{"step": 6, "begins": "gr\xc3'.encode("latin-1"), b"\0\0\0", b""])
def test_a_line_that_a_full_disk_cut_off(recipe, output, cut):
    quoted = json.dumps({"step": 2, "examples": "one\u2028line\x85of text"}, ensure_ascii=False) + "\n"
    (output / "bad_steps.jsonl").write_text(quoted)
    expected = metrics(output)
    with open(output / "metrics.jsonl", "ab") as file:
        file.write(cut if isinstance(cut, bytes) else cut.encode())
    values = make(recipe, output_dir=output)
    claim_output_dir(values, find_checkpoint(values, allow_changes=False))
    assert metrics(output) == expected
    assert (output / "bad_steps.jsonl").read_text() == quoted
