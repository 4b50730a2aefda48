"""The recipe: what is read, what is refused, and with which line."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from random_recipes import recipes

from recipe.dataset_keys import Datasets
from recipe.keys import IGNORED, Recipe
from recipe.load import load_recipe
from run.command_line import read_command_line
from sources.dolly15k import DollyOptions
from sources.messages import MessagesOptions
from sources.oasst_export import OasstOptions
from sources.source import DatasetOptions
from utils.errors import UserError

BASE = "model_name: m\noutput_dir: o\ndatasets: [vicuna]\n"

# Section 3 of the design: the blocks of the published run, one after the other.
VERBATIM = """\
save_strategy: epoch
sort_by_length: false
use_custom_sampler: false
datasets:
  - oasst_export:
      lang: "bg,ca,cs,da,de,en,es,fr,hr,hu,it,nl,pl,pt,ro,ru,sl,sr,sv,uk"
      input_file_path: 2023-04-12_oasst_release_ready_synth.jsonl.gz
  - vicuna:
      val_split: 0.05
      max_val_set: 800
      fraction: 1.0
  - dolly15k:
      val_split: 0.05
      max_val_set: 300
  - grade_school_math_instructions:
      val_split: 0.05
  - code_alpaca:
      val_split: 0.05
      max_val_set: 250

dtype: fp16
log_dir: stablelm_log_7b
model_name: stabilityai/stablelm-base-alpha-7b
output_dir: stablelm_7b
max_length: 4096
warmup_steps: 100
gradient_checkpointing: true
gradient_accumulation_steps: 2
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
eval_steps: 100
save_steps: 500
num_train_epochs: 4
save_total_limit: 4
use_flash_attention: true
"""


@pytest.fixture
def load(tmp_path):
    """Load a recipe from its text: load("learning_rate: 1") adds the keys that every recipe needs."""

    def load_text(text, overrides=None, base=BASE):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else (base + text).encode())
        return load_recipe(path, overrides)

    return load_text


def refuse(*parts):
    """A one-line UserError with every part in it."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]*\Z")


# ---- Values ----


def test_defaults_are_the_originals(load):
    recipe = load("")
    expected = {
        "learning_rate": 1e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-12,
        "weight_decay": 0.0,
        "max_grad_norm": 2.0,
        "logging_steps": 10,
        "rng_seed": 0xA1221F97,
        "random_offset_probability": 0.8,
        "label_masking": True,
        "use_system_tag": False,
        "fuse_gelu": True,
        "log_wandb": True,
        "wandb_project": "supervised-finetuning",
    }
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.datasets.vicuna.val_split == 0.2


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("save_strategy: no", "no"),  # all of YAML 1.1's false, a text and a number
        ("learning_rate: 1e-5", 1e-5),
        ("learning_rate: '1e-5'", 1e-5),
        ("rng_seed: 0xa1221f97", 0xA1221F97),
        ("rng_seed: 010", 10),
        ("num_train_epochs: 4", 4.0),
        ("log_wandb: no", False),
        ("log_wandb: on", True),
        ("log_wandb: TRUE", True),
        ("wandb_project: no", "no"),
        ("wandb_project: 2024-01-31", "2024-01-31"),
        ("log_dir: 0012", "0012"),
        ("deepspeed_config: null", None),
        ("deepspeed_config:", None),
        ("max_steps: ~", None),
    ],
)
def test_scalars_mean_what_they_look_like(load, line, value):
    assert getattr(load(line), line.split(":")[0]) == value


def test_texts_of_a_data_set_are_not_read_as_numbers(load):
    recipe = load(
        "datasets:\n- oasst_export:\n    lang: no\n    revision: 12e4567\n", base="model_name: m\noutput_dir: o\n"
    )
    assert (recipe.datasets.oasst_export.lang, recipe.datasets.oasst_export.revision) == ("no", "12e4567")


def test_anchors_and_merges_work(load):
    mix = "datasets:\n- vicuna: &all {val_split: 0.05, size: 3}\n- dolly15k:\n    <<: *all\n    size: 4\n"
    chosen = load(mix, base="model_name: m\noutput_dir: o\n").datasets.chosen()
    assert [(options.val_split, options.size) for options in chosen.values()] == [(0.05, 3), (0.05, 4)]


