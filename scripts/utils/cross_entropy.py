"""Cross-entropy and its gradient in one go, the gradient in the memory of the logits.

On a CUDA GPU Liger's Triton kernel does it, where the package is installed (requirements-cuda.txt): it reads half
precision twice and writes it once, where PyTorch's operations go over it in fp32 as well. Liger's fused linear
cross-entropy is the loop of utils/loss.py around the same kernel, but waits for the device at each call to count the
targets, and gives the sum or the losses, not both (0.8.5).
"""

import importlib.metadata
from collections.abc import Callable
from functools import cache

import torch
from packaging.version import Version

# The kernel is no public interface of Liger: its place and arguments may change with the second number.
LIGER_VERSIONS = Version("0.8.5"), Version("0.9")


def cross_entropy_in_place(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropies, fp32 [rows]; `logits` becomes the gradient of their sum.

    Args:
        logits: [rows, vocabulary], contiguous, fp32 or half precision; the softmax is computed in fp32 either way.
        targets: int64 [rows], each under vocabulary.
    """
    kernel, _ = choose_kernel(logits.device.type)
    return kernel(logits, targets)


@cache
def choose_kernel(device: str) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]:
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


def with_pytorch(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`cross_entropy_in_place` anywhere."""
    shares = logits.float()  # of fp32 the logits themselves: on a CPU, more memory is what would take the time
    torch.log_softmax(shares, -1, out=shares)
    losses = -shares.gather(1, targets[:, None])[:, 0]
    shares.exp_()  # softmax, less 1 at the target
    shares.scatter_add_(1, targets[:, None], shares.new_full((1, 1), -1).expand(len(targets), 1))
    if shares is not logits:
        logits.copy_(shares)
    return losses


def with_liger(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`cross_entropy_in_place` with the kernel that Liger's fused linear cross-entropy is made of."""
    from liger_kernel.ops.backends._triton.cross_entropy import cross_entropy_loss_and_grad_triton

    class_weights, ignored, z_loss, label_smoothing, softcap = None, -100, 0.0, 0.0, None
    counts = 1, 1.0, 0.0  # of targets and of class weights, by which only a mean is divided
    wanted = False, False, False, True  # z loss, accuracy, predictions, gradient
    return cross_entropy_loss_and_grad_triton(
        *(logits, targets, class_weights, ignored, z_loss, label_smoothing, "sum", softcap), *counts, *wanted
    )[0]
