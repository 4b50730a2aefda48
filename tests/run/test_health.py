"""Steps that go wrong: left out, counted, named, and too many of them the end; spikes; the end of fp16's loss scale."""

import json
import math
import re
import shutil
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from interruption import SCRIPT, metrics, run_here, small_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from run.health import FP16_ADVICE, StepHealth, one_line_at_minimum_scale
from training.optimizer import warmup_decay
from training.optimizer_state import load_loss_scale, loss_scale, loss_scale_state
from utils.errors import UserError

# ---- bad steps, in real runs ----

RARE = "\N{GREEK CAPITAL LETTER OMEGA}"  # in one conversation
BEGINS = f"sums 5 and {RARE}?"


@pytest.fixture
def changed_model(tmp_path, tiny_model):
    """A copy of the tiny model with some of its weights changed."""

    def change(name: str, rows, factor: float):
        model = shutil.copytree(tiny_model, tmp_path / "model")
        weights = load_file(model / "model.safetensors")
        weights[name][rows] *= factor
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        return model

    return change


@pytest.fixture
def one_bad_conversation(tmp_path, tiny_model, changed_model):
    """A recipe with a conversation, of the training split, that holds a token whose embedding is infinite."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    recipe = small_recipe(tmp_path, tiny_model)
    sums = tmp_path / "sums.jsonl"
    usual = set(tokenizer.encode(sums.read_text() + (tmp_path / "words.jsonl").read_text()))
    (rare, *_) = set(tokenizer.encode(f" {RARE}")) - usual
    values = json.loads(recipe.read_text())
    values["model_name"] = str(changed_model("gpt_neox.embed_in.weight", [rare], math.inf))
    recipe.write_text(json.dumps(values))
    lines = sums.read_text().splitlines()
    lines[5] = lines[5].replace("sums 5 and 9?", BEGINS)
    assert RARE in json.loads(lines[5])["messages"][0]["content"]
    sums.write_text("\n".join(lines))
    return recipe


def weights_and_moments(checkpoint) -> dict[str, torch.Tensor]:
    """Of all processes; a ZeRO-2 process's moments are its own part."""
    found = {}
    for path in checkpoint.rglob("*.safetensors"):
        found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("launch", ["here", "ddp2", "zero2x2", pytest.param("zero3x2", marks=pytest.mark.soak)])