def test_byte_order_mark_is_no_part_of_a_key(load):
    assert load(b"\xef\xbb\xbf" + BASE.encode()).model_name == "m"


# ---- Refusals ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rte: 1", ["line 4", "unknown key learning_rte", "learning_rate"]),
        ("Learning_rate: 1", ["unknown key Learning_rate", "learning_rate"]),
        ("zzz: 1", ["line 4", "unknown key zzz", "--help"]),
        ("1: 2", ["line 4", "unknown key 1 "]),
        ("null: 2", ["line 4", "unknown key null"]),
        ("true: 2", ["line 4", "unknown key true"]),
        ("learning_rate: -1", ["line 4", "learning_rate = -1", "greater"]),
        ("learning_rate: nan", ["learning_rate = nan"]),
        ("learning_rate: .inf", ["learning_rate = .inf"]),
        ("learning_rate: 1e5", ["learning_rate = 1e5", "less than or equal to 1"]),  # 1e-5 with its minus lost
        ("learning_rate: true", ["learning_rate = true", "number"]),
        ("learning_rate: [1]", ["line 4", "learning_rate", "number"]),
        ("learning_rate: {a: 1}", ["line 4", "learning_rate", "number"]),
        ("learning_rate: 1:30", ["learning_rate = 1:30", "number"]),
        ("learning_rate:", ["learning_rate = null", "number"]),
        ("learning_rate: |\n  a\n  b", ["learning_rate = "]),
        ("max_length: -5", ["max_length = -5"]),
        ("max_length: 1", ["max_length = 1"]),
        ("max_length: 512.5", ["max_length = 512.5", "integer"]),
        ("max_length: " + "9" * 5000, ["max_length = 999", "exceeded maximum size"]),
        ("rng_seed: -1", ["rng_seed = -1"]),
        ("rng_seed: 4294967296", ["rng_seed = 4294967296", "less than 4294967296"]),  # NumPy's limit
        ("save_strategy: off", ["save_strategy = off", "'epoch', 'steps' or 'no'"]),
        ("save_strategy: false", ["save_strategy = false", "'epoch', 'steps' or 'no'"]),
        ("dtype: float16", ["dtype = float16", "'fp32', 'fp16' or 'bf16'"]),
        ("fuse_gelu: 2", ["fuse_gelu = 2", "boolean"]),
        ("samples_mixing: true", ["samples_mixing = true", "only false"]),
        ("packing: true\npadding_free: false", ["packing: true needs padding_free: true"]),
        ("packing: true\nsort_by_length: true", ["give sort_by_length: false"]),
        ("torch_compile: true\ngradient_checkpointing: true", ["give one of them"]),
        ("attn_implementation: eager", ["attn_implementation = eager", "'varlen_attn'"]),
        ("num_train_epochs: 0", ["num_train_epochs = 0"]),
        ("num_train_epochs: 1e308", ["num_train_epochs = 1e308"]),
        ("max_steps: 0", ["max_steps = 0"]),
        ("per_device_train_batch_size: 0", ["per_device_train_batch_size = 0"]),
        ("per_device_train_batch_size: 99999999999999999999", ["per_device_train_batch_size"]),
        ("micro_batch_tokens: 0", ["micro_batch_tokens = 0"]),
        ("micro_batch_tokens: 511", ["micro_batch_tokens = 511", "max_length = 512 tokens", "give at least that"]),
        (
            "micro_batch_tokens: 512\nloss_normalization: micro_batch",
            ["micro_batch_tokens = 512 changes what is averaged", "give loss_normalization: tokens"],
        ),
        ("gradient_accumulation_steps: -2", ["gradient_accumulation_steps = -2"]),
        ("warmup_steps: -1", ["warmup_steps = -1"]),
        ("save_total_limit: 0", ["save_total_limit = 0"]),
        ("random_offset_probability: 1.1", ["random_offset_probability = 1.1"]),
        ("adam_beta1: 1", ["adam_beta1 = 1", "less than 1"]),
        ("adam_epsilon: 0", ["adam_epsilon = 0"]),
        ("max_grad_norm: inf", ["max_grad_norm = inf", "finite"]),
        ("cache_dir: null", ["cache_dir = null", "path"]),
        ('log_dir: "a\\0b"', ["line 4", "log_dir", "character"]),
        ('wandb_project: "\\ud83d"', ["line 4", "wandb_project", "character"]),
    ],
)
def test_refuses_values_and_keys(load, text, parts):
    with refuse("recipe.yaml", *parts):
        load(text)


