"""What a step has to compute and to carry: FLOPs and bytes of a model as a recipe trains it, under an engine."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from data.mix import Mix
from recipe.keys import Recipe
from training.adapters import adapter_size, linear_layers
from training.attention import CUDNN_FROM, attention_heads
from training.micro_batches import rows_of_step
from training.plan import EpochPlan, packs_per_step
from training.state_layout import ModelSize, StateLayout

# Bytes that the layers' passes between the products move for each token, layer and hidden unit: by the trace of a step
# of StableLM's 7B (benchmarks/roofline_7b.json, "as it is": 19 ms of norms, rotary, activation, residual, bias
# gradients and casts for 4,096 tokens at 2.5 TB/s), with GPT-NeoX's layers by our kernels; by transformers' own
# (roofline_before_7b) 53 ms, of which autocast's casts are 11. Gradient checkpointing makes 1.22 of them. The head: 29
# bytes a logit and 15 a weight of the output layer, from the same files of 3B and 7B.
OUR_KERNELS, AUTOCAST, HALF_WEIGHTS = 117, 328, 259
PASSES_AGAIN, LOGIT_BYTES, HEAD_BYTES = 1.22, 29, 15
# AdamW reads and writes fp32 weights, gradients, moments and copies: 94 ms a step of the 7B, and 12 for clipping.
UPDATE_BYTES = 34
# What configs call the experts of a layer, and those of them that a token meets.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_MET = ("num_experts_per_tok", "moe_topk")
STEPS = 24  # of the first epoch, evenly spread, that are cut as they will be


class Work(NamedTuple):
    """Of one process. FLOPs are those of training/flops.py, which counts nothing that is computed again."""

    per_token: float  # FLOPs in products
    again: float  # more, under gradient checkpointing
    per_target: float
    forward: float  # the share of both that the forward pass has: a third, or half where weights are frozen
    per_pair: float  # FLOPs of a query and a key that meet
    token_bytes: float
    target_bytes: float
    micro_batch_bytes: float  # of a micro-batch, however small
    weight_bytes: float  # that the products of forward and backward read at the least
    logits_twice: bool


def work_of(
    recipe: Recipe, config: PretrainedConfig, model: PreTrainedModel, layout: StateLayout, element: int
) -> Work:
    """
    Args:
        model: without weights in memory; what is not trained wants no gradient.
        element: bytes of a number in forward and backward.
    """
    text, head = config.get_text_config(), model.get_output_embeddings()
    matrices = [each for each in model.modules() if isinstance(each, (torch.nn.Linear, Conv1D)) and each is not head]
    stored, met = _expert_weights(model, text)
    body = sum(each.weight.numel() for each in matrices if each.weight.requires_grad)
    read, body = body + stored, body + met
    trained, in_4_bits = 6 * body, 0.0
    if recipe.use_peft:  # a frozen matrix has no gradient of its own
        trained = 4 * body + 6 * adapter_size(recipe, model, torch.bfloat16).weights
        if recipe.load_in_4bit:  # unpacked for each product: 9/16 of a byte read, two written
            in_4_bits = sum(each.weight.numel() for each in linear_layers(model).values()) * (9 / 16 + 2)
    passes = 3 if recipe.gradient_checkpointing else 2  # over the weights: forward, backward, and forward again
    heads, head_size = attention_heads(text)
    moved = HALF_WEIGHTS if layout.keeps_half_weights or recipe.use_peft else AUTOCAST
    if config.model_type == "gpt_neox" and moved == AUTOCAST:
        moved = OUR_KERNELS
    per_layer = moved * (PASSES_AGAIN if recipe.gradient_checkpointing else 1)
    return Work(
        per_token=trained,
        again=2 * body if recipe.gradient_checkpointing else 0,
        per_target=(4 if recipe.use_peft else 6) * head.weight.numel(),
        forward=1 / 2 if recipe.use_peft else 1 / 3,
        per_pair=12 * text.num_hidden_layers * heads * head_size,
        token_bytes=per_layer * text.num_hidden_layers * text.hidden_size,
        target_bytes=LOGIT_BYTES * text.vocab_size,
        micro_batch_bytes=HEAD_BYTES * head.weight.numel() + passes * in_4_bits,
        weight_bytes=(passes + 1) * read * element,
        logits_twice=recipe.dtype == "fp16",
    )


def _expert_weights(model: PreTrainedModel, text: PretrainedConfig) -> tuple[int, int]:
    """Weights of a mixture's experts, and those of them that a token meets. transformers has them in tensors [experts,
    inputs, outputs], which are no module; what says how many there are goes by the family."""
    experts, met = (
        next((count for name in names if isinstance(count := getattr(text, name, None), int)), None)
        for names in (EXPERTS, EXPERTS_MET)
    )
    if not experts:
        return 0, 0
    stacked = (each for each in model.parameters() if each.ndim == 3 and each.shape[0] == experts)
    stored = sum(each.numel() for each in stacked)
    return stored, stored * (met or experts) // experts


# ---- The steps of a run ----


class Load(NamedTuple):
    """What processes compute: arrays [micro-batches of a process, processes], of a step, or all of one shape."""

    tokens: np.ndarray  # padding is computed as they are
    targets: np.ndarray
    short_pairs: np.ndarray  # queries and keys of conversations that are too short for cuDNN's attention
    long_pairs: np.ndarray
    read: np.ndarray  # tokens without padding, which tokens_per_second counts


def loads_of_steps(mix: Mix, recipe: Recipe, plan: EpochPlan, tokens: np.ndarray, processes: int) -> list[Load]:
    """Steps of an epoch, cut as a run cuts them; `tokens` are `plan.tokens`."""
    per_step = packs_per_step(recipe, processes)
    starts = np.arange(0, len(plan), per_step)
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, STEPS).astype(int))]
    return [_load(mix, recipe, plan, tokens, int(first), processes) for first in chosen]


def _load(mix: Mix, recipe: Recipe, plan: EpochPlan, tokens: np.ndarray, first: int, processes: int) -> Load:
    micro_batches = rows_of_step(plan, tokens, first, recipe, processes)
    found = np.zeros((len(Load._fields), -(-len(micro_batches) // processes), processes))
    for number, rows in enumerate(micro_batches):
        found[:, number // processes, number % processes] = load_of(
            mix.train.lengths[rows], mix.train.targets[rows], recipe
        )
    return Load(*found)


def load_of(lengths: np.ndarray, targets: np.ndarray, recipe: Recipe) -> tuple[float, ...]:
    """`Load` of one micro-batch, after cutting to max_length."""
    cut = np.minimum(lengths, recipe.max_length)
    pairs, long = cut * (cut + 1) / 2, cut >= CUDNN_FROM
    scored = (targets * (cut / np.maximum(lengths, 1))).sum()
    computed = cut.sum() if recipe.padding_free else len(cut) * cut.max(initial=0)
    return tuple(map(float, (computed, scored, pairs[~long].sum(), pairs[long].sum(), cut.sum())))


# ---- What travels ----


class Traffic(NamedTuple):
    """Bytes that a card sends: at each micro-batch and once a step, to the cards that its state is shared with, and to
    its replicas; all-gather and reduce-scatter of M bytes are M (n - 1) / n of them, an all-reduce twice that."""

    micro_batch: float
    step: float
    replicas: float
    from_host: float  # through PCIe, at each micro-batch
    host_step: float  # and once a step


def traffic_of(layout: StateLayout, size: ModelSize, element: int) -> Traffic:
    """By the ZeRO paper (section 7: 2 for stages 1 and 2, 3 for stage 3, in numbers of the model) and what the engines
    send when: DeepSpeed reduces at every micro-batch from stage 2 on, in the precision of the weights, by default with
    an all-reduce in stages 1 and 2, which makes 3 of the paper's 2; FSDP2 as well, in fp32, and gathers in half
    precision, layers for the forward and for the backward pass, the root (embeddings, and what no text reaches) for
    both at once; DDP reduces fp32 once a step. DDP and ZeRO-2 were measured so, between two machines."""
    share, again = 1 - 1 / layout.shards, 2 * (1 - 1 / layout.replicas)
    trained, weights = size.trained, size.trained * element + size.frozen_bytes
    shard, gradients = trained / layout.shards, trained * element * (2 if layout.all_reduces else 1)
    micro_batch = step = replicas = from_host = host_step = 0.0
    if layout.engine == "plain":
        replicas = again * 4 * trained
    elif layout.engine == "zero1":
        step = share * (gradients + element * trained)
    elif layout.engine == "zero2":
        micro_batch, step = share * gradients, share * element * trained
    elif layout.engine == "zero3":
        micro_batch = share * (2 * weights + gradients)
    else:
        root, gathered = share * (size.ends * element + size.frozen_bytes), share * weights
        micro_batch = share * 4 * trained + (2 * gathered - root) * layout.reshard
        step, replicas = gathered * (not layout.reshard), again * 4 * shard
    if layout.optimizer_on_host:
        from_host, host_step = shard * (4 if layout.engine == "fsdp2" else element), shard * element
    if layout.parameters_on_host:
        from_host += 2 * weights / layout.shards
    return Traffic(micro_batch, step, replicas, from_host, host_step)
