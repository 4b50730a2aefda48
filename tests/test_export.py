"""scripts/export.py: what leaves the house is the model that was trained, and is read elsewhere as here."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import pytest
import torch
from conftest import ROOT, TRANSFORMERS_4, run_script
from huggingface_hub import constants
from read_elsewhere import read
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.dialogue import encode, prepare_tokenizer
from publishing.read_back import logits_of, template_ids
from publishing.verification import check_precision, check_same, make_reference
from publishing.weights import read_weights
from run.model_files import save_model
from sources.source import Conversation, Message
from training.model import fit_to_tokenizer
from utils.errors import UserError

DEMO = ROOT / "recipes" / "demo_data" / "model"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
MODELS = {
    "gpt_neox": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "llama_tied": {"rope_parameters": ROPE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": {"rope_parameters": ROPE, "num_key_value_heads": 2, "num_local_experts": 4},
    "phi": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},  # its output layer has a bias
}


def save_trained(folder: Path, name: str, dtype: torch.dtype = torch.float32, far: int | None = None) -> Path:
    """A model as a run leaves it: 1,025 tokens, 1,040 rows; `far` is the id of one more token, behind a gap."""
    base = folder / "tokenizer"
    shutil.copytree(DEMO, base)
    if far:
        values = json.loads((base / "tokenizer.json").read_text())
        values["model"]["vocab"]["far"] = far
        (base / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(base))
    tokenizer.add_tokens(["<extra>"])
    config = AutoConfig.for_model(
        name.removesuffix("_tied"), vocab_size=1200 if far else 1024, **(SIZES | MODELS[name])
    )
    config.bos_token_id = config.eos_token_id = 0
    model = AutoModelForCausalLM.from_config(config)
    fit_to_tokenizer(model, tokenizer, mean_resizing=False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    save_model(model.to(dtype), tokenizer, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    return {name: save_trained(tmp_path_factory.mktemp(name), name) for name in MODELS}


def read_here(folder: Path, reference):
    """`read_back` without the fresh process, which takes 5 s."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return template_ids(AutoTokenizer.from_pretrained(folder), reference.chats), logits_of(model, reference.ids)


@pytest.fixture
def run_export(monkeypatch, tmp_path):
    """Call it with a checkpoint and the script's options; what it wrote."""
    monkeypatch.setattr(export, "read_back", read_here)

    def run(checkpoint: Path, out: Path | str | None = None, **options) -> Path:
        given = {
            "dtype": None,
            "gguf": None,
            "gguf_dtype": None,
            "max_shard_size": "5GB",
            "vocab": "trim",
            "push_to_hub": None,
            "private": False,
            "trust_remote_code": False,
        }
        out = tmp_path / "out" if out is None else Path(out)
        export.main(argparse.Namespace(checkpoint=str(checkpoint), out=str(out), **(given | options)))
        return out

    return run


def training_ids(tokenizer, question: str, reply: str) -> list[int]:
    [(ids, _)] = encode(tokenizer, [Conversation([Message("user", question), Message("assistant", reply)])])
    return ids.tolist()


@pytest.mark.parametrize(
    ("name", "vocab", "dtype"),
    [
        ("gpt_neox", "trim", None),
        ("gpt_neox", "name", "bf16"),
        ("llama_tied", "trim", "fp16"),
        ("mixtral", "name", None),
        ("mixtral", "trim", "bf16"),
        ("phi", "keep", None),
        ("phi", "trim", None),
    ],
)
def test_the_model_elsewhere_is_the_model_here(trained, run_export, name, vocab, dtype):
    out = run_export(trained[name], vocab=vocab, dtype=dtype)
    rows = {"trim": 1025, "name": 1040, "keep": 1040}[vocab]
    before, after = AutoModelForCausalLM.from_pretrained(trained[name]), AutoModelForCausalLM.from_pretrained(out)
    assert (after.config.vocab_size, after.get_input_embeddings().num_embeddings) == (rows, rows)
    assert after.get_output_embeddings().weight.shape[0] == rows
    wanted = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert after.dtype == wanted
    ours, theirs = before.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys()
    for key, weights in theirs.items():  # bit for bit, as far as rows were kept
        assert torch.equal(weights, ours[key][: weights.shape[0]].to(weights.dtype)), key

    tokenizer, exported = AutoTokenizer.from_pretrained(trained[name]), AutoTokenizer.from_pretrained(out)
    assert len(exported.get_vocab()) == (1040 if vocab == "name" else 1025)
    for text in ("Hello  there, ünïcode 中文\n 12 345?", " x ", "<|endoftex", "<extra>"):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        ids = exported.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert ids == training_ids(tokenizer, text, text) or "<extra>" in text  # a token of the user's own, in raw text
        assert ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    if vocab == "name":
        assert exported.convert_ids_to_tokens([1025, 1039]) == ["<|unused_0|>", "<|unused_14|>"]
        assert exported.decode([300, 1030, 301], skip_special_tokens=True) == tokenizer.decode([300, 301])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id


