"""Linear layers in half precision over fp32 weights: cast once a step, their gradients summed in fp32 by the product.

Autocast casts each weight in every forward pass, and once more where a layer is recomputed. The weight's gradient is
rounded to half precision, cast to fp32 and added to the sum: all in all 26 bytes a weight and micro-batch, against 8
for a product that adds to the sum itself, and 6 a step for one cast.
"""

import torch
import torch.nn.functional as F

from training.adamw import AdamW


class HalfLinear(torch.nn.Linear):
    """An `nn.Linear` of fp32 weights that computes under autocast as `HalfWeights` has prepared it; else as ever."""

    half_weight: torch.Tensor  # as `HalfWeights` keeps it

    def in_half(self, device: torch.device) -> bool:
        """Whether autocast is on there, to the dtype of `half_weight`."""
        kind = device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.half_weight.dtype

    @torch.compiler.disable  # which would have to follow the sum into the weight's gradient
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in half precision under autocast."""
        if not self.in_half(input.device):
            return super().forward(input)
        return _Product.apply(input.to(self.half_weight.dtype), self.weight, self.bias, self)


class HalfWeights:
    """The half-precision copies of a model's linear weights, up to date after each step of the optimizer.

    Whoever else changes the weights calls `refresh`.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        """
        Args:
            model: on its device, in fp32. Its `nn.Linear`s become `HalfLinear`s where they are trained; what is
                saved of it stays as it is.
            optimizer: whose steps bring them up to date; ours writes them itself.
            dtype: fp16 or bf16.
        """
        linear = (layer for layer in model.modules() if type(layer) is torch.nn.Linear)
        self.layers = [layer for layer in linear if layer.weight.requires_grad]
        self.copies = {layer.weight: layer.weight.detach().to(dtype) for layer in self.layers}
        for layer in self.layers:
            layer.__class__ = HalfLinear
            # No buffers: in no file, and moved by nobody.
            layer.half_weight = self.copies[layer.weight]
        if isinstance(optimizer, AdamW):
            optimizer.copies = self.copies
        else:
            optimizer.register_step_post_hook(lambda *_: self.refresh())

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast anew: the weights have changed. The fused AdamW leaves no trace of it in their version numbers."""
        if self.copies:
            torch._foreach_copy_([*self.copies.values()], [*self.copies])


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right: fp32 [rows, columns] of [rows, n] and [n, columns] in fp32 or half precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # where no product of half precision gives fp32 (torch 2.13)
        total += left @ right


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, layer):
        ctx.save_for_backward(input, layer.half_weight)
        ctx.layer = layer
        return F.linear(input, layer.half_weight, None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx, gradient):
        (input, half), layer = ctx.saved_tensors, ctx.layer
        rows = gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        grad_input = (rows @ half).view(input.shape) if wanted[0] else None
        grad_weight = _weight_gradient(layer.weight, rows.T, input.reshape(-1, input.shape[-1])) if wanted[1] else None
        grad_bias = rows.sum(0, dtype=torch.float32) if wanted[2] else None
        return grad_input, grad_weight, grad_bias, None


def _weight_gradient(weight: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """left @ right in fp32, for autograd to add; None where it is added already.

    DDP's hook hears of the None, too, and reduces what the weight has (torch 2.11 to 2.13).
    """
    if not len(right):  # of no scored token, say
        return torch.zeros_like(weight) if weight.grad is None else None
    if weight.grad is not None:
        add_product(weight.grad, left, right)
        return None
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()
