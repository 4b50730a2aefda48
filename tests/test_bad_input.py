"""Bad input: one line that names what to mend, exit status 2, no traceback, and nothing lost.

Most cases run scripts/sft.py within the test's own process, which imports torch once; what depends on the process
(the hub's offline switch, the launcher) runs as its own.
"""

import contextlib
import gzip
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launcher_options, run_script
from forking import run_forked

from recipe.load import load_recipe
from run.folder import OWN_FILES, check_own_names
from run.record_file import read_record
from run.stopping import SIGNALS
from training.deepspeed_config import fill_config, find_config
from training.model import load_config, load_model, load_tokenizer
from utils.errors import UserError, one_line_errors
from utils.launch import check_processes, training_dtype

DEMO = ROOT / "recipes" / "demo.yaml"
DATA = ROOT / "recipes" / "demo_data"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def output_dir(tmp_path) -> Path:
    """An output folder with something of the user's in it."""
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def refused(tmp_path, output_dir, monkeypatch, capfd):
    """Run the script on the demo recipe with these options, see it refuse them, and return its line."""

    def run(*arguments, recipe: Path | str = DEMO, parts: tuple[str, ...] = (), output: Path = output_dir) -> str:
        before = snapshot(tmp_path)
        options = ["--output_dir", str(output), "--cache_dir", str(tmp_path / "cache"), *map(str, arguments)]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["scripts/sft.py", str(recipe), *options])
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "scripts" / "sft.py"), run_name="__main__")
        for number, handler in handlers.items():
            signal.signal(number, handler)
        stderr = capfd.readouterr().err
        assert stopped.value.code == 2
        assert "Traceback" not in stderr
        (line,) = re.findall(r"^error: .*$", stderr, flags=re.MULTILINE)
        for part in parts:
            assert part in line
        # What was there is there as it was. New, or of the last refused run, are at most its recipe and its record.
        own = {"output/.lock", "output/recipe.yaml", "output/run.json"}
        before = {name: content for name, content in before.items() if name not in own}
        after = snapshot(tmp_path)
        assert {name: after.get(name) for name in before} == before
        new = {name for name in after.keys() - before.keys() if not name.startswith("cache/prepared/")}
        assert new <= own
        return line

    return run


# ---- The recipe's file ----


def test_recipe_file(tmp_path, refused):
    refused(recipe=tmp_path / "none.yaml", parts=("none.yaml", "No such file", "looked in"))
    refused(recipe=tmp_path, parts=(str(tmp_path), "Is a directory"))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    refused(recipe=tmp_path / "list.yaml", parts=("list.yaml", "a list"))
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    refused(recipe=tmp_path / "binary.yaml", parts=("binary.yaml", "UTF-8"))
    (tmp_path / "cut.yaml").write_text(DEMO.read_text()[:330] + "\n  - [")
    refused(recipe=tmp_path / "cut.yaml", parts=("cut.yaml line ", "column", "does not parse"))
    refused("--learning_rte", "1", parts=("command line", "learning_rte", "learning_rate?"))
    refused("--datasets.vicuna.fractoin", "1", parts=("command line", "datasets.vicuna.fractoin", "fraction?"))


def test_an_error_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise UserError("a\nname: of two\n lines")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a name: of two lines\n"


