"""sft.py with LoRA against an independent loop: PyTorch, with W + scale * B A and the learnt rows by hand."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import yaml
from adapters import BASES, write_base
from conftest import ROOT, run_script
from huggingface_hub import ModelCard
from interruption import SCRIPT as INTERRUPTION
from interruption import metrics, run_here, small_recipe
from safetensors.torch import load_file, save_file
from test_training import EPSILON, LEARNING_RATE, MAX_NORM, WARMUP, conversations, recipe  # noqa: F401, a fixture
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GPTNeoXConfig, PhiConfig

from data.dialogue import prepare_tokenizer
from publishing.adapter import check_adapter, name_base_for_others
from publishing.foreign import shareable_card
from recipe.load import load_recipe
from training.adapter_files import ADAPTER_FILES
from training.adapters import adapter_size, check_reached
from training.deepspeed_config import fill_config
from training.family import freeze_unreached
from training.memory import estimate_memory
from training.model import load_config, without_weights
from training.pretrained import load_pretrained
from training.state_layout import replicated
from utils.errors import UserError

RANK, ALPHA = 4, 12
NEW = [*range(1024, 1029)]  # the rows of the five chat tokens
LINEAR = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LORA = {"use_peft": True, "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(tmp_path_factory.mktemp("base") / "model", kind) for kind in BASES}


def options(**keys) -> list[str]:
    return [str(text) for key, value in keys.items() for text in (f"--{key}", value)]


def by_hand(base, initial: dict[str, torch.Tensor], tokenizer_folder, steps: int, scale: float):
    """Train on the eight conversations in each step; returns losses, gradient norms and the adapter.

    Args:
        initial: the adapter as a file has it, from which the loop begins.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    if model.get_input_embeddings().num_embeddings < NEW[-1] + 1:
        model.resize_token_embeddings(NEW[-1] + 1)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    adapter = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    prefix = "base_model.model."

    def adapted() -> dict[str, torch.Tensor]:
        own = dict(weights)
        for layer in range(2):
            for linear in LINEAR:
                name = f"gpt_neox.layers.{layer}.{linear}"
                a, b = (adapter[f"{prefix}{name}.lora_{which}.weight"] for which in "AB")
                own[f"{name}.weight"] = weights[f"{name}.weight"] + scale * b @ a
        for name in ["gpt_neox.embed_in"] + ["lm_head"] * (not tied):
            rows = adapter[f"{prefix}{name}.token_adapter.trainable_tokens_delta"]
            own[f"{name}.weight"] = weights[f"{name}.weight"].index_copy(0, torch.tensor(NEW), rows)
        if tied:
            own["lm_head.weight"] = own["gpt_neox.embed_in.weight"]
        return own

    examples = conversations(AutoTokenizer.from_pretrained(tokenizer_folder))
    optimizer = torch.optim.AdamW(adapter.values(), betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        last = step - 1
        rate = 0.0 if last < 0 else LEARNING_RATE * math.log(last + 1) / math.log(WARMUP)
        rate = rate if last < WARMUP else LEARNING_RATE * (steps - last) / (steps - WARMUP)
        optimizer.param_groups[0]["lr"] = rate
        total, count = 0.0, 0
        for ids, targets in examples:
            logits = torch.func.functional_call(model, adapted(), (ids[None],), {"use_cache": False}).logits[0, :-1]
            total = total + F.cross_entropy(logits, targets[1:], reduction="sum")
            count += int((targets[1:] != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(adapter.values(), MAX_NORM)))
        optimizer.step()
        losses.append((total / count).item())
    return losses, norms, {name: tensor.detach() for name, tensor in adapter.items()}


RUNS = [(kind, "python", 4) for kind in BASES] + [("with spare rows", launch, 2) for launch in ("ddp2", "zero2x2")]


@pytest.mark.parametrize(("kind", "launch", "accumulation"), RUNS)
def test_twelve_steps_equal_matrices_written_out(run_sft, tmp_path, recipe, bases, kind, launch, accumulation):  # noqa: F811
    base = bases[kind]
    keys = LORA | {"model_name": base, "num_train_epochs": 12, "per_device_train_batch_size": 2}
    keys |= {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 1}
    arguments = options(**keys, save_total_limit="null")
    if launch == "python":
        run = run_here(recipe, *arguments, output_dir=tmp_path / "run")
    else:
        run = run_sft(recipe, *arguments, launch=launch)
    initial = load_file(run.output_dir / "checkpoint-1" / "adapter_model.safetensors")  # its step was at rate 0
    assert all(not tensor.any() for name, tensor in initial.items() if "lora_B" in name)
    losses, norms, adapter = by_hand(base, initial, run.output_dir, 12, ALPHA / RANK)
    assert run.curve("loss") == pytest.approx(losses, rel=1e-4)
    assert run.curve("grad_norm") == pytest.approx(norms, rel=1e-4)
    trained = load_file(run.output_dir / "adapter_model.safetensors")
    assert trained.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(
            trained[name], tensor, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert not torch.equal(tensor, initial[name])


# ---- Going on ----


@pytest.fixture(scope="module")
def small(bases, tmp_path_factory):
    """A recipe with dropout, so that a random state that is not restored shows."""
    keys = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "max_steps": 9, "num_train_epochs": 1}
    return small_recipe(tmp_path_factory.mktemp("small"), bases["with spare rows"], **keys)


QUANTIZED = {"of the model": [], "in 4 bits": ["--load_in_4bit", "true"]}


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The runs that nobody interrupts."""
    runs = {}
    for kind, keys in QUANTIZED.items():
        runs[kind] = run_here(small, *keys, output_dir=tmp_path_factory.mktemp("whole") / "run")
        assert runs[kind].returncode == 0, runs[kind].stderr
    return runs


@pytest.mark.parametrize("kind", QUANTIZED)
def test_an_interrupted_run_is_the_same_run(tmp_path, small, whole, kind):
    for moment in ({"steps": 3, "by": "SIGTERM"}, {"steps": 3, "by": "death"}, {}):
        run = run_here(small, *QUANTIZED[kind], output_dir=tmp_path / "run", **moment)
    assert run.returncode == 0, run.stderr
    assert metrics(run.output_dir) == metrics(whole[kind].output_dir)
    name = "adapter_model.safetensors"
    assert (run.output_dir / name).read_bytes() == (whole[kind].output_dir / name).read_bytes()
    checkpoint = run.output_dir / "checkpoint-5"
    assert not (checkpoint / "model.safetensors").exists()
    moments = [key for path in checkpoint.glob("trainer_state/optimizer*") for key in load_file(path)]
    assert len(moments) == 2 * len(load_file(checkpoint / name))  # of what is trained alone


def test_in_4_bits_the_loss_falls_as_it_does_without(whole):
    losses = [run.curve("loss") for run in whole.values()]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0] != losses[1]
    assert losses[1][-1] < losses[1][0] - 0.5


def test_zero_2_goes_on_from_a_plain_run_and_the_other_way_round_in_bf16(tmp_path, small):
    """Where ZeRO-2 has adapters in bf16 over fp32 masters, and a plain run in fp32."""
    keys = ("--dtype", "bf16", "--global_batch_size", 4, "--lora_dropout", 0, "--logging_steps", 1)
    unbroken = run_here(small, *keys, output_dir=tmp_path / "whole")
    assert unbroken.returncode == 0, unbroken.stderr
    output = tmp_path / "run"
    run_here(small, *keys, output_dir=output, steps=3)
    then = (json.dumps({"steps": 3}), small, *keys, "--output_dir", output)
    run = run_script(*then, launch="zero2x2", output_dir=output, script=INTERRUPTION, check=False)
    assert "start the same command again" in run.stdout, run.stderr[-3000:]
    run = run_here(small, *keys, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert "going on from" in run.stdout
    assert run.curve("loss") == pytest.approx(unbroken.curve("loss"), rel=2e-3)
    assert len(run.curve("loss")) == 9


# ---- What it leaves ----

ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM
for folder, classes in json.load(sys.stdin).items():
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("<|prompter|>What is 2 and 3?<|assistant|>").input_ids])
    for name in classes:
        model = globals()[name].from_pretrained(folder).eval()
        torch.save(model(ids).logits[0].detach(), f"{folder}/{name}.pt")
"""


def test_an_adapter_is_loaded_as_it_stands_in_a_clean_process(tmp_path, bases, whole):
    """By transformers itself where the base model has rows for all tokens, else by peft, which adds them."""
    grown = run_here(
        small_recipe(tmp_path, bases["without rows, tied"], use_peft=True, max_steps=4), output_dir=tmp_path / "grown"
    )
    assert "1,024 rows, 1,029 are needed" in grown.stdout, grown.stderr
    dora = run_here(
        small_recipe(tmp_path, bases["with spare rows"], use_peft=True, use_dora=True, max_steps=4),
        output_dir=tmp_path / "dora",
    )
    assert dora.returncode == 0, dora.stderr
    both = ["AutoPeftModelForCausalLM", "AutoModelForCausalLM"]
    folders = {str(run.output_dir): both for run in (whole["of the model"], dora)} | {str(grown.output_dir): both[:1]}
    subprocess.run([sys.executable, "-c", ELSEWHERE], input=json.dumps(folders).encode(), check=True, cwd=tmp_path)
    for folder, classes in folders.items():
        tokenizer = load_pretrained(AutoTokenizer, folder)
        ids = torch.tensor([tokenizer("<|prompter|>What is 2 and 3?<|assistant|>").input_ids])
        with torch.no_grad():
            merged = load_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32).eval()(ids).logits[0]
        for name in classes:
            torch.testing.assert_close(torch.load(f"{folder}/{name}.pt"), merged, atol=1e-5, rtol=0)
    file = dora.output_dir / "adapter_model.safetensors"  # as peft writes it, and this collection has
    ours = load_file(file)
    theirs = {name.replace("magnitude_vector.weight", "magnitude_vector"): own for name, own in ours.items()}
    assert theirs.keys() != ours.keys()
    save_file(theirs, file)
    with torch.no_grad():
        again = load_pretrained(AutoModelForCausalLM, str(dora.output_dir), dtype=torch.float32).eval()(ids).logits[0]
    torch.testing.assert_close(again, torch.load(f"{dora.output_dir}/AutoModelForCausalLM.pt"), atol=1e-5, rtol=0)


