"""The training loss: cross-entropy at the scored positions only, without ever holding all their logits.

Logits for 4 x 4096 tokens of StableLM's vocabulary are 3.3 GB in fp32, and as much again for their gradient. So the
model's body runs as usual, the hidden states of the scored positions are picked out, and the output layer is applied to
them in chunks. A chunk's gradient is computed beside its loss, in the memory of its logits: they are made once. (Making
them again took 29 % longer for a step of the small model of `scripts/benchmark.py train`, on a CPU.)

In fp16 they are made twice: its gradients are only kept from underflow by the loss scale, which comes in the backward
pass. Every path goes through `cross_entropy`, the one function from logits to losses and gradients.

On a CUDA GPU Liger's Triton kernel does its work, where the package is installed (requirements-cuda.txt): it reads half
precision twice and writes it once, where PyTorch's operations go over it in fp32 as well. Liger's fused linear
cross-entropy is the loop here around the same kernel, but waits for the device at each call to count the targets, and
gives the sum or the losses, not both (0.8.5).
"""

import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from recipe.keys import Recipe
from training.adapters import learnt_rows
from training.collate import Batch
from training.linear import HalfLinear, add_product
from training.neftune import noisy_embedding
from utils.launch import has_gpu, say, training_dtype

LOGITS_BUDGET = 256 * 2**20  # bytes of logits held at a time
# The kernel is no public interface of Liger: its place and arguments may change with the second number.
LIGER_VERSIONS = Version("0.8.5"), Version("0.9")


class Terms(NamedTuple):
    """What is minimised of a token beside its cross-entropy; nothing by default."""

    # The share of the target that goes to all of the vocabulary evenly (Szegedy et al. 2016, section 7).
    label_smoothing: float = 0.0
    # The factor of log(Z)^2, Z the sum of the logits' exponentials (Chowdhery et al. 2022, PaLM, section 5: 1e-4).
    z_loss: float = 0.0


NO_TERMS = Terms()


