"""Models that bring Python code of their own: trained, gone on with, and run by a script only where it is told to."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import average_checkpoints
import eval_loss
import export
import pytest
import torch
from checkpoints import give_own_code
from conftest import ROOT, run_script
from interruption import run_here, small_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from chatting.conversation import Chat
from chatting.replies import load_talker
from chatting.settings import Settings
from evaluation.chat_model import fingerprint
from evaluation.model import find_model
from run.model_files import save_model
from training.pretrained import load_pretrained
from utils.errors import UserError

DEMO = ROOT / "recipes" / "demo_data" / "model"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def of_models() -> list[str]:
    """Modules that came with models."""
    return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory):
    """An empty cache of what comes with models; a process imports from the first that it finds, for good."""
    cache = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        for name in of_models():
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").exists()])
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.setenv("HF_MODULES_CACHE", str(cache))  # of the process that reads an export back
        yield cache
        for name in of_models():
            del sys.modules[name]


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["own model", "own model and config"])
def trained(request, tmp_path_factory) -> Path:
    """The output folder of a run that was stopped after two of its four steps, and has gone on."""
    work = tmp_path_factory.mktemp("run")
    keys = {"trust_remote_code": True, "max_steps": 4, "save_steps": 4, "fuse_gelu": False, "sample_replies": 0}
    recipe = small_recipe(work, give_own_code(save_llama(work / "model"), own_config=request.param), **keys)
    run = run_here(recipe, output_dir=work / "out", steps=2)
    assert run.returncode == 75, run.stderr
    run = run_here(recipe, output_dir=work / "out")
    assert run.returncode == 0, run.stderr
    assert "going on from" in run.stdout
    return work / "out"


def test_what_a_run_leaves_is_loaded_by_transformers(trained, own_modules):
    for saved in (trained, trained / "checkpoint-2"):
        assert {"own.py", "config.json"} <= {path.name for path in saved.iterdir()}
        model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        assert type(model).__name__ == "Own"
    assert "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)" in (trained / "README.md").read_text()
    # Under names that are the same at each start and on each machine, not those of temporary folders.
    folders = {path.name for path in (own_modules / "transformers_modules").iterdir()}
    assert {"model", "read_back", "checkpoint_hyphen_2"} <= folders
    assert not [name for name in folders if name.startswith("tmp")]


REFUSALS = {
    "chat": ["MODEL"],
    "export": ["MODEL", "NEW"],
    "sampling_report": ["MODEL"],
    "eval_gsm8k": ["MODEL", "--data", "PROBLEMS"],
    "eval_harness": ["MODEL", "--tasks", "scripts/tasks/demo_world"],
    "eval_loss": ["MODEL"],
    "average_checkpoints": ["MODEL/checkpoint-2", "MODEL/checkpoint-4", "--out", "NEW"],
}


@pytest.mark.parametrize("trained", [False], indirect=True)
@pytest.mark.parametrize("script", REFUSALS)
def test_without_the_option_a_script_says_its_name_and_runs_nothing(trained, tmp_path, script):
    """Also of a model_type that transformers knows, which it would read as a model of its own, in silence."""
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    names = {"MODEL": trained, "NEW": tmp_path / "new", "PROBLEMS": tmp_path / "problems.jsonl"}
    arguments = []
    for argument in REFUSALS[script]:
        first, slash, rest = argument.partition("/")
        arguments.append(f"{names.get(first, first)}{slash}{rest}")
    done = run_script(*arguments, script=f"scripts/{script}.py", output_dir=tmp_path, check=False, stdin=b"Hello?")
    assert done.returncode == 2, done.stderr
    (error,) = done.errors
    assert "comes with Python code of its own" in error
    assert "--trust_remote_code" in error
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_with_the_option_it_is_talked_to(trained):
    talker = load_talker(find_model(str(trained), trust_remote_code=True), None)
    assert type(talker.model).__name__ == "Own"
    chat, settings = Chat(), Settings(temperature=0, max_new_tokens=3)
    chat.ask("Hello?")
    *_, reply = talker.answer(chat, talker.prompt(chat, settings), settings)
    assert reply.tokens


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_with_the_option_it_is_exported_and_averaged(trained, tmp_path):
    asked = {"dtype": None, "gguf": None, "gguf_dtype": None, "max_shard_size": "5GB", "vocab": "trim"}
    asked |= {"push_to_hub": None, "private": False, "trust_remote_code": True}
    export.main(argparse.Namespace(checkpoint=str(trained), out=str(tmp_path / "exported"), **asked))
    checkpoints = [str(trained / name) for name in ("checkpoint-2", "checkpoint-4")]
    averaged = {"out": tmp_path / "averaged", "trust_remote_code": True}
    average_checkpoints.main(argparse.Namespace(checkpoints=checkpoints, **averaged))
    for folder in (tmp_path / "exported", tmp_path / "averaged"):
        assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__ == "Own"


@pytest.mark.parametrize(("more", "trusts"), [([], False), (["--trust_remote_code"], True)])
def test_the_recipe_beside_a_model_does_not_say_whether_its_code_is_run(trained, monkeypatch, more, trusts):
    """It is from whoever made the model."""
    monkeypatch.setattr(sys, "argv", ["eval_loss.py", str(trained), *more])
    _, checkpoint, recipe = eval_loss.arguments()
    assert (checkpoint.trust_remote_code, recipe.trust_remote_code) == (trusts, trusts)


def test_another_code_is_another_model(trained):
    before = fingerprint(find_model(str(trained)))
    text = (trained / "own.py").read_text()
    (trained / "own.py").write_text(text + "# changed\n")
    after = fingerprint(find_model(str(trained)))
    (trained / "own.py").write_text(text)
    assert before == fingerprint(find_model(str(trained))) != after


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LLaMAForCausalLM", "Llama_ForCausalLM"])
def test_what_transformers_has_by_now_is_read_without_the_code(tmp_path, name):
    """And what is saved of it names no code that is not in its folder."""
    folder = save_llama(tmp_path / "model")
    auto_map = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": f"code.{name}"}
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": auto_map}))
    (folder / "code.py").write_text("raise SystemExit('was run')\n")
    model = load_pretrained(AutoModelForCausalLM, str(folder))
    save_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("auto_map", ["own.Own", ["own.Own"], {"AutoModelForCausalLM": 5}, {"AutoConfig": "own"}, {}])
@pytest.mark.parametrize("trusts", [False, True])
def test_a_damaged_auto_map_is_no_traceback(tmp_path, auto_map, trusts):
    folder = save_llama(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": auto_map}))
    with contextlib.suppress(UserError):
        model = load_pretrained(AutoModelForCausalLM, str(folder), trust_remote_code=trusts)
        save_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / "saved")
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
