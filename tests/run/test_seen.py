"""What is seen of a run while it trains: replies, the best checkpoint, an early end; stopped and gone on, the same."""

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from checkpoints import save_chat_model
from conftest import run_script
from export import find_folder
from hypothesis import given
from hypothesis import strategies as st
from interruption import Died, metrics, run_here, small_recipe
from mixes import make_mix, make_progress, make_recipe
from test_resume import assert_same_end
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.model import find_model
from evaluation.result_files import read_columns
from recipe.load import load_recipe
from run.best import Best, best_and_last, best_checkpoint, judge, link_checkpoints
from run.checkpoint import read_checkpoint
from run.checkpoint_state import process_file
from run.log import RunLog
from run.resume import starting_point
from run.run import Run
from run.samples import Samples, greedy_replies
from run.saving import Saver
from training.replies import Reply

PROMPTS = [
    "sums 3 and 8?",
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "words\n\x1b[2J"}]},
]
# The accuracy is best after step 20, three times the same after that, and so the run ends after 32 of 90 steps.
KEYS = {
    "sample_every": 8,
    "early_stopping_metric": "eval_accuracy",
    "early_stopping_patience": 3,
    "keep_best": True,
    "save_total_limit": 1,
    "save_steps": 6,
    "num_train_epochs": 9,
}
BATCHES = 4  # of an evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def recipe(folder, tiny_model):
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return small_recipe(folder, tiny_model, sample_prompts=str(folder / "prompts.jsonl"), **KEYS)


@pytest.fixture(scope="module")
def whole(folder, recipe):
    """The run that nobody interrupts."""
    run = run_here(recipe, output_dir=folder / "whole")
    assert run.returncode == 0, run.stderr
    return run


def samples(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- A run ----


def test_what_is_left_of_a_run(whole):
    output = whole.output_dir
    assert [(line["step"], line["prompt"]) for line in samples(output)] == [
        (step, prompt) for step in (8, 16, 24, 32) for prompt in (1, 2)
    ]
    assert samples(output)[1]["messages"] == PROMPTS[1]["messages"]
    # The best was saved for its own sake, and kept though only the newest was to be.
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-20", "checkpoint-30"}
    assert (os.readlink(output / "best"), os.readlink(output / "last")) == ("checkpoint-20", "checkpoint-30")
    state = read_checkpoint(output / "last").state
    assert state.best.model_dump() == {
        "metric": "eval_accuracy",
        "step": 20,
        "value": max(whole.curve("eval_accuracy")),
        "evaluations_since": 2,
    }
    assert whole.curve("eval_accuracy")[-4:] == [state.best.value] * 4  # of equals the earliest is the best
    report = json.loads((output / "run.json").read_text())["report"]
    assert (report["steps"], report["ended_early"]) == (32, True)
    assert report["seconds"]["samples"] > 0
    assert "32 of 90 steps" in whole.stdout
    assert "ended early: 3 evaluations since the best eval_accuracy" in whole.stdout
    assert "best is checkpoint-20, last is checkpoint-30" in whole.stdout
    assert "replies after step 32\n  > sums 3 and 8?\n  " in whole.stdout
    assert "\\x1b[2J" in whole.stdout
    assert "\x1b" not in whole.stdout


def test_the_replies_are_those_of_the_model_of_that_step(whole, recipe):
    """By a plain loop over the whole text for each token: no cache, no padding, none of `generate`."""
    final = whole.output_dir
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final).eval()
    for line in samples(final)[-2:]:
        ids = tokenizer.apply_chat_template(line["messages"], add_generation_prompt=True)["input_ids"]
        written = []
        while len(written) < 24 and tokenizer.eos_token_id not in written:
            with torch.no_grad():
                logits = model(torch.tensor([ids + written])).logits
            written.append(int(logits[0, -1].argmax()))
        assert line["tokens"] == len(written)
        assert line["ended"] == (written[-1] == tokenizer.eos_token_id)
        assert line["reply"] == tokenizer.decode(written[: len(written) - line["ended"]])


