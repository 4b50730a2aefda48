"""A run goes on from what it wrote, or says in one line why not: damage that keeps a file's size, files that somebody
added, values that no run writes, another model's config, an output folder that was taken away.

`make fuzz` makes the last tests' damage some thousands of times (FUZZ_CASES); the normal run makes some.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interruption import metrics, run_here, small_recipe
from mutations import NO_JSON, damaged_bytes, damaged_json, flipped, reseal, rewrite_state, written_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.mix import prepare_mix
from recipe.load import load_recipe
from run.checkpoint import read_checkpoint
from run.checkpoint_state import sealed
from run.folder import check_still_ours, claim_output_dir, lock_output_dir
from run.health import StepHealth
from run.lines import lines_up_to
from run.model_files import config_of_run
from run.record import differences
from run.record_file import read_record
from run.resume import check_config, check_data, find_checkpoint, is_finished, restore, starting_point
from run.run import Run
from run.stats import Clock, TrainingStats
from training.engine import prepare_engine
from training.model import load_config, load_tokenizer
from utils.errors import UserError

FORMAT_1 = ROOT / "tests" / "fixtures" / "checkpoint_format_1"
STATE = "trainer_state/state.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def recipe_file(folder, tiny_model):
    return small_recipe(folder, tiny_model, max_steps=6, save_steps=2, logging_steps=1, eval_steps=3, sample_replies=0)


@pytest.fixture(scope="module")
def whole(folder, recipe_file):
    run = run_here(recipe_file, output_dir=folder / "whole")
    assert run.returncode == 0, run.stderr
    return run.output_dir


@pytest.fixture(scope="module")
def stopped(folder, recipe_file):
    """After step 4, with checkpoints 2 and 4; to be copied."""
    run = run_here(recipe_file, output_dir=folder / "stopped", steps=4)
    assert run.returncode == 75, run.stderr
    return run.output_dir


@pytest.fixture
def output(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "output", symlinks=True)


@pytest.fixture
def newest(output):
    return output / "checkpoint-4"


def recipe_for(recipe_file: Path, output: Path, **keys):
    return load_recipe(recipe_file, {"output_dir": str(output), **{key: str(value) for key, value in keys.items()}})


def assert_passed_over(recipe_file: Path, output: Path, said: str, why: str) -> None:
    """The newest one, for a reason that names file and field; asked for by its name it is an error."""
    assert find_checkpoint(recipe_for(recipe_file, output), allow_changes=False).path == output / "checkpoint-2"
    (line,) = said().out.splitlines()
    assert line.startswith(f"passed over: {output}/checkpoint-4: ")
    assert why in line
    assert line.isprintable()
    asked = recipe_for(recipe_file, output, resume_from_checkpoint=output / "checkpoint-4")
    with pytest.raises(UserError) as error:
        find_checkpoint(asked, allow_changes=False)
    assert f"passed over: {error.value}" == line


def assert_same_end(output: Path, whole: Path) -> None:
    assert metrics(output) == metrics(whole)
    weights, expected = load_file(output / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected | weights)


@pytest.fixture
def engine(stopped, recipe_file):
    """A real one, to restore into."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = recipe_for(recipe_file, stopped)
    model = AutoModelForCausalLM.from_pretrained(stopped / "checkpoint-4")
    yield prepare_engine(Accelerator(cpu=True), model, recipe, 6)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next test's run has its own


@pytest.fixture(scope="module")
def mix(stopped, recipe_file):
    recipe = recipe_for(recipe_file, stopped)
    return prepare_mix(recipe, load_tokenizer(recipe))


def restored(checkpoint, recipe, engine, mix) -> tuple[TrainingStats, StepHealth]:
    stats, health = TrainingStats(mix, torch.device("cpu"), Clock()), StepHealth(10, None)
    restore(checkpoint, recipe, engine, stats, health)
    return stats, health


# ---- damage that keeps the size ----


def zeroed(content: bytes, share: float) -> bytes:
    """The contents behind some share of them lost, as after a flush that never came."""
    kept = int(len(content) * share)
    return content[:kept] + bytes(len(content) - kept)


