"""eval_loss.py: equal to sft.py's own evaluation and to an independent computation, on one process and on two."""

import importlib.metadata
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.dialogue import CHAT_TOKENS
from evaluation.model import find_model
from evaluation.results import Evaluation, start_processes

SCRIPT = "scripts/eval_loss.py"
SMALL = [
    *("--max_steps", 4, "--save_steps", 2, "--eval_steps", 2, "--sample_replies", 0),
    *("--datasets.vicuna.max_val_set", 12, "--datasets.grade_school_math_instructions.max_val_set", 7),
    *("--datasets.code_alpaca.max_val_set", 5, "--max_length", 48, "--learning_rate", "1e-2"),
]


def evaluate(*arguments, check=True, launch="python"):
    return run_script(*arguments, script=SCRIPT, output_dir=None, check=check, launch=launch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the demo; max_length cuts some of its conversations."""
    folder = tmp_path_factory.mktemp("run") / "output"
    return run_script("recipes/demo.yaml", *SMALL, "--output_dir", folder, output_dir=folder)


@pytest.fixture(scope="module")
def result(run):
    evaluate(run.output_dir)
    return json.loads((run.output_dir / "eval" / "loss.json").read_text())


def values(result):
    return {name: metric["value"] for name, metric in result["results"].items()}


def test_equals_the_last_evaluation_of_the_run(run, result):
    last = next(line for line in reversed(run.metrics()) if "eval_loss" in line)
    found = values(result)
    for name in ("oasst_export", "vicuna", "dolly15k", "grade_school_math_instructions", "code_alpaca"):
        assert found[f"loss/{name}"] == pytest.approx(last[f"eval_{name}_loss"], rel=1e-6)
        assert found[f"accuracy/{name}"] == pytest.approx(last[f"eval_{name}_accuracy"], abs=1e-9)
    assert found["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(last["eval_loss"]), rel=1e-6)
    assert result["checkpoint"]["step"] == 4
    assert result["settings"]["datasets"]["vicuna"]["max_val_set"] == 12
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    for metric in result["results"].values():
        assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]


@torch.no_grad()
def test_equals_an_independent_computation(run, result, tmp_path):
    """From the exported messages: one conversation at a time, full logits, turns by hand."""
    export = tmp_path / "mix.jsonl"
    run_script(run.output_dir / "recipe.yaml", "--export", export, script="scripts/prepare_data.py", output_dir=None)
    model = AutoModelForCausalLM.from_pretrained(run.output_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.output_dir)
    with open(ROOT / "recipes" / "demo_data" / "oasst_trees.jsonl", encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    lang_of = {prompt["text"]: prompt["lang"] for prompt in prompts}

    sums: dict[str, list[float]] = {}  # loss, right, targets of each part
    conversations: dict[str, int] = {}
    for line in export.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["split"] != "validation":
            continue
        ids, turns = [], []  # of each token the reply that it is a target of, 0 where it is none
        for place, message in enumerate(row["messages"]):
            reply = place // 2 + 1 if message["role"] == "assistant" else 0
            head = tokenizer("<|assistant|>" if reply else "<|prompter|>", add_special_tokens=False)["input_ids"]
            body = tokenizer(message["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            turns += [place // 2 if not reply else 0] + [reply] * len(body)  # the prompter token ends the reply before
            ids += head + body
        ids, turns = torch.tensor(ids[:48]), turns[:48]
        logits = model(ids[None]).logits[0, :-1].double()
        losses, right = F.cross_entropy(logits, ids[1:], reduction="none"), logits.argmax(-1) == ids[1:]
        parts = {"", f"/{row['dataset']}"}
        if row["dataset"] == "oasst_export":
            parts.add(f"/language {lang_of[row['messages'][0]['content']]}")
        for part in parts:
            conversations[part] = conversations.get(part, 0) + any(turns)
        for loss, hit, turn in zip(losses.tolist(), right.tolist(), turns[1:], strict=True):
            for part in parts | {f"/turn {turn}{' on' * (turn == 5)}"} if turn else ():
                of_part = sums.setdefault(part, [0, 0, 0])
                for place, value in enumerate((loss, hit, 1)):
                    of_part[place] += value

    found = result["results"]
    assert {name.removeprefix("loss") for name in found if name.startswith("loss")} == set(sums)
    assert {"/language de", "/language en", "/turn 2"} <= set(sums)
    for part, (loss, right, targets) in sums.items():
        assert found[f"loss{part}"]["value"] == pytest.approx(loss / targets, abs=1e-4)
        assert found[f"perplexity{part}"]["value"] == pytest.approx(math.exp(loss / targets), rel=1e-4)
        assert found[f"accuracy{part}"]["value"] == pytest.approx(right / targets)
        assert found[f"loss{part}"]["targets"] == targets
        if part in conversations:
            assert found[f"loss{part}"]["n"] == conversations[part]


@pytest.mark.parametrize("cut", [("--batch_size", 3), ("--micro_batch_tokens", 300)])
def test_two_processes_and_other_batches_give_the_same(run, result, tmp_path, cut):
    evaluate(run.output_dir, "--output", tmp_path / "two.json", *cut, launch="ddp2")
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["processes"] == 2
    assert two["settings"] == result["settings"]
    assert two["items"].keys() == result["items"].keys()
    for name, metric in two["results"].items():
        for key in ("value", "low", "high"):
            assert metric[key] == pytest.approx(result["results"][name][key], rel=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "two.json"]


def test_other_data_than_the_runs_are_warned_of(run, result, tmp_path):
    assert not any("data of" in warning for warning in result["warnings"])
    found = evaluate(run.output_dir, "--datasets.vicuna.max_val_set", 11, "--output", tmp_path / "loss.json")
    assert "warning: the data of vicuna are not those that the run had" in found.stdout
    assert values(json.loads((tmp_path / "loss.json").read_text()))["loss"] != values(result)["loss"]


def test_an_interrupted_evaluation_goes_on(run, result, tmp_path):
    """What is done is not done again: the losses that it is told here are no model's."""
    checkpoint = find_model(str(run.output_dir))
    started = Evaluation(start_processes(), checkpoint, "loss", result["settings"], str(tmp_path))
    done = dict(list(result["items"].items())[::2])
    fields = {"loss", "correct", "targets"}
    for key, item in done.items():
        measured = {name: value for name, value in item.items() if name.split("_turn_")[0] in fields}
        started.add(key, measured | {"loss": 10.0 * item["targets"]})
    again = evaluate(run.output_dir, "--output", tmp_path)
    assert f"an interrupted evaluation, done so far: {len(done)} item" in again.stdout
    found = json.loads((tmp_path / "loss.json").read_text())
    assert found["resumed_items"] == len(done)
    for key, item in found["items"].items():
        expected = 10.0 * item["targets"] if key in done else result["items"][key]["loss"]
        assert item["loss"] == pytest.approx(expected, rel=1e-5)
    assert list(tmp_path.iterdir()) == [tmp_path / "loss.json"]


def test_a_base_model_gets_the_chat_tokens(run, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    for path in base.glob("tokenizer*.json"):  # the demo's tokenizer has them
        text = path.read_text()
        for token in CHAT_TOKENS:
            text = text.replace(token, token.replace("<|", "<|not_"))
        path.write_text(text)
    found = evaluate(base, "--recipe", run.output_dir / "recipe.yaml")
    assert f"warning: it lacks {' '.join(CHAT_TOKENS)}: added with embeddings that were never trained" in found.stdout
    result = json.loads((base / "eval" / "loss.json").read_text())
    assert len(result["warnings"]) == 1
    assert result["results"]["loss"]["n"] == sum(item["times"] for item in result["items"].values())


def without(name):
    return lambda folder: (folder / name).unlink()


def test_a_base_model_needs_a_recipe(tiny_model):
    found = evaluate(tiny_model, check=False)
    assert found.returncode == 2
    assert found.errors == [
        f"error: {tiny_model}: no recipe.yaml beside it: give --recipe FILE, which says on what to evaluate"
    ]


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (without("chat_template.jinja"), [], "its tokenizer has no chat template"),
        (None, ["--max_length", "9999"], "positions"),
        (None, [f"--datasets.{name}.val_split=0" for name in ("oasst_export", "vicuna")], None),
        (None, ["--max_lenght", "9"], "unknown key max_lenght: did you mean max_length?"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, damage, options, message):
    copy = shutil.copytree(run.output_dir, tmp_path / "copy")
    if damage:
        damage(copy)
    if message is None:
        others = ("dolly15k", "grade_school_math_instructions", "code_alpaca")
        options += [f"--datasets.{name}.val_split=0" for name in others]
        message = "holds out no conversation"
    found = evaluate(copy, *options, check=False)
    assert found.returncode == 2
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert "Traceback" not in found.stderr


def test_help_lists_the_keys():
    found = evaluate("--help")
    assert "--recipe FILE" in found.stdout
    assert "max_length" in found.stdout
