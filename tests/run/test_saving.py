"""Checkpoints written behind the training: of the moment that they were asked for, one at a time, and never lost in
silence. (The whole of a run that is killed while one is written is tests/run/test_faults.py.)
"""

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from checkpoints import save_now, state_at
from interruption import metrics, run_here, small_recipe
from safetensors.torch import load_file
from test_damage import taken_away
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recipe.keys import Recipe
from run import opening, saving
from run.checkpoint import read_checkpoint
from run.folder import lock_output_dir
from run.log import RunLog
from run.processes import Processes
from run.retention import checkpoint_bytes
from run.run import Run
from run.saving import CheckpointWriter, Saver
from run.snapshot import HostCopies, take_snapshot
from run.stats import Clock, TrainingStats
from training.checkpoint_files import state_file
from training.engine import prepare_engine
from training.memory import background_copies
from training.optimizer import make_optimizer
from training.state_layout import replicated
from utils import errors
from utils.errors import UserError
from utils.launch import stop_all


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def saver(tmp_path, tiny_model, tokenizer):
    """Of a process alone."""
    values = {"model_name": "none", "output_dir": str(tmp_path / "run"), "datasets": ["vicuna"], "dtype": "fp32"}
    recipe = Recipe.model_validate(values)
    recipe.output_dir.mkdir()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.register_buffer("seen", torch.zeros(3))
    accelerator = Accelerator(cpu=True)
    return Saver(prepare_engine(accelerator, model, recipe, 10), tokenizer, recipe, Processes(accelerator))


@pytest.fixture
def stats():
    return TrainingStats(SimpleNamespace(names=["vicuna"]), torch.device("cpu"), Clock())


@pytest.fixture
def held_up(monkeypatch):
    """Keeps what is written from being written until it is set."""
    go_on, write = threading.Event(), CheckpointWriter.write

    def wait_and_write(writer):
        assert go_on.wait(60)
        write(writer)

    monkeypatch.setattr(CheckpointWriter, "write", wait_and_write)
    return go_on


def train(saver: Saver) -> None:
    """Change every weight and moment."""
    for parameter in saver.engine.model.parameters():
        parameter.grad = torch.rand_like(parameter)
    for group in saver.engine.optimizer.param_groups:
        group["lr"] = 0.1
    saver.engine.optimizer.step()


def contents(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_it_is_of_the_moment_that_it_was_asked_for(saver, stats, held_up):
    """Twice, since the copies' memory is used again."""
    folder = saver.recipe.output_dir
    for step in (1, 2):
        train(saver)
        weights = {name: tensor.clone() for name, tensor in saver.engine.language_model.state_dict().items()}
        saver.save(state_at(saver.recipe, step), stats)
        train(saver)
        assert not (folder / f"checkpoint-{step}").exists()
        held_up.set()
        saver.wait()
        held_up.clear()
        checkpoint = read_checkpoint(folder / f"checkpoint-{step}")
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path).state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
    now = saver.engine.language_model.state_dict()
    assert not any(torch.equal(now[name], weights[name]) for name in loaded)


def test_nothing_that_the_run_does_meanwhile_is_in_it(saver, tokenizer, stats, held_up):
    """Replies to samples bring another generation config and attention, whoever calls the tokenizer its padding, a
    forward pass its buffers, an evaluation its results."""

    def save(step: int) -> dict[str, object]:
        state = state_at(saver.recipe, step, results={"eval_loss": 1.0})
        saver.save(state, stats)
        if not held_up.is_set():
            state["results"]["eval_loss"] = state["health"]["norm_peak"] = 2.0
            model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=[1, 2])
            model.config.update({"vocab_size": 3, "rope_parameters": None, "architectures": ["Another"], "noted": 1})
            model.set_attn_implementation("eager")
            model.get_buffer("seen").add_(1)
            tokenizer(["a", "long text"], padding=True, truncation=True, max_length=2)
            tokenizer.add_tokens(["<later>"])
            tokenizer.chat_template = "another"
            held_up.set()
        saver.wait()
        path = saver.recipe.output_dir / f"checkpoint-{step}"
        texts = {file.name: json.loads(file.read_text()) for file in path.glob("*.json")}
        kept = {key: json.loads(state_file(path).read_text())[key] for key in ("results", "health")}
        return {"state": kept, "seen": contents(path)["seen"].tolist(), **texts}

    model = saver.engine.language_model
    held_up.set()
    before = save(1)
    held_up.clear()
    assert save(2) == before
    assert before["seen"] == [0, 0, 0]
    assert before["tokenizer.json"]["truncation"] is None


def test_waited_for_it_holds_the_same(saver, stats):
    train(saver)
    saver.save(state_at(saver.recipe, 1), stats)
    saver.wait()
    save_now(saver.engine, saver.tokenizer, saver.recipe, state_at(saver.recipe, 2), stats)
    behind, waited_for = (contents(saver.recipe.output_dir / f"checkpoint-{step}") for step in (1, 2))
    assert behind.keys() == waited_for.keys()
    assert all(torch.equal(behind[name], waited_for[name]) for name in behind)


