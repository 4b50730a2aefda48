"""Checkpoints: whole ones or none, the newest kept, what resuming needs in the newest of them; the model card.

Which of them a run goes on from is tests/run/test_resume.py; what a killed process leaves is tests/run/test_faults.py.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from accelerate import Accelerator
from checkpoints import save_now, state_at
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.dialogue import CHAT_TOKENS, prepare_tokenizer
from recipe.keys import Recipe
from run import model_parts, retention, saving
from run.checkpoint import read_checkpoint
from run.checkpoint_state import FORMAT
from run.folder import remove_leftovers
from run.processes import Processes
from run.retention import list_checkpoints
from run.saving import write_final_model
from run.snapshot import trained_weights
from run.stats import Clock, TrainingStats
from training.engine import Engine
from training.optimizer import make_optimizer
from training.plan import Position
from utils.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]


def make_recipe(folder: Path, **keys) -> Recipe:
    return Recipe.model_validate({"model_name": "none", "output_dir": str(folder), "datasets": ["vicuna"], **keys})


@pytest.fixture
def tokenizer(tiny_model):
    return prepare_tokenizer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture
def model(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=16)
    return model


@pytest.fixture
def engine(tmp_path, model):
    """Of a process alone."""
    accelerator = Accelerator(cpu=True)
    optimizer, _ = make_optimizer(model, make_recipe(tmp_path), 10, deepspeed=False)
    return Engine(accelerator, model, model, model, accelerator.prepare(optimizer), None)


@pytest.fixture
def save_final(engine, tokenizer):
    """Save the final model into a folder."""
    processes = Processes(engine.accelerator)
    return lambda folder: write_final_model(engine.model, tokenizer, folder, trained_weights(engine), processes)


@pytest.fixture
def save(tmp_path, engine, tokenizer):
    """Save a step."""
    stats = TrainingStats(SimpleNamespace(names=["vicuna"]), torch.device("cpu"), Clock())

    def save(step: int, **keys) -> Path:
        recipe = make_recipe(tmp_path, **keys)
        state = state_at(recipe, step, position={"epoch": 2, "conversations": 30})
        save_now(engine, tokenizer, recipe, state, stats)
        return tmp_path / f"checkpoint-{step}"

    return save


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


# ---- checkpoints ----


def test_a_checkpoint_loads_as_it_stands(save, model, tokenizer):
    folder = save(7)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded_tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS)) == tokenizer.convert_tokens_to_ids(
        list(CHAT_TOKENS)
    )
    eos = tokenizer.eos_token
    assert loaded_tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        f"<|system|>Be brief.{eos}<|prompter|>Hello{eos}<|assistant|>Hi{eos}<|prompter|>Bye{eos}<|assistant|>"
    )
    assert loaded_tokenizer.pad_token_id == tokenizer.pad_token_id


def test_it_says_where_the_run_stands_and_what_belongs_to_it(save):
    """And nothing in it is a pickle."""
    folder = save(7)
    found = read_checkpoint(folder)
    assert (found.step, found.position) == (7, Position(2, 30))
    assert found.state.format == FORMAT
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert files.pop("trainer_state/state.json").stat().st_size > 0
    assert found.state.files.keys() == files.keys()
    for name, path in files.items():
        own = f"xxh3_128:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"
        assert (found.state.files[name].bytes, found.state.files[name].checksum) == (path.stat().st_size, own)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".jinja"}
    assert [process.stats.tokens for process in found.processes] == [0]


def test_a_model_in_several_files(save, monkeypatch, model):
    monkeypatch.setattr(model_parts, "PART_BYTES", 10**5)
    folder = save(3)
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 2
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(UserError, match=f"not whole: {parts[1].name}"):
        read_checkpoint(folder)


@pytest.mark.parametrize(("limit", "kept"), [(1, [1000]), (2, [200, 1000]), (4, [20, 100, 200, 1000]), (None, None)])
def test_the_newest_checkpoints_are_kept(save, tmp_path, limit, kept):
    every = [3, 20, 100, 200, 1000]  # by step, not by name or by time
    for step in every:
        save(step, save_total_limit=limit)
    assert steps(tmp_path) == (kept or every)
    assert not list(tmp_path.glob(".checkpoint-*"))


@pytest.mark.parametrize("limit", [1, 2])
def test_the_one_just_written_is_never_removed(save, tmp_path, limit):
    """As after a run was taken back to an earlier step."""
    for step in (10, 20):
        save(step, save_total_limit=None)
    save(5, save_total_limit=limit)
    assert steps(tmp_path) == [[5], [5, 20]][limit - 1]
    before = (tmp_path / "checkpoint-5" / "trainer_state" / "state.json").stat().st_ino
    save(5, save_total_limit=limit)  # over itself
    assert (tmp_path / "checkpoint-5" / "trainer_state" / "state.json").stat().st_ino != before
    assert steps(tmp_path) == [[5], [5, 20]][limit - 1]
    read_checkpoint(tmp_path / "checkpoint-5")


@pytest.mark.parametrize(("keep", "kept"), [(1, [40]), (2, [30, 40]), (None, [20, 30, 40])])
def test_the_newest_keep_what_resuming_needs(save, tmp_path, keep, kept):
    for step in (10, 20, 30, 40):
        save(step, save_total_limit=3, keep_trainer_state=keep)
    assert steps(tmp_path) == [20, 30, 40]
    with_state = [path for path in list_checkpoints(tmp_path) if (path / "trainer_state").exists()]
    assert [int(path.name.split("-")[1]) for path in with_state] == kept
    for path in list_checkpoints(tmp_path):
        AutoModelForCausalLM.from_pretrained(path)
        assert {each.name for each in path.glob(".*")} == set()


def test_the_model_alone(save):
    folder = save(3, save_only_model=True)
    assert not (folder / "trainer_state").exists()
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UserError, match="holds no trainer_state/, so that no run can go on from it"):
        read_checkpoint(folder)


@pytest.mark.parametrize("broken", ["model", "tokenizer", "optimizer"])
@pytest.mark.parametrize(
    "problem",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["Python", "Rust"],
)
def test_a_save_that_fails_leaves_no_checkpoint(save, tmp_path, model, tokenizer, monkeypatch, broken, problem):
    save(1, save_total_limit=1)

    def fail(folder, *_, **__):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise problem

    with monkeypatch.context() as patch:
        if broken == "optimizer":
            patch.setattr(saving, "save_optimizer", fail)
        else:
            patch.setattr(model if broken == "model" else tokenizer, "save_pretrained", fail)
        with pytest.raises(UserError, match=r"checkpoint-2 could not be written: .*No space left on device") as error:
            save(2, save_total_limit=1)
    assert "the checkpoints before it are whole" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "last"}  # whole, and the half of it gone
    read_checkpoint(tmp_path / "checkpoint-1")
    save(2, save_total_limit=1)
    assert steps(tmp_path) == [2]


def test_an_error_that_is_not_the_disks_is_not_taken_for_one(save, tmp_path, model, monkeypatch):
    monkeypatch.setattr(model, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(2)
    assert steps(tmp_path) == []


def test_what_does_not_pass_the_check_gets_no_name(save, tmp_path, monkeypatch):
    """The model's file lost its end after it was written, say."""
    save(1, save_total_limit=1)
    save_trained = saving.save_trained

    def write_badly(model, tokenizer, folder, *parts):
        save_trained(model, tokenizer, folder, *parts)
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])

    monkeypatch.setattr(saving, "save_trained", write_badly)
    with pytest.raises(UserError, match="not whole"):
        save(2, save_total_limit=1)
    assert steps(tmp_path) == [1]
    read_checkpoint(tmp_path / "checkpoint-1")


