"""Cross-entropy and gradient in place, against PyTorch's own in fp64.

Liger's kernel is tried on a GPU, or by `make test-kernels` in Triton's interpreter on a CPU; else its tests skip.
"""

import importlib.metadata
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from mixes import given, scored_loss
from test_loss import (
    MODELS,
    TERMS,
    differences,
    full_losses,
    gradients,
    make_batch,
    make_labels,
    make_model,
    weighted_sum,
)
from torch.utils._python_dispatch import TorchDispatchMode

from training import loss as loss_module
from training.collate import Batch
from training.loss import NO_TERMS, Terms, choose_kernel, cross_entropy, with_liger, with_pytorch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_liger = pytest.mark.skipif(
    not (importlib.util.find_spec("liger_kernel") and (DEVICE == "cuda" or INTERPRETED)),
    reason="make test-kernels has Liger and an interpreter for it",
)
LIGER = pytest.param(with_liger, marks=needs_liger)
# A unit in the last place, not a half, since Triton's interpreter rounds towards zero.
EPSILON = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def exact(
    logits: torch.Tensor, targets: torch.Tensor, terms: Terms = NO_TERMS, factors: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses and the gradient of their sum, each times its factor, fp64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=terms.label_smoothing)
    losses = losses + terms.z_loss * logits.exp().sum(-1).log() ** 2
    (losses * factors).sum().backward()
    return losses.detach(), logits.grad


terms_of_losses = st.builds(Terms, st.sampled_from([0.0, 0.1, 0.9]), st.sampled_from([0.0, 1e-4, 0.3]))


@pytest.mark.parametrize("kernel", [with_pytorch, LIGER])
@pytest.mark.parametrize("dtype", EPSILON)
@given(
    st.integers(1, 6),
    st.integers(2, 300),
    st.sampled_from([0.1, 3, 30]),
    terms_of_losses,
    st.booleans(),
    st.integers(0, 99),
)
def test_losses_and_gradient(kernel, dtype, rows, width, spread, terms, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * spread).to(DEVICE, dtype)
    targets = torch.randint(width, (rows,), generator=generator).to(DEVICE)
    factors = torch.rand(rows, generator=generator).to(DEVICE) if weighted else 1.0
    losses, gradient = exact(logits, targets, terms, factors)
    alone = with_pytorch(logits.clone(), targets, None, terms)
    found = kernel(logits, targets, factors, terms)
    assert (found.dtype, found.shape, logits.dtype) == (torch.float32, (rows,), dtype)
    for each in (found, alone):
        torch.testing.assert_close(each.double(), losses, rtol=3e-6, atol=3e-6 * spread)
    # A share of e^-x has x times the rounding of x. A kernel may round once more for a factor.
    rounding = EPSILON[dtype] * (2 if weighted else 1)
    torch.testing.assert_close(logits.double(), gradient, rtol=max(3e-5, rounding), atol=1e-6)


@pytest.mark.parametrize("kernel", [with_pytorch, LIGER])
def test_a_target_far_below_the_others(kernel):
    """Its share is 0 in fp32; its loss is no less finite for that."""
    logits = torch.tensor([[0.0, 300.0, 299.0], [500.0, 0.0, 0.0]], device=DEVICE)
    targets = torch.tensor([0, 0], device=DEVICE)
    losses, gradient = exact(logits, targets)
    torch.testing.assert_close(kernel(logits, targets).double(), losses)
    torch.testing.assert_close(logits.double(), gradient)


@pytest.mark.parametrize("kernel", [with_pytorch, LIGER])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(kernel, bad):
    logits = torch.zeros(2, 5, device=DEVICE)
    logits[0, 3] = bad
    losses = kernel(logits, torch.tensor([1, 2], device=DEVICE))
    assert not losses[0].isfinite()
    assert losses[1].isfinite()
    assert logits[0].isnan().any()
    assert logits[1].isfinite().all()


class WideTensors(TorchDispatchMode):
    """Counts the tensors of so many columns that operations allocate."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.memories = width, set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape[-1:] == (self.width,):
            self.memories.add(output.untyped_storage().data_ptr())
        return output


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_no_second_tensor_of_fp32_logits(dtype, more):
    logits = torch.randn(7, 97).to(dtype)
    with WideTensors(97) as seen:
        with_pytorch(logits, torch.arange(7))
    assert len(seen.memories | {logits.untyped_storage().data_ptr()}) == 1 + more


@needs_liger
@pytest.mark.parametrize("keys", [{}, TERMS], ids=["", "weights and terms"])
@pytest.mark.parametrize("name", MODELS)
def test_the_training_loss_with_liger(name, keys, monkeypatch):
    """The whole loss in chunks around its kernel, on models with tied and untied output layers, and one with a bias."""
    labelled = tuple(tensor.to(DEVICE) for tensor in make_labels())
    batch: Batch = make_batch(*labelled, weighted=bool(keys)).to(DEVICE)
    model = make_model(name).to(DEVICE)
    expected, _ = full_losses(model, labelled, **keys)
    weighted_sum(expected, batch).backward()
    expected_gradients = gradients(model)
    monkeypatch.setattr(loss_module, "choose_kernel", lambda _: (with_liger, "Liger's"))
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", 5 * 4 * model.config.vocab_size)
    total, losses, _ = scored_loss(model, **keys)(batch)
    total.backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=3e-6)
    # Measured with weights and terms: 3.1e-6, of sums with more in them.
    assert max(differences(gradients(model), expected_gradients).values()) < (6e-6 if keys else 3e-6)


@pytest.mark.parametrize(
    ("installed", "kernel", "words"),
    [
        ("0.8.5", with_liger, "Liger's kernel (0.8.5)"),
        ("0.8.11", with_liger, "Liger's kernel (0.8.11)"),
        ("0.8.4", with_pytorch, "not Liger's kernel: 0.8.4 is installed"),
        ("0.9.0", with_pytorch, "not Liger's kernel: 0.9.0 is installed"),
        (None, with_pytorch, "not installed (requirements-cuda.txt)"),
    ],
)
def test_which_kernel(installed, kernel, words, monkeypatch):
    def version(name: str) -> str:
        if name != "liger-kernel" or installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    choose_kernel.cache_clear()
    assert choose_kernel("cuda")[0] is kernel
    assert words in choose_kernel("cuda")[1]
    assert choose_kernel("cpu")[0] is with_pytorch
    choose_kernel.cache_clear()


@pytest.mark.parametrize(("dtype", "said"), [("fp32", True), ("fp16", False)])
def test_the_start_says_which_on_a_gpu(dtype, said, monkeypatch, capsys):
    """But for fp16, whose gradients wait for the loss scale."""
    for module in ("training.loss", "utils.launch"):
        monkeypatch.setattr(f"{module}.has_gpu", lambda: True)
    scored_loss(make_model("gpt_neox"), dtype=dtype)
    assert ("cross-entropy: " in capsys.readouterr().out) == said


def test_what_a_device_computes_it_with():
    logits, targets, terms = torch.randn(3, 11), torch.tensor([0, 5, 10]), Terms(0.2, 1e-2)
    losses, gradient = exact(logits, targets, terms)
    torch.testing.assert_close(cross_entropy(logits, targets, 1.0, terms).double(), losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-5, atol=1e-6)