def header_of(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


SAME_SIZE = {
    "all tensors zero": lambda content: content[: header_of(content)] + bytes(len(content) - header_of(content)),
    "second half zero": lambda content: zeroed(content, 0.5),
    "last byte": lambda content: flipped(content, len(content) - 1),
    "a byte within": lambda content: flipped(content, header_of(content) + 1001),
}


@pytest.mark.parametrize("how", SAME_SIZE)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state/optimizer-00000-000.safetensors"])
def test_weights_of_the_same_size(recipe_file, output, newest, capsys, name, how):
    path = newest / name
    path.write_bytes(SAME_SIZE[how](path.read_bytes()))
    assert_passed_over(recipe_file, output, capsys.readouterr, f"{name} is changed since it was written")


def test_a_byte_of_any_file(recipe_file, output, newest, capsys):
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) >= 8
    for path in files:
        content = path.read_bytes()
        for place in {0, len(content) // 3, len(content) - 2}:
            path.write_bytes(flipped(content, place))
            assert_passed_over(recipe_file, output, capsys.readouterr, path.name)
        path.write_bytes(content)
    assert find_checkpoint(recipe_for(recipe_file, output), allow_changes=False).step == 4


def test_a_digit_of_the_state(recipe_file, output, newest, capsys):
    """Every number in it is one that a run might have written."""
    file = newest / STATE
    changes = {'"conversations": 16': '"conversations": 12', '"evaluation_due": false': '"evaluation_due": true'}
    for old, new in changes.items():
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        assert_passed_over(recipe_file, output, capsys.readouterr, f"{STATE}: changed since it was written")
        file.write_text(text)
    file.write_text(json.dumps(json.loads(text)))  # blanks do not matter
    assert find_checkpoint(recipe_for(recipe_file, output), allow_changes=False).step == 4


# ---- only what is listed is read ----


def add_files(checkpoint: Path) -> None:
    """What transformers or the optimizer would take, and the like."""
    model = checkpoint / "model.safetensors"
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(model).items()}
    save_file(other, checkpoint / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(other, checkpoint / "pytorch_model.bin")
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (checkpoint / "eval").mkdir()
    (checkpoint / "eval" / "gsm8k.json").write_text("{}")
    state = checkpoint / "trainer_state"
    moments = {key: tensor + 1 for key, tensor in load_file(state / "optimizer-00000-000.safetensors").items()}
    save_file(moments, state / "optimizer-00001-000.safetensors")
    (state / "process-1.json").write_text("[")


def test_files_that_somebody_added_change_nothing(recipe_file, output, newest, whole):
    add_files(newest)
    run = run_here(recipe_file, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert f"going on from {newest}" in run.stdout
    assert_same_end(output, whole)


def test_a_model_in_parts_beside_a_whole_one(recipe_file, output, newest, whole):
    """Which transformers would take in their place."""
    model = AutoModelForCausalLM.from_pretrained(newest)
    values = json.loads((newest / STATE).read_text())
    (newest / "model.safetensors").unlink()
    model.save_pretrained(newest, max_shard_size="100KB")
    del values["files"]["model.safetensors"]
    values["files"] |= {path.name: {} for path in newest.glob("model*")}
    (newest / STATE).write_text(json.dumps(values))
    reseal(newest)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save_file(zeros, newest / "model.safetensors", {"format": "pt"})
    run = run_here(recipe_file, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert_same_end(output, whole)


# ---- the model is the run's ----

CONFIGS = {
    "num_hidden_layers": 1,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-2,
    "hidden_dropout": 0.5,
    "attention_dropout": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    "use_parallel_residual": False,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "vocab_size": 1040,
}


@pytest.mark.parametrize("key", CONFIGS)
def test_another_config_is_refused(recipe_file, output, newest, key):
    recipe = recipe_for(recipe_file, output)
    config = config_of_run(recipe, load_config(recipe), load_tokenizer(recipe))
    check_config(read_checkpoint(newest), config, recipe, allow_changes=False)
    then = json.loads((newest / "config.json").read_text())
    (newest / "config.json").write_text(json.dumps(then | {key: CONFIGS[key]}))
    reseal(newest)
    now = then[key]
    expected = f"{key}: {CONFIGS[key]} then, {now} now"
    if key == "rope_parameters":
        expected = f"rope_parameters.rope_theta: 500.0 then, {now['rope_theta']} now"
    with pytest.raises(UserError) as error:
        check_config(read_checkpoint(newest), config, recipe, allow_changes=False)
    assert str(error.value).startswith(f"{newest}/config.json is not that of model_name = {recipe.model_name}: ")
    assert expected in str(error.value)


def test_whole_runs_with_another_config(recipe_file, output, newest, whole):
    text = (newest / "config.json").read_text()
    (newest / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    reseal(newest)
    run = run_here(recipe_file, output_dir=output)
    assert run.returncode == 2
    assert "num_hidden_layers: 1 then, 2 now: give another --output_dir" in run.errors[0]
    run = run_here(recipe_file, "--allow_changes", output_dir=output)
    assert run.returncode == 0, run.stderr
    assert "changed: config.json: num_hidden_layers: 1 then, 2 now" in run.stdout
    assert_same_end(output, whole)  # trained with the model as it is now


def test_another_config_of_format_1(tmp_path):
    output = shutil.copytree(FORMAT_1 / "run", tmp_path / "output")
    path = output / "checkpoint-5" / "config.json"
    path.write_text(path.read_text().replace('"layer_norm_eps": 1e-05', '"layer_norm_eps": 2e-05'))
    recipe = (FORMAT_1 / "recipe.yaml").relative_to(ROOT)
    for more in ([], ["--dry_run"]):
        run = run_here(recipe, "--cache_dir", tmp_path / "cache", *more, output_dir=output)
        assert run.returncode == 2
        assert "config.json is not that of model_name" in run.errors[0]
        assert "layer_norm_eps: 2e-05 then, 1e-05 now" in run.errors[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[]", b"\x80", b"{}", b'{"model_type": 5}'])
def test_a_config_that_is_none(recipe_file, output, newest, content):
    recipe = recipe_for(recipe_file, output)
    (newest / "config.json").write_bytes(content)
    reseal(newest)
    with pytest.raises(UserError, match=f"^{newest}: no usable config: "):
        check_config(read_checkpoint(newest), load_config(recipe), recipe, allow_changes=False)


@pytest.mark.parametrize("how", ["missing", "unexpected", "smaller"])
def test_tensors_that_do_not_fit(recipe_file, output, newest, how):
    path, name = newest / "model.safetensors", "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    weights = load_file(path)
    if how == "missing":
        del weights[name]
    elif how == "unexpected":
        weights[name.replace("layers.1", "layers.2")] = weights[name].clone()
    else:
        weights[name] = weights[name][:5].clone()
    save_file(weights, path, {"format": "pt"})
    reseal(newest)
    said = {
        "missing": f"checkpoint-4: its weights lack {name}",
        "unexpected": "checkpoint-4: its weights have gpt_neox.layers.2.mlp.dense_4h_to_h.weight, which its",
        "smaller": f"checkpoint-4: its weights have {name} as ",
    }
    recipe = recipe_for(recipe_file, output)
    run = Run(recipe, read_checkpoint(newest), lock=None)
    with pytest.raises(UserError, match=f"^{said[how]}"):
        run.load_model(load_config(recipe), load_tokenizer(recipe), torch.float32)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("exp_avg", float("nan"), "holds values that are no finite numbers"),
        ("exp_avg_sq", float("inf"), "holds values that are no finite numbers"),
        ("exp_avg_sq", -0.001, "a mean of squares, holds -0.001"),
    ],
)
def test_numbers_that_adam_cannot_have(recipe_file, output, newest, engine, mix, kind, value, said):
    """Saved so: the checksum is right."""
    name, path = "gpt_neox.layers.1.attention.dense.weight", newest / "trainer_state/optimizer-00000-000.safetensors"
    tensors = load_file(path)
    tensors[f"{kind}/0/{name}"].view(-1)[7] = value
    save_file(tensors, path, {"format": "pt"})
    reseal(newest)
    with pytest.raises(UserError) as error:
        restored(read_checkpoint(newest), recipe_for(recipe_file, output), engine, mix)
    assert str(error.value).startswith(f"{newest}/trainer_state: {kind} of {name}")
    assert str(error.value).endswith(said)


def test_keys_that_are_no_part_of_an_optimizer(recipe_file, output, newest, engine, mix):
    path = newest / "trainer_state/optimizer-00000-000.safetensors"
    tensors = load_file(path)
    for key in ("exp_avg", "exp_avg/x/y", f"exp_avg/{10**30}/y", "/", ""):
        save_file(tensors | {key: torch.zeros(1)}, path)
        reseal(newest)
        with pytest.raises(
            UserError, match=r"optimizer-00000-000.safetensors: '.*' is no part of an optimizer's state"
        ):
            restored(read_checkpoint(newest), recipe_for(recipe_file, output), engine, mix)


# ---- values that no run writes ----

HUGE = 10**400
WRONG_STATES = {
    "step": ["4", 4.0, True, None, -4, [4], HUGE, {}],
    "position": [
        *({}, None, 4, [0, 16], {"epoch": 0}, {"epoch": 0, "conversations": -5}, {"epoch": "0", "conversations": 16}),
        *({"epoch": 0, "conversations": 16, "pack": 3}, {"epoch": HUGE, "conversations": 0}),
        {"epoch": 0.5, "conversations": 1},
    ],
    "num_processes": [0, 2, -1, "1", None, HUGE, 1.0],
    "recipe": [None, [], {}, "x", 5],
    "data": [None, {}, {"sums": "x"}, {"sums": 1, "words": "x"}, {"sums": "x", "words": "x", "more": "x"}, []],
    "health": [None, {}, [], 5],
    "loss_scale": [None, 5, {"by": "x"}, {"by": "torch"}, {"by": "torch", "scale": -1}, {"scale": 1}, {"by": []}],
    "results": [None, [], {"eval_loss": "x"}, {"eval_loss": None}, 5],
    "evaluation_due": [None, 0, "true", 1],
    "wandb_id": [5, [], False],
    "files": [{}, None, [], {"config.json": 5}, {"config.json": {"bytes": 5, "checksum": None}}],
    "format": [0, -1, "2", 2.0, None, True, [], 1],
}


@pytest.mark.parametrize("key", WRONG_STATES)
def test_values_of_a_state_that_no_run_writes(recipe_file, output, newest, capsys, key):
    text = (newest / STATE).read_text()
    for wrong in WRONG_STATES[key]:
        rewrite_state(newest, **{key: wrong})
        # A second process's file is not among them, and the files of format 1 have sizes alone.
        why = "files" if wrong == {"num_processes": 2, "format": 1}.get(key, "") and wrong is not True else key
        assert_passed_over(recipe_file, output, capsys.readouterr, why)
        (newest / STATE).write_text(text)
    values = json.loads(text)
    del values[key]
    (newest / STATE).write_text(json.dumps(sealed(values)))
    assert_passed_over(recipe_file, output, capsys.readouterr, f"{key} is missing" if key != "format" else key)
    (newest / STATE).write_text(text)


def test_values_within_that_no_run_writes(recipe_file, output, newest, capsys):
    values = json.loads((newest / STATE).read_text())
    health, recipe, files = values["health"], values["recipe"], values["files"]
    model = files["model.safetensors"]
    best = {"metric": "eval_loss", "step": 3, "value": 2.5, "evaluations_since": 0}
    needed = [name for name in files if name.endswith(("safetensors", "process-0.json")) or name == "config.json"]
    cases = [
        *[("health", health | {name: wrong}) for name in health for wrong in (None, "x", -1.5, [None], float("nan"))],
        *[("health", health | {"skipped": 5}), ("health", health | {"norms": [1.0] * 101})],
        *[("recipe", recipe | {"learning_rate": wrong}) for wrong in ("x", None, -1, [])],
        *[("recipe", recipe | {"model_name": "\ud800"}), ("recipe", {"model_name": "x"})],
        *[("step", 100), ("position", {"epoch": 10**10, "conversations": HUGE})],
        *[("tracker_runs", wrong) for wrong in (None, [], "x", {"mlflow": 5}, {"mlflow": None})],
        *[("best", wrong) for wrong in (5, [], {}, best | {"value": float("nan")})],
        *[("best", best | {name: wrong}) for name in ("step", "evaluations_since") for wrong in (-1, [], "5", 0.5)],
        *[
            *[("best", best | {name: None}) for name in ("step", "value")],
            ("best", best | {"metric": 5}),
            ("best", best | {"step": 10**6}),
            ("best", best | {"more": 1}),
        ],
        *[("files", files | {name: model}) for name in ("../x", "/etc/passwd", "./config.json", "a\0b", "")],
        *[("files", {key: own for key, own in files.items() if key != gone}) for gone in needed],
        *[("files", files | {"model.safetensors": model | {"bytes": wrong}}) for wrong in (-1, 0, "5", 5.0, None)],
        *[("files", files | {"model.safetensors": model | {"checksum": wrong}}) for wrong in (5, "", "md5:0", None)],
        *[("more", 5), ("checksum_", "x")],
    ]
    for key, wrong in cases:
        (newest / STATE).write_text(json.dumps(sealed(values | {key: wrong})))
        assert_passed_over(recipe_file, output, capsys.readouterr, "")


def test_values_of_a_process_that_no_run_writes(recipe_file, output, newest, capsys):
    path = newest / "trainer_state" / "process-0.json"
    values = json.loads(path.read_text())
    stats, own = values["stats"], values["random"]
    numpy, words = own["numpy"], own["python"][1]
    cases = [
        *[("stats", stats | {name: wrong}) for name in stats for wrong in (None, "x", -1.5, [None], HUGE)],
        *[("stats", stats | {"sums": [*stats["sums"], 0.0]}), ("stats", stats | {"steps": 100}), ("stats", {})],
        *[("stats", stats | {"clock": stats["clock"] | {"data": wrong}}) for wrong in ("x", -1, None)],
        *[("random", own | {name: wrong}) for name in own for wrong in (None, [], {}, "x", [[]], [3, [], None])],
        ("random", own | {"torch": own["torch"][:-1]}),
        *[("random", own | {"torch": [256, *own["torch"][1:]]}), ("random", own | {"cuda": "x"})],
        *[("random", own | {"python": wrong}) for wrong in ([2, *own["python"][1:]], [*own["python"], None])],
        *[("random", own | {"python": [3, [*words[:-1], wrong], None]}) for wrong in (625, -1, "x", HUGE)],
        *[("random", own | {"numpy": numpy | {"state": numpy["state"] | {"pos": wrong}}}) for wrong in (625, -1, HUGE)],
        *[("random", own | {"numpy": numpy | {"state": numpy["state"] | {"key": [1, 2]}}})],
        ("more", 1),
    ]
    for key, wrong in cases:
        if wrong == stats | {"waited": None}:  # as in the first checkpoints
            continue
        path.write_text(json.dumps(values | {key: wrong}))
        reseal(newest)
        assert_passed_over(recipe_file, output, capsys.readouterr, "process-0.json: not the state of a process")


@pytest.mark.parametrize("name", [STATE, "trainer_state/process-0.json"])
def test_what_is_no_json_at_all(recipe_file, output, newest, capsys, name):
    path = newest / name
    text = (newest / STATE).read_text()
    for content in NO_JSON:
        (newest / STATE).write_text(text)
        path.write_bytes(content)
        if name != STATE:
            reseal(newest)
        assert_passed_over(recipe_file, output, capsys.readouterr, name)
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name)):
        make()
        assert_passed_over(recipe_file, output, capsys.readouterr, name)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_key_that_stands_there_twice(recipe_file, output, newest, capsys):
    text = (newest / STATE).read_text()
    (newest / STATE).write_text(text.replace('"step": 4', '"step": 4, "step": 4'))
    why = f"{STATE}: JSON does not parse: the key 'step' is given twice"
    assert_passed_over(recipe_file, output, capsys.readouterr, why)


@pytest.mark.parametrize(
    ("step", "position", "said"),
    [
        (4, {"epoch": 0, "conversations": 38}, "position.conversations = 38 of an epoch of 38"),
        (4, {"epoch": 0, "conversations": 3}, "step = 4 after 3 conversations"),
        (4, {"epoch": 10**15, "conversations": 10**15}, "position.conversations = 1000000000000000 of an epoch of 38"),
    ],
)
def test_a_position_that_the_data_do_not_have(recipe_file, output, newest, mix, step, position, said):
    rewrite_state(newest, step=step, position=position)
    with pytest.raises(UserError) as error:
        check_data(read_checkpoint(newest), mix, recipe_for(recipe_file, output), allow_changes=False)
    assert str(error.value) == f"{newest}/{STATE}: damaged: {said}: remove this checkpoint"


# ---- metrics.jsonl and bad_steps.jsonl ----

NO_LINES = (
    *("5", "[]", "null", "{}", '"x"', "{", "1" * 5000, "[" * 5000, "\0\0", "\ud800", '{"loss": 1}', '{"step": "3"}'),
    *('{"step": -1}', '{"step": 3.5}', '{"step": true}', f'{{"step": {HUGE}}}', '{"step": 3, "loss": "x"}'),
    *('{"step": 3, "loss": [1]}', '{"step": 3, "loss": 1e999}', '{"step": 3, "loss": NaN}'),
)


def test_damaged_lines_are_left_out_and_named(recipe_file, output, whole):
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines()
    damaged = "\n".join([*NO_LINES, *lines, ""])
    path.write_bytes(damaged.encode(errors="surrogatepass"))
    (output / "bad_steps.jsonl").write_text('5\n{"step": "x"}\n{"step": 2, "loss": "nan"}\n{"step": 99}\n')
    run = run_here(recipe_file, output_dir=output)
    assert run.returncode == 0, run.stderr
    assert_same_end(output, whole)
    for number in range(1, len(NO_LINES) + 1):
        assert f"{path} line {number}: left out, it is damaged" in run.stdout
    assert (output / "bad_steps.jsonl").read_text() == '{"step": 2, "loss": "nan"}\n'
    assert f"{output}/bad_steps.jsonl line 2: left out, it is damaged" in run.stdout


def test_lines_that_are_damaged_while_it_runs(recipe_file, tmp_path, whole, monkeypatch):
    """The curves and the best loss do without them."""
    end_step = Run.end_step

    def and_damage(self, *others):
        end_step(self, *others)
        if self.progress.step == 2:
            with open(self.log.path, "ab") as file:
                file.write("\n".join([*NO_LINES, ""]).encode(errors="surrogatepass"))

    monkeypatch.setattr(Run, "end_step", and_damage)
    run = run_here(recipe_file, output_dir=tmp_path / "run")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "run" / "run.json").read_text())["report"]
    assert report["best_eval_loss"] == json.loads((whole / "run.json").read_text())["report"]["best_eval_loss"]