class ScoredLoss(torch.nn.Module):
    """A causal LM whose forward returns the loss of every scored token.

    It is what `Accelerator.prepare` wraps, so that DDP and DeepSpeed see every parameter used inside one forward. What
    a recipe says of the loss of a token belongs here; how a step averages the losses is seen in sft.py.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe):
        super().__init__()
        self.model = model
        self.output = OutputLoss(Terms(recipe.label_smoothing, recipe.z_loss))
        self.noise_alpha = recipe.neftune_noise_alpha
        if has_gpu() and training_dtype(recipe.dtype) != torch.float16:
            say(f"cross-entropy: {choose_kernel('cuda')[1]}")

    @property
    def config(self):
        """The model's config, which Accelerate looks at under DeepSpeed."""
        return self.model.config

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Score a batch.

        Returns:
            total: fp32 scalar, the sum of the losses, each times its token's weight, to be differentiated.
            losses: fp32 [scored tokens], in the order of `batch.scored`, for the record.
            predictions: int64 [scored tokens], the likeliest token of each position; None while training.

        In evaluation losses are the cross-entropy alone, and no token has a weight.
        """
        with noisy_embedding(self.model, batch, self.noise_alpha if self.training else 0.0):
            hidden = self.model.base_model(**batch.model_inputs(), use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.scored)
        head, vocabulary = self.model.get_output_embeddings(), self.config.get_text_config().vocab_size
        return self.output(head, hidden, batch, vocabulary)


class OutputLoss(torch.nn.Module):
    """The output layer and the loss of what it gives.

    A module of its own, although it has no weights, because ZeRO-3 gathers weights around a module's forward and
    backward pass, and takes part in each call of one: the number of chunks is another on each process.
    """

    def __init__(self, terms: Terms):
        super().__init__()
        self.terms = terms

    def forward(self, head: torch.nn.Module, hidden: torch.Tensor, batch: Batch, vocabulary: int):
        """As ScoredLoss, of the output layer `head` and the hidden states [scored tokens, hidden]."""
        layer, learnt, ids = learnt_rows(head)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
        rows = rows_of_a_chunk(vocabulary, dtype.itemsize)
        if not self.training:
            return _evaluate(head, hidden, batch.targets, rows)
        if dtype == torch.float16 or not isinstance(layer, torch.nn.Linear):
            return _with_logits_recomputed(head, hidden, batch, rows, self.terms)
        cast_weight = layer.half_weight if isinstance(layer, HalfLinear) else layer.weight.detach().to(dtype)
        weight = layer.weight
        if learnt is not None:
            cast_weight, weight = cast_weight.index_copy(0, ids, learnt.detach().to(dtype)), learnt
        of_tokens = batch.targets, batch.weights, rows, ids, self.terms
        total, losses = _FusedLinearCrossEntropy.apply(hidden.to(dtype), weight, cast_weight, layer.bias, *of_tokens)
        return total, losses, None


def rows_of_a_chunk(vocabulary: int, logit_bytes: int) -> int:
    """Rows of logits that are made at a time, within LOGITS_BUDGET: in half precision in whole tiles of a product.

    (On an H100 the head took 8.5 ms for 4,096 rows of StableLM's in chunks of 2,048, in chunks of 1,334 10.2.)
    """
    rows = max(1, LOGITS_BUDGET // (logit_bytes * vocabulary))
    return rows if logit_bytes == 4 or rows < 128 else rows // 128 * 128


# ---- The paths from hidden states to losses ----


def _evaluate(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, rows: int):
    losses, predictions = [], []
    for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head.forward(chunk)  # not head(chunk): see OutputLoss
        predictions.append(logits.argmax(-1))
        losses.append(cross_entropy(logits, target))
    losses = torch.cat(losses)
    return losses.sum(), losses, torch.cat(predictions)


def _with_logits_recomputed(head: torch.nn.Module, hidden: torch.Tensor, batch: Batch, rows: int, terms: Terms):
    def losses_of(chunk: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return _CrossEntropy.apply(head.forward(chunk), target, terms)

    chunks = zip(hidden.split(rows), batch.targets.split(rows), strict=True)
    losses = torch.cat([checkpoint(losses_of, *chunk, use_reentrant=False) for chunk in chunks])
    return _weighted_sum(losses, batch.weights), losses.detach(), None


def _weighted_sum(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return losses.sum() if weights is None else (losses * weights).sum()


class _CrossEntropy(torch.autograd.Function):
    """The loss of each row, fp32, of logits from any output layer."""

    @staticmethod
    def forward(ctx, logits, targets, terms):
        ctx.save_for_backward(logits, targets)
        ctx.terms = terms
        return cross_entropy(logits, targets, None, terms)

    @staticmethod
    def backward(ctx, factors):
        logits, targets = ctx.saved_tensors
        gradient = logits.clone()
        cross_entropy(gradient, targets, factors, ctx.terms)
        return gradient, None, None


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses of hidden @ weight.T + bias, each times its row's of `weights`, and each of them.

    Only the sum can be differentiated: its gradients are ready after the forward pass, up to the one factor that the
    backward pass brings. The losses and the weight's gradient are summed in fp32, whatever the dtype. `cast_weight` is
    the weight in the dtype of the products. Where only its rows `ids` are trained, `weight` is these; a frozen one gets
    no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, cast_weight, bias, targets, weights, rows, ids, terms):
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        trained, bias_trained = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias_trained else None
        cast_bias = None if bias is None else bias.to(cast_weight.dtype)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            grad_logits = F.linear(hidden[part], cast_weight, cast_bias)  # logits, until the next line
            losses[part] = cross_entropy(grad_logits, targets[part], 1.0 if weights is None else weights[part], terms)
            if bias_trained:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
            grad_hidden[part] = grad_logits @ cast_weight
            if trained:
                # Under no name, which would keep this chunk's logits beside the next one's: 256 MiB.
                add_product(grad_weight, (grad_logits if ids is None else grad_logits[:, ids]).T, hidden[part])
        grad_weight = grad_weight.to(weight.dtype) if trained else None
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias.to(bias.dtype) if bias_trained else None)
        ctx.mark_non_differentiable(losses)
        return _weighted_sum(losses, weights), losses

    @staticmethod
    def backward(ctx, factor, _):
        # In place: a second backward pass over the same forward would find them changed, and says so.
        gradients = [gradient if gradient is None else gradient.mul_(factor) for gradient in ctx.saved_tensors]
        grad_hidden, grad_weight, grad_bias = gradients
        return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None


# ---- From logits to losses and gradients ----


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor | float | None = None, terms: Terms = NO_TERMS
) -> torch.Tensor:
    """The cross-entropy of each row with its other terms, and in the memory of the logits its gradient.

    Args:
        logits: [rows, vocabulary], contiguous, fp32 or half precision; the softmax is computed in fp32 either way.
        targets: int64 [rows], each under vocabulary.
        factors: `logits` becomes the gradient of the losses multiplied by these, fp32 [rows], or by 1.0; None leaves
            it as it is.
        terms: beside the cross-entropy.
    Returns: the losses, fp32 [rows], not multiplied.
    """
    on_half = logits.dtype == torch.float16  # multiplied in fp32, before a small share of it rounds to 0
    kernel = with_pytorch if factors is None or on_half else choose_kernel(logits.device.type)[0]
    return kernel(logits, targets, factors, terms)


@cache
def choose_kernel(device: str) -> tuple[Callable[..., torch.Tensor], str]:
    """What does the above on a device of this type, and its name, for CUDA with the reason where it is not Liger's."""
    if device != "cuda":
        return with_pytorch, "PyTorch's operations"
    try:
        installed = Version(importlib.metadata.version("liger-kernel"))
    except importlib.metadata.PackageNotFoundError:
        return with_pytorch, "PyTorch's operations; not Liger's kernel: it is not installed (requirements-cuda.txt)"
    if not LIGER_VERSIONS[0] <= installed < LIGER_VERSIONS[1]:
        needed = f"{installed} is installed, not from {LIGER_VERSIONS[0]} on and under {LIGER_VERSIONS[1]}"
        return with_pytorch, f"PyTorch's operations; not Liger's kernel: {needed}"
    return with_liger, f"Liger's kernel ({installed})"


def with_pytorch(
    logits: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor | float | None = 1.0, terms: Terms = NO_TERMS
) -> torch.Tensor:
    """`cross_entropy` anywhere."""
    smoothing, z_loss = terms
    shares = logits.float()  # of fp32 the logits themselves: on a CPU, more memory is what would take the time
    highest = shares.amax(-1) if z_loss else None
    shares = torch.log_softmax(shares, -1, out=None if factors is None else shares)
    losses = -shares.gather(1, targets[:, None])[:, 0]
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * shares.mean(-1)
    if z_loss:
        log_z = highest - shares.amax(-1)  # of the highest, whose share has a small logarithm: nothing cancels
        losses += z_loss * log_z**2
    if factors is None:
        return losses
    shares.exp_()  # softmax, less 1 at the target
    if z_loss:
        shares *= (1 + 2 * z_loss * log_z)[:, None]
    if smoothing:
        shares -= smoothing / shares.shape[-1]
    shares.scatter_add_(1, targets[:, None], shares.new_full((1, 1), smoothing - 1).expand(len(targets), 1))
    _multiply(shares, factors)
    if shares is not logits:
        logits.copy_(shares)
    return losses


def with_liger(
    logits: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor | float = 1.0, terms: Terms = NO_TERMS
) -> torch.Tensor:
    """`cross_entropy` with the kernel that Liger's fused linear cross-entropy is made of."""
    from liger_kernel.ops.backends._triton.cross_entropy import cross_entropy_loss_and_grad_triton

    class_weights, ignored, softcap = None, -100, None
    counts = 1, 1.0, 0.0  # of targets and of class weights, by which only a mean is divided
    wanted = False, False, False, True  # z loss, accuracy, predictions, gradient
    losses = cross_entropy_loss_and_grad_triton(
        *(logits, targets, class_weights, ignored, terms.z_loss, terms.label_smoothing, "sum", softcap),
        *counts,
        *wanted,
    )[0]
    _multiply(logits, factors)
    return losses


def _multiply(gradient: torch.Tensor, factors: torch.Tensor | float) -> None:
    if isinstance(factors, torch.Tensor):  # else 1, and one pass over the logits less
        gradient.mul_(factors[:, None])
