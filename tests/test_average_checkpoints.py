"""The mean of checkpoints: against one computed in another way, and what has none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from average_checkpoints import INDEX, Weights, check_same_model, copy_run, mean
from checkpoints import save_chat_model
from conftest import run_script
from mixes import make_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.model import EvaluatedModel, find_model
from publishing.model_card import model_card
from publishing.provenance import find_run
from utils.errors import UserError

SCRIPT = "scripts/average_checkpoints.py"


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> list[Path]:
    """Three of one architecture: in one file, in five, and in bf16."""
    folder = tmp_path_factory.mktemp("models")
    paths = [save_chat_model(tiny_model, folder / f"checkpoint-{seed}", seed) for seed in (1, 2, 3)]
    for path, how in ((paths[1], {"max_shard_size": "60KB"}), (paths[2], {})):
        model = AutoModelForCausalLM.from_pretrained(path)
        (path / "model.safetensors").unlink()
        (model.bfloat16() if path is paths[2] else model).save_pretrained(path, **how)
    assert len(list(paths[1].glob("*.safetensors"))) > 2
    return paths


def average(tmp_path, *paths, **how):
    return run_script(*paths, "--out", tmp_path / "out", script=SCRIPT, output_dir=tmp_path, **how)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0), (2, 1)])
def test_against_the_mean_of_loaded_models(tmp_path, models, order):
    run = average(tmp_path, *(models[place] for place in order))
    assert f"the mean of {len(order)} checkpoints" in run.stdout
    loaded = [AutoModelForCausalLM.from_pretrained(models[place], dtype=torch.float64).state_dict() for place in order]
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not any(info.values())
    assert found.dtype == (torch.bfloat16 if order[0] == 2 else torch.float32)  # that of the first
    for name, tensor in found.state_dict().items():
        expected = torch.stack([state[name] for state in loaded]).mean(0)
        tolerance = {"rtol": 2**-8, "atol": 0} if order[0] == 2 else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(tensor.double(), expected, **tolerance)
    tokenizer, own = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", models[order[0]]))
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == (own.get_vocab(), own.chat_template)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_code_that_comes_with_a_model(tmp_path, models):
    """Of an architecture that transformers knows it goes along; of another it is not run, so the model is refused."""
    paths = [shutil.copytree(path, tmp_path / "in" / path.name) for path in models[:2]]
    for path in paths:
        change_json(path / "config.json", auto_map={"AutoConfig": "own_config.OwnConfig"})
        (path / "own_config.py").write_text("raise SystemExit('was run')\n")
    average(tmp_path, *paths)
    assert (tmp_path / "out" / "own_config.py").read_text() == "raise SystemExit('was run')\n"
    change_json(paths[1] / "config.json", model_type="own")
    with pytest.raises(UserError, match="comes with Python code of its own"):
        check_same_model(*(Weights(path, path.name) for path in paths))


def test_of_one_run_it_has_the_recipe_and_the_record(tmp_path, models, capsys):
    """So that evaluations need no --recipe, and the card says what it is; of several runs no recipe is the mean's."""
    run = tmp_path / "run"
    paths = [shutil.copytree(path, run / path.name) for path in models[:2]]
    recipe = make_recipe(output_dir=run)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    record = {"format": 1, "status": "finished", "recipe": recipe.values(), "num_processes": 1, "dtype": "fp32"}
    (run / "run.json").write_text(json.dumps(record))
    (run / "last").symlink_to(paths[1].name)
    average(tmp_path, paths[0], run / "last")
    found = find_model(str(tmp_path / "out"))
    assert found.recipe_file.read_text() == (run / "recipe.yaml").read_text()
    averaged = ["checkpoint-1", "checkpoint-2"]
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == record | {"averaged": averaged}
    card = str(model_card(found, find_run(found)))
    assert "the mean of the weights of checkpoint-1, checkpoint-2, fine-tuned on the conversations of" in card
    assert "- checkpoint: the mean of the weights of checkpoint-1, checkpoint-2\n" in card

    for recipes, said in ([run / "recipe.yaml", None], "not of one run"), ([run / "recipe.yaml"] * 2, "is left out"):
        (run / "run.json").write_text("{}")
        (tmp_path / "mean").mkdir()
        copy_run(
            [EvaluatedModel(str(path), file) for path, file in zip(paths, recipes, strict=True)], tmp_path / "mean"
        )
        assert said in capsys.readouterr().out
        names = [path.name for path in (tmp_path / "mean").iterdir()]
        assert names == ["recipe.yaml"] * (said == "is left out")
        shutil.rmtree(tmp_path / "mean")