def test_a_step_without_finite_numbers_is_left_out(tmp_path, one_bad_conversation, launch):
    output = tmp_path / "output"
    keys = (one_bad_conversation, "--logging_steps", 1, "--save_steps", 1, "--keep_trainer_state", "null")
    if launch == "here":
        run = run_here(*keys, output_dir=output)
        assert run.returncode == 0, run.stderr
    else:
        keys = ("{}", *keys, "--gradient_accumulation_steps", 1, "--output_dir", output)
        run = run_script(*keys, launch=launch, output_dir=output, script=SCRIPT)

    # Once an epoch, since every conversation of its data set is used once in each.
    bad = [json.loads(line) for line in (output / "bad_steps.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in bad]
    assert len(steps) == 2
    assert steps[0] <= 10 < steps[1]
    for line in bad:
        assert line["loss"] == "nan"
        assert line["grad_norm"] == ("inf" if launch.startswith("zero") else "nan")  # as DeepSpeed says it
        assert len(line["examples"]) == (4 if line["step"] % 10 else 2)  # all of the step, over both processes
        assert {"dataset": "sums", "conversation": 5, "begins": BEGINS} in line["examples"]
        printed = (
            f"step {line['step']:,} left out: loss nan, gradient norm {line['grad_norm']}; see {output}/bad_steps.jsonl"
        )
        assert run.stdout.count(printed) == 1
    assert "2 steps left out, 2 of them for a loss or gradient that was no number" in run.stdout

    # The weights and Adam's moments are as they were, and good numbers still.
    for step in range(2, 21):
        before, after = (weights_and_moments(output / f"checkpoint-{number}") for number in (step - 1, step))
        assert before.keys() == after.keys()
        changed = [name for name in after if not torch.equal(before[name], after[name])]
        assert bool(changed) == (step not in steps and step > 2), step  # the first two run at rate 0
    finite = [bool(torch.isfinite(tensor).all()) for name, tensor in after.items() if "embed_in" not in name]
    assert all(finite)

    # Nor do they count for the learning rate's curve, or for the loss.
    lines = [line for line in metrics(output) if "grad_norm" in line]
    assert [line["step"] for line in lines] == list(range(1, 21))
    updates = 0
    for line in lines:
        assert line["learning_rate"] == pytest.approx(1e-2 * warmup_decay(updates, 3, 20))
        count = sum(step <= line["step"] for step in steps)
        assert (line.get("bad_steps", 0), line.get("skipped_steps", 0)) == (count, count)
        assert ("loss" in line) == (line["step"] not in steps)
        assert (line["grad_norm"] is None) == (line["step"] in steps)
        updates += line["step"] not in steps
    report = json.loads((output / "run.json").read_text())["report"]
    assert (report["steps"], report["skipped_steps"], report["bad_steps"]) == (20, 2, 2)


def test_bad_steps_are_counted_over_interruptions(tmp_path, one_bad_conversation):
    run_here(one_bad_conversation, output_dir=tmp_path / "whole")
    output = tmp_path / "output"
    for steps in (8, 9):  # good ones, with the bad one between them
        assert run_here(one_bad_conversation, output_dir=output, steps=steps).returncode == 75
    assert run_here(one_bad_conversation, output_dir=output).returncode == 0
    assert metrics(output) == metrics(tmp_path / "whole")
    assert metrics(output)[-2]["bad_steps"] == 2
    files = [(folder / "bad_steps.jsonl").read_text() for folder in (output, tmp_path / "whole")]
    assert files[0] == files[1]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", ["here", "ddp2"])
def test_too_many_bad_steps_stop_the_run(tmp_path, changed_model, launch):
    """Here the loss is finite and its gradient's norm is not: an output layer scaled by 1e20."""
    recipe = small_recipe(tmp_path, changed_model("embed_out.weight", slice(None), 1e20), max_bad_steps=3)
    output = tmp_path / "output"
    if launch == "here":
        run = run_here(recipe, output_dir=output)
    else:
        keys = ("{}", recipe, "--output_dir", output)
        run = run_script(*keys, launch=launch, output_dir=output, script=SCRIPT, check=False)
    assert run.returncode == (2 if launch == "here" else 1)
    line = (
        "error: 3 steps in a row without a finite loss and gradient, up to step 3: stopped; "
        "bad_steps.jsonl in output_dir lists their conversations"
    )
    assert re.findall(r"error.*", run.stderr.partition("Root Cause")[0])[:1] == [line]
    assert run.stderr.count("steps in a row") == 1  # once, not by each process
    bad = [json.loads(line) for line in (output / "bad_steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["grad_norm"], len(line["examples"])) for line in bad] == [
        (step, "inf", 4 if launch == "here" else 8) for step in (1, 2, 3)
    ]
    assert all(math.isfinite(float(line["loss"])) for line in bad)


# ---- in a row ----

MIX = SimpleNamespace(
    names=["talk"],
    train=SimpleNamespace(dataset=[0] * 9, position=range(9), messages=lambda row: [{"content": f"{row}" * 100}]),
)


def test_only_bad_steps_in_a_row_stop_the_run(tmp_path):
    health = StepHealth(3, tmp_path / "bad_steps.jsonl")
    for _ in range(4):
        health.bad_step(1, math.nan, math.nan, MIX, [4])
        health.bad_step(2, math.inf, math.nan, MIX, [5, 6])
        health.good_step(1.0)
    assert (health.skipped, health.bad, health.bad_in_a_row) == (8, 8, 0)
    health.bad_step(3, 1.0, math.inf, MIX, [])
    health.overflow(128.0)  # which is not a bad one
    health.bad_step(4, 1.0, math.inf, MIX, [])
    health.bad_step(5, 1.0, math.inf, MIX, [])
    again = StepHealth(3, None)  # as after a resume, and on the other processes, which write nothing
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    for each in (health, again):
        with pytest.raises((UserError, SystemExit)):
            each.bad_step(6, 1.0, math.inf, MIX, [])
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert lines[1] == {
        "step": 2,
        "loss": "inf",
        "grad_norm": "nan",
        "examples": [{"dataset": "talk", "conversation": row, "begins": f"{row}" * 80} for row in (5, 6)],
    }


# ---- spikes ----


def test_spikes_are_marked_against_the_median_of_what_was_usual():
    health = StepHealth(3, None)
    for norm in [9.0, 1.0, 30.0] + [1.0] * 17:  # nothing is a spike among the first 20
        health.good_step(norm)
    assert health.metrics(2.0, None) == {"grad_norm_max": 30.0}
    for norm in (4.9, 5.1, 1.0, 100.0):
        health.good_step(norm)
    assert health.metrics(2.0, None) == {"grad_norm_max": 100.0, "grad_norm_spikes": 2}
    assert health.metrics(2.0, None) == {"grad_norm_max": 0.0}  # counted anew after each line


def test_loss_spikes_are_marked():
    health = StepHealth(3, None)
    found = [health.metrics(loss, None).get("loss_spike") for loss in [9.0, *[2.0] * 19, 2.9, 3.1, None, 2.0, 3.5]]
    assert found == [None] * 21 + [1, None, None, 1]


def test_the_window_forgets():
    """A rising norm becomes the usual one; the state of it comes back whole."""
    health = StepHealth(3, None)
    for norm in [1.0] * 100 + [10.0] * 100:
        health.good_step(norm)
    assert health.norm_spikes == 50  # until half of the window was of the new kind
    again = StepHealth(3, None)
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert isinstance(again.norms, deque)
    for each in (health, again):
        for norm in [49.0] * 2 + [51.0]:
            each.good_step(norm)
        assert len(each.norms) == 100
    assert health.metrics(None, 256.0) == again.metrics(None, 256.0)
    assert again.state_dict() == health.state_dict()


# ---- fp16's loss scale ----


def torch_scaled(scaler) -> SimpleNamespace:
    """As the accelerator has it, whose own on a machine without a GPU has no fp16."""
    return SimpleNamespace(scaler=scaler)


def overflowing_step(scaler: torch.amp.GradScaler) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight == 1


def test_the_end_of_torchs_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=64)
    accelerator, health = torch_scaled(scaler), StepHealth(3, None)
    for expected in (32, 16, 8, 4, 2, 1):
        overflowing_step(scaler)
        assert loss_scale(accelerator) == expected
        health.overflow(loss_scale(accelerator))
    assert health.metrics(1.0, loss_scale(accelerator)) == {
        "grad_norm_max": 0.0,
        "skipped_steps": 6,
        "loss_scale": 1.0,
    }
    overflowing_step(scaler)
    with pytest.raises(UserError, match="--dtype bf16") as end:
        health.overflow(loss_scale(accelerator))
    assert "\n" not in str(end.value)


def deepspeed_scaled(scaler) -> SimpleNamespace:
    engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    return SimpleNamespace(deepspeed_engine_wrapped=SimpleNamespace(engine=engine), scaler=None)


@pytest.fixture
def DynamicLossScaler(monkeypatch):
    """DeepSpeed's, which asks for the process's number before it prints."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    return loss_scaler.DynamicLossScaler


def test_the_end_of_deepspeeds_scaler(DynamicLossScaler):
    scaler = DynamicLossScaler(4.0, 1000, 1, 1, False)
    accelerator = deepspeed_scaled(scaler)
    for expected in (2, 1):
        with one_line_at_minimum_scale():
            scaler.update_scale(True)
        assert loss_scale(accelerator) == expected
    with pytest.raises(UserError) as end, one_line_at_minimum_scale():
        scaler.update_scale(True)
    assert str(end.value) == FP16_ADVICE


def test_other_errors_stay_as_they_are():
    with pytest.raises(ZeroDivisionError), one_line_at_minimum_scale():
        _ = 1 / 0


def test_scalers_go_on_where_they_were(DynamicLossScaler):
    def torchs(scale: float) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
        scaler.scale(torch.ones(1))  # it makes its tensors at the first use
        return scaler

    def deepspeeds(scale: float):
        return DynamicLossScaler(scale, 5, 1, 2, False)

    first = torchs(1024)
    for _ in range(2):
        overflowing_step(first)
    state = json.loads(json.dumps(loss_scale_state(torch_scaled(first))))
    second = torchs(65536)
    load_loss_scale(torch_scaled(second), state)
    for _ in range(4):
        overflowing_step(first)
        overflowing_step(second)
        assert loss_scale_state(torch_scaled(second)) == loss_scale_state(torch_scaled(first))

    third = deepspeeds(1024)
    for overflow in (True, False, True, False):
        third.update_scale(overflow)
    own = json.loads(json.dumps(loss_scale_state(deepspeed_scaled(third))))
    fourth = deepspeeds(65536)
    load_loss_scale(deepspeed_scaled(fourth), own)
    for overflow in (False, False, False, False, True, True, False):
        third.update_scale(overflow)
        fourth.update_scale(overflow)
        assert fourth.cur_scale == third.cur_scale

    # From the other kind the scale alone; where there is none, nothing.
    fifth, sixth = deepspeeds(65536), torchs(65536)
    load_loss_scale(deepspeed_scaled(fifth), state)
    assert fifth.cur_scale == state["scale"]
    load_loss_scale(torch_scaled(sixth), own)
    assert sixth.get_scale() == own["cur_scale"]
    load_loss_scale(torch_scaled(None), state)
    load_loss_scale(torch_scaled(sixth), {})
    assert loss_scale(torch_scaled(None)) is None
    assert sixth.get_scale() == own["cur_scale"]
