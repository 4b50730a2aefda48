"""What the evaluation scripts share: finding and loading a checkpoint, keeping results through interruptions."""

import importlib.metadata
import json
import os
import shutil

import pytest
import torch
from checkpoints import save_chat_model
from transformers import AutoTokenizer

from evaluation.chat_model import fingerprint, load_chat_model, load_chat_tokenizer
from evaluation.model import EvaluatedModel, find_model
from evaluation.result_files import read_result
from evaluation.results import Evaluation, metric, result_path, start_processes
from utils.errors import UserError


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory):
    return save_chat_model(tiny_model, tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="module")
def accelerator():
    return start_processes()


# ---- Finding it ----


def test_the_recipe_of_a_run_is_beside_its_models(tmp_path):
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-9", run / "checkpoint-10", tmp_path / "other"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (run / "recipe.yaml").write_text("model_name: x")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 12}\n')
    assert find_model(str(run)) == EvaluatedModel(str(run), run / "recipe.yaml", 12)
    found = find_model(f"{run}/checkpoint-10/")
    assert (found.recipe_file, found.step) == (run / "recipe.yaml", 10)
    assert find_model(str(tmp_path / "other")) == EvaluatedModel(str(tmp_path / "other"))
    assert find_model("org/name-1.4b").folder is None
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"no final model yet; give one of checkpoint-9, checkpoint-10"):
        find_model(str(run))


@pytest.mark.parametrize("name", ["/no/such/folder", "./org/name", "a/b/checkpoint-3", "no such model"])
def test_what_is_neither_a_folder_nor_a_hub_name(name):
    with pytest.raises(UserError, match="no such folder"):
        find_model(name)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"not a model, no config.json; it holds notes\.txt"):
        find_model(str(tmp_path))
    with pytest.raises(UserError, match="nor is it a hub name"):
        find_model(str(tmp_path / "notes.txt"))


def test_fingerprint_changes_with_one_weight(chat_model, tmp_path):
    copy = shutil.copytree(chat_model, tmp_path / "copy")
    checkpoint = find_model(str(copy))
    before = fingerprint(checkpoint)
    assert before == fingerprint(find_model(str(chat_model)))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(checkpoint) != before


# ---- Loading it ----


def test_a_chat_model_brings_no_sampling_default(chat_model, tmp_path):
    copy = shutil.copytree(chat_model, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.1, "eos_token_id": 7}))
    model, tokenizer = load_chat_model(find_model(str(copy)), torch.device("cpu"))
    assert not model.training
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == sorted({7, tokenizer.eos_token_id})
    assert model.generation_config.temperature is None
    assert model.generation_config.do_sample is None


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


def with_other_tokens(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|prompter|>", "<|human|>"))


def with_broken_template(folder):
    (folder / "chat_template.jinja").write_text("{% for message in %}")


def with_a_template_cut_off(folder):
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text()[:1])


def with_an_end_that_is_no_token(folder):
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": "x"}))