# ---- an output folder that is no longer ours ----


def taken_away(output: Path, how: str) -> None:
    if how in ("renamed", "replaced", "replaced by another run"):
        output.rename(output.with_name("elsewhere"))
    if how == "replaced":
        output.mkdir()
    if how == "replaced by another run":
        shutil.copytree(output.with_name("elsewhere"), output)
    if how == "a link to nowhere":
        output.rename(output.with_name("elsewhere"))
        output.symlink_to("nowhere")
    if how == "deleted":
        shutil.rmtree(output)
    if how == "emptied":
        for path in output.iterdir():
            if not path.name.startswith("."):  # as rm -rf OUTPUT_DIR/* does
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


WAYS = ["deleted", "renamed", "replaced", "replaced by another run", "emptied", "a link to nowhere"]


@pytest.mark.parametrize("how", WAYS)
def test_a_folder_that_is_no_longer_ours(recipe_file, tmp_path, how):
    recipe = recipe_for(recipe_file, tmp_path / "output")
    lock = lock_output_dir(recipe)
    claim_output_dir(recipe, None)
    check_still_ours(recipe, lock)
    (recipe.output_dir / "recipe.yaml").write_text("edited meanwhile")
    check_still_ours(recipe, lock)
    taken_away(recipe.output_dir, how)
    with pytest.raises(UserError, match=f"^output_dir = {recipe.output_dir}: no longer the folder that this run began"):
        check_still_ours(recipe, lock)