def test_an_evaluation_of_an_adapter_is_that_of_the_run(tmp_path, whole):
    result, run = tmp_path / "loss.json", whole["in 4 bits"]
    run_script(run.output_dir, "--output", result, script="scripts/eval_loss.py", output_dir=tmp_path)
    loss = json.loads(result.read_text())["results"]["loss"]["value"]
    assert loss == pytest.approx(run.curve("eval_loss")[-1], rel=1e-5)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_merged_final_model_has_the_logits_of_its_adapter(tmp_path, small, whole, kind):
    """And takes the place of the adapter that an earlier end of the run has left."""
    output = shutil.copytree(whole[kind].output_dir, tmp_path / "run")
    more = ("--max_steps", 10, "--merge_adapter", "true", "--allow_changes")
    run = run_here(small, *QUANTIZED[kind], *more, output_dir=output)
    assert run.returncode == 0, run.stderr
    adapter = load_pretrained(AutoModelForCausalLM, str(output / "checkpoint-10"), dtype=torch.float32).eval()
    assert ("what its 4 bits (nf4) stand for" in run.stdout) == (kind == "in 4 bits")
    assert not [name for name in ADAPTER_FILES if (output / name).exists()]
    merged = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-5, rtol=0)


def test_an_export_merges_an_adapter_of_4_bits(tmp_path, whole):
    folder = whole["in 4 bits"].output_dir
    run = run_script(folder, tmp_path / "exported", script="scripts/export.py", output_dir=tmp_path)
    assert "merged, in fp32, into the weights of" in run.stdout
    assert "what its 4 bits (nf4) stand for" in run.stdout
    adapter = load_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32).eval()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, adapter(ids).logits[..., :1029], atol=1e-5, rtol=0)