def with_a_length_that_is_no_number(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": []}))


def with_damaged_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def with_too_many_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{number}" for number in range(100)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_template, "no chat template"),
        (without_tokenizer, "tokenizer"),
        (with_other_tokens, r"lacks the chat tokens <\|human\|>"),
        (with_broken_template, "chat template does not work"),
        (with_a_template_cut_off, "its chat template does not write what the user says"),
        (with_an_end_that_is_no_token, "eos_token_id of its generation config is x"),
        (with_a_length_that_is_no_number, "model_max_length of its tokenizer_config.json is "),
        (with_damaged_weights, "no usable weights"),
        (with_too_many_tokens, "its embedding"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_missing_is_said(chat_model, tmp_path, damage, message):
    copy = shutil.copytree(chat_model, tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError, match=message):
        load_chat_model(find_model(str(copy)), torch.device("cpu"))


def test_a_base_model_is_no_chat_model(tiny_model):
    with pytest.raises(UserError, match="no chat template, so it is no chat model"):
        load_chat_tokenizer(find_model(str(tiny_model)))


# ---- Results ----


def test_an_interrupted_evaluation_goes_on(accelerator, chat_model, tmp_path):
    checkpoint = find_model(str(chat_model))
    first = Evaluation(accelerator, checkpoint, "test", {"seed": 1}, str(tmp_path))
    assert first.share(["a", "b", "c"]) == ["a", "b", "c"]
    first.add("a", {"value": 1})
    first.add("b", {"value": "zwei \N{SNOWMAN}\n\u2028"})
    (part,) = tmp_path.glob("*.jsonl")
    with open(part, "a") as file:
        file.write('{"key": "c", "resu')  # killed while it wrote
    # What another process of it had done.
    other_part = part.with_name(part.name.replace("partial-0", "partial-1"))
    other_part.write_text(first._line("d", {"value": 4}))

    other = Evaluation(accelerator, checkpoint, "test", {"seed": 2}, str(tmp_path))
    assert other.done == {}  # of other settings
    again = Evaluation(accelerator, checkpoint, "test", {"seed": 1}, str(tmp_path))
    assert again.done == {"a": {"value": 1}, "b": {"value": "zwei \N{SNOWMAN}\n\u2028"}, "d": {"value": 4}}
    assert again.share(["d", "c", "b", "a"]) == ["c"]
    again.add("c", {"value": 3})
    assert again.gather().keys() == {"a", "b", "c", "d"}
    again.warn("take care")
    again.write({"m": metric(1, (None, None), "higher", 4)}, items=again.gather())

    result = json.loads((tmp_path / "test.json").read_text(encoding="utf-8"))
    assert result["settings"] == {"seed": 1}
    assert result["results"] == {"m": {"value": 1.0, "low": None, "high": None, "better": "higher", "n": 4}}
    assert result["warnings"] == ["take care"]
    assert result["resumed_items"] == 3
    assert result["checkpoint"]["fingerprint"] == fingerprint(checkpoint)
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    assert result["items"]["b"]["value"] == "zwei \N{SNOWMAN}\n\u2028"
    # Its parts are gone, those of the evaluation with other settings are not.
    other.add("x", {})
    assert Evaluation(accelerator, checkpoint, "test", {"seed": 2}, str(tmp_path)).done == {"x": {}}
    assert Evaluation(accelerator, checkpoint, "test", {"seed": 1}, str(tmp_path)).done == {}


DAMAGED_LINES = [
    *(
        b"5",
        b"[]",
        b"null",
        b"{}",
        b'{"result": {}}',
        b'{"key": "a", "result": {}}',
        b"[" * 100_000,
        b"\xff\x00",
        b"\0",
    ),
    *(b'{"key": "a", "result": {"value": 2}, "check": "0123456789abcdef"}', b'{"key": "a", "key": "a"}', b'"\\ud800"'),
]


@pytest.mark.parametrize("line", DAMAGED_LINES, ids=lambda line: repr(line[:40]))
def test_damaged_lines_of_a_part_are_made_anew(accelerator, chat_model, tmp_path, capsys, line):
    def evaluation():
        return Evaluation(accelerator, find_model(str(chat_model)), "test", {}, str(tmp_path))

    first = evaluation()
    first.add("a", {"value": 1})
    first.add("b", {"value": float("nan")})
    (part,) = tmp_path.glob("*.jsonl")
    whole = part.read_bytes()
    part.write_bytes(line + b"\n" + whole)
    capsys.readouterr()
    again = evaluation()
    assert list(again.done) == ["a", "b"]
    assert again.done["a"] == {"value": 1}
    assert "made anew: 1\n" in capsys.readouterr().out
    assert part.read_bytes() == whole
    assert evaluation().done.keys() == {"a", "b"}
    assert "made anew" not in capsys.readouterr().out  # said once


def test_a_part_of_another_run_is_not_mixed_in(accelerator, chat_model, tmp_path, capsys):
    """The file of an evaluation with other settings under the name that this one's has; and one changed digit."""

    def evaluation(seed):
        return Evaluation(accelerator, find_model(str(chat_model)), "test", {"seed": seed}, str(tmp_path))

    evaluation(1).add("a", {"value": 1})
    (part,) = tmp_path.glob("*.jsonl")
    evaluation(2).add("b", {"value": 2})
    (other,) = {*tmp_path.glob("*.jsonl")} - {part}
    other.write_bytes(part.read_bytes() + other.read_bytes())
    assert evaluation(2).done == {"b": {"value": 2}}
    other.write_text(other.read_text().replace('"value": 2', '"value": 3'))
    assert evaluation(2).done == {}
    assert capsys.readouterr().out.count("made anew: 1\n") == 2


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_no_file_in_the_place_of_one(accelerator, chat_model, tmp_path, make):
    checkpoint = find_model(str(chat_model))
    Evaluation(accelerator, checkpoint, "test", {}, str(tmp_path))
    (part,) = tmp_path.glob("*.jsonl")
    part.unlink()
    make(part)
    with pytest.raises(UserError, match=r"partial-0.jsonl: cannot read this part of an evaluation \(remove it\): Is a"):
        Evaluation(accelerator, checkpoint, "test", {}, str(tmp_path))
    (tmp_path / "out" / "test.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"test.json: cannot write there \(Is a directory\)"):
        Evaluation(accelerator, checkpoint, "test", {}, str(tmp_path / "out"))


def test_what_is_no_number_is_null_in_a_result(accelerator, chat_model, tmp_path):
    evaluation = Evaluation(accelerator, find_model(str(chat_model)), "test", {}, str(tmp_path))
    nan = float("nan")
    evaluation.write({"m": metric(nan, (nan, 1.0), "lower", 1)}, items={"a": {"loss": nan, "answer": (nan, True)}})
    written = json.loads((tmp_path / "test.json").read_text(), parse_constant=pytest.fail)
    assert written["items"] == {"a": {"loss": None, "answer": [None, True]}}
    found = read_result(tmp_path / "test.json")
    assert (found.format, found.results["m"].value, found.results["m"].interval) == (1, None, None)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ('{"step": 12}\n{"step": 1', None),  # being written
        ("[" * 100_000 + "\n", "line 2: JSON does not parse"),
        ('{"step": "12"}\n', "line 2: not metrics: step should be a valid integer"),
        ('{"step": true}\n', "line 2: not metrics: step should be a valid integer"),
        ('{"step": -1}\n', "line 2: not metrics: step should be greater"),
        ("\0\0\n", "line 2, column 1: JSON does not parse"),
        ("null\n", "line 2: not metrics: should be a valid dictionary"),
    ],
)
def test_the_step_of_a_damaged_metrics_file(tmp_path, capsys, last, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n' + last)
    assert find_model(str(tmp_path)).step == (None if message else 12)
    said = capsys.readouterr().err
    assert (message in said and said.count("\n") == 1) if message else not said


def test_other_weights_are_another_evaluation(accelerator, chat_model, tmp_path):
    copy = shutil.copytree(chat_model, tmp_path / "copy")
    checkpoint = find_model(str(copy))
    Evaluation(accelerator, checkpoint, "test", {}).add("a", {})
    assert Evaluation(accelerator, checkpoint, "test", {}).done == {"a": {}}
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Evaluation(accelerator, checkpoint, "test", {}).done == {}


def test_where_a_result_goes(chat_model, tmp_path, accelerator):
    checkpoint = find_model(str(chat_model))
    assert result_path(checkpoint, "loss", None) == chat_model / "eval" / "loss.json"
    assert result_path(checkpoint, "loss", "there").as_posix() == "there/loss.json"
    assert result_path(checkpoint, "loss", "a/b.json").as_posix() == "a/b.json"
    with pytest.raises(UserError, match="give --output"):
        result_path(EvaluatedModel("org/name"), "loss", None)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write there .*; give --output"):
        Evaluation(accelerator, checkpoint, "test", {}, str(tmp_path / "file"))
