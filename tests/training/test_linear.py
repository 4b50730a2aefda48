"""Linear layers over half-precision copies: they compute what autocast's own do, in every place that a layer can be in,
and the copies follow the weights; under DDP on two processes, too. After a restart: tests/run/test_resume.py."""

import copy
import filecmp
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from hypothesis import strategies as st
from mixes import given, make_recipe, scored_loss
from test_loss import MODELS, make_batch, make_labels
from test_loss import make_model as make_loss_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from training.linear import HalfLinear, HalfWeights
from training.model import ready_for_training

BF16, FP16 = torch.bfloat16, torch.float16


def with_half(model: torch.nn.Module, dtype: torch.dtype = BF16, rate: float = 0.0):
    """The model, its linear layers prepared, with its optimizer and the copies."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    return model, optimizer, HalfWeights(model, optimizer, dtype)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def off(found: dict, expected: dict) -> dict[str, float]:
    """Of each tensor, the norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - own).norm() / own.norm()) for name, own in expected.items()}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert {name for name, own in expected.items() if not torch.equal(found[name], own)} == set()


# ---- one layer ----


@given(
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 24),
    st.integers(1, 24),
    st.booleans(),
    st.sampled_from([torch.float32, BF16]),
    examples=40,
)
def test_a_layer_computes_what_autocasts_own_does(rows, fan_in, fan_out, bias, of_input):
    """Bit for bit: output, and the gradients of input and weight; the bias's is summed in fp32."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(fan_in, fan_out, bias)
    ours, _, _ = with_half(copy.deepcopy(plain))
    data, factors = torch.randn(*rows, fan_in).to(of_input), torch.randn(*rows, fan_out)
    found = []
    for layer in (plain, ours):
        own = data.clone().requires_grad_()
        with torch.autocast("cpu", BF16):
            output = layer(own)
        output.backward(factors.to(output.dtype))
        found.append((output, own.grad, layer.weight.grad))
    assert type(ours) is HalfLinear
    for expected, mine in zip(*found, strict=True):
        assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
        assert torch.equal(mine, expected)
    if bias:
        exact = factors.to(BF16).double().reshape(-1, fan_out).sum(0)
        torch.testing.assert_close(ours.bias.grad.double(), exact, rtol=1e-5, atol=1e-6)


def test_outside_of_autocast_it_is_a_linear_layer_in_fp32():
    torch.manual_seed(0)
    plain = torch.nn.Linear(7, 5)
    ours, _, _ = with_half(copy.deepcopy(plain))
    data = torch.randn(3, 7)
    for layer in (plain, ours):
        layer(data).square().sum().backward()
    assert torch.equal(ours(data), F.linear(data, plain.weight, plain.bias))
    assert_same(gradients(ours), gradients(plain))
    with torch.autocast("cpu", FP16):  # of another dtype than the copies are in
        assert torch.equal(ours(data), plain(data))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_over_micro_batches_are_no_farther_from_fp64_than_autocasts(device):
    """Of 16, in which all that varies cancels: what is left shows the rounding. On a CPU each product is rounded to
    half precision, as autocast's is; a GPU's are summed in fp32 throughout."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48, device=device)
    exact = copy.deepcopy(plain).double()
    exact.weight.data = plain.weight.data.to(BF16).double()
    exact.bias.data = plain.bias.data.to(BF16).double()
    ours, _, _ = with_half(copy.deepcopy(plain))
    for number in range(16):
        data = torch.randn(32, 64, device=device).to(BF16)
        factors = (torch.randn(32, 48, device=device) * (-1) ** number + 0.1).to(BF16)
        with torch.autocast(device, BF16):
            for layer in (plain, ours):
                layer(data).backward(factors)
        exact(data.double()).backward(factors.double())
    expected = gradients(exact)
    of_ours, of_plain = (
        off({name: own.double() for name, own in gradients(layer).items()}, expected) for layer in (ours, plain)
    )
    assert of_ours["bias"] < 1e-6 < 0.1 * of_plain["bias"]
    if device == "cuda":
        assert of_ours["weight"] < 0.01 * of_plain["weight"]
    else:
        assert of_ours["weight"] == of_plain["weight"]


# ---- models ----


def gpt2() -> GPT2LMHeadModel:
    """`Conv1D` in place of linear layers, and a tied head."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 104}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).train()


def make_model(name: str):
    return gpt2() if name == "gpt2" else make_loss_model(name)


def freeze(model) -> None:
    """The embedding and a layer of the body, weights and biases."""
    for module in (model.get_input_embeddings(), next(m for m in model.modules() if type(m) is torch.nn.Linear)):
        for parameter in module.parameters():
            parameter.requires_grad_(False)


def accumulate(model, dtype: torch.dtype = BF16, count: int = 3) -> dict[str, torch.Tensor]:
    """The gradients of the loss, summed over some micro-batches, under autocast."""
    loss_of = scored_loss(model).train()
    for seed in range(count):
        with torch.autocast("cpu", dtype):
            total = loss_of(make_batch(*make_labels(seed)))[0]
        total.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dtype", [BF16, FP16])  # in fp16 the head is a layer like others, run twice
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "gpt2"])
def test_a_model_has_the_gradients_of_autocast(name, frozen, dtype):
    """Matrices to fp32's rounding, biases and norms to half precision's, in which autocast sums them."""
    plain = make_model(name)
    if frozen:
        freeze(plain)
    ours, _, _ = with_half(copy.deepcopy(plain), dtype)
    expected, found = accumulate(plain, dtype), accumulate(ours, dtype)
    assert max(off(found, expected).values()) < 1e-2
    matrices = {name for name, own in expected.items() if own.ndim > 1}
    largest = max(off({key: found[key] for key in matrices}, {key: expected[key] for key in matrices}).values())
    assert largest < 1e-5


def test_what_is_a_layer_and_what_is_none():
    """All `nn.Linear`s, GPT-2's only one its head; no subclass, whose forward may be another."""
    model = gpt2()
    model.transformer.h[0].own = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)
    kinds = {name: type(module) for name, module in model.named_modules()}
    _, _, half_weights = with_half(model)
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert changed == {"lm_head"}
    assert half_weights.layers == [model.lm_head]
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D