def test_a_checkpoint_half_removed_does_not_keep_its_name(save, tmp_path, monkeypatch):
    save(1, save_total_limit=1)

    def killed(folder, *_, **__):
        if (Path(folder) / "config.json").exists():
            (Path(folder) / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(2, save_total_limit=1)
    assert steps(tmp_path) == [2]
    assert remove_leftovers(tmp_path) == [".checkpoint-1"]
    assert [path.name for path in tmp_path.iterdir() if not path.is_symlink()] == ["checkpoint-2"]


def test_one_that_is_written_over_is_there_until_the_new_one_is(save, tmp_path, monkeypatch):
    """As of a stop before an evaluation, which then is the best: seconds pass while the old one is removed."""
    save(1)
    remove, there = saving.remove_tree, []

    def look_and_remove(path):
        there.append((path.name, read_checkpoint(tmp_path / "checkpoint-1").step))
        remove(path)

    monkeypatch.setattr(saving, "remove_tree", look_and_remove)
    save(1)
    assert there == [(".checkpoint-1.replaced", 1)]
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]


def test_leftovers_are_removed_and_named(save, tmp_path):
    whole = save(3)
    (whole / ".trainer_state").mkdir()
    for name in (".checkpoint-4", ".final", "checkpoint-final", "notes"):
        (tmp_path / name).mkdir()
    assert sorted(remove_leftovers(tmp_path)) == [".checkpoint-4", ".final", "checkpoint-3/.trainer_state"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-final", "last", "notes"]
    read_checkpoint(whole)


def test_of_a_link_only_itself_is_removed(save, tmp_path):
    """A checkpoint on another disk, what resuming needs on another one, and what was left of such a removal."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (1, 2):
        whole = save(step, save_total_limit=None)
        linked = whole if step == 1 else whole / "trainer_state"
        linked.rename(elsewhere / linked.name)
        linked.symlink_to(elsewhere / linked.name)
    (tmp_path / ".checkpoint-8").symlink_to(elsewhere)
    (tmp_path / "checkpoint-3").symlink_to("nowhere")
    save(3, save_total_limit=2, keep_trainer_state=1)
    assert remove_leftovers(tmp_path) == [".checkpoint-8"]
    assert steps(tmp_path) == [2, 3]
    assert not (tmp_path / "checkpoint-2" / "trainer_state").exists()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["checkpoint-1", "trainer_state"]
    read_checkpoint(elsewhere / "checkpoint-1")
    assert (elsewhere / "trainer_state" / "state.json").exists()


def test_a_number_that_no_run_writes_is_nobodys_to_remove(save, tmp_path):
    (tmp_path / "checkpoint-0001").mkdir()
    for step in (1, 2, 3):
        save(step, save_total_limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0001", "checkpoint-3", "last"]


def test_other_folders_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-3", ".checkpoint-4", "checkpoint-final", "checkpoint-5.set-aside", "my-checkpoint-6"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [3]


# ---- the final model ----


def test_the_final_model_has_the_form_of_a_checkpoint(save, save_final, tmp_path):
    folder, final = save(1, save_only_model=True), tmp_path / "final"
    final.mkdir()
    save_final(final)
    assert {path.name for path in final.iterdir()} == {path.name for path in folder.iterdir()}


def test_a_final_model_that_cannot_be_written(save_final, tmp_path, tokenizer, monkeypatch):
    """What was there, of a run that is trained on, stays."""
    save_final(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(folder):
        (folder / "tokenizer.json").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"the final model could not be written: .*No space left on device"):
        save_final(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
