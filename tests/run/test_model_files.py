"""A model's folder is read elsewhere as here, by transformers 4 too (`make test-transformers4`)."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TRANSFORMERS_4, run_script
from read_elsewhere import read
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.dialogue import prepare_tokenizer
from run.model_files import save_model, with_older_rope
from training.tokenizer_files import as_older_tokenizer

DEMO = ROOT / "recipes" / "demo_data" / "model"
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


# ---- base models that are not quite right, as they are found: mended before the first step, or refused ----


def with_weights(folder: Path, tokenizer_changes=None, generation: dict | None = None, **config) -> Path:
    """A tiny Llama as a base model with the demo's tokenizer, changed."""
    config = AutoConfig.for_model("llama", **({"vocab_size": 1024} | SIZES | config))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    if tokenizer_changes:
        values = json.loads((folder / "tokenizer.json").read_text())
        tokenizer_changes(values)
        (folder / "tokenizer.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def leave_a_gap(tokenizer: dict) -> None:
    tokenizer["model"]["vocab"]["far"] = 1101


def run_of(model: Path, tmp_path: Path, *more) -> subprocess.CompletedProcess:
    options = [
        "--from_scratch",
        "false",
        "--max_length",
        64,
        "--max_steps",
        4,
        "--save_steps",
        2,
        "--sample_replies",
        0,
    ]
    return run_script(
        *["recipes/demo.yaml", "--model_name", model, *options, "--cache_dir", tmp_path / "cache", *more],
        output_dir=tmp_path / "out",
        check=False,
    )


BASES = {
    "pad in rows that the resize removes": {"vocab_size": 1100, "pad_token_id": 1099},
    "greedy with a temperature": {"generation": {"do_sample": False, "temperature": 0.9, "top_p": 0.6}},
    "ids with gaps": {"tokenizer_changes": leave_a_gap, "vocab_size": 1200},
    "end token far away": {"vocab_size": 2000, "eos_token_id": [1999, 0], "bos_token_id": 1998},
}


@pytest.mark.parametrize("name", BASES)
def test_the_final_model_of_such_a_base_loads_and_the_run_goes_on(tmp_path, name):
    model = with_weights(tmp_path / "base", **BASES[name])
    run = run_of(model, tmp_path)
    assert run.returncode == 0, run.stderr
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = final.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    assert rows == (highest + 16) // 16 * 16
    assert (highest > 1100) == (name == "ids with gaps")
    ids = [final.config.pad_token_id, final.config.bos_token_id, final.config.eos_token_id]
    assert all(one is None or one < rows for one in ids)
    assert final.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        assert final(torch.tensor([[highest, 5]])).logits.isfinite().all()
    for path in (tmp_path / "out").glob("*.*"):  # as if killed after checkpoint-2
        if path.suffix in (".safetensors", ".json", ".md", ".jinja"):
            path.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    again = run_of(model, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[key], value) for key, value in final.state_dict().items())


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_what_cannot_be_saved_is_one_line_before_the_first_step(tmp_path, dry_run):
    """Whatever it is: here a generation config that neither we nor transformers know how to mend."""
    model = with_weights(tmp_path / "base", generation={"do_sample": True, "num_beams": 1, "num_return_sequences": 0})
    (model / "generation_config.json").write_text(json.dumps({"cache_implementation": "no such thing"}))
    run = run_of(model, tmp_path, *dry_run)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert "what a run saves of it could not be read back" in run.errors[0]
    assert "training:" not in run.stderr


def test_a_model_without_attention_trains_padded(tmp_path):
    config = AutoConfig.for_model("mamba", vocab_size=1024, hidden_size=32, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "base")
    for more in ([], ["--dry_run"]):
        run = run_of(tmp_path / "base", tmp_path, *more)
        assert run.returncode == 2
        assert "it has states in place of attention: give padding_free: false" in run.errors[0]
    run = run_of(tmp_path / "base", tmp_path, "--padding_free", "false")
    assert run.returncode == 0, run.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "mamba"
