"""eval_harness.py: what lm_eval itself finds on the same folder, with and without the chat template."""

import json
import signal
import sys
from pathlib import Path

import eval_harness
import pytest
from checkpoints import save_chat_model
from conftest import ROOT, run_script
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from utils.errors import UserError

SCRIPT = "scripts/eval_harness.py"
TASKS = "scripts/tasks/demo_world"


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    return save_chat_model(tiny_model, tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "harness.json"
    options = ("--tasks", TASKS, "--chat_template", "both", "--limit", 6, "--output", output)
    run = run_script(model, *options, script=SCRIPT, output_dir=None)
    run.result = json.loads(output.read_text())
    return run


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """The script in this process, its imports paid once: evaluate(model, "--tasks", ...) gives the result file."""

    def evaluate(*arguments) -> dict:
        output = tmp_path / "harness.json"
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["eval_harness.py", *map(str, arguments), "--output", str(output)])
        eval_harness.main(*eval_harness.arguments())
        return json.loads(output.read_text())

    return evaluate


def lm_evals_own(model: Path, chat: bool, **asked) -> dict:
    """lm_eval called as its documentation says, which loads the folder by itself."""
    tasks = TaskManager(include_path=TASKS, include_defaults=False)
    arguments = {"pretrained": str(model), "dtype": "float32"}
    asked |= {"task_manager": tasks, "tasks": tasks.all_subtasks, "apply_chat_template": chat}
    return simple_evaluate("hf", arguments, device="cpu", batch_size=4, **asked)


def check_against(result: dict, own: dict, mode: str) -> None:
    found = result["lm_eval"][mode]
    assert found.keys() == own.keys() - {"samples"}
    for task, values in own["results"].items():
        assert found["results"][task] == pytest.approx(values, abs=1e-9)
        for sample in own["samples"][task]:
            item = result["items"][f"{task} ({mode}) {sample['doc_id']} {sample['doc_hash'][:8]}"]
            for response, expected in zip(item["responses"], sample["resps"], strict=True):
                assert response[0] == (expected[0] if isinstance(expected[0], str) else pytest.approx(expected[0]))
            for name in sample["metrics"]:
                field = name if sample["filter"] == "none" else f"{name},{sample['filter']}"
                assert item[field] == sample[name]
    for key in ("n-shot", "n-samples", "versions", "higher_is_better"):
        assert found[key] == own[key]


# ---- The same as lm_eval ----