@pytest.mark.parametrize("local_rank", [0, 1], ids=["another machine", "the same machine"])
def test_an_error_on_a_process_other_than_the_first_begins_as_every_error_does(capsys, monkeypatch, local_rank):
    """Before the processes have met, the first of a machine speaks for the others of it; they, where it does not."""
    monkeypatch.setattr("utils.errors.PATIENCE", 0.0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with keeping_signals(), pytest.raises(SystemExit) as stopped, one_line_errors():
        raise UserError("no room")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: process 3: no room\n"


@contextlib.contextmanager
def keeping_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


BEHIND = """
import os, sys, time
sys.path.insert(0, "scripts")
from utils.errors import UserError, one_line_errors
from utils.launch import stop_all
with one_line_errors():
    if os.environ["RANK"] == "0":
        time.sleep(1.5)
    {fail}("no room")
"""


@pytest.mark.parametrize("fail", ["raise UserError", "stop_all"])
def test_the_first_process_says_what_is_wrong_though_another_ends_sooner(tmp_path, fail):
    """A launcher ends all of them as soon as one has ended."""
    (tmp_path / "behind.py").write_text(BEHIND.format(fail=fail))
    run = run_script(launch="ddp2", script=str(tmp_path / "behind.py"), output_dir=tmp_path, check=False)
    assert run.errors == ["error: no room"]


def test_a_path_that_can_be_none_is_one_line_wherever_it_is_looked_for(tmp_path, capsys):
    for path in (tmp_path / ("x" * 300), Path("/abcdefgh" * 500)):
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            path.is_file()
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "File name too long" in line
        assert "cannot write" not in line
    with pytest.raises(PermissionError), one_line_errors():  # a bug of ours, or nobody's business
        raise PermissionError(13, "Permission denied")


def test_ctrl_c_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130  # as shells count: 128 and the signal's number
    assert capsys.readouterr().err == "\ninterrupted\n"


# ---- Data ----


def only(name: str, path: Path | str, **options) -> tuple[str, str]:
    return "--datasets", json.dumps([{name: {"input_file_path": str(path), **options}}])


def test_missing_data_file(tmp_path, refused):
    refused(*only("vicuna", tmp_path / "none.json"), parts=("vicuna", f"{tmp_path}/none.json not found", "looked at"))
    name = "x" * 300 + ".json"  # longer than a file's name can be
    refused(*only("vicuna", tmp_path / name), parts=("vicuna", "not found"))
    refused(*only("vicuna", tmp_path), parts=("vicuna", f"{tmp_path}: the split train is of no kind that is read"))
    refused(*only("vicuna", tmp_path / "none.json"), "--dry_run", parts=("vicuna", "none.json"))


CUT_OFF = {
    "array": ("vicuna", "sharegpt.json", "json", "cut off"),
    "lines": ("dolly15k", "dolly.jsonl", "jsonl", "cut off"),
    "gzip": ("oasst_export", "oasst_trees.jsonl", "jsonl.gz", "cut off"),
}


@pytest.mark.parametrize("kind", CUT_OFF)
@pytest.mark.parametrize("dry", [False, True])
def test_cut_off_data_file(tmp_path, refused, kind, dry):
    name, file, ending, what = CUT_OFF[kind]
    content = (DATA / file).read_bytes()
    content = gzip.compress(content) if ending.endswith("gz") else content
    path = tmp_path / f"data.{ending}"
    path.write_bytes(content[: len(content) // 2])
    line = refused(*only(name, path), *(["--dry_run"] if dry else []), parts=(str(path), what))
    assert re.search(r"(record|line) \d+", line)
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("dolly15k", "", ("the file is empty",)),
        ("dolly15k", "[]", ("holds no records",)),
        ("dolly15k", "instruction,response\nWhat?,That.\n", ("line 1", "not valid JSON")),
        ("dolly15k", '{"instruction": "a"\n{"instruction": "b"}\n', ("line 1", "not valid JSON", "at column 20")),
        ("dolly15k", bytes(range(128, 256)), ("line 1", "not UTF-8")),
        ("dolly15k", "<!DOCTYPE html>\n<p>Not found</p>\n", ("web page", "download it anew")),
        ("dolly15k", '{"instruction": "a", "context": ""}\n', ("record 1", "response")),
        ("dolly15k", '{"instruction": "a", "context": "", "response": 3}\n', ("record 1", "response", "a number")),
        ("code_alpaca", '[{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a"}]', ("record 2",)),
        ("vicuna", '{"id": "1"}\n', ("record 1", "conversations")),
        ("vicuna", '[{"conversations": [{"from": "human"}]}]', ("record 1", "value")),
        ("oasst_export", '{"message_tree_id": "1"}\n', ("record 1", "prompt")),
        ("grade_school_math_instructions", '{"INSTRUCTION": "a"}\n', ("record 1", "RESPONSE")),
    ],
)
def test_data_of_another_form(tmp_path, refused, name, content, parts):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(*only(name, path), parts=(str(path), *parts))


def test_a_mended_data_file_is_read_again(tmp_path, refused, capfd):
    """A refused file leaves nothing behind that a later run would take for its data."""
    path = tmp_path / "data.jsonl"
    good = (DATA / "dolly.jsonl").read_text()
    path.write_text(good[:5000])
    refused(*only("dolly15k", path), parts=("cut off",))
    path.write_text(good)
    # It comes as far as the next thing that is wrong.
    refused(*only("dolly15k", path), "--deepspeed_config", tmp_path / "none.json", parts=("deepspeed_config",))


def test_no_conversation_left(refused):
    refused(
        *only("oasst_export", DATA / "oasst_trees.jsonl", lang="sw"),
        parts=("oasst_export", "no conversation left", "language"),
    )


def test_cache_that_is_a_file(output_dir, refused):
    cache = output_dir / "notes.txt"
    refused("--cache_dir", cache, parts=(f"cache_dir = {cache}", "Not a directory"))


# ---- The output folder ----


@pytest.mark.parametrize("held", ["metrics.jsonl", "config.json", "checkpoint-20/model.safetensors"])
@pytest.mark.parametrize("dry", [False, True])
def test_output_folder_of_another_run(refused, output_dir, held, dry):
    (output_dir / held).parent.mkdir(exist_ok=True)
    (output_dir / held).write_text("hours of work")
    before = snapshot(output_dir)
    parts = (f"output_dir = {output_dir}", "holds another run", held.split("/")[0])
    refused(*(["--dry_run"] if dry else []), parts=parts)
    assert snapshot(output_dir) == before


@pytest.mark.parametrize("dry", [False, True])
def test_output_folder_that_is_a_file(refused, output_dir, dry):
    for place in (output_dir / "notes.txt", output_dir / "notes.txt" / "deeper"):
        refused(*(["--dry_run"] if dry else []), output=place, parts=(f"output_dir = {place}", "cannot write there"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "README.md", "config.json", "checkpoint-5/x", ".final"])
@pytest.mark.parametrize("dry", [False, True])
def test_log_dir_of_a_name_that_the_run_needs(refused, name, dry):
    options = ["--log_wandb", "true", "--log_dir", name, *(["--dry_run"] if dry else [])]
    refused(*options, parts=(f"log_dir = {name}", "something else of that name"))


def test_log_dir_that_is_a_file(refused, output_dir):
    """After the model has been loaded it was a traceback."""
    refused("--log_wandb", "true", "--log_dir", "notes.txt", parts=("log_dir = notes.txt", "cannot write", "exists"))
    refused("--log_wandb", "true", "--log_dir", "notes.txt/x", parts=("log_dir = notes.txt/x", "Not a directory"))


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_folder_or_a_pipe_where_a_run_going_on_has_to_write_a_file(tmp_path, name):
    recipe = load_recipe(DEMO, {"output_dir": str(tmp_path)})
    check_own_names(recipe)
    (tmp_path / name).write_text("a file")
    check_own_names(recipe)
    (tmp_path / name).unlink()
    for make in (os.mkdir, os.mkfifo):
        make(tmp_path / name)
        with pytest.raises(UserError, match=rf"^output_dir = {tmp_path}: {re.escape(name)} is no file there, .* away$"):
            check_own_names(recipe)
        os.rename(tmp_path / name, tmp_path / f"{name}.away.{make.__name__}")


def test_all_that_a_run_writes_is_known(run_sft):
    run = run_sft(DEMO, "--max_steps", 1, "--sample_replies", 0, "--save_strategy", "no")
    files = {path.name for path in run.output_dir.iterdir() if path.is_file()}
    assert files - {".lock", "chat_template.jinja"} <= set(OWN_FILES)
    assert {path.name for path in run.output_dir.iterdir()} - files == set()


READERS = {
    "recipe": load_recipe,
    "record": read_record,
    "deepspeed_config": lambda path: find_config(load_recipe(DEMO, {"deepspeed_config": str(path)})),
}


@pytest.mark.parametrize("kind", READERS)
def test_what_never_ends_is_refused(tmp_path, kind):
    os.mkfifo(tmp_path / "fifo")
    for path, what in ((tmp_path / "fifo", "named pipe"), (Path("/dev/zero"), "device")):
        with pytest.raises(UserError, match=f"{path}: cannot read this .*: Is a {what}"):
            READERS[kind](path)


def test_base_model_as_output_folder(refused, tiny_model):
    before = snapshot(tiny_model)
    refused("--model_name", tiny_model, output=tiny_model, parts=("output_dir", "base model"))
    assert snapshot(tiny_model) == before


# ---- The model ----


@pytest.fixture
def broken_model(tmp_path, tiny_model):
    """A copy of the tiny model with one file's content changed, or the file removed."""

    def make(name: str, content: bytes | str | None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return make


def test_model_folder_that_is_not_there(tmp_path, refused):
    for name in (tmp_path / "none", tmp_path / ("x" * 300), DEMO):
        for dry in ([], ["--dry_run"]):
            refused("--model_name", name, *dry, parts=(f"model_name = {name}",))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("config.json", None, ("no usable config", "holds generation_config.json")),
        ("config.json", '{"model_type": "gpt_ne', ("no usable config", "not a valid JSON")),
        ("config.json", "null", ("no usable config",)),
        ("config.json", '{"model_type": "gtp_neox"}', ("no usable config", "gtp_neox")),
        ("config.json", '{"model_type": "t5"}', ("no causal language model", "T5Config")),
        ("tokenizer.json", None, ("no usable tokenizer", "holds config.json")),
        ("tokenizer.json", '{"version": "1.0", "trunc', ("no usable tokenizer",)),
        ("tokenizer.json", "[]", ("no usable tokenizer",)),
        ("model.safetensors", b"", ("model.safetensors", "cut off")),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 3\n", ("model.safetensors", "damaged")),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_broken_model_folder(refused, broken_model, name, content, parts, dry):
    folder = broken_model(name, content)
    refused(
        "--model_name", folder, "--from_scratch", "false", *(["--dry_run"] if dry else []), parts=(str(folder), *parts)
    )


def test_truncated_weights(refused, broken_model, tiny_model):
    whole = (tiny_model / "model.safetensors").read_bytes()
    folder = broken_model("model.safetensors", whole[: len(whole) // 2])
    line = refused("--model_name", folder, "--from_scratch", "false", parts=("model.safetensors", "cut off"))
    assert str(folder) in line


def test_no_tokenizer_at_all(refused, broken_model):
    """transformers makes one with two tokens and says nothing: every text would become nothing."""
    folder = broken_model("tokenizer.json", None)
    (folder / "tokenizer_config.json").unlink()
    refused("--model_name", folder, parts=(str(folder), "no tokenizer", "holds config.json"))


def model_recipe(folder: Path, tmp_path: Path, **overrides: str):
    return load_recipe(DEMO, {"model_name": str(folder), "output_dir": str(tmp_path / "o"), **overrides})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": 3}, "lack gpt_neox.layers.2"),  # transformers would draw the third layer at random
        ({"hidden_size": 64}, r"its weights have .* for which its config.json calls as \["),
        (None, "no usable weights"),
    ],
)
def test_weights_that_are_not_the_configs(tmp_path, broken_model, tiny_model, change, part):
    if change:
        config = json.loads((tiny_model / "config.json").read_text()) | change
        folder = broken_model("config.json", json.dumps(config))
    else:
        folder = broken_model("model.safetensors", None)
    recipe = model_recipe(folder, tmp_path, from_scratch="false")
    with pytest.raises(UserError, match=rf"^model_name = {folder}: .*{part}[^\n]*$"):
        load_model(recipe, load_config(recipe), load_tokenizer(recipe), torch.float32)


def test_pickled_weights_run_no_code(tmp_path, broken_model):
    folder = broken_model("model.safetensors", None)
    torch.save({"weight": _Malicious(tmp_path / "ran")}, folder / "pytorch_model.bin")
    recipe = model_recipe(folder, tmp_path, from_scratch="false")
    with pytest.raises(UserError, match="no usable weights"):
        load_model(recipe, load_config(recipe), load_tokenizer(recipe), torch.float32)
    assert not (tmp_path / "ran").exists()


class _Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_of_a_model_is_not_run_unasked(tmp_path, refused, broken_model):
    auto_map = {"AutoConfig": "code.Config"}
    folder = broken_model("config.json", json.dumps({"model_type": "mine", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused("--model_name", folder, parts=(str(folder), "Python code of its own", "--trust_remote_code"))
    refused("--model_name", folder, "--dry_run", parts=(str(folder), "Python code of its own", "--trust_remote_code"))
    assert not (tmp_path / "ran").exists()


def test_max_length_over_the_positions(refused, tiny_model):
    refused(
        "--model_name", tiny_model, "--max_length", "300", parts=("max_length = 300", str(tiny_model), "256 positions")
    )
    refused("--max_length", "300", "--dry_run", parts=("max_length = 300", "256 positions"))


SEED_SHAPE = {
    "model_type": "gpt_neox",
    "hidden_size": 6144,
    "num_hidden_layers": 16,
    "num_attention_heads": 48,
    "intermediate_size": 24576,
    "vocab_size": 50432,
    "max_position_embeddings": 4096,
}


def test_model_too_large_for_a_machine_without_gpu(refused, broken_model, monkeypatch):
    folder = broken_model("config.json", json.dumps(SEED_SHAPE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=24 * 2**30))
    parts = (f"model_name = {folder}", "no GPU", "7.9 billion", "117 GiB", "24 GiB")
    refused("--model_name", folder, "--from_scratch", "true", parts=parts)
    # A laptop may check what a cluster is to run.
    recipe = load_recipe(DEMO, {"model_name": str(folder)})
    assert load_config(recipe).hidden_size == 6144


def test_hub_model_offline(tmp_path, run_sft, output_dir):
    run = run_sft(DEMO, "--model_name", "someone/some-model", "--cache_dir", tmp_path / "cache", check=False)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert "model_name = someone/some-model" in run.errors[0]
    assert "connect" in run.errors[0]
    assert "Traceback" not in run.stderr
    assert (output_dir / "notes.txt").read_text() == "mine"


# ---- DeepSpeed ----

ZERO2 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("No such file", "looked in")),
        (b"\xff\xfe", ("UTF-8",)),
        ('{"fp16":\n  {"enabled": tru}}', ("line 2, column 15", "does not parse")),
        ("[1]", ("not a JSON object",)),
        ({**ZERO2, "gradient_clipping": 1.0}, ("gradient_clipping = 1.0", "max_grad_norm = 2.0")),
        ({**ZERO2, "train_batch_size": 7}, ("train_batch_size = 7", "16")),
        (
            {**ZERO2, "optimizer": {"type": "AdamW", "params": {"lr": 1}}},
            ("optimizer.params.lr = 1", "learning_rate = 0.003"),
        ),
        ({**ZERO2, "fp16": {"enabled": True}}, ("fp16.enabled = True", "torch.float32")),
        ({**ZERO2, "optimizer": {"type": "Lamb"}}, ("optimizer.type = Lamb", "AdamW")),
        ({**ZERO2, "scheduler": {"type": "WarmupLR"}}, ("scheduler.type = WarmupLR", "WarmupDecayLR")),
        ({**ZERO2, "gradient_cliping": "auto"}, ("unknown key gradient_cliping: did you mean gradient_clipping?",)),
        ({**ZERO2, "optimizer": "auto"}, ("optimizer", "not a JSON object")),
        ({**ZERO2, "fp16": True}, ("fp16 = true", "not a JSON object")),
        ({**ZERO2, "scheduler": {"params": None}}, ("scheduler.params = null", "not a JSON object")),
        ({**ZERO2, "zero_optimization": {"stage": 4}}, ("zero_optimization.stage = 4",)),
    ],
)
def test_deepspeed_config(tmp_path, refused, content, parts):
    path = tmp_path / "zero.json"
    if isinstance(content, dict):
        path.write_text(json.dumps(content))
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("--deepspeed_config", path, "--dry_run", parts=(str(path), *parts))


def test_deepspeed_keeps_its_moments_in_fp32(refused):
    keys = ("--deepspeed_config", "ds_configs/zero2.json", "--optimizer_state_dtype", "bf16")
    parts = ("optimizer_state_dtype = bf16: ds_configs/zero2.json: ", "give fp32, or train without DeepSpeed")
    refused(*keys, parts=parts)
    refused(*keys, "--dry_run", parts=parts)


def test_deepspeed_sections_may_be_left_out():
    recipe = load_recipe(DEMO)
    config = fill_config({"zero_optimization": {"stage": 2}}, "short.json", recipe, 100, torch.float32)
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.95]
    assert config["scheduler"]["params"]["total_num_steps"] == 100
    assert config["gradient_clipping"] == 2.0


def test_dry_run_does_not_guess_the_number_of_steps(tmp_path):
    """A fixed total_num_steps cannot be compared before the data are read; with max_steps it can."""
    config = {**ZERO2, "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 12000}}}
    fill_config(config, "zero.json", load_recipe(DEMO), None, torch.float32)
    with pytest.raises(UserError, match=r"total_num_steps = 12000 contradicts .* = 10"):
        fill_config(config, "zero.json", load_recipe(DEMO), 10, torch.float32)


# ---- The machine ----


def test_bf16_on_a_gpu_without_it(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match=r"^dtype = bf16: Tesla T4 has no bf16; use dtype: fp16 or fp32$"):
        training_dtype("bf16")
    assert training_dtype("fp16") == torch.float16


def test_fp16_without_a_gpu_is_fp32_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_dtype("fp16") == torch.float32
    assert "computing in fp32" in capsys.readouterr().out


def test_processes_that_believe_they_are_alone(monkeypatch):
    alone = SimpleNamespace(num_processes=1, distributed_type="NO", mixed_precision="no")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes, but 1 found each other"):
        check_processes(alone)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_processes(alone)


def test_two_processes_stop_together(tmp_path, run_sft, output_dir):
    """Only the first process looks at the output folder; the second does not wait for it in a collective."""
    (output_dir / "metrics.jsonl").write_text("hours of work")
    before = snapshot(output_dir)
    run = run_sft(DEMO, "--cache_dir", tmp_path / "cache", launch="ddp2", check=False)
    assert run.returncode != 0
    assert [line for line in run.errors if "holds another run (metrics.jsonl)" in line]
    assert snapshot(output_dir) == before


def test_two_processes_say_a_misspelt_key_once(run_sft):
    run = run_sft(DEMO, "--learning_rte", "1", launch="zero2x2", check=False)
    assert run.returncode != 0
    assert run.errors == ["error: command line: unknown key learning_rte: did you mean learning_rate?"]


# ---- Models whose logits are not plainly their output layer's ----

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("kind", "own", "refused"),
    [
        ("gpt_neox", {}, False),
        ("llama", {"num_key_value_heads": 2}, False),
        ("bloom", {"n_layer": 1, "n_head": 2}, False),  # without SDPA, which is not forced on it
        ("granite", {"num_key_value_heads": 2, "logits_scaling": 8.0}, True),
        ("roberta", {"is_decoder": True}, True),  # a dense layer before the output layer
    ],
)
def test_only_models_whose_loss_is_right_are_trained(kind, own, refused):
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.model import check_output_layer

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **own)).eval()
    with pytest.raises(UserError, match="not those of its output layer") if refused else contextlib.nullcontext():
        check_output_layer(model, kind)