def test_the_folder_is_clean(trained, run_export, capsys):
    out = run_export(trained["gpt_neox"], dtype="bf16", max_shard_size="100KB")
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if name.startswith("model-0")}
    assert len(shards) == 2
    assert names - shards == {
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert max((out / shard).stat().st_size for shard in shards) < 110_000
    said = capsys.readouterr().out
    assert "weights: fp32, 337.8 kB in" in said
    assert "bf16, 168.5 kB in" in said
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # by the umask


def test_again_from_an_export_it_is_the_same(trained, run_export, tmp_path):
    first = run_export(trained["gpt_neox"], tmp_path / "first", dtype="bf16")
    again = run_export(first, tmp_path / "again")
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_ids_with_gaps(tmp_path, run_export):
    model = save_trained(tmp_path, "gpt_neox", far=1101)
    out = run_export(model)
    assert AutoConfig.from_pretrained(out).vocab_size == 1102
    assert AutoTokenizer.from_pretrained(out).convert_ids_to_tokens(1101) == "far"
    with pytest.raises(UserError, match="have gaps, whose rows cannot be named: give --vocab trim or keep"):
        run_export(model, tmp_path / "named", vocab="name")
    assert not (tmp_path / "named").exists()


def test_a_models_own_end_tokens_and_template_stay(trained, tmp_path, run_export):
    """A chat model from elsewhere: ChatML, two end tokens, no system message."""
    model = tmp_path / "model"
    shutil.copytree(trained["llama_tied"], model)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, tokenizer.eos_token_id]}))
    (model / "README.md").write_text("---\nlicense: mit\n---\nIts own card.\n")
    out = run_export(model)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, end]
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    assert (out / "README.md").read_text() == (model / "README.md").read_text()
    (model / "README.md").unlink()
    card = (run_export(model, tmp_path / "again") / "README.md").read_text()
    assert "<|im_start|>user\nWhat is a meme" in card
    assert "Generation stops at `<|endoftext|>` or `<|im_end|>`." in card


# ---- what is refused, or found in what was written ----


