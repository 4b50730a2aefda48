"""Whatever is wrong with a file that the evaluation reads back: it is read as it is, or one line names it.

The short form belongs to the suite; `make fuzz` runs the long one.
"""

import io
import json
import os
import runpy
import warnings
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_chat_model
from conftest import ROOT
from damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.prompts import read_prompts
from evaluation.chat_model import load_chat_model
from evaluation.generation import generate
from evaluation.model import find_model
from evaluation.report_files import read_configs, read_report
from evaluation.report_page import make_page
from evaluation.result_files import read_result
from evaluation.results import Evaluation, start_processes
from utils.errors import UserError

ITEMS = {f"c{n}": {"dataset": "d", "loss": 2.5 * n, "targets": n, "times": 2, "group": "g"} for n in range(1, 5)}
RESULT = {
    "format": 1,
    "name": "loss",
    "checkpoint": {"name": "x", "step": 2, "fingerprint": "00ff"},
    "settings": {"max_length": 64, "datasets": {"d": {"val_split": 0.5}}},
    "results": {
        "loss": {"value": 2.5, "low": 2.25, "high": 2.75, "better": "lower", "n": 8}
        | {"ratio": ["loss", "targets"], "where": {"dataset": "d"}},
        "perplexity/d": {"value": 12.0, "low": None, "high": None, "better": "lower", "n": 8, "exp": True}
        | {"ratio": ["loss", "targets"], "where": {}},
        "tokens": {"value": 1234, "better": None},
    },
    "warnings": ["take care"],
    "items": ITEMS,
}
REPORT = {
    "model_name": "m",
    "date": "2023-04-16T12:47:25.474575",
    "args": {"seed": 42, "report": None, "versions": {"torch": "2"}},
    "prompts": [
        {"prompt": "p", "results": [{"sampling_config": "greedy"} | {"sampling_params": {}, "outputs": ["o"]}]}
    ],
}
SETTINGS = {
    "default": {"generate_args": {"max_new_tokens": 3, "do_sample": True, "temperature": 1.5}, "bot_name": "Joi"},
    "configurations": [
        {"name": "greedy", "generate_args": {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}},
        {"name": "all", "generate_args": {"top_k": 50, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}}
        | {"pre_text": None, "add_prefix_tokens": False},
        {"name": "more", "generate_args": {"epsilon_cutoff": 0.001, "min_new_tokens": 1}},
    ],
}
PROMPTS = ["a", {"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}], "id": 1}, "d"]


def fuzz(short: int, long: int = 20_000):
    """A test of `check(here, data)` in two lengths: here, what the fixture gives; data, hypothesis' draws."""

    def make(check):
        def run(here, examples):
            quiet = dict(database=None, suppress_health_check=list(HealthCheck))

            @settings(max_examples=examples, **quiet)
            @given(st.data())
            def every(data):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # what a library says of it would stand on the screen
                    warnings.simplefilter("ignore", ResourceWarning)
                    check(here, data)

            every()

        length = pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.fuzz)])
        return length(run)

    return make


def refused(read, path):
    """What a reader makes of a file; None where it refuses it in one line that names it."""
    try:
        return read(path)
    except UserError as error:
        said = str(error)
    assert str(path) in said
    assert len(said.splitlines()) == 1
    assert len(said) < 1000
    return None


@pytest.fixture(scope="module")
def here(tiny_model, tmp_path_factory):
    """A run with results of one checkpoint, compare.py, and a model."""
    folder = tmp_path_factory.mktemp("here")
    chat_model = find_model(str(save_chat_model(tiny_model, folder / "chat_model")))
    files = [folder / "run" / f"checkpoint-{step}" / "eval" / "loss.json" for step in (1, 2)]
    for file in files:
        file.parent.mkdir(parents=True)
    files[0].write_text(json.dumps(RESULT | {"checkpoint": {"name": "y", "step": 1}}))
    return SimpleNamespace(
        folder=folder,
        whole=files[0],
        damaged=files[1],
        compare=runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="compare")["main"],
        as_settings=runpy.run_path(str(ROOT / "scripts" / "sampling_report.py"), run_name="report")["as_settings"],
        chat_model=chat_model,
        model=load_chat_model(chat_model, torch.device("cpu")),
        accelerator=start_processes(),
    )