@pytest.mark.parametrize("mode", ["chat", "plain"])
def test_equals_lm_eval(run, model, mode, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_against(run.result, lm_evals_own(model, mode == "chat", limit=6), mode)


def test_equals_lm_eval_with_examples_on_two_processes(model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ("--tasks", TASKS, "--num_fewshot", 2, "--limit", 3, "--seed", 5, "--output", tmp_path)
    run_script(model, *options, script=SCRIPT, output_dir=None, launch="ddp2")
    result = json.loads((tmp_path / "harness.json").read_text())
    assert result["processes"] == 2
    seeds = {f"{name}random_seed": 5 for name in ("", "numpy_", "torch_", "fewshot_")}
    check_against(result, lm_evals_own(model, True, limit=3, num_fewshot=2, **seeds), "chat")
    text = result["first_prompts"]["chat"]["demo_reply"]["text"]
    assert text.count("<|prompter|>") == text.count("<|assistant|>") == 3  # examples are earlier turns


def test_results(run):
    result = run.result
    assert result["settings"]["tasks"] == {"demo_choice": 1.0, "demo_reply": 1.0}
    assert set(result["lm_eval"]) == {"chat", "plain"}
    own = result["lm_eval"]["chat"]["results"]["demo_choice"]
    found = result["results"]["demo_choice/acc (chat)"]
    assert found["value"] == own["acc,none"]
    # Wilson's interval, from its formula: within 0 and 1, and not of no width at 0 of 6 or 6 of 6.
    share, z, n = found["value"], 1.959964, 6
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    assert found["low"] == pytest.approx(max(0, (middle - half) / (1 + z * z / n)))
    assert found["high"] == pytest.approx(min(1, (middle + half) / (1 + z * z / n)))
    for metric in result["results"].values():
        assert 0 <= metric["low"] < metric["high"] <= 1
    assert (found["better"], found["n"]) == ("higher", 6)
    for name, metric in result["results"].items():  # what compare.py pairs adds up to it
        items = [item for item in result["items"].values() if metric["where"].items() <= item.items()]
        assert len(items) == 6, name
        assert sum(item[metric["ratio"][0]] for item in items) / 6 == pytest.approx(metric["value"])


# ---- Prompts ----


def test_first_prompts(run, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    questions = [json.loads(line) for line in (ROOT / TASKS / "questions.jsonl").read_text().splitlines()]
    question, choice = questions[0]["question"], questions[0]["choices"][0]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    chat = chat["input_ids"] if hasattr(chat, "keys") else chat
    for mode, tasks in run.result["first_prompts"].items():
        for task, prompt in tasks.items():
            assert tokenizer.decode(prompt["ids"]) == prompt["text"], (mode, task)
    prompts = run.result["first_prompts"]
    assert prompts["chat"]["demo_reply"]["ids"] == chat  # no special token twice
    assert prompts["chat"]["demo_choice"]["ids"][: -prompts["chat"]["demo_choice"]["scored"]] == chat
    scored = prompts["chat"]["demo_choice"]["ids"][-prompts["chat"]["demo_choice"]["scored"] :]
    assert tokenizer.decode(scored) == choice
    assert prompts["plain"]["demo_reply"]["text"] == question
    assert not set(prompts["plain"]["demo_choice"]["ids"]) & set(tokenizer.all_special_ids)


def test_a_tokenizer_that_puts_a_token_in_front(evaluate, model, tmp_path):
    """Its chat template writes all special tokens of a chat prompt; plain text gets what the tokenizer adds."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model)
    first = tokenizer.convert_tokens_to_ids("<|system|>")
    processor = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", first)])
    tokenizer.backend_tokenizer.post_processor = processor
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (copy / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(copy)
    assert AutoTokenizer.from_pretrained(copy).encode("a")[0] == first
    prompts = evaluate(copy, "--tasks", TASKS, "--limit", 1, "--chat_template", "both")["first_prompts"]
    for task in ("demo_choice", "demo_reply"):
        assert first not in prompts["chat"][task]["ids"]
        assert prompts["plain"][task]["ids"][0] == first


def test_a_base_model_without_a_chat_template(evaluate, tiny_model):
    result = evaluate(tiny_model, "--tasks", TASKS, "--limit", 1, "--chat_template", "off")
    assert set(result["lm_eval"]) == {"plain"}
    with pytest.raises(UserError, match="no chat template"):
        evaluate(tiny_model, "--tasks", TASKS, "--limit", 1)


# ---- The table ----


def write_task(folder: Path, name: str, rows: list[dict], **changes) -> Path:
    """A multiple choice of one's own; `changes` are more lines of its YAML."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        **{
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        },
        **{"test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}"},
        **{"doc_to_choice": "choices", "doc_to_target": "label", **changes},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


ROWS = [{"question": text, "choices": ["yes", "no"], "label": 0} for text in ("Is it?", "very " * 300 + "old?")]


def test_published_scores_and_cut_requests(evaluate, model, tmp_path, capsys):
    """A task that has the name of one of Stability AI's stands beside their scores, unless it is asked otherwise."""
    task = write_task(tmp_path, "arc_easy", ROWS)
    result = evaluate(model, "--tasks", task, "--chat_template", "both")
    shown = capsys.readouterr().out
    [line] = [line for line in shown.splitlines() if " acc " in line]
    assert "0.5055" in line  # stablelm-base-alpha-7b
    assert "0.4474" in line  # stablelm-base-alpha-3b
    assert "0-shot" in shown
    for mode in ("chat", "plain"):
        assert any(f"({mode}): 2 of 4 requests are longer than the model's 256" in line for line in result["warnings"])
    evaluate(model, "--tasks", task, "--num_fewshot", 1)
    assert "0.5055" not in capsys.readouterr().out


def test_the_table(run):
    [acc] = [line for line in run.stdout.splitlines() if " acc " in line]
    for mode in ("chat", "plain"):
        assert f"{run.result['results'][f'demo_choice/acc ({mode})']['value']:.4f} (" in acc
    assert "stablelm-base" not in run.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"note": "", "num_fewshot": 0, "models": {"m": {"t": {"acc": "1"}}}}',
            "models.m.t.acc should be a valid number",
        ),
        ('{"note": "", "num_fewshot": 0}', "models is missing"),
        ("[" * 100_000, "JSON does not parse"),
    ],
)
def test_damaged_published_scores(tmp_path, monkeypatch, content, message):
    """Said before a model is loaded, not when all is computed."""
    (tmp_path / "scores.json").write_text(content)
    monkeypatch.setattr(eval_harness, "PUBLISHED", tmp_path / "scores.json")
    with pytest.raises(UserError, match=r"scores\.json: ") as caught:
        eval_harness.main(None, None)
    assert message in str(caught.value)


