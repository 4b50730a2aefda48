"""Where a model is built."""

import copy

import pytest
import torch
from mixes import make_recipe
from test_attention import GPT2_SIZES, SIZES
from transformers import AutoConfig

from training import model as model_module
from training.model import load_model


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
