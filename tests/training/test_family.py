"""What a model is found to be by trying it: what no text reaches, what only some texts do, what changes its weights."""

import pytest
import torch
from families import family_config
from transformers import AutoModelForCausalLM

from training.family import check_output_layer, check_own_loss, check_training_kind, freeze_unreached
from utils.errors import UserError


class Experts(torch.nn.Module):
    """A mixture as a model's own code may have it: a module for each expert, run only where a token asks for it."""

    def __init__(self, width: int, count: int = 4):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(count))

    def forward(self, hidden):
        return self.experts[1](hidden)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config("Llama, SmolLM2")).eval()


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_all_of_an_ordinary_model_is_trained(llama):
    before = trained(llama)
    assert freeze_unreached(llama, "it") == []
    assert trained(llama) == before
    assert all(parameter.grad is None for parameter in llama.parameters())  # no gradient was computed


def test_what_no_text_reaches_is_left_as_it_is_and_named(llama):
    before = trained(llama)
    llama.value_head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 1))
    llama.model.images = torch.nn.ModuleDict({"tower": torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])})
    llama.model.layers[1].self_attn.extra_proj = torch.nn.Linear(
        32, 32
    )  # though its layer is reached, and another's not
    llama.model.layers[0].scale = torch.nn.Parameter(torch.ones(3))
    assert freeze_unreached(llama, "it") == [
        "model.images", "model.layers.0.scale", "model.layers.1.self_attn.extra_proj", "value_head"
    ]  # fmt: skip
    assert trained(llama) == before


def test_experts_of_which_some_texts_reach_some_are_trained_by_one_process_alone(llama, monkeypatch):
    for layer in llama.model.layers:
        layer.mlp = Experts(32)
    before = trained(llama)
    assert freeze_unreached(llama, "it") == []
    assert trained(llama) == before
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"experts are modules of their own \(model.layers.0.mlp.experts.0.bias\)"):
        freeze_unreached(llama, "it")


def test_a_forward_pass_that_changes_weights_is_refused(llama):
    def halve(module, *_) -> None:
        with torch.no_grad():
            module.weight.div_(2)

    llama.model.norm.register_forward_hook(halve)
    with pytest.raises(UserError, match="its forward pass changes its weights"):
        check_output_layer(llama, "it")


def test_a_loss_with_more_to_it_than_the_cross_entropy_is_refused():
    """By its own loss, whatever a config calls it; here a mixture's."""
    for asked in (False, True):
        config = family_config("Mixtral")
        config.output_router_logits = asked
        model = AutoModelForCausalLM.from_config(config).eval()
        if asked:
            with pytest.raises(UserError, match=r"its own loss .* is not the cross-entropy of its logits"):
                check_own_loss(model, "it")
        else:
            check_own_loss(model, "it")


def test_what_a_config_says_of_another_training(monkeypatch):
    config = family_config("Mixtral")
    config.output_router_logits, config.router_aux_loss_coef = True, 0.0
    check_training_kind(config, "x")  # nothing is left out
    config = family_config("OPT")
    config.layerdrop = 0.1
    check_training_kind(config, "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"layerdrop = 0\.1, .* give layerdrop: 0\.0 there, or one process"):
        check_training_kind(config, "x")
