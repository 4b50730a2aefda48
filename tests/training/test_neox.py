"""GPT-NeoX's layer in few passes over memory, against transformers' own and against fp64.

Its kernels are tried on a GPU, or by `make test-kernels` in the interpreter of Triton; else their tests skip.
"""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import strategies as st
from mixes import given
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, apply_rotary_pos_emb

from recipe.keys import Recipe
from training.collate import end_to_end
from training.engine import for_autocast
from training.linear import HalfWeights
from training.model import ready_for_training
from training.neox import FusedLayer, add_three, fuse_layers, rotate, two_norms, two_norms_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not (importlib.util.find_spec("triton") and (DEVICE == "cuda" or INTERPRETED)),
    reason="make test-kernels has Triton and its interpreter",
)
HALF = st.sampled_from([torch.bfloat16, torch.float16])
# A unit in the last place, not a half, since Triton's interpreter rounds towards zero.
EPSILON = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@needs_kernels
@given(st.integers(1, 9), st.sampled_from([1, 5, 32, 96]), HALF, st.sampled_from([0.0, 3.0, 100.0]), st.integers(0, 99))
def test_two_norms_and_their_gradients(rows, width, dtype, shift, seed):
    """Far from zero, too, where a variance as a difference of squares would be lost."""
    x = random(rows, width, seed=seed) + shift
    weights = [random(width, seed=seed + number) for number in range(1, 5)]
    gradients = [random(rows, width, seed=seed + number).to(dtype) for number in (5, 6)]
    rest = random(rows, width, seed=seed + 7)
    first, second, mean, root = two_norms(x, *weights, 1e-5, dtype)
    of_x, of_weights = two_norms_backward([*gradients, rest], x, mean, root, weights[0], weights[2])

    exact = [tensor.double().requires_grad_() for tensor in (x, *weights)]
    outputs = [F.layer_norm(exact[0], (width,), *pair, 1e-5) for pair in (exact[1:3], exact[3:5])]
    expected = torch.autograd.grad([*outputs, exact[0]], exact, [g.double() for g in (*gradients, rest)])
    close = {"rtol": EPSILON[dtype], "atol": 1e-4 * (1 + shift)}
    torch.testing.assert_close(first.double(), outputs[0].detach(), **close)
    torch.testing.assert_close(second.double(), outputs[1].detach(), **close)
    assert (first.dtype, of_x.dtype, of_weights.dtype) == (dtype, torch.float32, torch.float32)
    for found, wanted in zip((of_x, *of_weights), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-3 * (1 + shift) * float(root.max()))