def test_weights_that_are_not_numbers_are_refused(run_sft, tiny_model, tmp_path):
    import safetensors.torch

    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = run_sft("recipes/demo.yaml", "--model_name", broken, "--from_scratch", "false", check=False)
    assert run.returncode == 2
    assert len(run.errors) == 1
    assert "logits that are not finite" in run.errors[0]
    assert not (run.output_dir / "model.safetensors").exists()


def test_an_accelerate_config_may_spell_deepspeed_out(tmp_path, tiny_model):
    """Without a JSON file: what it does not say is filled from the recipe as well."""
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 2\nnum_machines: 1\n"
        "deepspeed_config: {zero_stage: 2, offload_optimizer_device: none, zero3_init_flag: false}\n"
    )
    launcher = [*launcher_options("bare2"), "--config_file", str(config)]
    options = ["--max_steps", "2", "--output_dir", str(tmp_path / "out"), "--sample_replies", "0"]
    process = run_forked(launcher, "scripts/sft.py", ["recipes/demo.yaml", *options], ROOT)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "ZeRO-2, 2 processes, cpu" in process.stdout


def test_the_slurm_script_without_slurm(tmp_path):
    """Started by bash, say: it makes no folder of logs for a job that is none."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", ROOT / "recipes" / "launch.slurm", "recipes/demo.yaml"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, "error: no job of Slurm: start this by sbatch\n")
    assert not list(tmp_path.iterdir())
