"""plan.py as a user runs it: the tables, the command on top, the files that it writes, and what can be typed wrong."""

import json

import pytest
from conftest import ROOT, run_script

SEED = "recipes/stablelm7b_oasst.yaml"


def plan(*arguments, check: bool = True):
    return run_script(*arguments, script="scripts/plan.py", output_dir=None, check=check)


def test_the_seeds_recipe(tmp_path):
    files = ["--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png"]
    run = plan(SEED, "--gpus", "1,4,8", "--price", "2.5", *files)
    figures = json.loads((tmp_path / "plan.json").read_text())
    plans = figures["plans"]
    assert figures["estimates"] is True
    assert figures["parameters"] == 7_868_755_968
    fitting = [each for each in plans if each["fits"]]
    assert [each["hours"] for each in fitting] == sorted(each["hours"] for each in fitting)
    assert plans[: len(fitting)] == fitting
    assert {each["cards"] for each in plans} == {1, 4, 8}
    assert not any(each["fits"] for each in plans if each["engine"] in ("one process", "DDP"))
    lines = run.stdout.splitlines()
    assert lines[lines.index("the fastest, from the collection's folder:") + 1] == plans[0]["command"]
    cheapest = min(fitting, key=lambda each: each["hours"] * each["cards"])
    assert lines[-1] == cheapest["command"]
    (row,) = [line for line in lines if "ZeRO-2 " in line and "│ 8     │" in line and "no │" in line]
    assert f"{2.5 * fitting[0]['hours'] * 8:,.0f}" in row or fitting[0]["engine"] != "ZeRO-2"
    assert "estimate" in run.stdout
    assert "measured on one H100 (benchmarks/h100.json)" in run.stdout.replace("\n", " ")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_has_what_was_typed():
    """`varlen_attn` runs on those cards, though not on this machine. Cards that would compute nothing are said."""
    typed = ["--learning_rate", "2e-5", "--output_dir", "my run", "--attn_implementation", "varlen_attn"]
    run = plan(SEED, "--gpus", "64", "--gpu", "h100:90:800:3000", *typed)  # a name that has been measured, of another
    command = run.stdout.splitlines()[-1]
    assert f"scripts/sft.py {SEED} " in command
    assert "--learning_rate 2e-5 --output_dir 'my run' --attn_implementation varlen_attn" in command
    said = " ".join(run.stdout.split())
    assert "of this card nothing has been measured" in said
    assert "a step has 32 conversations (global_batch_size): of 64 cards 32 would compute nothing" in said


def test_what_fits_nowhere_is_an_answer():
    run = plan(SEED, "--gpus", "1", "--gpu", "mine:6:10:100")
    assert "it fits on none of these" in run.stdout
    assert "does not fit" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "h200"], "--gpu h200: give h100, a100-80"),
        (["--gpu", "mine:80:1"], "--gpu mine:80:1: give"),
        (["--gpu", "mine:nan:1:1"], "--gpu mine:nan:1:1: give"),
        (["--gpu", "mine:80:1e-9:1"], "--gpu mine:80:1e-9:1: give"),
        (["--gpu", ":80:1:1"], "--gpu :80:1:1: give"),
        (["--gpus", "0"], "0 is no whole number of at least 1"),
        (["--gpus", "4,"], "is no whole number of at least 1"),
        (["--gpus", "12"], "--gpus 12: more than 8 are machines of 8 each"),
        (["--gpus", "99999"], "99999 cards are more than 4,096"),
        (["--price", "-1"], "-1 is no number over 0"),
        (["--price", "cheap"], "cheap is no number over 0"),
        (["--price", "1e308"], "1e308 is no number over 0, of up to a billion"),
        (["--mfu", "40"], "--mfu 40: a share, of at most 1"),
        (["--tokens", "0"], "0 is no whole number of at least 1"),
        (["--tokens", "10000000001"], "--tokens 10000000001: at most 10,000,000,000"),
        (["--lerning_rate", "1"], "unknown key lerning_rate: did you mean learning_rate?"),
        (["--write_tables"], "--write_tables is of the recipes that ship"),
        (["--model_name", "some/model"], "model_name = some/model: its config.json is not on this machine"),
        (["--plot", "gone/plan.png"], "--plot gone/plan.png: cannot be written"),
        (["--plot", "docs"], "--plot docs: cannot be written"),
        (["--plot", "plan.docx"], "--plot plan.docx: cannot be written"),
        (["--json", "gone/plan.json"], "--json gone/plan.json: cannot be written"),
    ],
)
def test_what_is_typed_wrong_is_one_line(arguments, line):
    run = plan(SEED, *(["--gpus", "1"] if "--gpus" not in arguments else []), *arguments, check=False)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert line in run.errors[0]
    assert "Traceback" not in run.stderr


def test_without_a_recipe():
    assert plan(check=False).returncode == 2
    run = plan("--gpus", "1", check=False)
    assert run.errors == ["error: command line: no recipe given (--help shows how)"]
    assert (ROOT / "docs" / "plan_7b_h100.png").stat().st_size < 100_000
