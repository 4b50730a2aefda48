"""eval_gsm8k.py from end to end on problems of our own: the score, contamination, two processes, bad input."""

import gzip
import json

import pytest
from checkpoints import save_chat_model
from conftest import run_script
from metrics.final_number.final_number import final_number

NAMES = ("Ada", "Ben", "Cid", "Dot", "Eve", "Fay")
PROBLEMS = [
    {
        "question": f"{name} picks {n + 3} pears every morning for {n + 2} days and eats two. How many are left?",
        "answer": f"{name} picks {n + 3} x {n + 2} = {(n + 3) * (n + 2)}.\n#### {(n + 3) * (n + 2) - 2}",
    }
    for n, name in enumerate(NAMES)
]
EXAMPLES = [{"question": "What is 2 and 2?", "answer": "2 + 2 = 4\n#### 4"}, {"question": "x?", "answer": "#### 1"}]


def solve(*arguments, check=True, launch="python"):
    return run_script(*arguments, script="scripts/eval_gsm8k.py", output_dir=None, check=check, launch=launch)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in PROBLEMS)
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """A checkpoint of a run whose mix holds two of the problems, the second with a word changed."""
    run = tmp_path_factory.mktemp("run")
    save_chat_model(tiny_model, run / "checkpoint-7")
    other = PROBLEMS[3]["question"].replace("left", "left over")
    chats = [
        {"prompt": question, "response": "I do not know."} for question in (PROBLEMS[1]["question"], other, "why?")
    ]
    data = write_lines(run / "chats.jsonl", chats)
    (run / "recipe.yaml").write_text(
        f"model_name: {tiny_model}\noutput_dir: {run}\ncache_dir: {run / 'cache'}\nmax_length: 64\n"
        f"datasets:\n  - messages:\n      input_file_path: {data}\n      val_split: 0\n"
    )
    return run / "checkpoint-7"


@pytest.fixture(scope="module")
def result(checkpoint, problems):
    shown = solve(checkpoint, "--data", problems, "--max_new_tokens", 16).stdout
    content = json.loads((checkpoint / "eval" / "gsm8k.json").read_text())
    assert "warning: the training mix holds 2 of these 6 problems" in shown
    return content


def test_every_reply_is_scored(result):
    items = list(result["items"].values())
    assert [item["question"] for item in items] == [problem["question"] for problem in PROBLEMS]
    for item in items:
        assert item["correct"] == (final_number(item["reply"]) == final_number(item["answer"]))
        assert item["no_number"] == (final_number(item["reply"]) is None)
        assert item["ended"] or item["tokens"] == 16
    for name, field in (("exact_match", "correct"), ("no_number", "no_number"), ("ended", "ended")):
        entry = result["results"][name]
        assert entry["value"] == pytest.approx(sum(item[field] for item in items) / 6)
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert result["settings"]["problems"] == 6
    assert result["checkpoint"]["step"] == 7


def test_contamination_is_in_the_result(result):
    assert result["contamination"]["contaminated"] is True
    assert result["contamination"]["problems"] == [1, 3]
    assert result["warnings"] == [result["contamination"]["verdict"]]
    assert [item["in_training"] for item in result["items"].values()] == [n in (1, 3) for n in range(6)]
    assert result["results"]["exact_match/not in training"]["n"] == 4


def test_contamination_by_name_when_the_data_are_not_here(checkpoint, problems, tmp_path):
    recipe = checkpoint.parent / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(before.split("datasets:")[0] + "datasets:\n  - grade_school_math_instructions\n")
    try:
        shown = solve(checkpoint, "--data", problems, "--max_new_tokens", 4, "--limit", 2, "--output", tmp_path).stdout
    finally:
        recipe.write_text(before)
    assert "warning: the checkpoint was trained on grade_school_math_instructions" in shown
    content = json.loads((tmp_path / "gsm8k.json").read_text())
    assert content["contamination"]["contaminated"] is True
    assert content["contamination"]["problems"] is None
    assert len(content["items"]) == 2


def test_two_processes_say_the_same(result, checkpoint, problems, tmp_path):
    arguments = ("--data", problems, "--max_new_tokens", 16, "--batch_size", 2, "--output", tmp_path)
    solve(checkpoint, *arguments, launch="ddp2")
    two = json.loads((tmp_path / "gsm8k.json").read_text())
    assert two["processes"] == 2
    for part in ("items", "results", "settings", "contamination"):
        assert two[part] == result[part]
    assert [path.name for path in tmp_path.iterdir()] == ["gsm8k.json"]


def test_few_shot(result, checkpoint, problems, tmp_path):
    examples = write_lines(tmp_path / "examples.jsonl", EXAMPLES)
    arguments = ("--data", problems, "--max_new_tokens", 16, "--few_shot", 1, "--examples", examples)
    solve(checkpoint, *arguments, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "gsm8k.json").read_text())
    assert found["settings"]["few_shot"] == 1
    replies = [[item["reply"] for item in content["items"].values()] for content in (found, result)]
    assert replies[0] != replies[1]


def lacks_a_field(folder):
    return ["--data", write_lines(folder / "x.jsonl", [{"question": "x"}])]


def has_no_number(folder):
    return ["--data", write_lines(folder / "x.jsonl", [{"question": "x", "answer": "nobody knows"}])]


def is_cut_off(folder):
    (folder / "x.jsonl").write_text('{"question": "x", "ans')
    return ["--data", folder / "x.jsonl"]


def shows_a_problem(folder):
    return ["--few_shot", 1, "--examples", write_lines(folder / "x.jsonl", PROBLEMS[:1])]


def is_too_long(folder):
    (folder / "x.jsonl").write_text(json.dumps({"question": "so many " * 300, "answer": "#### 1"}))
    return ["--data", folder / "x.jsonl"]


def test_replies_fit_into_the_models_positions(checkpoint, problems, tmp_path):
    solve(checkpoint, "--data", problems, "--max_new_tokens", 10_000, "--limit", 2, "--output", tmp_path)
    result = json.loads((tmp_path / "gsm8k.json").read_text())
    most = result["settings"]["max_new_tokens"]
    assert 0 < most < 256
    assert f"replies of up to {most} tokens: more have no room in the model's positions" in result["warnings"]
    assert all(item["tokens"] <= most for item in result["items"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lacks_a_field, "x.jsonl, record 1: no field 'answer'"),
        (has_no_number, "the answer of problem 1 has no final number"),
        (is_cut_off, "x.jsonl, line 1: cut off or not valid JSON"),
        (shows_a_problem, "holds a problem that is asked"),
        (lambda folder: ["--data", folder / "none.jsonl"], "none.jsonl not found"),
        (lambda folder: ["--few_shot", 1], "--few_shot N and --examples FILE go together"),
        (lambda folder: ["--limit", 0], "--limit"),
        (is_too_long, "leaves no room for a reply in the model's 256 positions"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_is_one_line(checkpoint, problems, tmp_path, options, message):
    found = solve(checkpoint, "--data", problems, *options(tmp_path), check=False)
    assert found.returncode == 2
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert "Traceback" not in found.stderr


def test_a_base_model_is_refused(tiny_model, problems):
    found = solve(tiny_model, "--data", problems, check=False)
    assert found.errors == [f"error: {tiny_model}: its tokenizer has no chat template, so it is no chat model"]
    assert not (tiny_model / "eval").exists()
