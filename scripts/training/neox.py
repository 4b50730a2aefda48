"""GPT-NeoX's layer in half precision with few passes over memory, on a CUDA GPU.

Between its products the layer that transformers writes goes over the hidden states about 40 times: two norms that each
read them, rotary embeddings in fp32 that copy queries and keys, three additions. Of the 212 ms of a micro-batch of
4,096 tokens of the 3B shape on an H100 those took 43. Here norms are one kernel, the rotation is in place, the
additions are one: the same numbers up to rounding, in 12 ms. (torch.compile by layer brought nothing there, in place of
this: what it fuses around the attention's layout costs it as much.)
"""

import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import (
    ALL_ATTENTION_FUNCTIONS,
    GPTNeoXLayer,
    eager_attention_forward,
)

from training.linear import HalfLinear
from utils.errors import reason as why
from utils.launch import say


def fuse_layers(model: torch.nn.Module) -> int:
    """Have a GPT-NeoX's layers compute as here under autocast; returns how many. Their parameters stay as they are.

    Only layers whose linear layers are prepared (`HalfWeights`), with parallel residuals and without dropout; none
    where the kernels cannot run.
    """
    layers = [layer for layer in model.modules() if type(layer) is GPTNeoXLayer and _can_be_fused(layer)]
    if not layers:
        return 0
    if reason := why_no_kernels(model.device):
        say(f"layers: transformers' own; not the kernels of training/neox.py: {reason}")
        return 0
    for layer in layers:
        layer.__class__ = FusedLayer
    say("layers: the kernels of training/neox.py")
    return len(layers)


def why_no_kernels(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run; None when they can. Triton comes with a CUDA build of torch, and needs a C
    compiler: so one is tried."""
    try:
        one, half = torch.ones(1, device=device), torch.ones(1, device=device, dtype=torch.bfloat16)
        add_three(one, half, half)
    except Exception as error:  # ModuleNotFoundError, RuntimeError for no compiler, what a driver says
        return why(error)
    return None


def _can_be_fused(layer: GPTNeoXLayer) -> bool:
    prepared = isinstance(layer.attention.query_key_value, HalfLinear)
    compiled = layer._compiled_call_impl is not None  # under torch_compile
    return prepared and not compiled and layer.use_parallel_residual and not layer.post_attention_dropout.p


class FusedLayer(GPTNeoXLayer):
    """A GPT-NeoX layer; outside of autocast and in generation as transformers has it."""

    def forward(self, hidden_states, attention_mask=None, *, layer_past=None, position_embeddings=None, **kwargs):
        """[batch, tokens, hidden] fp32 to the same; arguments by name are those of transformers."""
        attention = self.attention
        in_half = attention.query_key_value.in_half(hidden_states.device)
        if not in_half or layer_past is not None or hidden_states.dtype != torch.float32:
            return super().forward(
                hidden_states, attention_mask, layer_past=layer_past, position_embeddings=position_embeddings, **kwargs
            )
        norms = self.input_layernorm, self.post_attention_layernorm
        weights = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
        batch, tokens, hidden = hidden_states.shape
        for_attention, for_mlp, rest = _TwoNorms.apply(
            hidden_states.reshape(-1, hidden).contiguous(),
            *weights,
            norms[0].eps,
            attention.query_key_value.half_weight.dtype,
        )
        cos, sin = (each.flatten(0, 1).float().contiguous() for each in position_embeddings)
        width = 3 * attention.head_size
        qkv = _Rotate.apply(attention.query_key_value(for_attention), cos, sin, width)
        parts = qkv.view(batch, tokens, -1, width).chunk(3, dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        dropout = attention.attention_dropout if self.training else 0.0
        mixed, _ = attend(
            attention,
            *(part.transpose(1, 2) for part in parts),
            attention_mask,
            scaling=attention.scaling,
            dropout=dropout,
            **kwargs,
        )
        mixed = attention.dense(mixed.reshape(-1, hidden))
        return _AddThree.apply(rest, mixed, self.mlp(for_mlp)).view(batch, tokens, hidden)


# ---- The kernels as operators, which a trace without a GPU knows, too; Triton is imported where they run ----


@torch.library.custom_op("neox::two_norms", mutates_args=())
def two_norms(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both norms of x, fp32 [rows, width], in `dtype`; the rows' means and inverse roots, fp32 [rows]."""
    from training import neox_kernels

    return neox_kernels.two_norms(x, (weight1, bias1, weight2, bias2), epsilon, dtype)


@two_norms.register_fake
def _(x, weight1, bias1, weight2, bias2, epsilon, dtype):
    half, row = torch.empty_like(x, dtype=dtype), x.new_empty(len(x))
    return half, torch.empty_like(half), row, torch.empty_like(row)


@torch.library.custom_op("neox::two_norms_backward", mutates_args=())
def two_norms_backward(
    gradients: list[Tensor], x: Tensor, mean: Tensor, root: Tensor, weight1: Tensor, weight2: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the four weights, fp32, the latter [4, width], from those of both results, and what x's
    is from elsewhere."""
    from training import neox_kernels

    return neox_kernels.two_norms_backward(gradients, x, mean, root, weight1, weight2)


@two_norms_backward.register_fake
def _(gradients, x, mean, root, weight1, weight2):
    return torch.empty_like(x), weight1.new_empty(4, len(weight1))


@torch.library.custom_op("neox::rotate", mutates_args={"qkv"})
def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Rotate queries and keys of [tokens, heads, 3 * head size] in place, by the angle (sign 1) or back (-1)."""
    from training import neox_kernels

    neox_kernels.rotate(qkv, cos, sin, sign)


@rotate.register_fake
def _(qkv, cos, sin, sign):
    return None


@torch.library.custom_op("neox::add_three", mutates_args=())
def add_three(residual: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """residual + first + second: fp32 of fp32 and twice half precision."""
    from training import neox_kernels

    return neox_kernels.add_three(residual, first, second)


@add_three.register_fake
def _(residual, first, second):
    return torch.empty_like(residual)


# ---- With their gradients ----


class _TwoNorms(torch.autograd.Function):
    """Both norms of x, and x itself for the residual: so that its gradient is put together in one pass."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, epsilon, dtype):
        first, second, mean, root = two_norms(x, weight1, bias1, weight2, bias2, epsilon, dtype)
        ctx.save_for_backward(x, mean, root, weight1, weight2)
        return first, second, x.view_as(x)

    @staticmethod
    def backward(ctx, of_first, of_second, of_rest):
        gradients = [gradient.contiguous() for gradient in (of_first, of_second, of_rest)]
        of_x, of_weights = two_norms_backward(gradients, *ctx.saved_tensors)
        return of_x, *of_weights, None, None


class _Rotate(torch.autograd.Function):
    """Rotary embeddings on queries and keys, in place both ways."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, width):
        rotate(qkv.view(len(qkv), -1, width), cos, sin, 1.0)
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(qkv)
        ctx.width = width
        return qkv

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()  # which chunk's backward has just made: nobody else holds it
        rotate(gradient.view(len(gradient), -1, ctx.width), *ctx.saved_tensors, -1.0)
        return gradient, None, None, None


class _AddThree(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, first, second):
        ctx.dtype = first.dtype
        return add_three(residual, first, second)

    @staticmethod
    def backward(ctx, gradient):
        half = gradient.to(ctx.dtype)
        return gradient, half, half
