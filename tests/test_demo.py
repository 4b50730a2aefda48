"""The demo as a whole: it learns, it replies, and its output folder keeps the contract."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run, run_script
from huggingface_hub import ModelCard
from interruption import MEASURED, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

DATASETS = ["oasst_export", "vicuna", "dolly15k", "grade_school_math_instructions", "code_alpaca"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A whole run of the demo; where DEMO_LOG names what `make demo` has just printed, as in .ci/run, that one."""
    if log := os.environ.get("DEMO_LOG"):
        return Run(subprocess.CompletedProcess("make demo", 0, Path(log).read_text(), ""), ROOT / "demo_output")
    folder = tmp_path_factory.mktemp("demo")
    return run_script(
        "recipes/demo.yaml",
        "--cache_dir",
        folder / "cache",
        launch="bare",
        output_dir=folder / "demo_output",
        real=True,
    )


def test_it_learns(demo):
    losses = demo.curve("loss")
    assert losses[0] == pytest.approx(7, abs=0.5)  # about log(1024): nothing is known yet
    assert losses[-1] < 0.2
    assert sorted(losses[::10], reverse=True) == losses[::10]
    for name in DATASETS:  # the likeliest token of each data set is right in less than a third of the places
        assert demo.curve(f"eval_{name}_accuracy")[-1] > 0.9
        assert demo.curve(f"eval_{name}_loss")[-1] < 0.5 * demo.curve(f"eval_{name}_loss")[0]


def test_every_reply_ends_by_itself(demo):
    assert "10 of 10 replies ended by themselves (100%)" in demo.stdout
    replies = re.findall(r"^--- \w+\n.*?\[\[(.*?)\]\]$", demo.stdout.split("replies to held-out")[1], re.M | re.S)
    assert len(replies) == 10
    assert all(reply.endswith("<|endoftext|>") for reply in replies)


def test_the_first_batch_is_shown_with_what_is_learnt_marked(demo):
    shown = demo.stdout.split("the first batch")[1].split("validation after")[0]
    assert re.search(r"<\|prompter\|>[^\[]+<\|endoftext\|><\|assistant\|>\[\[[^\]]+<\|endoftext\|>", shown)


def test_output_folder(demo):
    names = {path.name for path in demo.output_dir.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "training.png", "README.md", "model.safetensors"} <= names
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-250", "checkpoint-500"}
    lines = demo.metrics()
    assert all({"step", "epoch"} <= line.keys() for line in lines)
    training = next(line for line in lines if "loss" in line)
    assert {"loss", "learning_rate", "grad_norm", "tokens"} <= training.keys()
    assert MEASURED - {"mfu"} <= training.keys()  # no data sheet says what a CPU can do
    assert 0 <= training["data_wait_share"] < 1
    assert (demo.output_dir / "training.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(demo.output_dir / "README.md")
    assert all(f"\n| {name} | " in card.text for name in DATASETS)
    assert len(card.data.eval_results) == 2 * len([*DATASETS, "all"])
    assert str(ROOT) not in str(card)
    assert json.loads((demo.output_dir / "config.json").read_text())["hidden_act"] == "gelu_pytorch_tanh"


def test_its_end_says_how_to_talk_to_it(demo):
    command = re.search(r"^to talk to it: python (\S+) (\S+)$", demo.stdout, re.M)
    question = b"What colour is a banana?\n"
    reply = run_script(command[2], "--temperature", 0, script=command[1], output_dir=None, stdin=question)
    assert (reply.stdout, reply.stderr) == ("A banana is yellow.\n", "")


@pytest.mark.parametrize("folder", [".", "checkpoint-500"])
def test_the_model_replies_as_it_stands(demo, folder):
    model = AutoModelForCausalLM.from_pretrained(demo.output_dir / folder)
    tokenizer = AutoTokenizer.from_pretrained(demo.output_dir / folder)
    question = [{"role": "user", "content": "What colour is a banana?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        reply = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply) == "A banana is yellow.<|endoftext|>"


def test_training_from_the_resolved_recipe_repeats_the_run(run_sft, tmp_path):
    first = run_sft("recipes/demo.yaml", "--max_steps", 6, "--logging_steps", 1, output_dir=tmp_path / "first")
    again = run_sft(tmp_path / "first" / "recipe.yaml", output_dir=tmp_path / "again")
    assert metrics(first.output_dir) == metrics(again.output_dir)
