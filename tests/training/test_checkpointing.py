"""Gradient checkpointing under dropout: a layer that runs again draws what it drew before."""

from functools import partial

import pytest
import torch
from mixes import make_recipe, scored_loss
from test_attention import VOCABULARY, assert_close, gradients, make_model
from test_loss import make_batch, make_labels
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoConfig

from training import attention
from training.attention import attention_dropout, keep_attention
from training.model import ready_for_training

# A kernel that draws its dropout from the generator, as SDPA's and flash-attn's do on a GPU. (On a CPU, SDPA with
# dropout is made of plain operations, none of which is kept.)
KERNEL = "tests::attention_with_dropout"


def shares(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Causal, [rows, heads, tokens, tokens]."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


@torch.library.custom_op(KERNEL, mutates_args=())
def kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor]:
    share = shares(query, key)
    kept = (torch.rand_like(share) >= dropout) / (1 - dropout) if dropout else torch.ones_like(share)
    return (share * kept) @ value, kept


def save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def backward(ctx, gradient, _):
    *inputs, kept = ctx.saved_tensors
    with torch.enable_grad():
        own = [tensor.detach().requires_grad_() for tensor in inputs]
        output = (shares(*own[:2]) * kept) @ own[2]
    return *torch.autograd.grad(output, own, gradient), None


kernel.register_autograd(backward, setup_context=save_inputs)


def stand_in(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
    return kernel(query, key, value, dropout)[0].transpose(1, 2), None


AttentionInterface.register("attention_with_dropout", stand_in)


def gradients_of_a_step(implementation: str, checkpointing: bool | str, **dropout: float) -> dict[str, torch.Tensor]:
    """Of one padded batch, all random numbers drawn from the same seed on; `selective` keeps attention regardless."""
    model = make_model("gpt_neox", implementation, **dropout)
    recipe = make_recipe(gradient_checkpointing=bool(checkpointing), padding_free=False)
    ready_for_training(model, recipe)
    assert model.config._attn_implementation == implementation
    if checkpointing == "selective":
        keep = partial(create_selective_checkpoint_contexts, keep_attention)
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": keep})
    torch.manual_seed(3)
    scored_loss(model).train()(make_batch(*make_labels()))[0].backward()
    return gradients(model)


@pytest.fixture
def kept_kernel(monkeypatch):
    monkeypatch.setattr(attention, "KERNELS", (*attention.KERNELS, KERNEL))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attention_with_dropout"])
@pytest.mark.parametrize("of_attention", [0.0, 0.1])
def test_gradients_under_dropout_are_those_without_checkpointing(kept_kernel, implementation, of_attention):
    dropout = {"attention_dropout": of_attention, "hidden_dropout": 0.1}
    expected = gradients_of_a_step(implementation, False, **dropout)
    assert_close(gradients_of_a_step(implementation, True, **dropout), expected, 1e-6)
    if of_attention:  # which is drawn, and shows
        without = gradients_of_a_step(implementation, False, **dropout | {"attention_dropout": 0.0})
        with pytest.raises(AssertionError):
            assert_close(without, expected, 0.1)


def test_a_kept_kernel_would_shift_what_is_drawn_after_it(kept_kernel):
    """Why attention with dropout is not kept: its draws are left out, and the residual's mask is another."""
    dropout = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    expected = gradients_of_a_step("attention_with_dropout", False, **dropout)
    with pytest.raises(AssertionError):
        assert_close(gradients_of_a_step("attention_with_dropout", "selective", **dropout), expected, 0.1)


@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        ("gpt_neox", {}, False),
        ("gpt_neox", {"hidden_dropout": 0.1}, False),
        ("gpt_neox", {"attention_dropout": 0.1}, True),
        ("llama", {"attention_dropout": 0.1}, True),
        ("gpt2", {"attn_pdrop": 0.1}, True),
        ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.1}, False),
    ],
)
def test_which_models_drop_out_attention(kind, own, expected):
    assert attention_dropout(AutoConfig.for_model(kind, vocab_size=VOCABULARY, **own)) is expected