def test_the_next_waits_for_the_one_before(saver, stats, held_up):
    saver.save(state_at(saver.recipe, 1), stats)
    threading.Timer(0.5, held_up.set).start()
    saver.save(state_at(saver.recipe, 2), stats)
    assert (saver.recipe.output_dir / "checkpoint-1").exists()
    saver.wait()
    assert (saver.recipe.output_dir / "checkpoint-2").exists()


@pytest.mark.parametrize("told", ["save", "wait", "save_final_model"])
def test_what_could_not_be_written_is_told_by_whatever_comes_next(saver, stats, held_up, told):
    saver.save(state_at(saver.recipe, 1), stats)
    assert not saver.failed
    saver.recipe.output_dir.rename(saver.recipe.output_dir.with_name("taken away"))
    held_up.set()
    while not saver.is_idle:
        time.sleep(0.01)
    assert saver.failed
    again = {"save": (state_at(saver.recipe, 2), stats), "wait": (), "save_final_model": ()}[told]
    with pytest.raises(UserError, match=r"checkpoint-1 could not be written: .*No such file"):
        getattr(saver, told)(*again)


@pytest.mark.parametrize("keys", [{}, {"save_only_model": True}, {"optimizer_state_dtype": "bf16"}], ids=str)
def test_the_copies_are_as_large_as_is_foretold(saver, stats, keys):
    recipe, parameters = saver.recipe.model_copy(update=keys), saver.engine.language_model.num_parameters()
    saver.engine.optimizer, _ = make_optimizer(saver.engine.model, recipe, 10, deepspeed=False)
    saver.engine.optimizer = saver.engine.accelerator.prepare(saver.engine.optimizer)
    snapshot = take_snapshot(saver.engine, recipe, state_at(recipe, 1), stats)
    checkpoint = checkpoint_bytes(recipe, parameters, torch.float32, in_half=False)
    assert snapshot.bytes == background_copies(recipe, replicated(1), *checkpoint, local=1) + 12  # of the buffer