def test_an_adapter_is_exported_by_itself_without_a_path_of_this_machine(tmp_path, bases, whole, monkeypatch):
    """Who has the base model in a folder of that name loads it from there."""
    source, out = whole["of the model"].output_dir, tmp_path / "exported"
    run = run_script(source, out, "--adapter", script="scripts/export.py", output_dir=tmp_path)
    base = bases["with spare rows"]
    assert f"its base model: ./{base.name}" in run.stdout
    assert {path.name for path in out.iterdir()} >= {*ADAPTER_FILES, "README.md", "tokenizer.json"}
    for path in out.iterdir():
        assert not any(str(folder).encode() in path.read_bytes() for folder in (base.parent, source, ROOT)), path
    ids = torch.arange(40)[None]
    expected = load_pretrained(AutoModelForCausalLM, str(source), dtype=torch.float32).eval()(ids).logits
    with pytest.raises(UserError, match=rf"base model is gone: no folder \./{base.name} under"):
        load_pretrained(AutoModelForCausalLM, str(out))
    monkeypatch.chdir(base.parent)
    found = load_pretrained(AutoModelForCausalLM, str(out), dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    # The card says what it wants, and its lines load it: with the base where adapter_config.json says.
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert "base_model" not in card.data.to_dict()
    assert f"`pip install peft`) and its base model, `{base.name}`, which is not on the hub" in card.text
    monkeypatch.chdir(out)
    (out / base.name).symlink_to(base)
    loaded = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], loaded)
    torch.testing.assert_close(loaded["model"].eval()(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("base", "named"),
    [
        *(("org/name", "org/name"), ("folder/name", "./name"), ("./name", "./name"), ("~/name", "./name")),
        *(
            (".", "./here"),
            ("folder/..", "./here"),
            ("folder/name/", "./name"),
            ("linked", "org/name"),
            ("gpt2", "gpt2"),
        ),
        ("cache/models--org--name/snapshots/0123abc", "org/name"),
        ("cache/models--gpt2/snapshots/0123abc", "gpt2"),
        ("cache/models--org--name/0123abc", "./0123abc"),
    ],
)
def test_a_base_model_of_the_hub_keeps_its_name(tmp_path, monkeypatch, base, named):
    """Of an adapter from elsewhere, whose config has the path as it was typed."""
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    for folder in (
        "folder/name",
        "name",
        *(f"cache/models--{name}" for name in ("gpt2/snapshots/0123abc", "org--name")),
    ):
        Path(folder).mkdir(parents=True)
    for folder in ("0123abc", "snapshots/0123abc"):
        Path("cache/models--org--name", folder).mkdir(parents=True)
    Path("linked").symlink_to("cache/models--org--name/snapshots/0123abc")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    assert name_base_for_others(tmp_path) == named
    assert json.loads(file.read_text()) == {"base_model_name_or_path": named, "r": 8}


# ---- What is refused ----

REFUSED = {
    "lora_target_modules: nowhere is no linear layer": {"lora_target_modules": "[nowhere, dense]"},
    "lora_target_modules: lm_head is no linear layer of the body": {"lora_target_modules": "[lm_head]"},
    "lora_target_modules": {"lora_target_modules": "[]"},
    "load_in_4bit says how adapters are trained: give use_peft: true": {"use_peft": False, "load_in_4bit": True},
    "use_dora says how": {"use_peft": False, "use_dora": True},
    "merge_adapter says how": {"use_peft": False, "merge_adapter": True},
    "give from_scratch: false": {"from_scratch": True},
    "torch_compile: true does not compile layers with adapters": {"torch_compile": True},
    "load_in_4bit: true is not for DeepSpeed": {"load_in_4bit": True, "deepspeed_config": "ds_configs/zero2.json"},
    "bnb_4bit_quant_type": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
    "lora_r": {"lora_r": 0},
    "lora_dropout": {"lora_dropout": 1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_what_does_not_go_together(tmp_path, small, message):
    run = run_here(small, *options(**REFUSED[message]), output_dir=tmp_path / "run")
    (error,) = run.errors
    assert message in error
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("given", "names"),
    [("all-linear", None), ("[all-linear]", None), ("null", None), ("dense", ["dense"]), ("[a, b]", ["a", "b"])],
)
def test_target_modules_as_recipes_of_peers_have_them(small, given, names):
    assert load_recipe(small, {"lora_target_modules": given}).lora_target_modules == names


def test_new_rows_of_an_output_layer_with_a_bias_are_refused_before_weights_are_read(tmp_path, small, bases):
    folder = tmp_path / "phi"
    shutil.copytree(bases["with spare rows"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    PhiConfig(vocab_size=1040, max_position_embeddings=256, **sizes).save_pretrained(folder)
    run = run_here(small, "--model_name", folder, "--dry_run", output_dir=tmp_path / "run")
    assert run.errors == [f"error: use_peft: the output layer of {folder} has a bias: its new rows cannot be learnt"]


def test_target_modules_of_a_tower_that_no_text_reaches(small):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    tower = sizes | {"image_size": 28, "patch_size": 14}
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4))
    left_out = freeze_unreached(model, "gemma")
    for names, refused in (("[down_proj]", None), ("[q_proj]", None), ("[fc1]", "fc1"), ("[down_proj, fc2]", "fc2")):
        loaded = load_recipe(small, {"lora_target_modules": names})
        expected = pytest.raises(
            UserError, match=f"{refused} is no layer of .* that a text reaches: it is of model.vis"
        )
        with expected if refused else contextlib.nullcontext():
            check_reached(loaded, model, left_out)


@pytest.mark.parametrize(("key", "value"), [("use_peft", False), ("lora_r", 8), ("lora_target_modules", "[dense]")])
def test_a_run_cannot_go_on_with_another_adapter(small, tmp_path, whole, key, value):
    output = shutil.copytree(whole["of the model"].output_dir, tmp_path / "run")
    run = run_here(small, f"--{key}", value, "--max_steps", 12, "--allow_changes", output_dir=output)
    assert f"what is trained is another: {key}: " in run.errors[0]


def test_4_bits_are_refused_where_the_accelerate_config_brings_deepspeed(small):
    loaded = load_recipe(small, {"load_in_4bit": "true"})
    with pytest.raises(UserError, match=r"load_in_4bit = true: zero2.json: DeepSpeed"):
        fill_config({}, "zero2.json", loaded, 10, torch.float32)


@pytest.mark.parametrize("package", ["peft", "bitsandbytes"])
def test_a_missing_package_is_one_line(small, monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    with pytest.raises(UserError, match=f"{package} is not installed: pip install -r requirements-lora.txt"):
        load_config(load_recipe(small, {"load_in_4bit": "true"}))


def test_an_adapter_whose_base_is_gone_or_another(tmp_path, small, whole):
    base = write_base(tmp_path / "base")
    adapter = shutil.copytree(whole["of the model"].output_dir, tmp_path / "adapter")
    for name in ("adapter_config.json", "base_model.json"):
        values = json.loads((adapter / name).read_text())
        values |= {key: str(base) for key in ("name", "base_model_name_or_path") if key in values}
        (adapter / name).write_text(json.dumps(values))
    load_pretrained(AutoModelForCausalLM, str(adapter))
    write_base(base, seed=1)
    for auto_class in (AutoModelForCausalLM, AutoConfig):
        with pytest.raises(UserError, match="an adapter for another base model: what is in"):
            load_pretrained(auto_class, str(adapter))
    loaded = {"model_name": str(base), "resume_from_checkpoint": str(whole["of the model"].output_dir / "checkpoint-5")}
    run = run_here(small, *options(**loaded), "--allow_changes", output_dir=tmp_path / "run")
    assert "an adapter for another base model: model_name = " in run.errors[0]
    shutil.rmtree(base)
    with pytest.raises(UserError, match="an adapter whose base model is gone: no folder"):
        load_pretrained(AutoModelForCausalLM, str(adapter))


def write_foreign(folder, base, config):
    """An adapter as peft saves it, with random weights."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def foreign_lora(**keys):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["dense", "query_key_value"], **keys)


def test_an_adapter_of_anothers_making_is_merged_or_refused(tmp_path, bases):
    base, folder, ids = bases["with spare rows"], tmp_path / "adapter", torch.arange(40)[None]
    for config in (foreign_lora(), foreign_lora(bias="all", modules_to_save=["lm_head"])):
        expected = write_foreign(folder, base, config)
        merged = load_pretrained(AutoModelForCausalLM, str(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)
    write_foreign(folder, base, foreign_lora())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = min(tensors)
    for damaged in (
        {key: tensor for key, tensor in tensors.items() if key != name},
        tensors | {name.replace("layers.0", "layers.9"): tensors[name].clone()},
    ):
        save_file(damaged, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match="not of this base model: its weights and the model's do not meet in "):
            load_pretrained(AutoModelForCausalLM, str(folder))
    write_foreign(tmp_path / "prompt", base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="an adapter of kind PROMPT_TUNING, which cannot be merged into weights"):
        load_pretrained(AutoModelForCausalLM, str(tmp_path / "prompt"))
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match="names itself as its base model"):
        load_pretrained(AutoModelForCausalLM, str(folder))


CARD = """---
base_model: {base}
tags:
- base_model:adapter:{base}
- lora
library_name: peft
---
# Ours

A fine-tuned version of [{base}](https://huggingface.co/{base}), `{base}/config.json`, {elsewhere}.

    curl localhost/v1/chat 2>/dev/null -d @/v1/models/x
"""


@pytest.mark.parametrize("way", ["--adapter", "merged", "of the hub", "a model"])
def test_no_path_of_this_machine_is_in_what_was_made_elsewhere(tmp_path, bases, way):
    """peft's own card has the base model's path twice; a Trainer's, and configs, in other places."""
    base, folder, out = tmp_path / "hub/models--org--name/snapshots/0123abc", tmp_path / "adapter", tmp_path / "out"
    base = base if way == "of the hub" else tmp_path / "my base"
    shutil.copytree(bases["with spare rows"], base)
    write_foreign(folder, base, foreign_lora())
    assert str(base) in " ".join((folder / "README.md").read_text().split())  # YAML folds a long line at a blank
    if way == "a model":
        folder = shutil.copytree(base, tmp_path / "model")
    prepare_tokenizer(AutoTokenizer.from_pretrained(base)).save_pretrained(folder)
    if way != "merged":
        card = CARD.format(base=base, elsewhere=tmp_path / "another/place")
        (folder / "README.md").write_bytes(card.encode() + b"caf\xe9\n")
    for path in folder.glob("*config.json"):
        more = {"cache_dir": str(tmp_path / "my cache")} if path.name != "adapter_config.json" else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    given = [] if way in ("merged", "a model") else ["--adapter"]
    run = run_script(folder, out, *given, script="scripts/export.py", output_dir=tmp_path)
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    said = (out / "README.md").read_text(errors="surrogateescape")
    head = yaml.safe_load(said.split("---")[1])
    assert head.get("base_model") == ("org/name" if way == "of the hub" else None)
    if way == "merged":
        assert "peft" not in said
        return
    assert head["tags"] == ["base_model:adapter:org/name"] * (way == "of the hub") + ["lora"]
    name = "org/name" if way == "of the hub" else "my base"
    assert f"A fine-tuned version of [{name}](https://huggingface.co/{name}), `{name}/config.json`, place." in said
    assert "curl localhost/v1/chat 2>/dev/null -d @/v1/models/x" in said
    assert said.endswith("caf\udce9\n")
    assert "its base model: " in run.stdout or way == "a model"


def test_an_adapter_whose_weights_are_cut_off_is_not_exported(tmp_path, bases):
    write_foreign(tmp_path, bases["with spare rows"], foreign_lora())
    size = check_adapter(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    assert size == weights.stat().st_size
    os.truncate(weights, size - 1)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: cut off or damaged"):
        check_adapter(tmp_path)


def test_a_card_from_elsewhere_that_names_none_of_this_machine_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "org/name"):  # what happens to be in the working directory
        (tmp_path / name).mkdir(parents=True)
    for text in (
        "# No front matter: /v1/chat/completions, and/or </div>\n",
        "---\nbase_model:   org/name  # ours\ntags: [base_model:merge:org/name]\n---\n\n#!/usr/bin/env python\n",
        "---\n: [damaged\n---\ntext\n",
        "---\nbase_model:\n- org/one\n- gpt2\n---\n",
        "---\nbase_model: gpt2\ntags:\n- base_model:adapter:gpt2\n---\nof org/name\n",
        "docker run -v /opt/no-such/model:/mnt/no-such vllm --model /mnt/no-such/x, file:///home/no-such/x\n",
        "---\nwidget: /tmp/no-such/folder with a text\n---\n",
    ):
        assert shareable_card(text, "org/name") == text


def test_a_path_of_this_machine_in_a_card_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "my base"
    base.mkdir()
    assert shareable_card("---\nbase_model: my base\n---\n# Ours\n") == "# Ours\n"
    folded = str(base).replace(" ", "\n  ")  # as YAML writes a long line
    head = f"base_model: {folded}\ntags:\n- base_model:adapter:{folded}\n"
    assert shareable_card(f"---\n{head}---\n# Ours\n") == "# Ours\n"
    assert shareable_card(f"---\n{head}- lora\n---\n# Ours\n") == "---\ntags:\n- lora\n---\n# Ours\n"
    assert shareable_card(f"see {tmp_path}/gone/x, file://{tmp_path}/y, file://localhost{tmp_path}/a%20b/z") == (
        "see x, y, z"
    )
    assert shareable_card(f"---\n{head}---\nof file://{base}/x\n") == "of my base/x\n"


DAMAGES = {
    "it lacks": lambda tensors: tensors.pop(min(tensors)),
    "without a place for it": lambda tensors: tensors.update(beside=torch.zeros(1)),
    "is [1, 1], not": lambda tensors: tensors.update({min(tensors): torch.zeros(1, 1)}),
    "no finite numbers": lambda tensors: tensors[min(tensors)].fill_(math.nan),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_adapter(tmp_path, whole, problem):
    adapter = shutil.copytree(whole["of the model"].output_dir, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    DAMAGES[problem](tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors") as caught:
        load_pretrained(AutoModelForCausalLM, str(adapter))
    assert problem in str(caught.value)


# ---- What it needs ----

NEOX = {"num_hidden_layers": 16, "tie_word_embeddings": False}
SHAPES = {
    "stablelm7b_oasst_lora": {"vocab_size": 50432, "hidden_size": 6144, "num_attention_heads": 48},
    "stablelm7b_oasst_qlora": {"vocab_size": 50432, "hidden_size": 6144, "num_attention_heads": 48},
    "stablelm3b_oasst": {"vocab_size": 50688, "hidden_size": 4096, "num_attention_heads": 32},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_that_ships_says_its_own_estimate(name):
    path, sizes = ROOT / "recipes" / f"{name}.yaml", NEOX | SHAPES[name]
    loaded = load_recipe(path)
    config = GPTNeoXConfig(**sizes, intermediate_size=4 * sizes["hidden_size"])
    model = without_weights(loaded, config)
    adapter = adapter_size(loaded, model, torch.bfloat16) if loaded.use_peft else None
    shape = (1, loaded.micro_batch_tokens)
    parts = estimate_memory(loaded, config, model.num_parameters(), replicated(1), torch.bfloat16, shape, True, adapter)
    said = float(re.search(r"([\d.]+) GiB of memory", path.read_text())[1])
    assert sum(parts.values()) / 2**30 == pytest.approx(said, rel=0.01)


def test_in_4_bits_a_weight_takes_four_bits_and_its_share_of_a_factor(small, bases):
    loaded = load_recipe(small, {"load_in_4bit": "true"})
    model = AutoModelForCausalLM.from_pretrained(bases["with spare rows"])
    both = loaded.model_copy(update={"load_in_4bit": False}), loaded
    sizes = [adapter_size(each, model, torch.float32) for each in both]
    linear = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)
    assert sizes[0].frozen_bytes == 4 * model.num_parameters()
    assert sizes[0].frozen_bytes - sizes[1].frozen_bytes == linear * 4 - linear // 2 - linear // 64 * 4
    assert sizes[0].weights == 2 * 4 * (32 + 96 + 32 + 32 + 32 + 64 + 64 + 32)
