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
    assert "(estimates; none was measured)" in run.stdout
    assert "measured on one H100 (benchmarks/h100.json)" in run.stdout.replace("\n", " ")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def table_of(stdout: str, number: int) -> list[dict[str, str]]:
    """The rows of the first or second table, by column."""
    lines = [line.strip("┃│") for line in stdout.splitlines() if line[:1] in ("┃", "│")]
    starts = [place for place, line in enumerate(lines) if "engine" in line] + [len(lines)]
    header, *rows = lines[starts[number] : starts[number + 1]]
    names = [name.strip() for name in header.split("┃")]
    return [dict(zip(names, map(str.strip, row.split("│")), strict=True)) for row in rows]


@pytest.mark.parametrize("keys", [["--dtype", "fp32"], ["--price", "2.5", "--dtype", "bf16"]], ids=str)
def test_the_tables_and_the_file_have_the_same_figures(tmp_path, keys):
    """Each column is a figure of the file, in other units; what does not fit has neither hours nor a price."""
    run = plan("recipes/stablelm3b_oasst.yaml", "--gpus", "1,16", *keys, "--json", tmp_path / "plan.json")
    figures = json.loads((tmp_path / "plan.json").read_text())
    price = 2.5 if "--price" in keys else None
    assert figures["price_of_a_card_and_hour"] == price
    assert {each["fits"] for each in figures["plans"]} == {True, False}
    for each, row, memory in zip(figures["plans"], table_of(run.stdout, 0), table_of(run.stdout, 1), strict=True):
        star = "*" if each["engine"] == "one process" and "bf16" in keys else ""
        assert each["measured"] == bool(star)
        shown = {
            "GiB of 79.6": each["peak"] / 2**30,
            "micro-batch": each["micro_batch_tokens"],
            "largest": each["most_tokens"] or "does not fit",
            "recompute": "yes" if each["recomputes"] else "no",
            "steps": each["steps"],
            "tokens/s": each["tokens_per_second"],
            "training hours": each["training_hours"],
            "evaluation hours": each["evaluation_hours"],
            "hours in all": each["hours"],
            "GB sent a step": each["sent"]["by_a_card"] / 1e9,
            "between machines": each["sent"]["between_machines"] / 1e9,
            "host GiB": sum(each["host"].values()) / 2**30,
            "disk GiB": each["disk"] / 2**30,
        } | ({"price": each["price"]} if price else {})
        parts = {name: size / 2**30 for name, size in each["parts"].items()} | {"peak": each["peak"] / 2**30}
        for own, expected in ((row, shown), (memory, parts)):
            assert (own.pop("engine"), own.pop("cards")) == (each["engine"] + star, str(each["cards"]))
            assert own.keys() == expected.keys()
            for name, value in expected.items():
                if value is None or isinstance(value, str):
                    assert own[name] == (value or "")
                else:
                    assert float(own[name].replace(",", "")) == pytest.approx(value, rel=0.05)
        if not each["fits"]:
            assert each["hours"] is each["training_hours"] is each["price"] is each["tokens_per_second"] is None
            continue
        assert each["hours"] == pytest.approx(each["training_hours"] + each["evaluation_hours"])
        assert each["price"] == (price and pytest.approx(price * each["hours"] * each["cards"]))


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