@pytest.mark.parametrize("how", ["deleted", "emptied", "replaced"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_is_taken_away_meanwhile_gets_no_checkpoint(saver, stats, monkeypatch, held_up, begun, how):
    """Before it is begun, or when it is all but whole."""
    folder = saver.recipe.output_dir
    run = Run(saver.recipe, None, lock_output_dir(saver.recipe))
    saver = Saver(saver.engine, saver.tokenizer, saver.recipe, saver.processes, run.check_folder)
    (folder / "recipe.yaml").write_text("ours")
    read, seen = saving.read_checkpoint, []

    def take_away() -> None:
        taken_away(folder, how)
        seen.append(sorted(path.name for path in folder.glob("*")))

    def read_then_take_away(*arguments, **options):
        read(*arguments, **options)
        take_away()

    if begun:
        monkeypatch.setattr(saving, "read_checkpoint", read_then_take_away)
    saver.save(state_at(saver.recipe, 1), stats)
    if not begun:
        take_away()
    held_up.set()
    with pytest.raises(UserError, match=r"checkpoint-1 could not be written: "):
        saver.wait()
    assert sorted(path.name for path in folder.glob("*")) == [name for name in seen[0] if name != ".checkpoint-1"]


def test_without_memory_for_the_copies_training_waits(saver, stats, monkeypatch, capsys, held_up):
    held_up.set()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    saver.save(state_at(saver.recipe, 1), stats)
    assert (saver.recipe.output_dir / "checkpoint-1").exists()
    assert saver.is_idle
    assert "of a checkpoint's copies do not fit into the 0.000954 MiB" in capsys.readouterr().out


def test_the_machine_that_has_no_room_is_named(saver, stats, monkeypatch, capsys):
    others = [("node2", 3 * 2**30, 5 * 2**30), ("node2", 3 * 2**30, 6 * 2**30)]  # 6 of 5 GiB
    monkeypatch.setattr(saver.processes, "gather", lambda value: [value, *others])
    assert not saver._fits(take_snapshot(saver.engine, saver.recipe, state_at(saver.recipe, 1), stats))
    assert "the 6 GiB of a checkpoint's copies do not fit into the 5 GiB of memory that are free on node2" in (
        capsys.readouterr().out
    )


def test_what_is_kept_of_the_process_is_of_that_moment_too(saver, stats, held_up):
    """The clock goes on while the model's files are written."""
    saver.save(state_at(saver.recipe, 1), stats)
    stats.clock.seconds["training"] += 1000
    held_up.set()
    saver.wait()
    (process,) = read_checkpoint(saver.recipe.output_dir / "checkpoint-1").processes
    assert process.stats.clock.training < 1000


def test_a_run_ends_the_same_either_way(tmp_path, tiny_model):
    """Its disk fails behind a step: one line, and the run goes on from the checkpoint before when it is mended."""
    recipe = small_recipe(tmp_path, tiny_model)
    ends = {}
    for way in ("true", "false"):
        output = tmp_path / way
        assert run_here(recipe, "--save_in_background", way, output_dir=output).returncode == 0
        ends[way] = contents(output), metrics(output)
    assert ends["true"][1] == ends["false"][1]
    assert all(torch.equal(tensor, ends["false"][0][name]) for name, tensor in ends["true"][0].items())


def test_a_run_whose_checkpoint_fails_behind_it_stops_and_goes_on(tmp_path, tiny_model, monkeypatch):
    recipe, output = small_recipe(tmp_path, tiny_model), tmp_path / "run"
    save_optimizer = saving.save_optimizer

    def fail_at_10(folder, *parts):
        if folder.parent.name == ".checkpoint-10":
            raise OSError(28, "No space left on device")
        return save_optimizer(folder, *parts)

    monkeypatch.setattr(saving, "save_optimizer", fail_at_10)
    run = run_here(recipe, output_dir=output)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert "checkpoint-10 could not be written: [Errno 28] No space left on device (process 0)" in run.errors[0]
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-5"]
    monkeypatch.undo()
    assert run_here(recipe, output_dir=output).returncode == 0
    whole = tmp_path / "whole"
    run_here(recipe, output_dir=whole)
    assert metrics(output) == metrics(whole)


def test_without_pinned_memory_copies_are_made_all_the_same(saver, stats, monkeypatch, capsys):
    """No GPU is asked here: what CUDA's runtime answers where a system pins no more stands in for it."""
    success, asked = object(), []
    refusing = SimpleNamespace(
        cudaError=SimpleNamespace(success=success), cudaHostRegister=lambda *arguments: asked.append(arguments)
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    copies = HostCopies(torch.device("cpu"))
    copies.pins = True
    weights = {name: tensor.clone() for name, tensor in saver.engine.language_model.named_parameters()}
    for _ in range(2):
        snapshot = take_snapshot(saver.engine, saver.recipe, state_at(saver.recipe, 1), stats)
        copies.copy(snapshot)
        held = {each.name: each.tensors["model"] for each in snapshot.weights.held}
        assert held.keys() <= weights.keys()
        assert all(torch.equal(tensor, weights[name].flatten()) for name, tensor in held.items())
    assert len(asked) == 1
    assert capsys.readouterr().out.count("the system pins no more memory") == 1


def test_an_error_is_said_before_the_checkpoint_behind_it_is_waited_for(tmp_path, tiny_model, monkeypatch):
    output, write = tmp_path / "run", RunLog.write

    def fail_after_5(log, line):
        if line["step"] > 5:
            raise UserError("no more lines")
        write(log, line)

    def fail_when_that_is_said(*_):
        until = time.monotonic() + 60
        while "error: no more lines" not in sys.stderr.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunLog, "write", fail_after_5)
    monkeypatch.setattr(saving, "save_optimizer", fail_when_that_is_said)
    run = run_here(small_recipe(tmp_path, tiny_model), output_dir=output)
    assert run.returncode == 2
    said, too = run.errors
    assert said == "error: no more lines"
    assert "checkpoint-5 could not be written: [Errno 28]" in too
    assert json.loads((output / "run.json").read_text())["starts"][-1]["why"] == "no more lines"


def test_another_process_has_written_its_part_before_it_waits_for_the_first(saver, stats, monkeypatch, held_up):
    """Which says why all of them end: while it is waited for a SIGTERM ends the other at once."""
    run = Run(saver.recipe, None, None)
    run.saver, checkpoint, whole = saver, saver.recipe.output_dir / "checkpoint-1", []
    monkeypatch.setattr(opening, "_OPENED", [run])
    monkeypatch.setattr(errors, "let_the_first_speak", lambda: whole.append(checkpoint.exists()))
    saver.save(state_at(saver.recipe, 1), stats)
    threading.Timer(0.5, held_up.set).start()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), errors.one_line_errors(), opening.recorded_end():
        stop_all("too many bad steps")
    assert whole == [True]


@pytest.mark.parametrize(
    ("keys", "moment", "saved"),
    [
        ({"save_steps": 5}, {"steps": 3}, ["checkpoint-3"]),  # a stop before the first regular one
        ({"save_strategy": "no"}, {"steps": 6}, ["checkpoint-6"]),
        ({"save_steps": 20}, {}, ["checkpoint-20"]),  # the last step
    ],
    ids=str,
)
def test_no_copies_are_made_where_nothing_is_trained_meanwhile(tmp_path, tiny_model, monkeypatch, keys, moment, saved):
    monkeypatch.setattr(HostCopies, "copy", lambda *_: pytest.fail("copied"))
    output = tmp_path / "run"
    run = run_here(small_recipe(tmp_path, tiny_model, **keys), output_dir=output, **moment)
    assert run.returncode == (75 if moment else 0), run.stderr
    assert [path.name for path in output.glob("checkpoint-*")] == saved
    assert read_checkpoint(output / saved[0]).step == int(saved[0].partition("-")[2])