def die_in(monkeypatch, name: str, step: int, half: str = ""):
    """The process is gone when it comes to this method of `Run`, or of its `Saver`, after that step."""
    holder = Run if hasattr(Run, name) else Saver
    real = getattr(holder, name)

    def dying(*arguments, **options):
        run = next((argument for argument in arguments if isinstance(argument, Run)), None)
        if run is None or run.progress.step == step:
            if half:
                with open(run.recipe.output_dir / "samples.jsonl", "a", encoding="utf-8") as file:
                    file.write(half)
            raise Died
        return real(*arguments, **options)

    monkeypatch.setattr(holder, name, dying)


STOPS = {
    "by signals, in the evaluation that is the best and in the one that ends the run": [
        {"evaluation_batches": 4 * BATCHES + 2},
        {"evaluation_batches": 3 * BATCHES + 2},
    ],
    "by power cuts, within the replies, between the best evaluation and its save, before the final model": [
        {"die_in": ("save", 16), "half": '{"step": 16, "prompt": 1, "mess'},
        {"die_in": ("save", 20)},
        {"steps": 5},
        {"die_in": ("save_final_model", 32)},
    ],
}


@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_a_run_that_was_stopped_is_the_same(tmp_path, recipe, whole, stops, monkeypatch):
    for stop in map(dict, stops):
        by_signal = "evaluation_batches" in stop
        with monkeypatch.context() as patch:
            if "die_in" in stop:
                die_in(patch, *stop.pop("die_in"), half=stop.pop("half", ""))
            run = run_here(recipe, output_dir=tmp_path, **stop, by="SIGTERM" if by_signal else "death")
        assert run.returncode == (75 if by_signal else None), run.stderr
        for link in ("best", "last"):
            (tmp_path / link).unlink(missing_ok=True)
            (tmp_path / link).symlink_to("checkpoint-12345")  # of nothing
    again = run_here(recipe, output_dir=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_same_end(tmp_path, whole.output_dir)
    assert (tmp_path / "samples.jsonl").read_bytes() == (whole.output_dir / "samples.jsonl").read_bytes()
    assert os.readlink(tmp_path / "best") == "checkpoint-20"
    assert os.readlink(tmp_path / "last") == ("checkpoint-32" if by_signal else "checkpoint-30")  # that of the stop
    assert "32 of 90 steps" in again.stdout
    assert not list(tmp_path.glob(".*.tmp"))


def training_lines(output: Path) -> dict[int, dict]:
    """Of metrics.jsonl, by their steps."""
    lines = [line for line in metrics(output) if "eval_loss" not in line]
    assert len(lines) == len({line["step"] for line in lines})
    return {line["step"]: line for line in lines}


def test_an_early_end_between_two_lines_is_logged_as_a_last_step_is(whole):
    """Though it shows only when the evaluation is made."""
    *_, line, evaluation = metrics(whole.output_dir)
    steps = [1, *range(3, 31, 3), 32]
    assert [*training_lines(whole.output_dir)] == steps
    assert (line["step"], evaluation["step"]) == (32, 32)
    assert line.keys() == training_lines(whole.output_dir)[30].keys()
    assert line["tokens"] == json.loads((whole.output_dir / "run.json").read_text())["report"]["tokens"]


@pytest.mark.parametrize("moment", [{"steps": 8}, {"evaluation_batches": 2 * BATCHES - 1}, {"steps": 9}], ids=str)
def test_no_step_left_by_another_max_steps_is_a_last_step_too(tmp_path, recipe, whole, moment):
    """A signal after step 8, in the evaluation of that, and after step 9, where there is a line anyway, leaves the
    steps since the last line to the start that goes on, though that makes none."""
    assert run_here(recipe, output_dir=tmp_path, **moment).returncode == 75
    step, expected = moment.get("steps", 8), training_lines(whole.output_dir)
    until_then = {at: line for at, line in expected.items() if at <= step}
    assert training_lines(tmp_path) == until_then
    run = run_here(recipe, "--max_steps", step, "--allow_changes", output_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = training_lines(tmp_path)
    assert [*lines] == sorted({*until_then, step})
    assert lines.items() >= until_then.items()
    assert lines[step].keys() == expected[6].keys()


def test_evaluations_without_a_number_are_none_the_better(tmp_path, recipe, monkeypatch):
    """A model that diverged: they count, over a stop, too; there is no best checkpoint, and no word of one."""
    real = Run.write_evaluation
    monkeypatch.setattr(Run, "write_evaluation", lambda run, results: real(run, dict.fromkeys(results, math.nan)))
    run = run_here(recipe, output_dir=tmp_path, steps=9, by="death")
    assert run.returncode is None, run.stderr
    best = {"metric": "eval_accuracy", "step": None, "value": None, "evaluations_since": 1}
    assert read_checkpoint(tmp_path / "last").state.best.model_dump() == best
    run = run_here(recipe, output_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "12 of 90 steps" in run.stdout
    assert "ended early: 3 evaluations without a finite eval_accuracy (early_stopping_patience)" in run.stdout
    assert "last is checkpoint-12" in run.stdout
    assert "best is" not in run.stdout
    assert not os.path.lexists(tmp_path / "best")


def test_more_patience_goes_on_where_it_ended(tmp_path, recipe, whole):
    """From the link, which is another's by then; and though no line tells any longer which evaluation was the best."""
    output = shutil.copytree(whole.output_dir, tmp_path / "output", symlinks=True)
    keys = ("--early_stopping_patience", 4, "--resume_from_checkpoint", output / "last")
    assert "--allow_changes" in run_here(recipe, *keys, output_dir=output).errors[0]
    (output / "metrics.jsonl").unlink()
    run = run_here(recipe, *keys, "--max_steps", 33, "--allow_changes", output_dir=output)
    assert run.returncode == 0, run.stderr
    assert f"going on from {(output / 'checkpoint-30').resolve()}, after step 30" in run.stdout
    assert "33 of 33 steps" in run.stdout
    assert "ended early" not in run.stdout
    assert os.readlink(output / "best") == "checkpoint-20"


def test_many_prompts_are_warned_of(tmp_path, chat, capsys):
    for count, warned in ((100, False), (101, True)):
        (tmp_path / "p.txt").write_text("a\n" * count)
        Samples(make_recipe(sample_every=1, sample_prompts=str(tmp_path / "p.txt")), chat[1])
        assert ("p.txt: 101 prompts, to all of which" in capsys.readouterr().out) == warned


def test_what_evaluates_takes_the_link(whole):
    """As the checkpoint that it leads to now; a run that goes on may have it lead elsewhere."""
    link = whole.output_dir / "best"
    checkpoint = link.resolve()
    found = find_model(str(link))
    assert found == find_model(f"{link}/")
    assert (Path(found.name), found.step) == (checkpoint, 20)
    assert found.recipe_file == whole.output_dir / "recipe.yaml"
    assert find_folder(str(link)) == found
    result = {"name": "loss", "checkpoint": {"name": "x", "step": 20}, "results": {"loss": {"value": 1}}}
    (checkpoint / "eval").mkdir()
    (checkpoint / "eval" / "loss.json").write_text(json.dumps(result))
    columns, problems = read_columns([link])
    assert ([column.step for column in columns], problems) == ([20], [])


def test_wandb_has_them_as_a_table(tmp_path, recipe, chat, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen = load_recipe(recipe, {"log_wandb": "true", "output_dir": str(tmp_path)})
    own = Samples(chosen, chat[1])
    log = RunLog(chosen, make_progress(4), main_process=True)
    log.write_samples(4, own, [Reply("That is 11.", 5, True), Reply("So", 24, False)])
    log.close()
    log.trackers.finish()
    (file,) = (tmp_path / "base" / "wandb").glob("offline-run-*/files/media/table/samples_*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["step", "prompt", "reply", "ended"]
    assert table["data"] == [[4, "sums 3 and 8?", "That is 11.", True], [4, "words\n\x1b[2J", "So", False]]
    assert [line["reply"] for line in samples(tmp_path)] == ["That is 11.", "So"]


def test_two_processes_reply_together(tmp_path, recipe, whole):
    keys = ("--gradient_accumulation_steps", 1, "--max_steps", 8)
    run_script(recipe, *keys, output_dir=tmp_path, launch="ddp2")
    one = run_here(recipe, "--max_steps", 8, output_dir=tmp_path / "one")
    assert samples(tmp_path) == samples(one.output_dir)
    assert len(samples(tmp_path)) == 2
    # Nothing was drawn yet, and what will be (NEFTune's noise, dropout) is each process's own.
    seed = load_recipe(recipe).rng_seed
    for index in (0, 1):
        state = json.loads((tmp_path / "last" / process_file(index)).read_text())["random"]["torch"]
        assert (state == torch.Generator().manual_seed(seed + 1).get_state().tolist()) == (index == 1)


def test_all_processes_make_the_same_number_of_forward_passes(tmp_path, tiny_model):
    """Each of which may be collective, though the replies of one end before those of the other."""
    chat = save_chat_model(tiny_model, tmp_path / "chat")
    run_script(chat, tmp_path / "found", launch="ddp2", script="tests/run/reply_worker.py", output_dir=tmp_path)
    found = json.loads((tmp_path / "found").read_text())
    assert found == [[12, [6, False], [6, False]], [12, [1, True], [1, True]]]


# ---- The replies ----


@pytest.fixture(scope="module")
def chat(tiny_model, tmp_path_factory):
    folder = save_chat_model(tiny_model, tmp_path_factory.mktemp("chat"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_by_conversation", "eager"])
def test_a_reply_is_the_same_whatever_is_beside_it_and_training_is_left_alone(chat, attention):
    model, tokenizer = chat
    model.set_attn_implementation(attention)
    model.train()
    settings, random = model.generation_config, torch.get_rng_state()
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 9, 1)]
    together = greedy_replies(model, tokenizer, prompts, 12, batch_size=4)
    alone = [reply for prompt in prompts for reply in greedy_replies(model, tokenizer, [prompt], 12, batch_size=1)]
    assert together == alone
    assert (model.training, model.config._attn_implementation, model.generation_config) == (True, attention, settings)
    assert torch.equal(torch.get_rng_state(), random)


def test_defaults_of_the_models_own_change_no_reply(chat):
    model, tokenizer = chat
    prompts = [[5, 6, 7], [8]]
    expected = greedy_replies(model, tokenizer, prompts, 12, 2)
    own = model.generation_config
    try:
        model.generation_config = type(own)(do_sample=True, repetition_penalty=5.0, max_length=3, num_beams=2)
        assert greedy_replies(model, tokenizer, prompts, 12, 2) == expected
    finally:
        model.generation_config = own


def test_half_precision_by_autocast(chat):
    model, tokenizer = chat
    with torch.autocast("cpu", torch.bfloat16):
        assert len(greedy_replies(model, tokenizer, [[5, 6], [7]], 4, 2)) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_rehearsal_is_of_the_largest_batch_at_its_fullest(tmp_path, chat, size):
    """By what each forward pass has to hold: rows times places, those of the cache among them."""
    model, tokenizer = chat
    (tmp_path / "prompts.txt").write_text("".join(f"{'word ' * count}\n" for count in (3, 9, 1, 1, 7)))
    keys = {"sample_every": 1, "sample_prompts": str(tmp_path / "prompts.txt"), "max_length": 64}
    own = Samples(make_recipe(per_device_eval_batch_size=size, **keys), tokenizer)
    accelerator = SimpleNamespace(num_processes=1)
    engine = SimpleNamespace(accelerator=accelerator, language_model=model, outside_of_the_loss=contextlib.nullcontext)
    held = []

    def measure(_, arguments, options) -> None:
        cached = options["past_key_values"].get_seq_length()
        held.append(len(options["input_ids"]) * (cached + options["input_ids"].shape[1]))

    def end_none(_, __, logits):
        return logits.index_fill(-1, torch.tensor([5]), 1e9)  # the likeliest token ends nothing

    head = model.get_output_embeddings()
    hooks = [model.register_forward_pre_hook(measure, with_kwargs=True), head.register_forward_hook(end_none)]
    own.rehearse(engine)
    (rehearsed,) = held
    own.take(engine)
    for hook in hooks:
        hook.remove()
    assert max(held[1:]) == rehearsed


def test_memory_that_is_too_small_for_replies_is_told_before_the_first_step(tmp_path, recipe, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("run.samples.reply_to", fail)
    run = run_here(recipe, output_dir=tmp_path)
    assert run.returncode == 2
    (error,) = run.errors
    assert error.startswith("error: the GPU's memory is too small for the replies to sample_prompts: give a smaller")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("every", "evaluations", "expected"),
    [
        (1, 100, [100, 200, 300, 350]),
        (100, 100, [100, 200, 300, 350]),
        (120, 100, [200, 300, 350]),  # the first evaluations after 120 and 240, and the last
        (250, 50, [250, 350]),
        (1000, 100, [350]),
        (None, 100, []),
    ],
)
def test_when_replies_are_due(every, evaluations, expected, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    keys = {"sample_every": every, "sample_prompts": str(tmp_path / "p.txt")} if every else {}
    due = Samples.due
    own = type("", (), {"recipe": make_recipe(eval_steps=evaluations, **keys)})
    steps = [*range(evaluations, 350, evaluations), 350]
    assert [step for step in steps if due(own, make_progress(350, step=step))] == expected


# ---- Which is the best ----

values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan"), float("inf")]), max_size=12)


@pytest.mark.parametrize("metric", ["eval_vicuna_loss", "eval_accuracy"])
@given(values)
def test_the_best_is_the_first_of_the_extremes(metric, values):
    best = None
    for step, value in enumerate(values, 1):
        best = judge(best, metric, step, value)
    finite = [value for value in values if value in (0, 0.25, 0.5, 1)]
    if not finite:
        assert best == (Best(metric, None, None, len(values)) if values else None)
        return
    extreme = max(finite) if metric.endswith("accuracy") else min(finite)
    step = values.index(extreme) + 1
    assert best == Best(metric, step, extreme, len(values) - step)


def test_another_metric_is_judged_from_the_beginning(tmp_path, recipe, whole, monkeypatch):
    """Which evaluation was the best by it, and how many came since, stands in metrics.jsonl."""
    output = shutil.copytree(whole.output_dir, tmp_path / "output", symlinks=True)
    lines = [line for line in whole.metrics() if "eval_words_loss" in line and line["step"] <= 30]
    chosen = load_recipe(recipe, {"output_dir": str(output), "early_stopping_metric": "eval_words_loss"})
    mix = make_mix([[5] * 40])
    best = starting_point(read_checkpoint(output / "last"), mix, chosen).best
    losses = [line["eval_words_loss"] for line in lines]
    step = lines[losses.index(min(losses))]["step"]
    assert best == Best("eval_words_loss", step, min(losses), sum(line["step"] > step for line in lines))
    with monkeypatch.context() as patch:  # another process may see another file: it takes what the first has read
        patch.setenv("RANK", "1")
        other = Run(chosen, None, None)
        other.progress = starting_point(read_checkpoint(output / "last"), mix, chosen)
        assert other.progress.best is None
        patch.setattr("run.run.gather_object", lambda values: [best if values == [None] else "node1", *values])
        other.meet(Accelerator(cpu=True))
        assert other.progress.best == best
    (output / "metrics.jsonl").unlink()
    assert starting_point(read_checkpoint(output / "last"), mix, chosen).best is None


def test_links_lead_to_what_is_there(tmp_path):
    recipe = make_recipe(output_dir=tmp_path)
    link_checkpoints(recipe, None)
    assert not list(tmp_path.iterdir())
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((2, 3.0), (4, None), (6, 2.0), (8, 1.0), (9, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (2, 4, 6, 7, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    link_checkpoints(recipe, None)  # 8 has no checkpoint, 7 no evaluation, 4 no number
    assert (os.readlink(tmp_path / "best"), os.readlink(tmp_path / "last")) == ("checkpoint-6", "checkpoint-9")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "best").resolve().name == "checkpoint-6"
    recipe = make_recipe(output_dir=moved)
    (moved / "metrics.jsonl").unlink()
    assert best_checkpoint(moved, "eval_loss", Best("eval_loss", 9, 0.5)).name == "checkpoint-9"
    shutil.rmtree(moved / "checkpoint-9")
    link_checkpoints(recipe, None)
    assert not os.path.lexists(moved / "best")
    assert os.readlink(moved / "last") == "checkpoint-7"


def test_a_file_system_without_links_is_told_of_once(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.symlink", refuse)
    recipe = make_recipe(output_dir=tmp_path)
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        link_checkpoints(recipe, Best("eval_loss", 2, 1.0))
    assert capsys.readouterr().out == (
        f"\n{tmp_path}: no links best and last there: Operation not permitted; the end says which they are\n"
    )
    found = best_and_last(recipe, Best("eval_loss", 2, 1.0))
    assert {name: path.name for name, path in found.items()} == {"best": "checkpoint-2", "last": "checkpoint-4"}


# ---- What is refused ----

REFUSED = {
    "a misspelt metric": ({"early_stopping_metric": "eval_los"}, "did you mean eval_loss?"),
    "of a data set that is none": ({"early_stopping_metric": "eval_sum_loss"}, "did you mean eval_sums_loss?"),
    "no name at all": ({"early_stopping_metric": "x"}, "no metric of this run's (known: eval_loss, eval_accuracy, "),
    "of training": ({"early_stopping_metric": "loss"}, "no metric of this run's"),
    "of a data set without a validation split": (
        {"early_stopping_metric": "eval_sums_accuracy", "datasets.sums.val_split": 0},
        "nothing of sums is held out",
    ),
    "nothing held out": ({"datasets.sums.val_split": 0, "datasets.words.val_split": 0}, "nothing is held out"),
    "no prompts": ({"sample_prompts": "null"}, "sample_every does nothing without sample_prompts"),
    "never": ({"sample_every": "null"}, "sample_prompts does nothing without sample_every"),
    "no such file": ({"sample_prompts": "nowhere.txt"}, "nowhere.txt: cannot read this file"),
    "an empty file": ({"sample_prompts": "empty.txt"}, "empty.txt: it holds no prompts"),
    "no prompts in it": ({"sample_prompts": "other.jsonl"}, "other.jsonl, record 1: neither a text, "),
    "a long prompt": ({"sample_prompts": "long.txt"}, "long.txt: prompt 2 has"),
    "every 0 steps": ({"sample_every": 0}, "sample_every = 0"),
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, recipe, keys, message, dry):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "long.txt").write_text("short\n" + "word " * 60)
    options = []
    for key, value in keys.items():
        file = key == "sample_prompts" and value != "null"
        options += [f"--{key}", tmp_path / value if file else value]
    run = run_here(recipe, *options, *["--dry_run"] * dry, output_dir=tmp_path / "output")
    assert run.returncode == 2, run.stdout
    (error,) = run.errors
    assert message in error
    assert any(key.rpartition(".")[2] in error for key in keys)
    assert not (tmp_path / "output" / "metrics.jsonl").exists()


def test_a_copy_in_place_of_a_link_stays_as_it_is(tmp_path, recipe):
    """As scp and `cp -L` make one."""
    for name in ("best", "last"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"somebody's")
    assert "best is no link of this run's" in run_here(recipe, "--dry_run", output_dir=tmp_path).stdout
    run = run_here(recipe, "--max_steps", 4, output_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "last is no link of this run's, and stays as it is: remove it" in run.stdout
    assert [
        path.read_bytes() for path in tmp_path.glob("*/model.safetensors") if path.parent.name in ("best", "last")
    ] == [b"somebody's"] * 2


def test_a_link_or_a_file_of_somebody_elses_is_left_alone(tmp_path, recipe):
    (tmp_path / "mine").mkdir()
    (tmp_path / "best").symlink_to("mine")
    run = run_here(recipe, "--max_steps", 4, output_dir=tmp_path)
    assert run.returncode == 0, run.stderr
    assert os.readlink(tmp_path / "best") == "mine"
    assert "best is checkpoint" not in run.stdout
    assert "    last is checkpoint-" in run.stdout
    other = tmp_path / "other"
    other.mkdir()
    (other / "samples.jsonl").write_text("mine\n")
    assert "holds another run (samples.jsonl)" in run_here(recipe, output_dir=other).errors[0]
    assert (other / "samples.jsonl").read_text() == "mine\n"