@pytest.mark.parametrize(
    ("mix", "parts"),
    [
        ("5", ["datasets = 5", "list"]),
        ("vicuna", ["datasets = vicuna", "list"]),
        ("null", ["datasets = null", "list"]),
        ("[]", ["datasets", "empty"]),
        ("{vicuna: {}}", ["datasets", "list"]),  # a name without options would vanish from a mapping
        ("[[1]]", ["datasets", "each entry is a name"]),
        ("[null]", ["datasets", "each entry is a name"]),
        ("[{}]", ["datasets", "each entry is a name"]),
        ("[5]", ["unknown key datasets.5", "known: oasst_export"]),
        ("[vicunna]", ["line 3", "unknown key datasets.vicunna", "did you mean vicuna"]),
        ("[vicuna, vicuna]", ["datasets", "vicuna is listed twice"]),
        ("[vicuna: 3]", ["datasets.vicuna = 3", "options"]),
        ("[vicuna: [1]]", ["datasets.vicuna", "options"]),
        ("\n- vicuna:\n  fraction: 1", ["datasets", "indent the options"]),
        ("\n- vicuna:\n    fractoin: 1", ["line 5", "unknown key datasets.vicuna.fractoin", "did you mean fraction"]),
        ("\n- oasst_export:\n    lang: en,EN", ["line 5", "datasets.oasst_export.lang", "'EN'", "did you mean en?"]),
        ("\n- oasst_export:\n    lang: english", ["'english' is not the code of a language: did you mean en?"]),
        ("\n- oasst_export:\n    lang: pt_BR,de", ["'pt_BR' is not", "did you mean pt-BR?"]),
        ("\n- oasst_export:\n    lang: xx", ["'xx' is not the code of a language"]),
        ("\n- oasst_export:\n    lang: ''", ["'' is not the code of a language"]),
        ("\n- vicuna:\n    on_bad_records: ignore", ["datasets.vicuna.on_bad_records = ignore", "'error' or 'skip'"]),
        ("\n- dolly15k:\n    context: keep", ["datasets.dolly15k.context = keep", "'drop' or 'prompt'"]),
        ("\n- vicuna:\n    context: drop", ["unknown key datasets.vicuna.context"]),
        ("\n- vicuna:\n    lang: en", ["line 5", "unknown key datasets.vicuna.lang"]),
        ("\n- vicuna:\n    fraction: 0", ["line 5", "datasets.vicuna.fraction = 0"]),
        ("\n- vicuna:\n    fraction: 1.5", ["line 5", "datasets.vicuna.fraction = 1.5"]),
        ("\n- vicuna:\n    val_split: 1", ["line 5", "datasets.vicuna.val_split = 1"]),
        ("\n- vicuna:\n    max_val_set: 0", ["line 5", "datasets.vicuna.max_val_set = 0"]),
        ("\n- vicuna:\n    size: 3\n    fraction: 0.5", ["datasets.vicuna", "fraction or size, not both"]),
    ],
)
def test_refuses_mixes(load, mix, parts):
    with refuse("recipe.yaml", *parts):
        load(f"datasets: {mix}", base="model_name: m\noutput_dir: o\n")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ("# nothing\n", ["empty"]),
        ("- 1\n", ["a list"]),
        ("distributed_type: FSDP\n", ["no recipe, but an accelerate config", "--config_file"]),
        ('{"zero_optimization": {"stage": 2}}', ["no recipe, but a DeepSpeed config", "deepspeed_config"]),
        ("learning_rate\n", ["a text"]),
        (b"\x80\x81", ["line 1: not UTF-8"]),
        (BASE.encode("utf-16"), ["UTF-8"]),
        ("a: 1\n\x07", ["line 2, column 1", "0x07"]),
        ("a: [1\nb: 2\n", ["line 2, column 2", "does not parse"]),
        ("a: b: c\n", ["line 1, column 5", "does not parse"]),
        ("a: 1\n\tb: 2\n", ["line 2, column 1", "does not parse"]),
        ("a: 1\n---\nb: 2\n", ["line 2, column 1", "another document"]),
        ("a: *b\n", ["line 1, column 4", "does not parse"]),
        ("a: 1\nb: 2\na: 3\n", ["line 3, column 1", "the key a was given before, on line 1"]),
        ("a: {b: 1, b: 2}\n", ["line 1, column 11", "the key b was given before, on line 1"]),
        ("[1, 2]: 3\n", ["line 1, column 1", "a key must be a word"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["line 1, column 4", "does not parse"]),
        ("a: !!int b\n", ["line 1, column 4", "does not parse"]),
        ("a: &x [*x]\n", ["nested too deeply"]),
        ("[" * 1000, ["nested too deeply"]),
        ("model_name: m\n", ["datasets is missing", "output_dir is missing"]),
        ("model_name: ''\noutput_dir: o\ndatasets: [vicuna]\n", ["line 1", "model_name"]),
        ("model_name: a/../m\noutput_dir: m\ndatasets: [vicuna]\n", ["output_dir", "overwrite its base model"]),
    ],
)
def test_refuses_files(load, text, parts):
    with refuse("recipe.yaml", *parts):
        load(text, base="")


