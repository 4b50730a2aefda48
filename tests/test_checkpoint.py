"""The output folder: whole checkpoints or none, the newest kept, another run never written over, the model card."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import checkpoint
from utils.checkpoint import claim_output_dir, list_checkpoints, save_checkpoint, save_model, write_model_card
from utils.dialogue import CHAT_TOKENS, prepare_tokenizer
from utils.errors import UserError
from utils.recipe import Recipe, load_recipe

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
def save(tmp_path, model, tokenizer):
    """Save a step as the first of two processes does."""

    def save(step: int, main_process: bool = True, **keys) -> list[int]:
        """Returns how often the processes have waited for each other."""
        waits = []
        accelerator = SimpleNamespace(is_main_process=main_process, wait_for_everyone=lambda: waits.append(step))
        save_checkpoint(accelerator, model, tokenizer, make_recipe(tmp_path, **keys), step)
        return waits

    return save


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


# ---- checkpoints ----


def test_a_checkpoint_loads_as_it_stands(save, tmp_path, model, tokenizer):
    save(7)
    folder = tmp_path / "checkpoint-7"
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


@pytest.mark.parametrize(("limit", "kept"), [(1, [1000]), (2, [200, 1000]), (4, [20, 100, 200, 1000]), (None, None)])
def test_the_newest_checkpoints_are_kept(save, tmp_path, limit, kept):
    every = [3, 20, 100, 200, 1000]  # by step, not by name or by time
    for step in every:
        save(step, save_total_limit=limit)
    assert steps(tmp_path) == (kept or every)
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_only_the_first_process_writes_and_everyone_waits(save, tmp_path):
    assert save(1, main_process=False) == [1]
    assert not list(tmp_path.iterdir())
    assert save(1) == [1]
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("broken", ["model", "tokenizer"])
def test_a_save_that_fails_leaves_no_checkpoint(save, tmp_path, model, tokenizer, monkeypatch, broken):
    save(1, save_total_limit=1)
    target = model if broken == "model" else tokenizer

    def fail(folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, "save_pretrained", fail)
        with pytest.raises(OSError, match="no space"):
            save(2, save_total_limit=1)
    assert steps(tmp_path) == [1]  # the one before is still there, and whole
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")


def test_a_checkpoint_half_removed_does_not_keep_its_name(save, tmp_path, monkeypatch):
    save(1, save_total_limit=1)

    def killed(folder, *_):
        (Path(folder) / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(2, save_total_limit=1)
    assert steps(tmp_path) == [2]


def test_other_folders_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-3", ".checkpoint-4", "checkpoint-final", "checkpoint-5.old", "my-checkpoint-6"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [3]


# ---- the folder ----


def test_claiming_writes_a_recipe_that_repeats_the_run(tmp_path):
    recipe = make_recipe(tmp_path / "deep" / "out", learning_rate=2e-5)
    claim_output_dir(recipe)
    assert load_recipe(recipe.output_dir / "recipe.yaml") == recipe


def test_claiming_removes_what_a_killed_run_left(tmp_path):
    recipe = make_recipe(tmp_path)
    (tmp_path / ".checkpoint-5").mkdir()
    (tmp_path / ".checkpoint-5" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    claim_output_dir(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "recipe.yaml"]
    claim_output_dir(recipe)  # nothing has been trained yet


@pytest.mark.parametrize("held", ["metrics.jsonl", "config.json", "checkpoint-10"])
def test_another_run_is_not_written_over(tmp_path, held):
    (tmp_path / "recipe.yaml").write_text("the other's")
    if held.startswith("checkpoint"):
        (tmp_path / held).mkdir()
    else:
        (tmp_path / held).write_text("{}")
    with pytest.raises(UserError, match=held) as refusal:
        claim_output_dir(make_recipe(tmp_path))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "recipe.yaml").read_text() == "the other's"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="output_dir"):
            claim_output_dir(make_recipe(folder))


# ---- the card ----


def card_of(recipe: Recipe, tokenizer, results: dict) -> tuple[dict, str]:
    """The card's front matter and text."""
    recipe.output_dir.mkdir(exist_ok=True)
    write_model_card(recipe, tokenizer, results, steps=12_000, tokens=3_456_789)
    _, head, text = (recipe.output_dir / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_model_card(tmp_path, tokenizer):
    recipe = make_recipe(
        tmp_path / "my_model", model_name="stabilityai/stablelm-base-alpha-7b", datasets=["oasst_export", "vicuna"]
    )
    results = {"eval_vicuna_loss": 0.98765, "eval_vicuna_accuracy": 0.7654, "eval_loss": 1.0, "eval_accuracy": 0.7}
    head, text = card_of(recipe, tokenizer, results)
    assert head["base_model"] == "stabilityai/stablelm-base-alpha-7b"
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert "# my_model\n" in text
    assert "12,000 steps on 3,456,789 tokens" in text
    assert "| vicuna | 0.9877 | 76.54% |" in text
    assert "| oasst_export |" not in text  # nothing of it was held out
    assert f"<|prompter|>What is a meme?{tokenizer.eos_token}<|assistant|>" in text


@pytest.mark.parametrize("keys", [{"from_scratch": True, "model_name": "someone/model"}, {"model_name": "."}])
def test_a_base_model_that_is_not_on_the_hub_is_not_linked(tmp_path, tokenizer, keys):
    head, text = card_of(make_recipe(tmp_path / "out", **keys), tokenizer, {})
    assert "base_model" not in head
    assert ("random weights" in text) == bool(keys.get("from_scratch"))
    assert "No conversation was held out." in text
    assert "|---" not in text


def test_the_final_model_has_the_form_of_a_checkpoint(save, tmp_path, model, tokenizer):
    save(1)
    final = tmp_path / "final"
    save_model(model, tokenizer, final)
    assert {path.name for path in final.iterdir()} == {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