def test_published_scores_are_the_source_s():
    folder = ROOT.parent / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("only where the source is at hand")
    published = json.loads(eval_harness.PUBLISHED.read_text())
    for size in ("3b", "7b"):
        source = json.loads((folder / f"stablelm-base-alpha-{size}_harness.json").read_text())["results"]
        figures = [
            value for task in published["models"][f"stablelm-base-alpha-{size}"].values() for value in task.values()
        ]
        expected = [value for task in source.values() for name, value in task.items() if not name.endswith("_stderr")]
        assert sorted(figures) == sorted(expected)


# ---- Going on ----


KILLED_AFTER_8 = """
import os, runpy, signal, sys
from evaluation.results import Evaluation
add, kept = Evaluation.add, []

def add_and_die(self, *item):
    add(self, *item)
    kept.append(item)
    if len(kept) == 8:
        os.kill(os.getpid(), signal.SIGKILL)

Evaluation.add = add_and_die
sys.argv[0] = "scripts/eval_harness.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_going_on_after_a_kill(run, model, tmp_path):
    options = ["--tasks", TASKS, "--chat_template", "both", "--limit", "6", "--batch_size", "1"]
    script = tmp_path / "killed.py"
    script.write_text(KILLED_AFTER_8)
    killed = run_script(model, *options, "--output", tmp_path, script=str(script), output_dir=None, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "harness.json").exists()
    script.unlink()
    again = run_script(model, *options, "--output", tmp_path, script=SCRIPT, output_dir=None)
    result = json.loads((tmp_path / "harness.json").read_text())
    assert result["resumed_items"] == 8
    assert "going on" in again.stdout
    for name, found in run.result["results"].items():
        assert result["results"][name]["value"] == found["value"]
    assert result["settings"] == run.result["settings"]
    assert [path.name for path in tmp_path.iterdir()] == ["harness.json"]


# ---- Bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": None}, "cannot be loaded"),
        ({"doc_to_text": "{{nothing}"}, "cannot be loaded: TemplateSyntaxError"),
        ({"output_type": "multiple_choices"}, "invalid output_type"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "nowhere.jsonl"),
        ({"unsafe_code": True}, "not run here"),
        ({"no_such_key": 1}, "no_such_key"),
    ],
)
def test_a_damaged_task(tmp_path, changes, message):
    task = write_task(tmp_path, "own", ROWS[:1], **changes)
    with pytest.raises(UserError, match=message) as error:
        eval_harness.load_tasks([str(task)])
    assert "--tasks" in str(error.value)


def test_no_such_task(tmp_path):
    with pytest.raises(UserError, match=r"hellasswag: lm_eval knows no such task; nearest: (\w+, )*hellaswag\b"):
        eval_harness.load_tasks(["hellasswag"])
    with pytest.raises(UserError, match="no such file or folder"):
        eval_harness.load_tasks(["no/such.yaml"])
    with pytest.raises(UserError, match="no task in the"):
        eval_harness.load_tasks([str(tmp_path)])


def test_more_tokens_than_positions(evaluate, model, tmp_path):
    kwargs = {"until": ["\n"], "max_gen_toks": 256}
    task = write_task(tmp_path, "own", ROWS[:1], output_type="generate_until", generation_kwargs=kwargs)
    with pytest.raises(UserError, match=r"own: generates up to 256 tokens, but the model has 256 positions"):
        evaluate(model, "--tasks", task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no/such.yaml"], "no such file or folder"),
        ([], "--tasks"),
        (["--tasks", TASKS, "--chat_template", "maybe"], "invalid choice: 'maybe'"),
        (["--tasks", TASKS, "--num_fewshot", "-1"], "--num_fewshot"),
    ],
)
def test_bad_input_is_one_line(model, arguments, message):
    run = run_script(model, *arguments, script=SCRIPT, output_dir=None, check=False)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert message in run.errors[0]
    assert "Traceback" not in run.stderr
