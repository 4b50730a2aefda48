"""What no run is to begin with: secrets, paths that nothing can be kept at, names that somebody else refuses or has."""

import inspect
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

from recipe.keys import Recipe
from recipe.load import load_recipe
from recipe.refusals import LONGEST_PROJECT, NOT_IN_A_PROJECT, RESERVED_DATASETS
from run.command_line import read_command_line
from run.health import StepHealth
from utils.errors import UserError

BASE = "model_name: m\noutput_dir: o\nlog_wandb: true\ndatasets:\n- vicuna\n"
BASE += "- mine: {source: messages, input_file_path: x}\n"
HF = "hf_" + "aB3" * 12
COMMIT = "2b7e151628aed2a6abf7158809cf4f3c762e7160"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """What sft.py would train: start("log_dir: x", "--output_dir", "y")."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *arguments: str) -> Recipe:
        (tmp_path / "r.yaml").write_text(BASE + text + "\n")
        return read_command_line("", ["r.yaml", *arguments])[1]

    return read


def refused(read, *arguments) -> str:
    """The one line in which it is refused."""
    with pytest.raises(UserError) as refusal:
        read(*arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# ---- Secrets ----

SECRETS = {
    HF: "HF_TOKEN",
    "my-" + HF: "HF_TOKEN",
    "wandb_v1_" + "x" * 40: "WANDB_API_KEY",
    "ghp_" + "x" * 36: "git",
    "AKIAIOSFODNN7EXAMPLE": "AWS",
    "sk-proj-" + "x" * 40: "environment variable",
    "https://me:hunter2@host/data.jsonl": "give the file's path",
    "https://token@host/data.jsonl": "give the file's path",
    "s3://b/x.jsonl?X-Amz-Credential=a&X-Amz-Signature=0123abcd": "signed URL",
    "https://h/x.jsonl?sv=1&sig=abc%3D": "signed URL",
    "https://h/x?X-Goog-Signature=12": "signed URL",
    "https://h/x?token=abcdefgh": "environment variable",
    "password=hunter2": "environment variable",
}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("key", ["output_dir", "log_dir", "wandb_project", "model_name", "verbose", "learning_rate"])
def test_a_secret_is_refused_and_not_shown(start, secret, key):
    replaced = re.sub(rf"^{key}: .*\n", "", BASE, flags=re.MULTILINE)
    line = refused(
        start, f"{key}: '{secret}'" if replaced == BASE else "", *(["--" + key, secret] * (replaced != BASE))
    )
    assert re.match(r"(r\.yaml line 7|command line): " + key + ": holds what looks like an? ", line)
    assert SECRETS[secret] in line
    assert secret not in line
    assert "hunter2" not in line
    assert not list(Path().glob("[!r]*"))  # nothing was made


def test_a_secret_of_a_data_set(start):
    for arguments in (["--datasets.vicuna.input_file_path", f"https://{HF}@h/x"], ["--datasets.vicuna.revision", HF]):
        line = refused(start, "", *arguments)
        assert line.startswith(f"command line: {arguments[0][2:]}: holds what looks like a ")
        assert HF not in line
    line = refused(start, f"unknown_{HF}: 1")
    assert HF not in line
    mix = f"[{{{HF}: {{source: messages, input_file_path: x}}}}]"
    assert HF not in refused(start, "", "--datasets", mix)


def test_what_is_no_secret_is_taken(start):
    for value in ("runs/max_token=512,lr=1e-5", f"runs/{COMMIT}", "tokens", "task-aware-run", "hf_run", "a@b", COMMIT):
        assert start("", "--output_dir", value).output_dir == Path(value)
    assert start("", "--datasets.vicuna.revision", COMMIT).datasets.vicuna.revision == COMMIT
    assert "WANDB_API_KEY" in refused(start, f"wandb_project: {COMMIT}")  # an older key of wandb's, or a slip


def test_an_earlier_recipe_with_a_secret_can_still_be_evaluated(start):
    Path("old.yaml").write_text(BASE + f"wandb_project: {HF}\nlog_dir: ../../x\n")
    assert load_recipe("old.yaml").wandb_project == HF


# ---- Weights & Biases ----


def test_a_project_is_what_wandb_takes(start):
    """By its own words: what it raises after the model has been loaded."""
    import wandb  # here: most processes only collect this test, and it takes 1.3 CPU seconds

    rule = inspect.getsource(wandb.Settings.validate_project)
    assert f"> {LONGEST_PROJECT}" in rule
    assert repr(NOT_IN_A_PROJECT)[1:-1] in rule
    for wrong in NOT_IN_A_PROJECT:
        assert "wandb_project = a" in refused(start, "", "--wandb_project", f"a{wrong}b")
    assert "over 128 characters" in refused(start, "", "--wandb_project", "x" * 129)
    assert start("", "--wandb_project", "x" * 128).wandb_project == "x" * 128
    assert start("", "--wandb_project", "a/b", "--log_wandb", "false").wandb_project == "a/b"


# ---- Paths ----


def test_the_home_folder(start, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keys = ("output_dir", "cache_dir", "model_name", "deepspeed_config", "resume_from_checkpoint")
    recipe = start("", *(f"--{key}=~/{key}" for key in keys))
    for key in keys:
        assert str(getattr(recipe, key)) == str(tmp_path / "home" / key)
    for value in ("./~/x", "./~", "a/~", "x~"):  # a folder of that name
        recipe = start("", "--output_dir", value)
        assert os.path.realpath(recipe.output_dir) == os.path.realpath(tmp_path / value)
        Path("again.yaml").write_text(recipe.to_yaml())
        assert load_recipe("again.yaml") == recipe
    assert "log_dir = ~/x: is outside of output_dir" in refused(start, "log_dir: ~/x")


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("cache_dir: ''", "give . for the current folder"),
        ("log_dir: ''", "give a text"),
        ("wandb_project: ''", "give a text"),
        ("deepspeed_config: ''", "give null for none"),
    ],
)
def test_nothing_is_no_path(start, text, instead):
    key = text.split(":")[0]
    assert refused(start, text) == f"r.yaml line 7: {key}: is empty: {instead}"


def test_nothing_is_no_path_of_a_data_set(start):
    line = refused(start, "", "--datasets", "[vicuna: {input_file_path: ''}]")
    assert line == "command line: datasets.vicuna.input_file_path: is empty: give null for none"
    start("system_prefix: ''")  # of the original's, which do nothing here


@pytest.mark.parametrize("value", ["../x", "../../x", "/abs", "a/../../x", ".."])
def test_log_dir_stays_in_output_dir(start, value):
    assert f"log_dir = {value}: is outside of output_dir" in refused(start, f"log_dir: {value}")


@pytest.mark.parametrize("value", ["a/b", ".", "a/../b", "..x"])
def test_log_dir_may_be_any_folder_within(start, value):
    assert start(f"log_dir: {value}").log_dir == value


@pytest.mark.parametrize("key", ["output_dir", "cache_dir", "resume_from_checkpoint"])
def test_paths_at_which_nothing_can_be(start, tmp_path, key):
    os.symlink("loop", tmp_path / "loop")
    deep = str(tmp_path) + "/abcdefgh" * (
        (4090 - len(str(tmp_path))) // 9
    )  # there is room for it, not for what is in it
    for value, reason in [
        ("x" * 300, "File name too long"),
        ("none/" + "é" * 128, "File name too long"),
        (deep, "File name too long"),
        ("loop", "symbolic links"),
        ("loop/x", "symbolic links"),
    ]:
        line = refused(start, "", f"--{key}", value)
        assert line.startswith(f"command line: {key} = {value[:40]}")
        assert reason in line
        assert "log_dir" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "r.yaml"]
    assert getattr(start("", f"--{key}", "x" * 255), key)


def test_a_nul_byte_is_no_part_of_a_path(start):
    for key in ("cache_dir", "log_dir", "deepspeed_config", "resume_from_checkpoint"):
        for text in ("a\\0b", "~\\0/x"):
            assert "character that UTF-8 files and file names cannot hold" in refused(start, f'{key}: "{text}"')


# ---- Names of data sets ----


@pytest.mark.parametrize("name", RESERVED_DATASETS)
def test_a_data_set_with_the_name_of_a_metric(start, name):
    line = refused(start, "", "--datasets", f"[{name}: {{source: messages, input_file_path: x}}]")
    assert line == f"command line: datasets.{name}: loss_{name} is a metric of its own: give the data set another name"


def test_an_adapter_is_no_model_to_begin_with(start, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    line = refused(start, "", "--model_name", str(tmp_path / "adapter"))
    assert line.endswith("an adapter: merge it first, by scripts/export.py")


def test_these_are_all_the_metrics_that_look_like_a_data_sets():
    health = StepHealth(3, None)
    health.losses.extend([1.0] * 50)
    health.skipped = health.bad = health.norm_spikes = 1
    names = health.metrics(9.0, 65536.0).keys()
    assert {name for name in names if name.startswith(("loss_", "share_", "eval_"))} == {
        f"loss_{name}" for name in RESERVED_DATASETS
    }


def test_the_recipes_that_ship_are_not_refused():
    for path in (ROOT / "recipes").glob("*.yaml"):
        load_recipe(path, for_a_run=True)
