"""Trackers other than wandb, the real ones where they are installed: a resumed run is the same run, step by step."""

import importlib
import json
import sqlite3
import sys
from threading import Event
from types import SimpleNamespace

import pytest
from interruption import metrics, run_here, small_recipe
from mixes import make_progress
from test_log import LINES, make_recipe, nobody, records  # noqa: F401, a fixture

from publishing import model_card
from recipe.refusals import problems_of
from run import opening, trackers
from run.checkpoint import read_checkpoint
from run.health import StepHealth
from run.log import RunLog
from training.engine import Engine
from utils.errors import UserError

WHY = "pip install tensorboard mlflow trackio: too large for everybody's tests"


@pytest.fixture
def resumed(tmp_path, tiny_model, monkeypatch):
    """Call it with a tracker: a run that was stopped after step 8, killed after step 12, and ended; its folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # since a database would want another package
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def run(tracker: str):
        pytest.importorskip(tracker, reason=WHY)
        recipe, output = small_recipe(tmp_path, tiny_model, log_with=tracker, wandb_project="ours"), tmp_path / "out"
        for moment, code in (({"steps": 8}, 75), ({"steps": 4, "by": "death"}, None), ({}, 0)):
            assert run_here(recipe, output_dir=output, **moment).returncode == code
            if moment and tracker == "mlflow":  # what a process leaves when it dies
                importlib.import_module("mlflow").end_run()
        return output

    return run


def expected(output, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics(output) if name in line]


def test_tensorboard(resumed):
    output = resumed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "base" / "tensorboard"))
    events.Reload()
    for name in ("loss", "eval_sums_accuracy", "epoch"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        if name != "epoch":
            assert found == [(step, pytest.approx(value)) for step, value in expected(output, name)]
        assert len(found) >= 5
    (text,) = {event.tensor_proto.string_val[0].decode()[:20] for event in events.Tensors("recipe/text_summary")}
    assert text.startswith("```\nmodel_name:")


def test_mlflow(resumed):
    output = resumed("mlflow")
    import mlflow

    run_id = read_checkpoint(output / "checkpoint-20").state.tracker_runs["mlflow"]
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'ours'")
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [run_id]
    found = {(each.step, each.value) for each in client.get_metric_history(run_id, "loss")}  # some twice, of the kill
    assert found == set(expected(output, "loss"))
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "out")
    assert run.data.params["learning_rate"] == "0.01"


def test_a_run_that_mlflow_no_longer_has_is_begun_anew(tmp_path, monkeypatch, capsys):
    """As on a machine to which only the output folder was copied, or when somebody has deleted it."""
    mlflow = pytest.importorskip("mlflow", reason=WHY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    progress, client = make_progress(3, tracker_runs={"mlflow": "0" * 32}), mlflow.MlflowClient()
    for _ in range(2):
        before = progress.tracker_runs["mlflow"]
        log = RunLog(make_recipe(tmp_path, log_with=["mlflow"]), progress, main_process=True)
        log.write(LINES[0])
        log.close()
        log.trackers.finish()
        assert f"mlflow: the run {before}, of which the checkpoint tells, is not there" in capsys.readouterr().out
        assert client.get_run(progress.tracker_runs["mlflow"]).info.status == "FINISHED"
        client.delete_run(progress.tracker_runs["mlflow"])


def test_trackio(resumed, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)  # these runs draw nothing
    output = resumed("trackio")
    assert hasattr(sys.modules["matplotlib.figure"], "Figure")  # whole before there is a line, of which it is asked
    name = read_checkpoint(output / "checkpoint-20").state.tracker_runs["trackio"]
    with sqlite3.connect(tmp_path / "trackio" / "ours.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {row[0] for row in rows} == {name}
    found = {(step, json.loads(values)["loss"]) for _, step, values in rows if "loss" in json.loads(values)}
    assert found == set(expected(output, "loss"))


class Failing:
    """A tracker whose server goes away after the first line."""

    tracker = SimpleNamespace(offline=True)  # of wandb's the run

    def __init__(self):
        self.lines = []

    def log(self, values, step):
        if self.lines:
            raise ConnectionError("nobody there")
        self.lines.append((step, values))

    def finish(self):
        raise AssertionError("it was left")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tmp_path, monkeypatch, capsys, name):
    failing = Failing()
    monkeypatch.setattr(trackers, f"_start_{name}", lambda *_: failing)
    recipe = make_recipe(tmp_path, log_with=[name], log_wandb=name == "wandb")
    log = RunLog(recipe, make_progress(3), main_process=True)
    for line in LINES:
        log.write(line)
    log.close()
    log.trackers.finish()
    assert failing.lines == [(1, {name: value for name, value in LINES[0].items() if name != "step"})]
    said = f"{name}: no longer logged to, metrics.jsonl has all: ConnectionError: nobody there"
    assert capsys.readouterr().out.count(said) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_no_step_waits_for_a_tracker(tmp_path, monkeypatch, capsys):
    """Whose server takes a line and does not answer; the run's end waits for it, but not for ever."""
    hanging, lines = Event(), []

    class Hanging:
        def log(self, values, step):
            hanging.wait()
            lines.append(step)

        def finish(self):
            lines.append("the end")

    monkeypatch.setattr(trackers, "_start_mlflow", lambda *_: Hanging())
    monkeypatch.setattr(trackers, "LONGEST_END", 0.1)
    log = RunLog(make_recipe(tmp_path, log_with=["mlflow"]), make_progress(3), main_process=True)
    for line in LINES:
        log.write(line)
    log.close()
    log.trackers.finish()
    assert "mlflow: not done 0.1 s after the run: left" in capsys.readouterr().out
    assert lines == []
    monkeypatch.setattr(trackers, "LONGEST_END", 60)
    hanging.set()
    log.trackers.finish()
    assert lines == [*(line["step"] for line in LINES), "the end"]


