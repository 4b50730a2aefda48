"""scripts/prepare_data.py through the command line: the table, the export, the pictures, the contamination report."""

import gzip
import json
import re
from pathlib import Path

import pytest
from conftest import run_script


def read_rows(file: Path) -> list[dict]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else open(file) as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def prepare(tmp_path):
    def run(*arguments, **how):
        how = {"output_dir": tmp_path, "script": "scripts/prepare_data.py", **how}
        return run_script("recipes/demo.yaml", "--cache_dir", tmp_path / "cache", *arguments, **how)

    return run


def test_table_export_and_plot(prepare, tmp_path):
    run = prepare("--export", tmp_path / "mix.jsonl.gz", "--plot", tmp_path / "lengths.png", "--max_length", 40)
    rows = read_rows(tmp_path / "mix.jsonl.gz")
    for row in rows:
        assert row.keys() == {"dataset", "split", "messages", "input_ids", "labels"}
        assert len(row["input_ids"]) == len(row["labels"]) <= 40
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
        assert {message["role"] for message in row["messages"]} <= {"user", "assistant", "system"}
    train = [row for row in rows if row["split"] == "train"]
    # What the table says is what the export holds.
    for name in {row["dataset"] for row in rows}:
        counts = [
            str(sum(row["dataset"] == name and row["split"] == split for row in rows))
            for split in ("train", "validation")
        ]
        line = next(line for line in run.stdout.splitlines() if line.startswith(f"│ {name} "))
        assert [cell.strip() for cell in line.split("│")][4:6] == counts
    assert (
        f"an epoch: {len(train):,} conversations, {sum(len(row['input_ids']) for row in train):,} tokens" in run.stdout
    )
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("keys", "headline"),
    [
        ([], r"8 conversations, end to end, 1 row of (?P<tokens>[\d,]+) tokens, no padding"),
        (
            ["--padding_free", "false"],
            r"8 conversations, 8 rows of (?P<width>\d+) tokens, (?P<padding>\d+) of them padding",
        ),
        (
            ["--packing", "true"],
            r"(?P<count>\d+) conversations in 8 packs, end to end, 1 row of (?P<tokens>[\d,]+) tokens, no padding",
        ),
    ],
    ids=["padding-free", "padded", "packed"],
)
def test_show_marks_what_is_scored_and_where_all_of_a_batch_lies(prepare, keys, headline):
    run = prepare("--show", 1, "--dataset", "dolly15k", "--show_batch", *keys)
    example = run.stdout.split("dolly15k, row")[1]
    assert "<|prompter|>|" in example
    assert example.count("[[") >= 1
    assert "<|endoftext|>]]" in example
    first, _, batch = run.stdout.partition("the first batch: ")[2].partition("\n")
    numbers = {name: int(text.replace(",", "")) for name, text in re.match(headline, first).groupdict().items()}
    lengths = [int(last) + 1 for last in re.findall(r"at positions 0 to (\d+), \d+ scored", batch)]
    assert len(lengths) == numbers.get("count", 8)
    assert max(map(len, run.stdout.splitlines())) < 1000  # a rule across a pipe, which has no edge, was of 10^6 signs
    if "width" in numbers:
        assert max(lengths) == numbers["width"]
        assert 8 * numbers["width"] - sum(lengths) == numbers["padding"]
    else:
        assert sum(lengths) == numbers["tokens"]
    if "count" in numbers:
        assert numbers["count"] > 8
        assert re.search(r"packing: 2,\d+ conversations in \d+ packs, .* steps an epoch in place of 134", run.stdout)
        assert "16 packs of up to 256 tokens a step" in run.stdout


def test_the_first_batch_by_tokens(prepare):
    run = prepare("--show_batch", "--micro_batch_tokens", 300)
    assert "16 conversations a step (1 process x up to 300 tokens x up to 16 accumulated)" in " ".join(
        run.stdout.split()
    )
    tokens = int(re.search(r"the first batch: \d+ conversations, end to end, 1 row of (\d+) tokens", run.stdout)[1])
    assert 200 < tokens <= 300


def test_contamination_is_reported_and_dropped(prepare, tmp_path):
    """Two questions of the demo's own training data as a benchmark's test set."""
    held_out = prepare("--export", tmp_path / "before.jsonl")
    (unchecked,) = (line for line in held_out.stdout.splitlines() if "gsm8k_test" in line)
    words = (
        "test questions in training: not looked for, since gsm8k_test is not on this machine and could not be fetched"
    )
    assert unchecked.startswith(words)
    assert unchecked.endswith("/gsm8k_test.jsonl")  # all of it, in one line
    rows = read_rows(tmp_path / "before.jsonl")
    questions = [
        row["messages"][0]["content"]
        for row in rows
        if row["split"] == "train" and row["dataset"] == "grade_school_math_instructions"
    ][:2]
    with open(tmp_path / "cache" / "gsm8k_test.jsonl", "w") as file:
        file.writelines(json.dumps({"question": question, "answer": "#### 1"}) + "\n" for question in questions)
    run = prepare("--export", tmp_path / "after.jsonl", "--drop_contaminated", "true")
    # The two themselves, and what shares 13 words with them: the demo's problems follow a few patterns.
    found = int(re.search(r"(\d+) training conversations with questions of gsm8k_test .*\(2 exact;", run.stdout)[1])
    assert 2 <= found < 10
    assert f"{found} training conversations with questions of gsm8k_test left out" in run.stdout
    left = read_rows(tmp_path / "after.jsonl")
    assert len(left) == len(rows) - found
    assert not any(row["split"] == "train" and row["messages"][0]["content"] in questions for row in left)


def test_dropping_what_cannot_be_checked_is_refused(prepare):
    run = prepare("--drop_contaminated", "true", check=False)
    assert run.returncode == 2
    assert "drop_contaminated: gsm8k_test is not on this machine" in run.errors[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dataset", "vicunna"], "--dataset vicunna"),
        (["--show", "many"], "--show: many is no whole number"),
        (["--dry_run"], "unknown key dry_run"),
        (["--learning_rte", "1"], "did you mean learning_rate"),
    ],
)
def test_bad_arguments_get_one_line(prepare, arguments, named):
    run = prepare(*arguments, check=False)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert named in run.errors[0]
