"""compare.py: the table of what is there, the best, the differences, the curves; other files are passed over."""

import json
import os
import re
import runpy
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_script


def compare(*arguments, check=True):
    return run_script(*arguments, script="scripts/compare.py", output_dir=None, check=check)


def write_result(folder, step, loss, name="loss", settings=None, **more):
    """A result of 60 conversations with a loss around `loss`, the noise shared by all results."""
    noise = np.random.default_rng(0).normal(size=60)
    items = {f"c{n}": {"dataset": "d", "loss": 10 * (loss + noise[n]), "targets": 10} for n in range(60)}
    value = loss + noise.mean()
    results = {
        "loss": {"value": value, "low": value - 0.25, "high": value + 0.25, "better": "lower", "n": 60}
        | {"ratio": ["loss", "targets"], "where": {}},
        "accuracy": {"value": 1 - loss / 10, "low": 0.1, "high": 0.9, "better": "higher", "n": 60},
        "tokens": {"value": 12345, "better": None},
    }
    content = {
        "name": name,
        "checkpoint": {"name": folder.name, "step": step, "fingerprint": "x"},
        "settings": settings or {"max_length": 64},
        "results": results,
        "warnings": [],
        "items": items,
    } | more
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "eval" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with results of three checkpoints, and files that are no results of ours."""
    run = tmp_path_factory.mktemp("run")
    for step, loss in ((100, 3.0), (20, 4.0), (300, 3.5)):
        write_result(run / f"checkpoint-{step}", step, loss)
    (run / "config.json").write_text('{"model_type": "gpt_neox"}')
    (run / "checkpoint-20" / "eval" / "sampling_report.json").write_text('{"model_name": "x", "prompts": []}')
    return run


def test_table_of_a_run(run, tmp_path):
    plot = tmp_path / "curves.png"
    shown = compare(run, "--plot", plot).stdout
    lines = shown.splitlines()
    header = next(line for line in lines if "metric" in line)
    assert header.index("checkpoint-20 ") < header.index("checkpoint-100") < header.index("checkpoint-300")
    loss = next(line for line in lines if "│ loss " in line).split("│")
    assert [cell.strip().endswith("*") for cell in loss[3:6]] == [False, True, False]
    accuracy = next(line for line in lines if "accuracy" in line).split("│")
    assert [cell.strip().endswith("*") for cell in accuracy[3:6]] == [False, True, False]
    # Paired: the noise is shared, so that the difference has none. Not paired: only intervals are known.
    assert "-1.0000" in shown
    assert "~-1.0000" not in shown
    assert "~+0.1000" in shown
    assert "~ not paired" in shown
    assert "12,345" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """200 checkpoints, the best of them by loss 700, 710 and 690; by another evaluation 1500."""
    run = tmp_path_factory.mktemp("long_run")
    for step in range(10, 2010, 10):
        write_result(run / f"checkpoint-{step}", step, 2 + abs(step - 701) / 1000)
    for step in (1490, 1500, 1510):
        write_result(run / f"checkpoint-{step}", step, 1 + abs(step - 1500) / 1000, name="other")
    return run


def steps_shown(text: str) -> list[int]:
    header = next(line for line in text.splitlines() if "metric" in line)
    return [int(step.replace(",", "")) for step in re.findall(r"\(step ([\d,]+)\)", header)]


def test_of_many_checkpoints_the_newest_and_the_best_are_shown(long_run, run, tmp_path):
    found = compare(long_run, "--plot", tmp_path / "curves.png")
    assert steps_shown(found.stdout) == [10, 690, 700, 710, 1500, 1980, 1990, 2000]
    table, _, notes = found.stdout.partition("* best")
    assert max(map(len, table.splitlines())) < 400  # 6,415 with all of them
    assert "8 of 200 checkpoints are shown" in notes
    loss = next(line for line in table.splitlines() if "│ loss  " in line and "other" not in line).split("│")[3:-1]
    assert [cell.strip().endswith("*") for cell in loss] == [step == 700 for step in steps_shown(found.stdout)]
    # What is named is shown, and so is a run of few beside it; the best of a row is the best of all.
    both = compare(long_run, run, long_run / "checkpoint-1000", "--markdown").stdout
    assert len(steps_shown(both)) == 8 + 3 + 1
    assert steps_shown(compare(long_run, "--all", "--markdown").stdout) == list(range(10, 2010, 10))


def test_a_best_that_is_not_shown_is_not_given_to_another(long_run):
    """By accuracy alone: its rows in the table of the checkpoints that are best by loss."""
    file = long_run / "checkpoint-1000" / "eval" / "loss.json"
    kept = file.read_text()
    content = json.loads(kept)
    content["results"]["accuracy"]["value"] = 0.999
    try:
        file.write_text(json.dumps(content))
        shown = compare(long_run).stdout
    finally:
        file.write_text(kept)
    accuracy = next(line for line in shown.splitlines() if "accuracy" in line)
    assert 1000 not in steps_shown(shown)
    assert "*" not in accuracy


def test_a_metric_has_one_row_and_all_shows_its_parts(tmp_path, monkeypatch):
    """Of a loss on two data sets and two turns; a score that leaves out contaminated problems is no part."""

    def figures(loss: float) -> dict:
        part = {"low": loss - 0.1, "high": loss + 0.1, "better": "lower"}
        losses = {
            f"loss{name}": {"value": loss} | part for name in ("", "/vicuna", "/dolly15k", "/turn 1", "/turn 2 on")
        }
        scores = {"exact_match": {"value": 0.5, "better": "higher"}}
        scores["exact_match/not in training"] = {"value": 0.25, "better": "higher", "where": {"in_training": False}}
        other = {"arc_easy/acc (raw)": {"value": 0.3, "better": "higher"}}
        return losses | {"perplexity": {"value": np.exp(loss), "better": "lower", "exp": True}} | scores | other

    for step in (10, 20):
        write_result(tmp_path / "run" / f"checkpoint-{step}", step, 3.0, results=figures(3 - step / 10))

    def rows(text: str) -> list[str]:
        return [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| loss | ")]

    whole = ["loss", "perplexity", "exact_match", "exact_match/not in training", "arc_easy/acc (raw)"]
    short = compare(tmp_path / "run", "--markdown").stdout
    assert rows(short) == whole
    assert "note: --all adds 4 rows of single data sets, languages and turns" in short
    every = compare(tmp_path / "run", "--markdown", "--all").stdout
    assert rows(every) == ["loss", "loss/vicuna", "loss/dolly15k", "loss/turn 1", "loss/turn 2 on", *whole[1:]]
    assert "--all adds" not in every

    # What is drawn: the panels with the lines of each.
    drawn = []

    def look(figure, *_, **__):
        drawn.append({axis.get_title(): [line.get_label() for line in axis.lines] for axis in figure.axes})

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", look)
    from evaluation.result_files import read_columns

    columns, _ = read_columns([tmp_path / "run"])
    for parts in (False, True):
        runpy.run_path(str(ROOT / "scripts" / "compare.py"))["plot"](columns, tmp_path / "curves.png", parts)
    scores = {"loss: exact_match": ["all", "not in training"], "loss: arc_easy": ["acc (raw)"]}
    assert drawn[0] == {"loss": ["all"], **scores}
    assert drawn[1] == {"loss": ["all", "vicuna", "dolly15k", "turn 1", "turn 2 on"], **scores}


def test_markdown(run):
    shown = compare(run / "checkpoint-20", run / "checkpoint-300", "--markdown").stdout.splitlines()
    assert shown[0].startswith("| evaluation | metric |")
    assert shown[1] == "| --- | --- | ---: | ---: |"
    assert all(line.count(" | ") == 3 for line in shown[:5])
    assert "**" in shown[2]
    assert "<br>-0.5000" in shown[2]


def test_other_settings_and_warnings_are_said(run, tmp_path):
    write_result(
        tmp_path / "other", None, 2.0, settings={"max_length": 32, "seed": 1}, warnings=["it was trained on it"]
    )
    shown = compare(run / "checkpoint-20", tmp_path / "other").stdout
    assert "differ in max_length, seed" in shown
    assert "trained on it" in shown


def test_a_result_file_and_an_output_folder(run, tmp_path):
    file = run / "checkpoint-20" / "eval" / "loss.json"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.json").write_text(file.read_text())
    shown = compare(file, tmp_path / "out", "--markdown").stdout
    assert "eval/loss.json (step 20) |" in shown
    assert "/out (step 20) |" in shown
    assert "**" not in shown.split("bold")[0].rpartition("**")[0]  # equal: none is the best


def test_a_damaged_file_hides_no_other(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    write_result(copy / "checkpoint-400", 400, 3.2)
    damaged = [copy / f"checkpoint-{step}" / "eval" / "loss.json" for step in (20, 400)]
    damaged[0].write_text(damaged[0].read_text()[:-9])
    half_a_pair = json.loads((copy / "checkpoint-300/eval/loss.json").read_text()) | {"warnings": ["\ud800"]}
    (copy / "checkpoint-300" / "eval" / "surrogate.json").write_text(json.dumps(half_a_pair))
    damaged[1].write_text(json.dumps(json.loads(damaged[1].read_text()) | {"format": 99}))
    (copy / "checkpoint-100" / "eval" / "of_before.json").write_text(
        (copy / "checkpoint-300/eval/loss.json").read_text()
    )
    os.mkfifo(copy / "checkpoint-300" / "eval" / "pipe.json")
    found = compare(copy, "--plot", tmp_path / "curves.png")
    assert steps_shown(found.stdout) == [100, 300]
    said = [line for line in found.stderr.splitlines() if line.startswith("passed over: ")]
    assert len(said) == 5
    for place, problem in (
        (f"{damaged[0]} line", "JSON does not parse"),
        (damaged[1], "its format is 99, newer than the 1 that these scripts know: update them"),
        ("of_before.json", "loss.json is shown, which is of the same evaluation (loss)"),
        ("pipe.json", "Is a named pipe"),
        ("surrogate.json", "warnings.0 holds half of a surrogate pair"),
    ):
        assert sum(str(place) in line and problem in line for line in said) == 1, problem
    alone = compare(*damaged, check=False)
    assert alone.returncode == 2
    assert alone.stderr.count("\n") == len(alone.errors) == 1
    assert "(and 1 file more)" in alone.errors[0]


def test_what_has_no_results_keeps_nobody_from_the_others(run, tmp_path):
    """Each is named; an error only where nothing is left."""
    without = [tmp_path / "empty", tmp_path / "gone", run / "config.json", tmp_path / ("x" * 300)]
    without[0].mkdir()
    problems = ["no results; run an eval_", "no such file", "not a result file", "File name too long"]
    for place in (0, 1, 2):  # whichever comes first
        arguments = [*without[:place], run / "checkpoint-20", *without[place:]]
        found = compare(*arguments)
        assert steps_shown(found.stdout) == [20]
        said = found.stderr.splitlines()
        for line, path, problem in zip(said, without, problems, strict=True):
            assert line.startswith(f"passed over: {path}: ")
            assert problem in line
    alone = compare(*without, check=False)
    assert alone.returncode == 2
    assert len(alone.errors) == alone.stderr.count("\n") == 1
    assert "empty: no results; run an eval_*.py on it first (and 3 files more)" in alone.errors[0]


def test_results_of_before_there_were_all_fields(run, tmp_path):
    """As far as their meaning is known; what nobody knows is left out of the table."""
    old = {
        "name": "loss",
        "checkpoint": {"name": "x"},
        "results": {"loss": {"value": 2, "low": 3.0, "high": 4.0}, "diverged": {"value": None}},
    }
    (tmp_path / "loss.json").write_text(json.dumps(old))
    shown = compare(run / "checkpoint-20", tmp_path / "loss.json", "--markdown").stdout
    loss = next(line for line in shown.splitlines() if "| loss |" in line)
    assert "**2.0000**<br>-2" in loss
    assert "[" not in loss
    assert "the interval of loss does not hold its value" in shown
    assert next(line for line in shown.splitlines() if "| diverged |" in line).endswith("|  |  |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["x" * 300], "File name too long"),
        (["{run}/config.json"], "not a result file of the eval scripts"),
        (["{empty}"], "no results; run an eval_*.py on it first"),
        (["{run}/checkpoint-20", "--plot", "x.png"], "needs results at two steps"),
        (["{run}", "--plot", "{run}/no/such/folder/x.png"], "cannot be written"),
        (["{run}", "--markdwon"], "--markdwon"),
        ([], "CHECKPOINT"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, arguments, message):
    arguments = [argument.format(run=run, empty=tmp_path) for argument in arguments]
    found = compare(*arguments, check=False)
    assert found.returncode == 2
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert "Traceback" not in found.stderr
