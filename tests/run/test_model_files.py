"""A model's folder is read elsewhere as here, by transformers 4 too (`make test-transformers4`)."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from read_elsewhere import read
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.dialogue import prepare_tokenizer
from run.model_files import as_older_tokenizer, save_model, with_older_rope

DEMO = ROOT / "recipes" / "demo_data" / "model"
TRANSFORMERS_4 = ROOT / ".venv" / "transformers4"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
MODELS = {
    "gpt_neox": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "stablelm": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}, "num_key_value_heads": 2},
    "llama": {"rope_parameters": ROPE, "num_key_value_heads": 2},
    "llama_scaled": {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    "olmo": {"rope_parameters": ROPE},  # qwen2 would take its own tokenizer, whatever the folder says (5.23)
    "phi": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
OLDER = {
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 5000.0},
    "stablelm": {"partial_rotary_factor": 0.5, "rope_theta": 5000.0},
    "llama": {"rope_theta": 5000.0},
    "llama_scaled": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "olmo": {"rope_theta": 5000.0},
    "phi": {"partial_rotary_factor": 0.5, "rope_theta": 5000.0},
    "gpt2": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, keys in MODELS.items():
        tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(DEMO))
        config = AutoConfig.for_model(name.removesuffix("_scaled"), vocab_size=1024, **(SIZES | keys))
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        save_model(AutoModelForCausalLM.from_config(config), tokenizer, found[name])
    return found


@pytest.fixture(scope="module")
def here(folders) -> dict[str, dict]:
    return {name: read(str(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_form_of_transformers_4_stands_beside_that_of_5(folders, name):
    config = json.loads((folders[name] / "config.json").read_text())
    assert OLDER[name].items() <= config.items()
    again = AutoConfig.from_pretrained(folders[name])
    given = MODELS[name].get("rope_parameters", {})
    assert given.items() <= (getattr(again, "rope_parameters", None) or {}).items()
    tokenizer = json.loads((folders[name] / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|prompter|>" in tokenizer["additional_special_tokens"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & tokenizer.keys()


@pytest.mark.parametrize("name", MODELS)
def test_read_here_it_is_what_was_saved(folders, here, name):
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(DEMO))
    assert here[name]["ids"] == tokenizer(here[name]["text"], add_special_tokens=False)["input_ids"]
    assert here[name]["special"] == sorted(tokenizer.all_special_tokens)


@pytest.mark.skipif(not TRANSFORMERS_4.exists(), reason="make test-transformers4 installs it")
def test_read_by_transformers_4_it_is_the_same(folders, here):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "read_elsewhere.py"), *map(str, folders.values())],
        env={**os.environ, "PYTHONPATH": str(TRANSFORMERS_4)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name, found in zip(folders, json.loads(run.stdout.splitlines()[-1]), strict=True):
        assert found["version"].startswith("4."), name
        for what in ("text", "ids", "special", "pad, eos"):
            assert found[what] == here[name][what], (name, what)
        for what in ("rotary", "logits"):
            torch.testing.assert_close(torch.tensor(found[what]), torch.tensor(here[name][what]), rtol=1e-5, atol=1e-6)


def test_the_output_layer_keeps_the_name_that_readers_look_for(folders):
    with safe_open(folders["gpt_neox"] / "model.safetensors", framework="pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118, it is no mapping


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_the_umask(tiny_model, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        save_model(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "out")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {mode}


def test_nested_and_layered_rotary_values():
    gemma = {
        "sliding_attention": {"rope_theta": 1e4},
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8},
    }
    config = with_older_rope({"model_type": "gemma3", "text_config": {"rope_parameters": gemma}})["text_config"]
    assert config["rope_theta"] == 1e6
    assert config["rope_local_base_freq"] == 1e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8}
    assert config["rope_parameters"] == gemma
    assert with_older_rope({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def test_a_model_specific_dictionary_of_special_tokens_stays():
    named = {"extra_special_tokens": {"image_token": "<image>"}}
    assert as_older_tokenizer(named)["extra_special_tokens"] == {"image_token": "<image>"}
