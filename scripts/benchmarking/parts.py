"""What an operation of a step is for, by the module and the phase that it ran in: the lines of the table."""

import torch

from benchmarking.operations import kind_of, short, tensors_in
from training.loss import OutputLoss, ScoredLoss

PARTS = (
    "matrix products",
    "attention",
    "norms",
    "rotary",
    "activation",
    "residual",
    "bias gradients",
    "casts",
    "weight casts",
    "gradient accumulation",
    "embedding",
    "head",
    "optimizer",
    "clipping",
    "other",
)
# The kernels of training/neox.py.
OF_KERNELS = {"two_norms": "norms", "two_norms_backward": "norms", "rotate": "rotary", "add_three": "residual"}
PHASES = {"before": "other", "after": "clipping"}
ROLES = {"Norm": "norms", "Rotary": "rotary", "Attention": "rotary", "Embedding": "embedding"}


def role_of(module: torch.nn.Module) -> str:
    """What a module's own operations, but for products and casts, are for: as the field names its kind."""
    name, home = type(module).__name__, type(module).__module__
    if isinstance(module, (ScoredLoss, OutputLoss)):
        return "head"
    if isinstance(module, torch.nn.Linear):  # what is neither product nor cast nor a bias's gradient
        return "gradient accumulation"
    if home in ("transformers.activations", "torch.nn.modules.activation") or name.endswith("MLP"):
        return "activation"
    for word, role in ROLES.items():
        if word in name:
            return role
    return "residual" if name.endswith(("Layer", "Block")) or isinstance(module, torch.nn.Dropout) else "other"


def part_of(func, args: tuple, out, role: str, phase: str) -> str:
    """One of PARTS; `role` is that of the module whose work, or whose gradient, it is."""
    name, kind, node = short(func), kind_of(func), torch._C._current_autograd_node()
    if phase == "optimizer":
        return "optimizer"
    if phase != "window":
        return "weight casts" if is_cast(func, args, out) and of_weights(args) else PHASES[phase]
    if node and node.name().endswith("AccumulateGrad"):
        return "gradient accumulation"
    if kind == "attention":
        return "attention"
    if kind == "product":
        return "matrix products"
    if func.namespace == "neox":
        return OF_KERNELS[name]
    if role == "head":
        return "head"
    if role != "weight casts" and is_cast(func, args, out):
        return "casts"
    if node and name == "sum" and ("Addmm" in node.name() or node.name() == "_ProductBackward"):
        return "bias gradients"
    # The engine adds up what comes from two sides, here at the input of a norm, and says the last side's node.
    return "residual" if role == "norms" and name in ("add", "add_") and node else role


def is_cast(func, args: tuple, out) -> bool:
    """Whether all that a call does is to give numbers in another dtype."""
    name = short(func)
    if name not in ("_to_copy", "copy_", "_foreach_copy_"):
        return False
    source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
    return next(tensors_in(source)).dtype != next(tensors_in(target)).dtype


def of_weights(args: tuple) -> bool:
    return any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors_in(args[:2]))
