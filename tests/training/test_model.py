"""Where a model is built."""

import copy
import time

import pytest
import torch
from huggingface_hub import constants
from mixes import make_recipe
from test_attention import GPT2_SIZES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training import model as model_module
from training.model import load_model
from training.pretrained import load_pretrained
from training.weight_files import hub_is_reachable, hub_name
from utils.errors import UserError


class Built(Exception):
    """Carries a model out of `load_model`, before its first forward pass, for which there is no device here."""


@pytest.fixture
def built(monkeypatch):
    """Call it with a config and what takes the GPU's place: the devices of a model that is made from scratch."""

    def call(config, device: str | None) -> set[str]:
        monkeypatch.setattr(model_module, "has_gpu", lambda: device is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: device)

        def stop(model, name):
            raise Built(model)

        monkeypatch.setattr(model_module, "check_output_layer", stop)
        recipe = make_recipe(from_scratch=True)
        with pytest.raises(Built) as caught:
            load_model(recipe, copy.deepcopy(config), None, torch.float32)
        model = caught.value.args[0]
        return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}

    return call


@pytest.mark.parametrize(("kind", "own"), [("gpt_neox", {}), ("llama", {}), ("gpt2", GPT2_SIZES)])
def test_random_weights_are_drawn_on_the_gpu_where_there_is_one(built, kind, own):
    """Its place is taken by the device that has no memory: a weight or a rotary frequency of a CPU would show."""
    config = AutoConfig.for_model(kind, **SIZES, **own)
    assert built(config, device="meta") == {"meta"}
    assert built(config, device=None) == {"cpu"}


def test_a_hub_that_cannot_be_reached_is_said_soon(monkeypatch):
    """Of a misspelt folder on a machine without a network. huggingface_hub's own attempts take 46 s, mostly asleep."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_is_reachable.cache_clear()
    try:
        for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
            with pytest.raises(UserError, match=r"^misspelt: no such folder under .*, and the hub cannot be reached$"):
                load_pretrained(kind, "misspelt")
    finally:
        hub_is_reachable.cache_clear()
    assert slept == []


def test_a_folder_of_the_hubs_cache_has_its_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--a-model"
    for commit in ("1" * 40, "2" * 40):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("2" * 40)
    assert hub_name(model / "snapshots" / ("2" * 40)) == "org/a-model"
    assert hub_name(model / "snapshots" / ("1" * 40)) is None  # by that name somebody else would get the newer one
    assert hub_name(tmp_path) is None