def test_bad_input(trained, tmp_path, run_export):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    bad = {}
    for name in ("plain", "adapter", "quantized", "cut", "pickled", "short"):
        bad[name] = tmp_path / name
        shutil.copytree(trained["gpt_neox"], bad[name])
    (bad["plain"] / "chat_template.jinja").unlink()
    (bad["adapter"] / "adapter_config.json").write_text("{}")
    config = json.loads((bad["quantized"] / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (bad["quantized"] / "config.json").write_text(json.dumps(config))
    weights = bad["cut"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (bad["pickled"] / "model.safetensors").rename(bad["pickled"] / "pytorch_model.bin")
    tokens = json.loads((bad["short"] / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["far"] = 1041
    (bad["short"] / "tokenizer.json").write_text(json.dumps(tokens))
    cases = {
        tmp_path / "nowhere": "no such folder under",
        tmp_path / "file": "no such folder under",
        tmp_path / "empty": "not a model, no config.json; it holds nothing",
        bad["plain"]: "has no chat template, so it is no chat model",
        bad["adapter"]: r"does not name its base model \(base_model_name_or_path\)",
        bad["quantized"]: "its weights are quantized",
        bad["cut"]: "model.safetensors: cut off or damaged",
        bad["pickled"]: r"holds no \*.safetensors",
        bad["short"]: "its tokenizer has ids up to 1,041, its embedding 1,040 rows",
    }
    for folder, problem in cases.items():
        with pytest.raises(UserError, match=problem) as caught:
            run_export(folder)
        assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def test_weights_that_a_precision_cannot_hold(trained, tmp_path, run_export):
    model = AutoModelForCausalLM.from_pretrained(trained["gpt_neox"])
    model.gpt_neox.layers[1].mlp.dense_h_to_4h.bias.data[3] = 70_000.0
    save_model(model, AutoTokenizer.from_pretrained(trained["gpt_neox"]), tmp_path / "large")
    with pytest.raises(UserError, match=r"--dtype fp16: .*layers.1.mlp.dense_h_to_4h.bias holds weights over 65,504"):
        run_export(tmp_path / "large", dtype="fp16")
    assert not (tmp_path / "out").exists()
    run_export(tmp_path / "large", dtype="bf16")


FAULTS = {
    "another rotary base": lambda model: setattr(model.gpt_neox.rotary_emb, "inv_freq", torch.ones(2)),
    "rows that moved": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.roll(1, 0)),
    "a layer that is another": lambda model: model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.data.normal_(),
    "not a number": lambda model: model.gpt_neox.final_layer_norm.bias.data.fill_(float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_model_is_found_whatever_the_precision(trained, fault, dtype):
    tokenizer = AutoTokenizer.from_pretrained(trained["gpt_neox"])
    model = AutoModelForCausalLM.from_pretrained(trained["gpt_neox"])
    reference = make_reference(model, tokenizer, "fp32")
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    logits = logits_of(model, reference.ids)
    check_precision(reference, logits, dtype)
    check_same(reference, logits, (reference.template, logits_of(model, reference.ids)), dtype)
    FAULTS[fault](model)
    with pytest.raises(UserError, match="read back, it is another model"):
        check_same(reference, logits, (reference.template, logits_of(model, reference.ids)), dtype)


def test_a_precision_that_the_model_cannot_do_with(trained):
    """Hidden states over fp16's range make NaN; so many lost bits are another model."""
    tokenizer = AutoTokenizer.from_pretrained(trained["gpt_neox"])
    reference = make_reference(AutoModelForCausalLM.from_pretrained(trained["gpt_neox"]), tokenizer, "fp32")
    with pytest.raises(UserError, match="in fp16 its logits are not finite numbers: give --dtype bf16 or fp32"):
        check_precision(reference, reference.logits * float("nan"), "fp16")
    noise = np.random.default_rng(0).normal(size=reference.logits.shape) * reference.logits.std()
    check_precision(reference, reference.logits + 0.05 * noise, "fp16")
    with pytest.raises(UserError, match=r"in fp16 its logits differ by .* of their spread"):
        check_precision(reference, reference.logits + 0.5 * noise, "fp16")


def test_other_ids_are_found(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained["gpt_neox"])
    reference = make_reference(AutoModelForCausalLM.from_pretrained(trained["gpt_neox"]), tokenizer, "fp32")
    template = [ids[:] for ids in reference.template]
    template[3][2] += 1
    with pytest.raises(UserError, match=r"other ids of .* than training"):
        check_same(reference, reference.logits, (template, reference.logits), "fp32")


# ---- as a user runs it ----


def test_the_script(trained, tmp_path):
    """With the fresh process; then read by transformers 4, where it is installed."""
    folders = {name: tmp_path / name for name in ("gpt_neox",)}
    run = run_script(
        *(trained["gpt_neox"], folders["gpt_neox"], "--vocab", "name"), script="scripts/export.py", output_dir=tmp_path
    )
    assert "vocabulary: 1,040 rows for 1,025 tokens: 15 named" in run.stdout
    assert "the logits within 0 of their spread" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gpt_neox"]
    if TRANSFORMERS_4.exists():
        elsewhere = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "read_elsewhere.py"), str(folders["gpt_neox"])],
            env={**os.environ, "PYTHONPATH": str(TRANSFORMERS_4)},
            capture_output=True,
            text=True,
        )
        [found] = json.loads(elsewhere.stdout.splitlines()[-1])
        here = read(str(folders["gpt_neox"]))
        assert found["version"].startswith("4.")
        assert (found["text"], found["ids"]) == (here["text"], here["ids"])
        torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(here["logits"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("a",), "the following arguments are required: OUT"),
        (("a", "b", "--dtype", "int8"), "--dtype"),
        (("a", "b", "--max_shard_size", "0GB"), "0GB is no size such as 5GB or 500MB"),
        (("a", "b", "--max_shard_size", "large"), "large is no size"),
        (("a", "b", "--vocab", "cut"), "--vocab"),
        (("a", "b", "--private"), "give --push_to_hub REPO too"),
        (("a", "b", "--adapter", "--dtype", "fp32"), "leave out --dtype"),
        (("a", "b", "--adapter", "--vocab", "trim"), "leave out --vocab"),
        (("a", "b", "--adapter", "--max_shard_size", "5GB"), "leave out --max_shard_size"),
        (("a", "b", "--adapter", "--gguf", "c"), "leave out --gguf"),
    ],
)
def test_what_the_command_line_refuses(monkeypatch, options, problem):
    monkeypatch.setattr(sys, "argv", ["export.py", *options])
    with pytest.raises(UserError, match=problem):
        export.arguments()


@pytest.mark.parametrize("name", ["someone/mine", "no name"])
def test_what_cannot_be_published_is_not_written(trained, tmp_path, run_export, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push_to_hub"):
        run_export(trained["gpt_neox"], push_to_hub=name)
    assert not [*tmp_path.iterdir()]


def test_the_sizes_are_those_of_the_files(trained):
    for name, folder in trained.items():
        weights, size = read_weights(folder), 0
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                size += sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118, it is no mapping
        assert weights.count == size == AutoModelForCausalLM.from_pretrained(folder).num_parameters(), name