@needs_kernels
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([(8, 2), (12, 4), (32, 8), (10, 10)]), st.booleans(), HALF)
def test_rotation_is_that_of_transformers_and_can_be_undone(heads, tokens, sizes, padded, dtype):
    (size, rotary), rows = sizes, tokens * (1 + padded)
    qkv = random(rows, heads, 3 * size).to(dtype)
    angles = random(tokens, rotary // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    parts = qkv.float().view(1 + padded, tokens, heads, 3 * size).transpose(1, 2).chunk(3, -1)
    query, key = apply_rotary_pos_emb(*parts[:2], cos[None], sin[None])
    expected = torch.cat([query, key, parts[2]], -1).transpose(1, 2).reshape(qkv.shape).to(dtype)

    found = qkv.clone()
    rotate(found, cos, sin, 1.0)
    torch.testing.assert_close(found, expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
    assert torch.equal(found[..., rotary:size], qkv[..., rotary:size])
    assert torch.equal(found[..., 2 * size :], qkv[..., 2 * size :])
    rotate(found, cos, sin, -1.0)
    torch.testing.assert_close(found, qkv, rtol=2 * EPSILON[dtype], atol=4 * EPSILON[dtype])


@needs_kernels
@given(st.integers(1, 5000), HALF)
def test_three_are_added_in_fp32(count, dtype):
    residual, first, second = random(count), random(count, seed=1).to(dtype), random(count, seed=2).to(dtype)
    torch.testing.assert_close(add_three(residual, first, second), residual + (first.float() + second.float()))


def make_model(**own):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    config = GPTNeoXConfig(vocab_size=104, max_position_embeddings=64, initializer_range=0.2, **sizes, **own)
    return AutoModelForCausalLM.from_config(config).to(DEVICE).train()


def prepare(model, fused: bool, **keys) -> None:
    base = {"model_name": "none", "output_dir": "nothing", "datasets": ["vicuna"], "dtype": "bf16"}
    ready_for_training(model, Recipe.model_validate(base | keys))
    weights = HalfWeights(model, torch.optim.AdamW(model.parameters(), fused=True), torch.bfloat16)
    assert weights.layers
    if fused:
        assert fuse_layers(model) == 2


def result(model, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The hidden states, and the gradients of a sum of them with random weights."""
    with torch.autocast(DEVICE, torch.bfloat16):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    (hidden * random(*hidden.shape, seed=5)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


PADDED = {"input_ids": torch.arange(24).view(2, 12) % 104}
PADDED["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
PADDED["attention_mask"][1, 7:] = 0


@needs_kernels
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding_free", [True, False])
def test_layer_is_transformers_up_to_rounding(padding_free, checkpointing):
    """Not further from fp32 than half as far again as autocast's own; two different ways to round."""
    keys = {"padding_free": padding_free, "gradient_checkpointing": checkpointing}
    inputs = dict(PADDED)
    if padding_free:
        inputs = end_to_end([torch.arange(length) for length in (9, 1, 12)]).to(DEVICE).model_inputs()
    inputs = {key: v.to(DEVICE) if key in ("input_ids", "attention_mask") else v for key, v in inputs.items()}
    plain = make_model()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain)
    prepare(plain, fused=False, **keys)
    prepare(fused, fused=True, **keys)
    ready_for_training(exact, Recipe.model_validate(
        {"model_name": "none", "output_dir": "nothing", "datasets": ["vicuna"], "dtype": "fp32"} | keys
    ))  # fmt: skip
    with torch.autocast(DEVICE, enabled=False):
        hidden = exact.base_model(**inputs, use_cache=False).last_hidden_state
    (hidden * random(*hidden.shape, seed=5)).sum().backward()
    expected = hidden.detach(), {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}

    def off(found) -> tuple[float, float]:
        norms = [
            torch.cat([(g - w).flatten(), w.flatten()]) for g, w in ((found[1][n], w) for n, w in expected[1].items())
        ]
        far = sum(float((each[: len(each) // 2] ** 2).sum()) for each in norms)
        size = sum(float((each[len(each) // 2 :] ** 2).sum()) for each in norms)
        return float((found[0] - expected[0]).norm() / expected[0].norm()), (far / size) ** 0.5

    of_plain, of_fused = off(result(plain, inputs)), off(result(fused, inputs))
    assert of_fused[0] < 1.5 * of_plain[0]
    assert of_fused[1] < 1.5 * of_plain[1]
    assert of_plain[0] < 0.05


@needs_kernels
def test_outside_of_autocast_and_in_generation_it_is_transformers_own():
    plain = make_model()
    fused = copy.deepcopy(plain)
    prepare(fused, fused=True)
    fused.set_attn_implementation("sdpa")
    ids = torch.arange(7, device=DEVICE)[None]
    assert torch.equal(fused.eval()(ids).logits, plain.eval()(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert torch.equal(fused.generate(ids, **options), plain.generate(ids, **options))
    assert fused.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("own", [{"use_parallel_residual": False}, {"hidden_dropout": 0.1}])
def test_other_layers_stay_as_they_are(own, monkeypatch):
    monkeypatch.setattr("training.neox.why_no_kernels", lambda device: None)
    model = make_model(**own)
    HalfWeights(model, torch.optim.AdamW(model.parameters(), fused=True), torch.bfloat16)
    assert fuse_layers(model) == 0


def test_layers_are_fused_where_triton_is_and_on_a_gpu_only(monkeypatch):
    model = make_model().cpu()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    monkeypatch.setattr("training.neox.why_no_kernels", lambda device: None)
    for_autocast(model, optimizer, torch.bfloat16)
    assert all(type(layer) is GPTNeoXLayer for layer in model.base_model.layers)
    monkeypatch.setattr("training.neox.why_no_kernels", lambda device: "no compiler")
    assert fuse_layers(model) == 0
    monkeypatch.setattr("training.neox.why_no_kernels", lambda device: None)
    assert fuse_layers(model) == 2
    assert all(type(layer) is FusedLayer for layer in model.base_model.layers)


COMPILES = """
import os, signal, sys, time
sys.path.insert(0, "scripts")
from types import SimpleNamespace
from run.stopping import StopSignal
stop = StopSignal()
stop.defer()
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from training.neox_kernels import _add_three
signature = {"residual": "*fp32", "first": "*bf16", "second": "*bf16", "output": "*fp32", "count": "i32"}
source = ASTSource(fn=_add_three, signature=signature | {"block": "constexpr"}, constexprs={(5,): 1024})
compile(source, target=GPUTarget("cuda", 90, 32))
alone = SimpleNamespace(num_processes=1)
assert not stop.agreed(alone)
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.2)
assert stop.agreed(alone)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="make test-kernels has Triton")
def test_sigusr1_is_heard_after_the_first_kernel_is_compiled(tmp_path):
    """For a GPU that need not be there. LLVM takes the signals for itself at that moment, and drops this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "SIGUSR1: saving after this step" in run.stderr
