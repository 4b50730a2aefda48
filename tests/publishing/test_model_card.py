"""The card says what really ran, in the form of the seed's, as the hub takes it; and nothing of this machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub_server
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from checkpoints import save_chat_model
from conftest import ROOT
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

from evaluation.chat_model import fingerprint
from evaluation.model import EvaluatedModel, find_model
from publishing.model_card import model_card, write_model_card
from publishing.provenance import find_run, shareable_text
from recipe.load import load_recipe
from run.folder import RECIPE_HEADER

SEED = ROOT / "recipes" / "stablelm7b_oasst.yaml"
DATASETS = ["oasst_export", "vicuna", "dolly15k", "grade_school_math_instructions", "code_alpaca"]
SECRET = "hf_" + "x" * 34
RECORD = {
    "format": 1,
    "status": "finished",
    "command": {"folder": "/home/me/work", "launcher": {"ACCELERATE_MIXED_PRECISION": "fp16", "WORLD_SIZE": "4"}},
    "recipe": {},
    "data": {
        name: {"conversations": {"train": 1000 + n, "validation": n}, "files": []} for n, name in enumerate(DATASETS)
    },
    "model": {"name": "stabilityai/stablelm-base-alpha-7b", "commit": "b" * 40},
    "deepspeed": json.loads((ROOT / "ds_configs" / "zero2.json").read_text()),
    "dtype": "float16",
    "num_processes": 4,
    "packages": {"transformers": "5.23.0", "torch": "2.13.0"},
    "git": {"commit": "a" * 40, "dirty": False},
    "hardware": {"GPUs": ["NVIDIA A100-SXM4-80GB, 79.3 GiB"] * 4},
    "wandb": "https://wandb.ai/open-assistant/supervised-finetuning/runs/08dfhyuc",
}
LINES = [
    {"step": 500, "epoch": 0.125, "loss": 1.2, "tokens": 5_000_000},
    {"step": 500, "epoch": 0.125, "eval_loss": 1.1, "eval_accuracy": 0.6, "eval_vicuna_loss": 1.0},
    {"step": 12000, "epoch": 3.0, "loss": 0.9, "tokens": 123_456_789},
    {"step": 12000, "epoch": 3.0, "eval_loss": 0.98765432, "eval_accuracy": 0.7, "eval_vicuna_loss": 0.8},
]


@pytest.fixture(scope="module")
def chat_model(tiny_model, tmp_path_factory) -> Path:
    return save_chat_model(tiny_model, tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def run_folder(chat_model, tmp_path):
    """Call it to make the folder of a finished run, of the seed's recipe with other values."""

    def make(record: dict | None = RECORD, lines: list = LINES, name: str = "stablelm_7b", **values) -> Path:
        folder = tmp_path / name
        shutil.copytree(chat_model, folder)
        recipe = load_recipe(SEED, {key: str(value) for key, value in values.items()} | {"output_dir": str(folder)})
        (folder / "recipe.yaml").write_text(RECIPE_HEADER + recipe.to_yaml())
        if record is not None:
            (folder / "run.json").write_text(json.dumps(record))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "training.png").write_bytes(b"")
        return folder

    return make


def add_results(folder: Path, name: str, results: dict, **more) -> None:
    """A result file as `Evaluation.write` leaves it."""
    (folder / "eval").mkdir(exist_ok=True)
    checkpoint = {"name": str(folder), "step": 1, "fingerprint": fingerprint(EvaluatedModel(str(folder)))}
    content = {"name": name, "checkpoint": checkpoint, "settings": {}, "results": results, "warnings": [], **more}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(content))


def card_of(folder: Path) -> ModelCard:
    write_model_card(folder)
    return ModelCard.load(folder / "README.md")


