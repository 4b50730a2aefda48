"""A checkpoint whose files are not those that its run wrote is refused by whatever loads it, not computed with."""

import shutil
from pathlib import Path

import export
import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from evaluation.chat_model import load_chat_model
from evaluation.model import find_model
from training.pretrained import load_pretrained
from utils.errors import UserError

SMALL = ("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path, request) -> Path:
    folder = ROOT / f"tests/fixtures/checkpoint_format_{getattr(request, 'param', 2)}/run/checkpoint-5"
    return Path(shutil.copytree(folder, tmp_path / "checkpoint-5"))


def flip(path: Path) -> None:
    """Change a bit in the middle: size, and mostly the form, stay what they are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*SMALL, "model.safetensors"])
def test_a_changed_file_is_named(checkpoint, name):
    flip(checkpoint / name)
    for load in (lambda: load_chat_model(find_model(str(checkpoint)), CPU), lambda: export_it(checkpoint)):
        with pytest.raises(UserError, match=f"{name} is changed since it was written") as refused:
            load()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(checkpoint, name):
    """Of which transformers would make something else without a word."""
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"{name} is not there"):
        load_chat_model(find_model(str(checkpoint)), CPU)


def export_it(checkpoint: Path) -> None:
    source = export.find_folder(str(checkpoint))
    stored = export.stored_weights(source)
    export.load_chat_tokenizer(source)
    export.load(source, stored.dtype)


@pytest.mark.parametrize("checkpoint", [1, 2], indirect=True)
def test_what_is_whole_is_loaded(checkpoint):
    for name in ("process-0.json", "optimizer-00000-000.safetensors"):  # which are for going on with the run alone
        flip(checkpoint / "trainer_state" / name)
    (checkpoint / "eval").mkdir()
    (checkpoint / "eval" / "loss.json").write_text("{}")  # written since
    load_chat_model(find_model(str(checkpoint)), CPU)


@pytest.mark.parametrize("checkpoint", [1], indirect=True)
def test_a_format_1_checkpoint_knows_sizes(checkpoint):
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match=r"chat_template.jinja has [\d,]+ of [\d,]+ bytes: give another checkpoint"):
        load_chat_model(find_model(str(checkpoint)), CPU)


@pytest.mark.parametrize("content", ["", "{}", '{"files": 3}', '{"files": {"config.json": true}}', "[1]"])
def test_a_list_that_cannot_be_read(checkpoint, content):
    (checkpoint / "trainer_state" / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json.*: give another checkpoint, or remove its trainer_state/"):
        load_pretrained(AutoConfig, str(checkpoint))


def test_a_change_that_is_meant(checkpoint):
    flip(checkpoint / "model.safetensors")
    load_pretrained(AutoTokenizer, str(checkpoint))  # reads no weights, and so none of 28 GB for a tokenizer
    load_pretrained(AutoModelForCausalLM, str(checkpoint), device_map="meta")
    with pytest.raises(UserError, match="or remove its trainer_state/ if the change is meant"):
        load_pretrained(AutoModelForCausalLM, str(checkpoint))
    shutil.rmtree(checkpoint / "trainer_state")
    load_pretrained(AutoModelForCausalLM, str(checkpoint))