@fuzz(short=150)
def test_results(here, data):
    here.damaged.write_bytes(data.draw(damaged(RESULT)))
    plot = here.folder / "curves.png" if data.draw(st.integers(0, 200)) == 137 else None  # slow
    options = SimpleNamespace(paths=[here.damaged.parents[2]], all=True, markdown=data.draw(st.booleans()), plot=plot)
    too_few_steps = suppress(UserError) if plot else nullcontext()
    with redirect_stdout(io.StringIO()) as shown, redirect_stderr(io.StringIO()) as said, too_few_steps:
        here.compare(options)
    shown.getvalue().encode()  # to a terminal
    assert "1,234" in shown.getvalue()  # of the other
    if "passed over" in said.getvalue():
        (line,) = said.getvalue().splitlines()
        assert line.startswith(f"passed over: {here.damaged}")
        return
    assert not said.getvalue()
    written = json.loads(here.damaged.read_bytes())
    if "results" not in written and "checkpoint" not in written:
        return
    found = read_result(here.damaged)
    for name, metric in found.results.items():
        for field in ("value", "low", "high", "better", "n"):
            wanted, read = written["results"][name].get(field), getattr(metric, field)
            assert read == wanted
            assert not isinstance(wanted, bool)


@fuzz(short=60)
def test_parts_of_an_evaluation(here, data):
    folder = here.folder / "parts"
    for old in folder.glob("*"):
        old.unlink()

    def evaluation(seed=1):
        with redirect_stdout(io.StringIO()):
            return Evaluation(here.accelerator, here.chat_model, "test", {"seed": seed}, str(folder))

    first, other = evaluation(), evaluation(2)
    for key, item in ITEMS.items():
        first.add(key, item)
        other.add(key, {**item, "loss": 0.0})
    part, foreign = (next(folder.glob(f"{run._stem.rpartition('/')[2]}*")) for run in (first, other))
    lines = part.read_bytes().splitlines() + foreign.read_bytes().splitlines()[:1]
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = data.draw(damaged(json.loads(lines[place])))
    end = data.draw(st.sampled_from([b"\n", b"", b'\n{"key": "c1", "resu']))
    part.write_bytes(b"\n".join(lines) + end)
    done = evaluation().done
    assert done.items() <= ITEMS.items()
    assert done.keys() >= ITEMS.keys() - {f"c{place + 1}", *(["c2"] if not end else [])}
    assert evaluation().done == done


@fuzz(short=100)
def test_reports(here, data):
    path = here.folder / "report.json"
    path.write_bytes(data.draw(damaged(REPORT)))
    report = refused(read_report, path)
    if report:
        page = make_page([report, report])
        start = page.index('type="application/json"')
        json.loads(page[page.index(">", start) + 1 : page.index("</script>", start)], parse_constant=pytest.fail)


@fuzz(short=60)
def test_sampling_settings(here, data):
    path = here.folder / "settings.json"
    path.write_bytes(data.draw(damaged(SETTINGS)))
    model, tokenizer = here.model
    for config in (refused(read_configs, path) or {}).values():
        chosen = here.as_settings(config)
        try:
            list(generate(model, tokenizer, [], chosen, 1))
        except UserError:
            continue
        # sampling_report.py fits both to the model's positions.
        chosen |= {key: min(chosen[key], 3) for key in ("max_new_tokens", "min_new_tokens") if key in chosen}
        ((_, reply),) = generate(model, tokenizer, [[5, 6, 7]], chosen, 1, [0])
        assert 0 < reply.tokens <= 3


@fuzz(short=100)
def test_prompts(here, data):
    as_lines = data.draw(st.booleans())
    path = here.folder / ("prompts.jsonl" if as_lines else "prompts.json")
    text = data.draw(damaged(PROMPTS[1])) + b'\n"last"' if as_lines else data.draw(damaged(PROMPTS))
    path.write_bytes(text)
    for messages in refused(read_prompts, path) or []:
        assert messages[-1]["role"] == "user"
        assert all(message["content"].encode().strip() for message in messages)


@fuzz(short=60)
def test_metrics_of_a_run(here, data):
    run = here.folder / "model"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text("{}")
    last = data.draw(damaged({"step": 12, "epoch": 0.5, "eval_loss": 2.5}))
    (run / "metrics.jsonl").write_bytes(b'{"step": 10}\n' + last + data.draw(st.sampled_from([b"\n", b""])))
    with redirect_stderr(io.StringIO()) as said:
        step = find_model(str(run)).step
    assert len(said.getvalue().splitlines()) == (step is None)
    if step is None:
        assert said.getvalue().startswith(f"warning: {run / 'metrics.jsonl'}")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("read", [read_result, read_report, read_configs, read_prompts])
def test_what_is_no_file(tmp_path, make, read):
    make(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x.json: cannot read this .*: Is a"):
        read(tmp_path / "x.json")