def blocks(card: ModelCard) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)\n```$", card.text, flags=re.DOTALL | re.MULTILINE)


def test_the_seeds_run(run_folder):
    card = card_of(run_folder())
    head = card.data.to_dict()
    assert head["language"] == [
        "bg",
        "ca",
        "cs",
        "da",
        "de",
        "en",
        "es",
        "fr",
        "hr",
        "hu",
        "it",
        "nl",
        "pl",
        "pt",
        "ro",
        "ru",
        "sl",
        "sr",
        "sv",
        "uk",
    ]
    assert head["license"] == "cc-by-sa-4.0"
    assert head["base_model"] == "stabilityai/stablelm-base-alpha-7b"
    assert head["datasets"] == [
        *("OpenAssistant/oasst1", "Aeala/ShareGPT_Vicuna_unfiltered", "OllieStanley/oa_dolly_15k"),
        *("qwedsacf/grade-school-math-instructions", "sahil2801/CodeAlpaca-20k"),
    ]
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    headings = re.findall(r"^##? .*$", card.text, flags=re.MULTILINE)
    wanted = ["# stablelm_7b", "## Model Details", "## Prompting", "## How to use it", "## Dev Details"]
    assert headings == [*wanted, "## Training data", "## Evaluation", "## Limitations"]
    for line in (
        "- wandb: https://wandb.ai/open-assistant/supervised-finetuning/runs/08dfhyuc",
        "- base model: [stabilityai/stablelm-base-alpha-7b](https://huggingface.co/stabilityai/stablelm-base-alpha-7b)",
        "- checkpoint: 3 epochs (12,000 steps), 123,456,789 tokens, of 4 epochs",
        "- computed in float16 on 4 processes, NVIDIA A100-SXM4-80GB",
        "as recipe.yaml: `accelerate launch --num_processes 4 scripts/sft.py recipe.yaml --output_dir NEW`",
        "| validation after step 12,000 | eval_loss | 0.9877 |",
        "![loss, accuracy, learning rate, gradient norm and speed over the steps](training.png)",
    ):
        assert line in card.text, line
    assert "holds GSM8K's 1,319 test problems" in card.text
    assert json.loads(blocks(card)[-1]) == RECORD["deepspeed"]


def test_its_blocks_are_the_recipe(run_folder, tmp_path):
    folder = run_folder(max_length=1024)
    data, hyperparameters = (
        block for block in blocks(card_of(folder)) if block.startswith(("datasets:", "model_name:"))
    )
    (tmp_path / "again.yaml").write_text(f"{data}\n{hyperparameters}\n")
    then, again = load_recipe(folder / "recipe.yaml"), load_recipe(tmp_path / "again.yaml")
    paths = {"output_dir", "cache_dir"}
    assert again.model_dump(exclude=paths) == then.model_dump(exclude=paths)
    assert again.output_dir.name == then.output_dir.name


ZERO3 = str(ROOT / "ds_configs" / "zero3.json")
FSDP = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}
GROUPS = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"}
HSDP = "--config_file accelerate_configs/hsdp.yaml --parallelism_config_dp_replicate_size 2 "
HSDP += "--parallelism_config_dp_shard_size 8 "
SPELLED = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
SPELLED |= {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}


@pytest.mark.parametrize(
    ("launcher", "keys", "options", "rest"),
    [
        ({}, {}, None, ""),
        ({"WORLD_SIZE": "4"}, {}, "", ""),
        (FSDP, {"deepspeed_config": "null"}, "--config_file accelerate_configs/fsdp2.yaml ", ""),
        (FSDP | GROUPS, {"deepspeed_config": "null"}, HSDP, ""),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": ZERO3}, {}, "", " --deepspeed_config ds_configs/zero3.json"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/home/me/own.json"}, {}, "", " --deepspeed_config own.json"),
        ({"WORLD_SIZE": "4"}, {"deepspeed_config": "/home/me/own.json"}, "", ""),
        (SPELLED, {}, "--use_deepspeed --zero_stage 3 --offload_param_device cpu ", ""),
    ],
)
def test_the_command_is_one_that_can_be_typed(run_folder, tmp_path, launcher, keys, options, rest):
    """In the collection's folder: with files that are there, or that the card says to write."""
    card = card_of(run_folder(RECORD | {"command": {"folder": "/x", "launcher": launcher}}, **keys)).text
    start = "python" if options is None else f"accelerate launch {options}--num_processes 4"
    command = f"{start} scripts/sft.py recipe.yaml --output_dir NEW{rest}"
    assert f"recipe.yaml: `{command}`" in card
    words = shlex.split(command)
    if options is not None:
        parsed = launch_command_parser().parse_args(words[2:])
        assert parsed.training_script == "scripts/sft.py"
        assert parsed.config_file is None or (ROOT / parsed.config_file).exists()
    named = [word for word in words if word.endswith(".json")] or re.findall("deepspeed_config: (.*json)", card)
    assert named or "null" in keys.values()
    for file in named:
        assert ("and the zero config as `own.json`" in card) == (file == "own.json")
        assert (ROOT / file).exists() or file == "own.json"


def test_the_prompts_are_the_chat_templates(run_folder):
    folder = run_folder()
    card, tokenizer = card_of(folder), AutoTokenizer.from_pretrained(folder)
    prompt, chat = blocks(card)[:2]
    assert prompt == "<|prompter|>What is a meme, and where does the word come from?<|endoftext|><|assistant|>"
    question = [{"role": "user", "content": "What is a meme, and where does the word come from?"}]
    assert prompt == tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    turns = re.findall(r"<\|(prompter|assistant)\|>([^<]+)", chat)
    messages = [{"role": {"prompter": "user"}.get(role, role), "content": text} for role, text in turns]
    assert chat == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    widget = [entry["text"] for entry in card.data.widget]
    assert widget[0] == prompt
    assert all(re.fullmatch(r"<\|prompter\|>[^<]+<\|endoftext\|><\|assistant\|>", text) for text in widget)
    assert "Generation stops at `<|endoftext|>`." in card.text


def test_the_lines_that_load_it_run_in_a_clean_process(run_folder):
    folder = run_folder()
    lines = next(block for block in blocks(card_of(folder)) if "from_pretrained" in block)
    assert len([line for line in lines.splitlines() if line and not line.startswith(("from", "name"))]) == 5
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", lines], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_hub_takes_it(run_folder, monkeypatch):
    """By huggingface_hub's own code: read back, its results there and back, and `validate` against a hub here."""
    folder = run_folder()
    add_results(folder, "gsm8k", {"exact_match": {"value": 0.25, "low": 0.2, "high": 0.31, "n": 200}})
    card = card_of(folder)
    assert str(ModelCard(str(card))) == str(card) == (folder / "README.md").read_text()
    index = yaml.safe_load(str(card).split("---\n")[1])["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index
    results = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results["Aeala/ShareGPT_Vicuna_unfiltered", "loss"] == 0.8
    assert results["mix", "loss"] == 0.987654
    assert results["openai/gsm8k", "exact_match"] == 0.25
    with hub_server.running() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        card.validate()
    assert hub.requests[-1] == "POST /api/validate-yaml"


def test_evaluations_with_their_intervals(run_folder):
    folder = run_folder()
    loss = {"value": 1.25, "low": 1.2, "high": 1.3, "n": 400, "better": "lower"}
    add_results(
        folder, "loss", {"loss": loss, "loss/vicuna": loss, "loss/language de": loss, "accuracy": {"value": 0.5}}
    )
    mode = {"acc_norm,none (chat)": 1}
    add_results(
        folder, "harness", {"arc|easy/acc (chat)": {"value": 0.6, "low": None, "high": None, "n": 10}}, lm_eval=mode
    )
    (folder / "eval" / "sampling_report.json").write_text(json.dumps({"prompts": []}))
    card = card_of(folder)
    assert "| loss | loss | 1.2500 | 1.2000 to 1.3000 | 400 |" in card.text
    assert "| loss | loss/language de | 1.2500 |" in card.text
    assert "| loss | accuracy | 0.5000 |  |  |" in card.text
    assert r"| harness | arc\|easy/acc (chat) | 0.6000 |  | 10 |" in card.text
    assert "validation after step" not in card.text  # eval_loss.py has these figures, with intervals
    found = {(one.dataset_type, one.metric_type, one.metric_name) for one in card.data.eval_results}
    assert ("Aeala/ShareGPT_Vicuna_unfiltered", "loss", "loss/vicuna, 95 %: 1.2000 to 1.3000") in found
    assert ("arc|easy", "acc (chat)", "arc|easy/acc (chat)") in found
    assert not any("language" in name for *_, name in found)


def test_results_of_other_weights_are_left_out(run_folder, capsys):
    """The run went on after the evaluation."""
    folder = run_folder()
    add_results(folder, "gsm8k", {"exact_match": {"value": 0.25, "n": 200}})
    result = folder / "eval" / "gsm8k.json"
    result.write_text(result.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    card = card_of(folder)
    assert "exact_match" not in str(card)
    assert "gsm8k is of other weights than those beside it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "looked", "said"),
    [
        ({}, None, "as it is published, holds GSM8K's 1,319 test problems"),
        ({"drop_contaminated": "true"}, None, "were left out before training"),
        ({}, {"contaminated": False, "verdict": "none in /home/me/mix"}, "GSM8K's test problems: none in mix."),
        (
            {"drop_contaminated": "true"},
            {"contaminated": None, "verdict": "not known"},
            "were left out before training",
        ),
    ],
)
def test_contamination(run_folder, values, looked, said):
    folder = run_folder(**values)
    if looked:
        add_results(folder, "gsm8k", {"exact_match": {"value": 0.25}}, contamination=looked)
    assert said in card_of(folder).text


# ---- nothing of this machine ----


def test_no_path_and_no_secret(run_folder, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    record = RECORD | {
        "model": {"name": str(tmp_path / "base"), "files": {}},
        "deepspeed": {"comms_logger": {"token": SECRET, "path": f"x {SECRET}"}},
        "wandb": "http://10.0.0.1/run",
    }
    folder = run_folder(
        record,
        model_name=tmp_path / "base",
        cache_dir=tmp_path / "cache",
        deepspeed_config="/home/me/ds/zero2.json",
        sample_every=5,
        sample_prompts="/home/me/prompts.txt",
        resume_from_checkpoint="/home/me/out/checkpoint-5",
        **{"datasets.vicuna.input_file_path": "/home/me/data/chats.json"},
    )
    add_results(folder, "loss", {"loss": {"value": 1}}, warnings=[f"could not look: {tmp_path}/x: {SECRET}, ~/y/z"])
    card = card_of(folder)
    for private in (str(tmp_path), "/home/me", SECRET, "10.0.0.1", "~/"):
        assert private not in str(card), private
    assert "base_model" not in card.data.to_dict()
    assert card.data.license == "apache-2.0"
    assert "- base model: `base`, a model that is not on the hub" in card.text
    assert "could not look: x: [redacted], z" in card.text
    assert "input_file_path: chats.json" in card.text


@pytest.mark.parametrize("recorded", [True, False])
def test_a_base_model_in_the_hubs_cache_is_named_as_the_hub_names_it(run_folder, tmp_path, recorded):
    base = tmp_path / "models--stabilityai--stablelm-base-alpha-7b" / "snapshots" / "0123abc"
    base.mkdir(parents=True)
    record = RECORD | {"model": {"name": str(base), "files": {}}} if recorded else None
    card = card_of(run_folder(record, model_name=base))
    assert card.data.base_model == "stabilityai/stablelm-base-alpha-7b"
    assert card.data.license == "cc-by-sa-4.0"
    assert "0123abc" not in str(card)


def test_splits_of_one_hub_data_set_and_a_list_of_files(run_folder):
    own = {"source": "messages", "hub_name": "org/chats"}
    files = {"source": "messages", "input_file_path": ["/home/me/a.csv", "https://me:pw@host/b.jsonl"]}
    mix = [{"one": own | {"split": "train_sft[:5%]"}}, {"two": own | {"config": "code"}}, {"files": files}]
    card = card_of(run_folder(RECORD | {"data": {}}, datasets=json.dumps(mix)))
    assert card.data.to_dict()["datasets"] == ["org/chats"]
    assert "| files | ? | ? | data of its own, `a.csv`, `b.jsonl` | not stated |" in card.text
    for private in ("/home/me", "pw@"):
        assert private not in str(card)


@settings(max_examples=25)
@given(st.lists(st.from_regex(r"[\w.-]{1,8}", fullmatch=True), min_size=2, max_size=5), st.sampled_from(" '\"(:=,"))
def test_whatever_path_it_is_only_its_name_is_left(parts, before):
    path = "/" + "/".join(parts)
    text = shareable_text(f"see{before}{path} and https://a.b/c/d and/or x")
    assert path not in text
    assert text.endswith("and https://a.b/c/d and/or x")


MARKUP = ("<b>x</b>", "\n## A heading", "[a](http://b)", "`", "*x*", "<script>alert(1)</script>", "\r\n- a | b")


