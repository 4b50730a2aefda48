"""Attention: the fastest exact implementation that is here, and how each conversation attends only to itself.

In a padding-free batch (training/collate.py) conversations lie end to end. flash-attn's kernels get their boundaries
from transformers; the functions here do the same with what PyTorch brings. They are registered with transformers'
attention interface, which makes no mask for them, so that nothing of the size tokens x tokens is ever held.
"""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from recipe.keys import Recipe
from utils.errors import UserError
from utils.launch import has_gpu

DROPOUT_KEYS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


def choose_attention(recipe: Recipe, config: PretrainedConfig) -> tuple[str, list[str]]:
    """The implementation to train with, by its name in `attn_implementation`, and why not each faster one.

    `use_flash_attention` means the first that can run here of PyTorch's own copy of flash-attn's kernels for sequences
    end to end (torch.nn.attention.varlen; on Hopper with cuDNN's for long ones), the flash-attn package, through which
    transformers waits for the device once a micro-batch, and SDPA, which on a CPU is the fastest.

    Raises: UserError when attn_implementation asks for one that cannot run here.
    """
    if recipe.attn_implementation:
        if reason := _why_not(recipe.attn_implementation, recipe, config):
            raise UserError(f"attn_implementation = {recipe.attn_implementation}: {reason}")
        return recipe.attn_implementation, []
    reasons = []
    for name in ("varlen_attn", "flash_attention_2") if recipe.use_flash_attention else ():
        reason = _why_not(name, recipe, config)
        if not reason:
            return name, reasons
        reasons.append(f"not {name}: {reason}")
    return "sdpa", reasons


def describe_attention(recipe: Recipe, config: PretrainedConfig) -> str:
    """That of a model which is ready for training, and why it is no faster one, for a message."""
    return f"attention: {'; '.join([config._attn_implementation, *choose_attention(recipe, config)[1]])}"


def _why_not(name: str, recipe: Recipe, config: PretrainedConfig) -> str | None:
    """Why an implementation cannot be used here; None when it can."""
    if name == "sdpa":
        return None
    if not attention_heads(config.get_text_config())[0]:
        return "the model has no attention"
    if not has_gpu():
        return "there is no GPU"
    if recipe.dtype == "fp32":
        return "it computes in fp16 and bf16, not in fp32"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    if name == "flash_attention_2":
        return None if is_flash_attn_2_available() else "flash-attn is not installed (requirements-cuda.txt)"
    if not recipe.padding_free:
        return "padding_free is false"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of PyTorch has no flash attention"
    _, head_size = attention_heads(config.get_text_config())
    if head_size % 8 or head_size > 256:
        return f"its heads would have to be a multiple of 8, up to 256 wide, and are {head_size}"
    if attention_dropout(config):
        return "the model has dropout in its attention, which it lacks"
    return None