def test_a_tracker_that_takes_its_time_at_the_end_is_no_stall(tmp_path, tiny_model, monkeypatch):
    """By which `stall_minutes` would end the run, whose model is written, as one that failed."""
    words = []

    def slow(*_, **__):
        words.extend(opening._OPENED[-1].watch._own_word()[1:] for _ in range(2))

    monkeypatch.setattr(trackers.Trackers, "finish", slow)
    run = run_here(small_recipe(tmp_path, tiny_model, max_steps=1, eval_steps=2), output_dir=tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert words[0] != words[1]  # it is told that the process comes further
    assert words[0][1] == "ending the run in its trackers"


def test_one_that_cannot_be_started_is_an_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no server at\nhttp://x")

    monkeypatch.setattr(trackers, "_start_mlflow", refuse)
    with pytest.raises(UserError, match=r"mlflow could not be started: ConnectionError: no server at http://x$"):
        RunLog(make_recipe(tmp_path, log_with=["mlflow"]), make_progress(3), main_process=True)


def test_a_setting_that_wandb_refuses(tmp_path, monkeypatch):
    """By no error of its own: pydantic's, of WANDB_MODE=bogus or a WANDB_BASE_URL that is none."""

    def refuse(**_):
        raise ValueError("mode\n  Input should be 'online', 'offline'")

    monkeypatch.setenv("WANDB_MODE", "bogus")
    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(UserError, match=r"log_wandb: wandb could not be started: ValueError: mode Input should be "):
        RunLog(make_recipe(tmp_path, log_wandb=True), make_progress(3), main_process=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"log_with": ["tensorboard", "trackio"]},
            "log_with names trackio, which is not installed: pip install trackio",
        ),
        ({"log_with": ["wandb"], "log_wandb": False}, "log_with names wandb beside log_wandb: false"),
        ({"log_with": ["trackio", "trackio"]}, "log_with names trackio, which is not installed: pip install trackio"),
        ({"log_with": ["mlflow"], "wandb_project": "it's"}, "wandb_project = it's: an experiment of MLflow's"),
        ({"log_with": ["mlflow"], "wandb_project": "/Users/me/chat"}, None),  # as Databricks wants them
        ({"log_with": ["tensorboard"], "wandb_project": "a/b"}, None),  # it has no projects
        ({"log_with": ["tensorboard"], "wandb_project": "a/b", "log_wandb": True}, "wandb_project = a/b: no project"),
        ({"log_with": ["tensorboard"], "wandb_project": "a" * 129}, None),
        ({"log_with": ["wandb"], "wandb_project": "a" * 129, "log_wandb": True}, "wandb_project has over 128"),
        ({"log_with": ["wandb"], "log_wandb": True}, None),
        ({"log_with": "tensorboard"}, None),
        ({"log_with": []}, None),
        ({"log_with": None}, None),
    ],
)
def test_what_is_refused_of_log_with(tmp_path, monkeypatch, keys, message):
    monkeypatch.setattr("recipe.refusals.find_spec", lambda name: name != "trackio")
    recipe = make_recipe(tmp_path, **keys)
    problems = [f"{'.'.join(key)} {problem}" for key, problem in problems_of(recipe, {})]
    assert [message] == [problem[: len(message)] for problem in problems] if message else not problems


def test_others_are_unknown(tmp_path):
    with pytest.raises(ValueError, match="'wandb', 'tensorboard', 'trackio' or 'mlflow'"):
        make_recipe(tmp_path, log_with=["comet"])


def test_all_is_written_before_the_trackers_take_their_time(tmp_path, tiny_model, monkeypatch):
    output, there = tmp_path / "out", []

    def finish(*_, **__):
        there.extend(path.name for path in output.iterdir())
        there.append(json.loads((output / "run.json").read_text())["status"])

    def close(engine):
        there.append("the others leave")  # of which a stopped one has the launcher end this process soon
        leave(engine)

    leave = Engine.close
    monkeypatch.setattr(Engine, "close", close)
    monkeypatch.setattr(trackers.Trackers, "finish", finish)
    run = run_here(small_recipe(tmp_path, tiny_model, max_steps=2, sample_replies=0), output_dir=output)
    assert run.returncode == 0, run.stderr
    assert {"model.safetensors", "README.md", "finished"} <= set(there)
    assert there[-2:] == ["finished", "the others leave"]


@pytest.mark.usefixtures("nobody")
def test_a_run_that_fails_ends_as_such_in_its_trackers(tmp_path, tiny_model, monkeypatch):
    """Else what they still hold is lost, and they show it as one that goes on."""

    def fail(*_):
        raise UserError("no more")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(StepHealth, "judge", fail)
    run = run_here(small_recipe(tmp_path, tiny_model, log_wandb=True), output_dir=tmp_path / "out")
    assert run.errors == ["error: no more"]
    (folder,) = (tmp_path / "out" / "base" / "wandb").glob("offline-run-*")
    assert [record.exit.exit_code for record in records(folder) if record.HasField("exit")] == [1]


def test_a_card_that_fails_holds_up_no_tracker(tmp_path, tiny_model, monkeypatch):
    def fail(_):
        raise ValueError("as a template may")

    ended = []
    monkeypatch.setattr(trackers.Trackers, "finish", lambda _, failed: ended.append(failed))
    monkeypatch.setattr(model_card, "find_run", fail)
    run = run_here(small_recipe(tmp_path, tiny_model, max_steps=1, eval_steps=2), output_dir=tmp_path / "out")
    assert (run.returncode, ended) == (0, [False])
    assert "the model's card could not be written: ValueError: as a template may" in run.stdout