@pytest.mark.parametrize("text", MARKUP)
def test_what_stands_in_files_is_no_markup(run_folder, text):
    hardware = {"GPUs": [f"GPU {text}, 80 GB"]}
    record = RECORD | {"hardware": hardware, "wandb": f"https://wandb.ai/{text}", "packages": {"torch": f"2{text}"}}
    folder = run_folder(record, **{"datasets.vicuna.input_file_path": f"/home/me/x{text}"})
    add_results(folder, "harness", {f"task {text}/acc": {"value": 0.5}}, warnings=[f"found {text}"])
    model = find_model(str(folder))
    card = model_card(model, find_run(model), name=f"n {text}")
    page = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    kinds = Counter(child.type for token in page for child in [token, *(token.children or [])])
    assert kinds["html_inline"] == kinds["html_block"] == kinds["em_open"] == 0
    assert kinds["heading_open"] == 8
    assert kinds["table_open"] == 2
    links = [child.attrs["href"] for token in page for child in token.children or [] if child.type == "link_open"]
    assert "http://b" not in links


# ---- what is not there, or damaged ----


def test_the_demos_data_are_not_the_hubs(run_folder):
    files = {name: {"files": [{"path": f"recipes/demo_data/{name}.json"}]} for name in DATASETS}
    card = card_of(
        run_folder(RECORD | {"data": files}, from_scratch="true", **{"datasets.oasst_export.lang": "en,pt-BR"})
    )
    head = card.data.to_dict()
    assert not {"datasets", "base_model", "license"} & head.keys()
    assert head["language"] == ["en", "pt"]  # ISO 639-1
    assert "random weights of the shape of" in card.text
    assert "1,319 test problems" not in card.text


