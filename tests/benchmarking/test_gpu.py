"""`benchmark.py gpu`: every part runs in the rehearsal, and a part that fails or comes too late stops no other."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from forking import measure_forked

from benchmarking import gpu
from benchmarking.gpu import Part, all_parts, benchmark_gpu
from utils.errors import UserError

# Left out below: the same code as another part's, with other numbers.
SAME = ("mixed lengths", "in twos", "sft.py, fp16", "again")
LONG = "ZeRO-2"  # two starts of sft.py more, which tests/run/test_resume.py makes too

PREDICTION = "roofline at these rates"  # comes last, from the others' figures


@pytest.mark.timeout(900)
@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_rehearsal_runs_every_kind_of_part(tmp_path, monkeypatch, long):
    """In processes of their own, as a GPU has them: new ones in the long form, else forked, which saves each
    4 seconds of imports."""
    parts = all_parts(rehearse=True)
    left_out = SAME if long else (*SAME, LONG)
    chosen = [part for part in parts if not any(words in part.name for words in left_out)]
    assert {part.measure for part in chosen} == {part.measure for part in parts}
    patient = [replace(part, limit=300) for part in chosen]  # others may be at work here
    monkeypatch.setattr(gpu, "all_parts", lambda rehearse: patient)
    if not long:
        monkeypatch.setattr(gpu, "in_a_process", measure_forked)
    found = benchmark_gpu(tmp_path, 15, rehearse=True)
    assert [name for name, part in found["parts"].items() if "failed" in part] == []
    assert list(found["parts"]) == [*(part.name for part in chosen), PREDICTION]
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(found))

    figures = {name: part["figures"] for name, part in found["parts"].items()}
    losses = {name: own["losses"] for name, own in figures.items() if "losses" in own}
    assert losses.keys() >= {"this collection, rows", "TRL, padding-free, rows", "a bare loop, all logits, rows"}
    for name, own in losses.items():  # bf16, the same work
        assert own == pytest.approx(losses["this collection, rows"], rel=2e-3), name
    for label, errors in figures["exactness"].items():
        if isinstance(errors, str):
            assert "there is no GPU" in errors, label
            continue
        assert errors["gradients"] < (1e-5 if "float32" in label else 3e-2), label
    for name, errors in figures["AdamW"].items():
        assert errors["weights"] < (1e-2 if "bf16" in name else 1e-5), name
        assert errors["exp_avg_sq"] < (1e-2 if "bf16" in name else 1e-5), name
    runs = [own for name, own in figures.items() if name.startswith("sft.py")]
    assert len(runs) == 1 + long
    for run in runs:
        assert [line["step"] for line in run["metrics"]] == [*range(1, 31)]
        assert 2 <= run["stopped_at"] < 30
        assert "eval_loss" in run["evaluation"]


def test_the_rehearsal_has_the_parts_of_the_real_thing():
    real, tiny = all_parts(rehearse=False), all_parts(rehearse=True)
    assert [(part.name, part.measure, part.limit) for part in real] == [
        (part.name, part.measure, part.limit) for part in tiny
    ]


# ---- parts that fail, are slow, or come too late ----


MEASURES = """
import time

def works(number):
    return {"number": number}

def fails():
    raise RuntimeError("out of memory, say")

def is_slow():
    time.sleep(60)
"""


@pytest.fixture
def measures(tmp_path, monkeypatch):
    """A module whose functions processes of their own can import, as fast as may be."""
    (tmp_path / "some_measures.py").write_text(MEASURES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_measures")
    del sys.modules["some_measures"]


def a_part(name: str, measure, *arguments, limit: int = 30) -> Part:
    return Part(name, measure, arguments, limit, lambda figures: f"number {figures['number']}")


def test_what_fails_says_why_and_the_rest_goes_on(tmp_path, monkeypatch, capsys, measures):
    parts = [
        a_part("first", measures.works, 1),
        a_part("breaks", measures.fails),
        a_part("hangs", measures.is_slow, limit=1),
        a_part("last", measures.works, 4),
    ]
    monkeypatch.setattr(gpu, "all_parts", lambda rehearse: parts)
    written, write = [], gpu.write

    def write_and_read(folder, found) -> None:
        write(folder, found)
        names = list(json.loads((folder / "gpu.json").read_text())["parts"])
        written.append((names, (folder / "gpu.md").read_text().count("\n## ")))

    monkeypatch.setattr(gpu, "write", write_and_read)
    found = benchmark_gpu(tmp_path / "new" / "folder", 10, rehearse=True)["parts"]
    names = ["first", "breaks", "hangs", "last", PREDICTION]
    assert written == [(names[:count], count) for count in range(1, 6)]
    assert "needs the ceilings" in found[PREDICTION]["failed"]
    assert (found["first"]["figures"], found["last"]["table"]) == ({"number": 1}, "number 4")
    assert found["breaks"]["failed"] == "benchmark: fails failed: RuntimeError: out of memory, say"
    assert found["hangs"]["failed"] == "benchmark: is_slow: not done after 1 s"
    page = (tmp_path / "new" / "folder" / "gpu.md").read_text()
    assert all(words in page for words in ("rehearsal on a CPU", "## breaks\n\nbenchmark: fails failed", "number 1"))
    assert "## hangs" in capsys.readouterr().out


def test_after_the_minutes_nothing_more_is_begun(tmp_path, monkeypatch, measures):
    seconds, limits = iter([0.0, 10.0, 10.0, 40.0, *[46.0] * 6]), []
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    def at_once(measure, *arguments, limit):
        limits.append(limit)
        return measure(*arguments)

    monkeypatch.setattr(gpu, "in_a_process", at_once)
    parts = [a_part("in time", measures.works, 1, limit=90), a_part("late", measures.works, 2)]
    monkeypatch.setattr(gpu, "all_parts", lambda rehearse: parts)
    found = benchmark_gpu(tmp_path, 1, rehearse=True)["parts"]
    assert limits == [50.0]  # what is left of the minute
    assert found["in time"]["table"] == "number 1"
    assert found["late"]["failed"] == "not measured: the minutes are over"


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_without_a_gpu_it_says_what_would_work():
    with pytest.raises(UserError, match="there is no GPU; --rehearse does the same"):
        benchmark_gpu(Path("nowhere"), 8, rehearse=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu"], "gpu needs --out DIR"),
        (["gpu", "--out", "x", "--layers", "3"], "--layers is for train, scaling, attention"),
        (["train", "--gpu", "3b", "--minutes", "3"], "--minutes is for gpu"),
        (["gpu", "--out", "x", "--minutes", "0"], "--minutes: 0 is no whole number of at least 1"),
    ],
)
def test_bad_command_lines(arguments, words, tmp_path):
    run = run_script(*arguments, script="scripts/benchmark.py", output_dir=tmp_path, check=False)
    assert run.returncode == 2
    assert words in run.stderr
    assert "Traceback" not in run.stderr
