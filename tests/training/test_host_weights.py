"""One process reads a model; every other has the same in the end, whatever its files and its config say of it."""

import json

import pytest
import torch
from checkpoints import give_own_code
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file
from test_loss import SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaConfig

DEMO = ROOT / "recipes" / "demo_data" / "model"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_llama(folder, **keys):
    """A tied one, with the demo's tokenizer, for which it has not rows enough."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"tie_word_embeddings": True} | keys)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def save_gemma(folder):
    """Whose config says bf16, in which one of its buffers is made then; trained in fp32 that one is fp32."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    sizes |= {"intermediate_size": 64, "vocab_size": SIZES["vocab_size"], "max_position_embeddings": 128}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    AutoModelForCausalLM.from_config(GemmaConfig(**sizes)).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def test_the_others_receive_what_the_first_has_read(tmp_path):
    folders = [save_llama(tmp_path / "tied"), save_llama(tmp_path / "untied", tie_word_embeddings=False)]
    folders += [save_gemma(tmp_path / "gemma"), save_llama(tmp_path / "adapters"), save_llama(tmp_path / "4 bits")]
    folders.insert(3, give_own_code(save_llama(tmp_path / "own code", vocab_size=1024), own_config=True))
    folders.append(give_own_code(save_llama(tmp_path / "adapters of own code")))
    worker = "tests/training/host_worker.py"
    run_script(tmp_path / "found.json", *folders, launch="ddp2", script=worker, output_dir=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for each in found:
        assert each["on_meta"] == [False, True]
        assert each["same"]
    for each in found[:4]:
        assert each["trained"] == each["names"]
    for each in found[4:]:
        assert {name.split(".")[-3] for name in each["trained"]} == {"lora_A", "lora_B"}
    tied, untied = ({HEAD, EMBEDDING} & set(each["names"]) for each in found[:2])
    assert tied == {EMBEDDING}
    assert untied == {HEAD, EMBEDDING}


@pytest.mark.parametrize("launch", ["ddp2", "fsdp2x2"])
def test_what_the_first_cannot_read_ends_all_with_one_line(tmp_path, run_sft, launch):
    folder = save_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    assert lost.numel()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    keys = ("--model_name", folder, "--from_scratch", "false", "--max_length", 64)
    run = run_sft("recipes/demo.yaml", *keys, launch=launch, check=False)
    assert run.returncode
    (error,) = run.errors
    assert error.startswith(f"error: model_name = {folder}: its weights lack model.layers.1.mlp.up_proj.weight")
    assert "Traceback" not in run.stderr