def test_a_checkpoint_has_the_card_of_its_step(run_folder):
    folder = run_folder()
    checkpoint = folder / "checkpoint-500"
    checkpoint.mkdir()
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]:
        if path.name != "run.json":
            shutil.copy(path, checkpoint)
    model = find_model(str(checkpoint))
    card = model_card(model, find_run(model))
    assert "# stablelm_7b-checkpoint-500" in card.text
    assert "- checkpoint: 0.125 epochs (500 steps), 5,000,000 tokens" in card.text
    assert "| validation after step 500 | eval_loss | 1.1000 |" in card.text


def test_a_model_without_a_run(chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert "No evaluation of these weights was found." in card.text
    assert "## Dev Details" not in card.text
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags", "widget"}


@pytest.mark.parametrize("damage", ["run.json", "recipe.yaml", "eval/loss.json"])
def test_what_is_damaged_is_left_out_with_a_line(run_folder, capsys, damage):
    folder = run_folder()
    (folder / "eval").mkdir()
    (folder / damage).write_text('{"step": \n')
    card = card_of(folder)
    assert "## Prompting" in card.text
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the card leaves out")]
    assert damage.rpartition("/")[2] in line


@pytest.mark.parametrize("value", [{"data": []}, {"git": "x"}, {"num_processes": "many"}, {"hardware": {"GPUs": 4}}])
def test_a_record_that_was_edited_is_left_out_with_a_line(run_folder, capsys, value):
    card = card_of(run_folder(RECORD | value))
    assert "- checkpoint: 3 epochs (12,000 steps)" in card.text
    said = capsys.readouterr().out
    assert "warning: the card leaves out the record of the run: " in said
    assert next(iter(value)) in said


@pytest.mark.parametrize("line", [{"step": "x"}, {"step": 12000}, {"step": 12000, "epoch": []}, [1], 3, None])
def test_a_line_of_metrics_that_was_edited_does_not_count(run_folder, line):
    card = card_of(run_folder(lines=[*LINES[:3], line]))
    assert "123,456,789 tokens" in card.text


def test_a_run_of_before_that_has_less(run_folder):
    card = card_of(run_folder(None, []))
    assert "- checkpoint: an unknown number of steps, of 4 epochs" in card.text
    assert "not known, the record of the run does not hold it" in card.text


@pytest.mark.parametrize("problem", ["a folder of its name", "no tokenizer"])
def test_a_card_that_cannot_be_written_costs_nothing_else(run_folder, capsys, problem):
    """All training is done: the run is to end as one that is finished."""
    folder = run_folder()
    if problem == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "README.md").mkdir()
    before = sorted(folder.iterdir())
    write_model_card(folder)
    assert f"warning: {folder / 'README.md'}: the model's card could not be written: " in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before