def attention_heads(text: PretrainedConfig) -> tuple[int, int]:
    """How many attention heads each layer of a language model has, and how wide each is; 0, 0 for one of states alone
    (Mamba, RWKV)."""
    heads = largest(text, "num_attention_heads") or 0
    return heads, heads and (largest(text, "head_dim") or text.hidden_size // heads)


def largest(text: PretrainedConfig, name: str) -> int | None:
    """A number that a language model's config gives for a layer, the largest where layers differ (Gemma 4); None where
    it gives none."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # transformers', which wants to be asked layer by layer
        return max(getattr(layer, name, None) or 0 for layer in text.per_layer_config)


def attention_dropout(config: PretrainedConfig) -> bool:
    """Whether the model drops out shares of its attention in training."""
    return any(getattr(config.get_text_config(), key, 0) for key in DROPOUT_KEYS)


@torch.compiler.disable  # else a layer under torch_compile is compiled anew for every mix of lengths
def sdpa_by_conversation(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    conversation_lengths: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """PyTorch's scaled dot product attention on one conversation after the other: no mask, no work between them.

    Args:
        query, key, value: [1, heads, tokens, head size].
        conversation_lengths: int64 [conversations], on the CPU; None where the model does not pass it on (StableLM-2
            is one), and in generation.
        position_ids: int64 [1, tokens], by which conversations are told apart then.
    Returns: [1, tokens, heads, head size], as the attention interface of transformers has it.
    """
    if query.shape[2] != key.shape[2]:  # a step of generation, whose keys are cached
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [query.shape[2]]
    if conversation_lengths is not None:
        lengths = conversation_lengths.tolist()
    elif position_ids is not None and len(position_ids) == 1:
        if not hasattr(position_ids, "lengths"):  # a GPU is waited for here: once a micro-batch, not once a layer
            starts = sorted({0, *(position_ids[0] == 0).nonzero().flatten().tolist()})  # where positions are 0
            position_ids.lengths = [end - start for start, end in pairwise([*starts, position_ids.shape[1]])]
        lengths = position_ids.lengths
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        window = None
        if sliding_window and q.shape[2] > sliding_window:
            place = torch.arange(q.shape[2], device=q.device)
            back = place[:, None] - place  # how far behind the query a key lies
            window = ((back >= 0) & (back < sliding_window))[None, None]
        outputs.append(sdpa_attention_forward(module, q, k, v, window, **kwargs)[0])
    return torch.cat(outputs, 1), None


@torch.compiler.disable
def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    conversation_lengths: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """PyTorch's flash attention over all conversations in one kernel, and cuDNN's for long ones where it is faster.

    Arguments and result as of `sdpa_by_conversation`.

    Args:
        cu_seq_lens_q: int32 [conversations + 1], their boundaries; None where the model does not pass them on, and in
            generation: SDPA by conversation takes its place.
        max_length_q: tokens of the longest.
    """
    if unknown := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
        raise UserError(f"attn_implementation: varlen_attn has no {unknown[0]}, which this model needs: give sdpa")
    if cu_seq_lens_q is None:
        return sdpa_by_conversation(
            *(module, query, key, value, attention_mask, conversation_lengths),
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    repeats = query.shape[1] // key.shape[1]
    # Rotary embeddings may have made fp32 of queries and keys, under autocast.
    query, key, value = (
        tensor.to(value.dtype).squeeze(0).transpose(0, 1)  # not [0], whose gradient is a copy among zeros
        for tensor in (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    )
    window = (sliding_window - 1 if sliding_window else -1, 0)
    lengths = [] if conversation_lengths is None or sliding_window else conversation_lengths.tolist()
    if not lengths or max(lengths) < CUDNN_FROM or not cudnn_is_faster():
        output = varlen_attn(
            *(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q),
            scale=scaling,
            window_size=window,
        )
        return output[None], None
    groups = cudnn_groups(lengths)
    cut = [(query, key, value)]
    if len(groups) > 1:
        cut = zip(*(tensor.split([sum(group) for group in groups]) for tensor in (query, key, value)), strict=True)
    outputs, first = [], 0
    for group, parts in zip(groups, cut, strict=True):
        if group[0] >= CUDNN_FROM:
            outputs.append(_by_cudnn(*parts, scaling))
        else:
            boundaries = cu_seq_lens_q[first : first + len(group) + 1] - cu_seq_lens_q[first]
            of_group = *parts, boundaries, boundaries, max(group), max(group)
            outputs.append(varlen_attn(*of_group, scale=scaling, window_size=window))
        first += len(group)
    return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None], None


# Tokens of a conversation from which cuDNN's attention is worth a call of its own, and the multiples to which its
# length is filled up: cuDNN plans each length anew for 0.1 to 2 s. On an H100, 32 heads of 128, forward and backward
# take 1.18 ms of 4,096 tokens in place of 1.99, 0.44 of 2,048 in place of 0.65, 0.25 of 1,024 in place of 0.29 (torch
# 2.11).
CUDNN_FROM, CUDNN_STEP = 2048, 512


@cache
def cudnn_is_faster() -> bool:
    """Whether this GPU is one on which cuDNN's attention is faster than flash attention 2: Hopper or newer."""
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def cudnn_groups(lengths: list[int]) -> list[list[int]]:
    """The conversations of a batch in their order, by what computes them: each long one alone, short ones together."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and max(length, *groups[-1]) < CUDNN_FROM:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


def _by_cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Causal attention of one conversation, all [tokens, heads, head size], filled up at its end, which no real token
    sees."""
    tokens, inputs = len(query), (query, key, value)
    missing = -tokens % CUDNN_STEP
    if missing:
        inputs = (F.pad(each, (0, 0, 0, 0, 0, missing)) for each in inputs)
    inputs = (each.transpose(0, 1).unsqueeze(0) for each in inputs)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        output = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scaling)
    output = output.squeeze(0).transpose(0, 1)
    return output[:tokens] if missing else output


# The kernels that attention comes down to, for each implementation.
KERNELS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn::_flash_attn_forward",
)


def keep_attention(ctx, operator, *args, **kwargs) -> CheckpointPolicy:
    """Gradient checkpointing's choice of what to keep: the attention's result, and nothing else of a layer.

    It is as small as the layer's input, which is kept anyway, and the one part whose cost grows with length squared.
    """
    kept = getattr(operator, "name", lambda: "")().split(".")[0] in KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# The names by which a model is told to use them.
AttentionInterface.register("sdpa_by_conversation", sdpa_by_conversation)
AttentionInterface.register("varlen_attn", varlen_attention)