@pytest.mark.parametrize(
    ("when", "how"),
    [("end_step", "deleted"), ("write_evaluation", "replaced"), ("save", "deleted"), ("end", "emptied")],
)
def test_a_run_whose_folder_is_taken_away(recipe_file, tmp_path, monkeypatch, when, how):
    """It stops with one line, and leaves nothing under the old name but what somebody else put there. What it writes
    meanwhile is tests/run/test_saving.py."""
    output, original, seen = tmp_path / "output", getattr(Run, when), []

    def what_is_there() -> list[str]:
        return [str(path.relative_to(output)) for path in sorted(output.rglob("*")) if ".checkpoint-" not in str(path)]

    def taken_before(self, *others):
        if not seen:
            taken_away(output, how)
            seen.append(what_is_there())
        original(self, *others)

    monkeypatch.setattr(Run, when, taken_before)
    run = run_here(recipe_file, output_dir=output)
    assert run.returncode == 2, run.stderr
    (error,) = run.errors
    assert error.startswith(f"error: output_dir = {output}: no longer the folder that this run began in")
    assert what_is_there() == seen[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("launch", ["ddp2", pytest.param("zero2x2", marks=pytest.mark.soak)])
def test_all_processes_stop(recipe_file, tmp_path, launch):
    output = tmp_path / "output"
    run = run_script(
        *(output, recipe_file, "--output_dir", output),
        launch=launch,
        output_dir=output,
        check=False,
        script="tests/taking_away.py",
    )
    assert run.returncode == 1, run.stderr[-3000:]
    assert [error for error in run.errors if "no longer the folder" in error] == run.errors
    assert len(run.errors) == 1
    assert not output.exists()


# ---- at random ----

SHORT, LONG = 40, int(os.environ.get("FUZZ_CASES", 3000))
QUICK = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


def is_one_line(problem: UserError) -> None:
    assert str(problem).isprintable()


def same_or_refused(recipe, output: Path, pristine: Path) -> str:
    """The checkpoint in use is the undamaged one, or what differs from it was never read."""
    found = find_checkpoint(recipe, allow_changes=False)
    if found.path.name == "checkpoint-2":
        return "passed over"
    assert found.state == read_checkpoint(pristine).state
    for name in found.state.files:
        assert (found.path / name).read_bytes() == (pristine / name).read_bytes()
    return "same"


def damage_any_file(seed: int, recipe, output: Path, pristine: Path) -> None:
    """One file of the newest checkpoint, in one way."""
    rng = random.Random(seed)
    names = sorted(path.relative_to(pristine).as_posix() for path in pristine.rglob("*") if path.is_file())
    path = output / "checkpoint-4" / rng.choice([*names, STATE, STATE])
    content = path.read_bytes()
    try:
        if path.suffix == ".json" and rng.random() < 0.5:
            path.write_bytes(written_json(damaged_json(rng, json.loads(content))))
        else:
            path.write_bytes(damaged_bytes(rng, content))
        same_or_refused(recipe, output, pristine)
    finally:
        path.write_bytes(content)


def damage_values(seed: int, recipe, output: Path, engine, mix) -> None:
    """Values of state.json or process-0.json under right checksums: they are refused in one line, or can be used."""
    rng = random.Random(seed)
    checkpoint = output / "checkpoint-4"
    path = checkpoint / rng.choice([STATE, STATE, "trainer_state/process-0.json"])
    before = {each: each.read_bytes() for each in (path, checkpoint / STATE)}
    try:
        values = damaged_json(rng, json.loads(before[path]))
        path.write_bytes(written_json(values))
        if path.name != "state.json":
            reseal(checkpoint)
        elif isinstance(values, dict):
            path.write_bytes(written_json(sealed(values)))
        try:
            found = find_checkpoint(recipe, allow_changes=False)
            if found.step == 4:
                check_data(found, mix, recipe, allow_changes=False)
                progress = starting_point(found, mix, recipe)
                stats, health = restored(found, recipe, engine, mix)
                assert progress.step == 4
                assert progress.total_steps == 6
                assert torch.isfinite(stats.sums).all()
                json.dumps(health.state_dict(), allow_nan=False)
        except UserError as problem:
            is_one_line(problem)
    finally:
        for each, content in before.items():
            each.write_bytes(content)


def damage_record(seed: int, recipe, output: Path) -> None:
    rng = random.Random(seed)
    path = output / "run.json"
    content = path.read_bytes()
    try:
        if rng.random() < 0.6:
            path.write_bytes(written_json(damaged_json(rng, json.loads(content))))
        else:
            path.write_bytes(damaged_bytes(rng, content))
        try:
            is_finished(recipe)
            record = read_record(path)
            differences(record, json.loads(content))
        except UserError as problem:
            is_one_line(problem)
    finally:
        path.write_bytes(content)


def damage_lines(seed: int, output: Path) -> None:
    rng = random.Random(seed)
    path = output / "metrics.jsonl"
    content = path.read_bytes()
    try:
        path.write_bytes(damaged_bytes(rng, content))
        for line in lines_up_to(path, 4, evaluation_due=False).splitlines():
            assert json.loads(line)["step"] <= 4
    finally:
        path.write_bytes(content)


@pytest.fixture
def fuzzed(stopped, recipe_file, tmp_path, engine, mix):
    """By what is damaged, a trial from a seed, on a copy of the stopped run."""
    output = shutil.copytree(stopped, tmp_path / "fuzzed")
    recipe = recipe_for(recipe_file, output)
    return {
        "files": lambda seed: damage_any_file(seed, recipe, output, stopped / "checkpoint-4"),
        "values": lambda seed: damage_values(seed, recipe, output, engine, mix),
        "record": lambda seed: damage_record(seed, recipe, output),
        "lines": lambda seed: damage_lines(seed, output),
    }


KINDS = ["files", "values", "record", "lines"]


@pytest.mark.parametrize("what", KINDS)
def test_damage_at_random(fuzzed, what):
    @settings(max_examples=SHORT, **QUICK)
    @given(st.integers(0, 2**32))
    def is_one_line_or_none(seed):
        fuzzed[what](seed)

    is_one_line_or_none()


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", KINDS)
def test_much_damage_at_random(fuzzed, what):
    first = int(os.environ.get("FUZZ_SEED", random.randrange(2**32)))
    for seed in range(first, first + LONG):
        try:
            fuzzed[what](seed)
        except BaseException:
            print(f"FUZZ_SEED={seed}")
            raise


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_whole_runs_with_a_byte_changed(recipe_file, stopped, whole, tmp_path):
    rng = random.Random(int(os.environ.get("FUZZ_SEED", 0)))
    for number in range(LONG // 100):
        output = shutil.copytree(stopped, tmp_path / str(number))
        path = rng.choice([path for path in sorted(output.rglob("*")) if path.is_file() and path.name != ".lock"])
        content = path.read_bytes()
        path.write_bytes(flipped(content, rng.randrange(len(content)), 1 << rng.randrange(8)))
        run = run_here(recipe_file, output_dir=output)
        if run.returncode == 2:
            assert len(run.errors) == 1, (path, run.stderr)
        else:
            assert run.returncode == 0, (path, run.stderr)
            if path.name != "metrics.jsonl":  # a digit of an earlier line is not what is trained
                assert_same_end(output, whole)
        shutil.rmtree(output)