def test_a_layer_that_runs_twice_in_a_forward():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, data):
            return self.layer(torch.tanh(self.layer(data)))

    torch.manual_seed(0)
    plain = Twice()
    ours, _, _ = with_half(copy.deepcopy(plain))
    found = []
    for model in (plain, ours):
        for seed in range(4):
            with torch.autocast("cpu", BF16):
                output = model(torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)))
            output.float().square().sum().backward()
        found.append(gradients(model))
        model.zero_grad(set_to_none=True)
    assert max(off(found[1], found[0]).values()) < 5e-3  # autocast adds the two products in half precision


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["attention kept", "plain"])
@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied"])
def test_gradient_checkpointing_changes_nothing(name, dropout):
    """With attention dropout layers are run again as a whole, else but for the attention."""
    found = []
    for checkpointing in (False, True):
        model = make_model(name)
        model.config.attention_dropout = dropout  # what decides; the layers were built without
        ready_for_training(model, make_recipe(gradient_checkpointing=checkpointing, padding_free=False))
        model, _, _ = with_half(model)
        found.append(accumulate(model))
    assert_same(found[1], found[0])


# ---- what others see of a model ----


def test_what_is_saved_is_as_without(tmp_path):
    model = make_model("llama_tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "plain")
    model, optimizer, _ = with_half(model)
    state_of_optimizer = optimizer.state_dict()
    assert_same(model.state_dict(), before)
    model.save_pretrained(tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert "model.safetensors" in names
    assert filecmp.cmpfiles(tmp_path / "plain", tmp_path / "ours", names, shallow=False) == (names, [], [])
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    accumulate(model)
    assert optimizer.state_dict() == state_of_optimizer


# ---- the copies follow the weights ----


def assert_up_to_date(half_weights: HalfWeights) -> None:
    assert half_weights.layers
    for layer in half_weights.layers:
        assert torch.equal(layer.half_weight, layer.weight.detach().to(layer.half_weight.dtype))


@pytest.mark.parametrize("name", ["gpt_neox", "llama_tied"])
def test_after_a_step_the_copies_are_those_of_the_new_weights(name):
    """So that the next step and the evaluation compute what autocast does with the same weights."""
    model, optimizer, half_weights = with_half(make_model(name), rate=1e-2)
    copies = [layer.half_weight.clone() for layer in half_weights.layers]
    loss_of, batch = scored_loss(model), make_batch(*make_labels())
    with torch.autocast("cpu", BF16):
        loss_of.train()(batch)[0].backward()
    optimizer.step()
    assert not any(torch.equal(layer.half_weight, old) for layer, old in zip(half_weights.layers, copies, strict=True))
    assert_up_to_date(half_weights)

    plain = make_model(name)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.autocast("cpu", BF16):
        _, losses, predictions = loss_of.eval()(batch)
        _, expected, expected_predictions = scored_loss(plain).eval()(batch)
    assert torch.equal(losses, expected)
    assert torch.equal(predictions, expected_predictions)


def test_a_step_that_is_left_out_leaves_the_copies():
    model, optimizer, half_weights = with_half(make_model("gpt_neox"), rate=1e-2)
    copies = [layer.half_weight.clone() for layer in half_weights.layers]
    with torch.autocast("cpu", BF16):
        (scored_loss(model).train()(make_batch(*make_labels()))[0] * float("nan")).backward()
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    optimizer.step()
    assert all(torch.equal(layer.half_weight, old) for layer, old in zip(half_weights.layers, copies, strict=True))


# ---- two processes ----


def test_under_ddp_gradients_are_those_of_autocast_in_one_process(tmp_path):
    """Two steps of three micro-batches on each of two processes, by `sft.train_step`; see half_worker.py."""
    run_script(tmp_path / "found.json", launch="ddp2", script="tests/training/half_worker.py", output_dir=tmp_path)
    steps = json.loads((tmp_path / "found.json").read_text())
    assert len(steps) == 2
    for step in steps:
        assert max(step["matrices"].values()) < 1e-5
        assert max(step["vectors"].values()) < 1e-2
        assert step["norm"] == pytest.approx(step["expected_norm"], rel=1e-3)
        assert step["copies_follow"]


def test_a_product_of_no_rows_has_gradients_of_zeros():
    """As of a micro-batch without a scored token."""
    layer, _, _ = with_half(torch.nn.Sequential(torch.nn.Linear(4, 3)))
    for rows in (0, 2, 0):
        with torch.autocast("cpu", BF16):
            layer(torch.ones(rows, 4)).sum().backward()
    assert torch.equal(layer[0].weight.grad, torch.full((3, 4), 2.0))
    assert torch.equal(layer[0].bias.grad, torch.full((3,), 2.0))