def alias_bomb(levels: int, each: int) -> str:
    """`levels` lists, each of so many aliases of the one before it."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * each) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * each) + "]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        alias_bomb(7, 9),  # 500 bytes
        alias_bomb(60, 2),
        "a: &a {b: 1}\n"
        + "k0: &k0 {<<: *a}\n"
        + "".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}\n" for n in range(1, 200)),
    ],
)
def test_aliases_are_counted_before_they_are_followed(load, text):
    started = time.process_time()
    with refuse("recipe.yaml line", r"aliases \(\*name\) stand for more than 10,000 values"):
        load(text, base="")
    with refuse("--datasets", "aliases"):
        load("", {"datasets": "{" + ", ".join(text.splitlines()) + "}"})
    assert time.process_time() - started < 1


def test_a_large_mix_of_shared_options_is_no_bomb(load):
    mix = "datasets:\n- a: &all {source: messages, input_file_path: x, val_split: 0.05, size: 3}\n"
    mix += "".join(f"- b{n}:\n    <<: *all\n    size: {n + 1}\n" for n in range(200))
    assert len(load(mix, base="model_name: m\noutput_dir: o\n").datasets.chosen()) == 201


def test_a_recipe_has_no_megabyte(load):
    with refuse("recipe.yaml: cannot read this recipe: over 1,048,576 bytes"):
        load("#" * 2**20)


# ---- Command line ----


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--learning_rate", "2e-5"], "learning_rate", 2e-5),
        (["--learning_rate=2e-5"], "learning_rate", 2e-5),
        (["--learning_rate", "1", "--learning_rate", "0.5"], "learning_rate", 0.5),
        (["--max_steps", "null"], "max_steps", None),
        (["--wandb_project", "a=b"], "wandb_project", "a=b"),
        (["--wandb_project=a=b"], "wandb_project", "a=b"),
        # As it stands, where YAML would see a comment, a mapping, a number, an anchor.
        (["--log_dir", "a # b"], "log_dir", "a # b"),
        (["--log_dir", "a: b"], "log_dir", "a: b"),
        (["--log_dir", "0012"], "log_dir", "0012"),
        (["--log_dir", "&x"], "log_dir", "&x"),
        (["--log_dir", '"x"'], "log_dir", "x"),
        (["--trust_remote_code"], "trust_remote_code", True),
        (["--trust_remote_code", "--log_dir", "x"], "trust_remote_code", True),
        (["--trust_remote_code", "false"], "trust_remote_code", False),
        (["--trust_remote_code=false", "--packing"], "trust_remote_code", False),
        (["--datasets.vicuna.fraction", "0.5"], "datasets.vicuna.fraction", 0.5),
        (["--datasets.vicuna.fraction=0.5"], "datasets.vicuna.fraction", 0.5),
        (["--datasets", "[dolly15k: {size: 3}]"], "datasets.dolly15k.size", 3),
        (["--datasets", "[dolly15k]", "--datasets.dolly15k.size", "4"], "datasets.dolly15k.size", 4),
    ],
)
def test_overrides(tmp_path, arguments, key, value):
    (tmp_path / "recipe.yaml").write_text(BASE)
    options, recipe = read_command_line("", [str(tmp_path / "recipe.yaml"), *arguments])
    for name in key.split("."):
        recipe = getattr(recipe, name)
    assert recipe == value
    assert not options.dry_run


def test_an_override_leaves_the_other_options_alone(load):
    mix = "datasets:\n- vicuna: {val_split: 0.05, fraction: 1.0}\n- dolly15k\n"
    overrides = {"datasets.vicuna.fraction": "0.5", "datasets.dolly15k.size": "3"}
    chosen = load(mix, overrides, base="model_name: m\noutput_dir: o\n").datasets.chosen()
    assert chosen["vicuna"] == DatasetOptions(val_split=0.05, fraction=0.5)
    assert chosen["dolly15k"] == DollyOptions(size=3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--learning_rte", "1"], ["unknown key learning_rte", "did you mean learning_rate"]),
        (["--learning-rate", "1"], ["unknown key learning-rate", "did you mean learning_rate"]),
        (["--learning_rate.x", "1"], ["unknown key learning_rate.x"]),
        (["--dry-run"], ["unknown key dry-run", "did you mean dry_run"]),
        (["--num_processes", "2"], ["--num_processes is for accelerate launch: give it before the script's name"]),
        (["-x"], ["unknown key -x"]),
        (["--"], ["unknown key"]),
        (["--learning_rate"], ["--learning_rate needs a value"]),
        (["--learning_rate", "--dry_run"], ["--learning_rate needs a value"]),
        (["--learning_rate="], ["--learning_rate needs a value"]),
        (["--trust_remote_code="], ["--trust_remote_code needs a value"]),
        (["--trust_remote_code", "maybe"], ["trust_remote_code = maybe"]),
        (["--output_dir", ""], ["--output_dir needs a value"]),  # an unset variable of a shell script
        (["--learning_rate", "-1"], ["learning_rate = -1"]),
        (["--learning_rate", "{"], ["learning_rate", "column 2"]),
        (["--dry_run=false"], ["--dry_run takes no value"]),
        (["more.yaml"], ["more.yaml", "one recipe at a time"]),
        (["--datasets.vicuna.fractoin", "1"], ["unknown key datasets.vicuna.fractoin", "did you mean fraction"]),
        (["--datasets.vicunna.fraction", "1"], ["vicunna is not in this recipe's mix", "did you mean vicuna"]),
        (["--datasets.dolly15k.fraction", "1"], ["dolly15k is not in this recipe's mix", "known: vicuna"]),
        (["--datasets.vicuna", "{}"], ["unknown key datasets.vicuna", "datasets.NAME.OPTION"]),
        (["--datasets", "[vicuna: {fraction: 5}]"], ["datasets.vicuna.fraction = 5"]),
        (["--datasets", "dolly15k"], ["datasets = dolly15k", "list"]),
    ],
)
def test_refuses_arguments(tmp_path, arguments, parts):
    (tmp_path / "recipe.yaml").write_text(BASE)
    with refuse("command line|--", *parts):
        read_command_line("", [str(tmp_path / "recipe.yaml"), *arguments])


@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        ("samples_mixing: true\n", [], ["recipe.yaml line 3: samples_mixing = true: only false is supported"]),
        ("", ["--samples_mixing", "true"], ["command line: samples_mixing = true: only false is supported"]),
        ("samples_mixing: true\nlearning_rat: 1\n", [], ["samples_mixing = true", "unknown key learning_rat"]),
        ("loss_fn: PolyLoss\n", [], ["line 3: loss_fn = PolyLoss: only CrossEntropyLoss is supported"]),
    ],
)
def test_a_key_of_the_original_that_would_change_something_here_is_refused(tmp_path, text, arguments, parts):
    base = "model_name: m\noutput_dir: o\n" + text + "datasets: [vicuna]\n"
    (tmp_path / "recipe.yaml").write_text(base)
    with refuse(*parts):
        read_command_line("", [str(tmp_path / "recipe.yaml"), *arguments])


@pytest.mark.parametrize("spelling", ["false", "no", "off", "0", "False"])
def test_keys_of_the_original_that_do_nothing_are_accepted(tmp_path, spelling):
    lines = ["model_name: m", "output_dir: o", "datasets: [vicuna]", f"samples_mixing: {spelling}", "verbose: true"]
    lines += ["freeze_layer:", "loss_fn: CrossEntropyLoss", "use_custom_sampler: true", "datasets_extra: []"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    assert load_recipe(tmp_path / "recipe.yaml") == load_recipe_of("\n".join(lines[:3]), tmp_path)


def load_recipe_of(text: str, folder: Path) -> Recipe:
    (folder / "plain.yaml").write_text(text)
    return load_recipe(folder / "plain.yaml")


@pytest.mark.parametrize("mix", ["5", "[{}]", "[[1]]", "[vicuna: 3]", "null"])
def test_an_override_of_a_broken_mix(load, mix):
    with refuse("datasets.vicuna.size"):
        load(f"datasets: {mix}", {"datasets.vicuna.size": "3"}, base="model_name: m\noutput_dir: o\n")


def test_no_recipe():
    with refuse("no recipe given"):
        read_command_line("", ["--dry_run"])


def test_help_is_complete_and_quick():
    code = (
        "import runpy, sys\n"
        "sys.path[0], sys.argv = 'scripts', ['scripts/sft.py', '--help']\n"
        "try:\n    runpy.run_path('scripts/sft.py', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert process.returncode == 0, process.stderr
    words = set(process.stdout.replace("(", " ").split())
    for schema in (Recipe, Datasets, DatasetOptions, OasstOptions, DollyOptions, MessagesOptions):
        for key, field in schema.model_fields.items():
            assert key in words
            assert field.description
            assert field.description in process.stdout
    assert seconds < 2


# ---- Round trip ----


@settings(max_examples=60)
@given(values=recipes)
def test_round_trip(tmp_path, values):
    """A random recipe, written by a YAML library, reads as it was meant; what it resolves to reads as the same."""
    values = values | {"datasets": [{name: block} for name, block in values["datasets"].items()]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe = load_recipe(path)
    resolved = recipe.model_dump(mode="json", exclude={"datasets"})
    for key in set(values) - {"datasets", "output_dir", "cache_dir"}:  # "a//b" and "a/b" are one path
        assert resolved[key] == values[key]
    for entry in values["datasets"]:
        ((name, block),) = entry.items()
        assert {key: getattr(getattr(recipe.datasets, name), key) for key in block} == block

    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == recipe


# ---- The seed's run and the shipped recipes ----


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    assert load_recipe(path).datasets.chosen()


def test_the_shipped_seed_is_the_published_run(tmp_path):
    (tmp_path / "verbatim.yaml").write_text(VERBATIM)
    published = load_recipe(tmp_path / "verbatim.yaml")
    shipped = load_recipe(ROOT / "recipes" / "stablelm7b_oasst.yaml")
    given = yaml.safe_load(VERBATIM)
    for key in set(given) - {"datasets", *IGNORED}:
        assert getattr(shipped, key) == getattr(published, key), key
    for entry in given["datasets"]:
        ((name, block),) = entry.items()
        for key in set(block) - {"input_file_path"}:
            assert getattr(getattr(shipped.datasets, name), key) == getattr(getattr(published.datasets, name), key)
    assert list(shipped.datasets.chosen()) == list(published.datasets.chosen())
    assert shipped.deepspeed_config == "ds_configs/zero2.json"


def test_every_key_of_the_shipped_seed_is_written_out():
    written = yaml.safe_load((ROOT / "recipes" / "stablelm7b_oasst.yaml").read_text())
    assert set(written) == set(Recipe.model_fields)
    for entry in written["datasets"]:
        ((name, block),) = entry.items()
        keys = set(Datasets.options_of(name).model_fields)
        assert set(block) == keys


def test_verbatim_blocks_pass_a_dry_run(tmp_path, run_sft):
    recipe = tmp_path / "verbatim.yaml"
    recipe.write_text(VERBATIM)
    run = run_sft(recipe, "--dry_run")
    assert not run.errors
    assert not run.output_dir.exists()
    resolved = run.stdout[run.stdout.index("model_name:") : run.stdout.index("\n# ---- what was found")]
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_recipe(tmp_path / "resolved.yaml") == load_recipe(recipe, {"output_dir": str(run.output_dir)})

    recipe.write_text(VERBATIM + "learning_rte: 1e-5\n")
    run = run_sft(recipe, "--dry_run", check=False)
    assert run.returncode == 2
    assert run.errors == [f"error: {recipe} line 36: unknown key learning_rte: did you mean learning_rate?"]
    assert "Traceback" not in run.stderr