def test_half_precision_is_summed_in_fp32_and_stays_half(tmp_path):
    """Of 300 times 1 and once 0.01 a sum in bf16 would stand still at 256."""
    for number in range(301):
        (tmp_path / str(number)).mkdir()
        value = torch.full((4,), 0.01 if number == 300 else 1, dtype=torch.bfloat16)
        save_file({"a": value, "positions": torch.arange(3)}, tmp_path / str(number) / "model.safetensors")
    models = [Weights(tmp_path / str(number), str(number)) for number in range(301)]
    found = mean("a", models, models[0].dtypes["a"])
    assert found.dtype == torch.bfloat16
    assert found.tolist() == torch.full((4,), 300.01 / 301).bfloat16().tolist()
    assert torch.equal(mean("positions", models, torch.int64), torch.arange(3))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change) -> None:
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", {"format": "pt"})


def break_number(state) -> None:
    state["gpt_neox.embed_in.weight"][3, 3] = float("nan")


CHANGES = {
    "another config": (
        lambda path: change_json(path / "config.json", layer_norm_eps=0.5),
        "are not checkpoints of one model: config.json",
    ),
    "another tokenizer": (
        lambda path: change_json(path / "tokenizer.json", truncation={"direction": "Right"}),
        "differ in tokenizer.json",
    ),
    "another chat template": (
        lambda path: (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        "differ in their chat templates",
    ),
    "other shapes": (
        lambda path: change_weights(path, lambda state: state.update(extra=torch.ones(2))),
        "extra is [2] and absent",
    ),
    "a weight that is no number": (lambda path: change_weights(path, break_number), "embed_in.weight holds what is no"),
    "cut off": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
        "cut off or damaged",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "holds no *.safetensors"),
    "an adapter": (lambda path: (path / "adapter_config.json").write_text("{}"), "is an adapter"),
    "a damaged index": (
        lambda path: (path / "model.safetensors").rename(path / "model.safetensors.index.json"),
        "model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_has_no_mean(tmp_path, models, change, message):
    other = shutil.copytree(models[0], tmp_path / "other")
    change(other)
    run = average(tmp_path, models[0], other, check=False)
    assert run.returncode == 2
    assert message in run.errors[0]
    assert {path.name for path in tmp_path.iterdir()} == {"other"}  # nothing half written


def test_what_is_refused_of_the_command_line(tmp_path, models):
    (tmp_path / "link").symlink_to(models[0])
    for paths, message in [
        ([models[0]], "give two checkpoints or more"),
        ([models[0], tmp_path / "link"], "is given twice"),
        ([models[0], tmp_path / "nowhere"], "no such folder"),
    ]:
        run = average(tmp_path, *paths, check=False)
        assert run.returncode == 2
        assert message in run.errors[0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert "holds mine.txt already" in average(tmp_path, *models[:2], check=False).errors[0]


def test_an_index_is_that_of_the_weights_or_refused(tmp_path, models):
    path = shutil.copytree(models[1], tmp_path / "wrong")
    index = json.loads((path / INDEX).read_text())
    files = index["weight_map"]
    first, last = min(files.values()), max(files.values())
    wrong = {name: {first: last, last: first}.get(file, file) for name, file in files.items()}
    fewer = {name: file for name, file in files.items() if name != "gpt_neox.final_layer_norm.bias"}
    for weight_map in ({}, wrong, fewer):
        change_json(path / INDEX, weight_map=weight_map)
        with pytest.raises(UserError, match=r"index.json: damaged: "):
            Weights(path, "wrong")
    # Beside the whole weights in one file an index names nothing that is read.
    whole = shutil.copytree(models[0], tmp_path / "whole")
    shutil.copyfile(models[1] / INDEX, whole / INDEX)
    average(tmp_path, whole, models[1])
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_a_file_that_an_index_names_and_that_is_gone(tmp_path, models):
    broken = shutil.copytree(models[1], tmp_path / "broken")
    sorted(broken.glob("*.safetensors"))[0].unlink()
    with pytest.raises(UserError, match="not there"):
        Weights(broken, "broken")
