"""What training needs of each device's memory, estimated, and whether this machine has it; and what it came to."""

import math
import os
import resource
import sys
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from recipe.keys import Recipe
from training.adapters import AdapterSize
from training.attention import attention_heads, choose_attention
from training.deepspeed_config import optimizer_on_host
from training.fsdp_config import ShardedSize
from training.loss import rows_of_a_chunk
from utils.errors import UserError
from utils.launch import has_gpu, num_processes, say
from utils.tables import counted


def estimate_memory(
    recipe: Recipe,
    config: PretrainedConfig,
    num_parameters: int,
    num_processes: int,
    zero: dict[str, Any] | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    gpu: bool,
    adapter: AdapterSize | None = None,
    sharded: ShardedSize | None = None,
) -> dict[str, int]:
    """Bytes that training needs on each device, by what they are for.

    Weights, gradients and optimizer are those of the ZeRO paper (Rajbhandari et al. 2020, section 3.1: 2 + 2 + 12 bytes
    a parameter in half precision, of which stage 1 shards the 12, stage 2 the gradients too). Activations follow
    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4.1: 34 bytes a
    token and hidden unit, with dropout), without the attention matrix, which SDPA and flash-attn never hold, and with
    what transformers adds: norms in fp32, a fused projection that stays whole, SDPA's mask of padded batches. An
    activation function written out in Python, as GPT-2's, and attention without SDPA need more.

    Measured on a CPU with 7 to 55 million parameters and 1024 tokens, the sum is 6 to 15 % over the peak of a process
    whose allocator gives all back at once, 11 to 35 % under gradient checkpointing, most with the fewest parameters.
    What it really holds is more by what the allocator cannot give back: with glibc's, at 55 million, from 5 % over to
    5 % under it.

    Args:
        zero: the section `zero_optimization` of DeepSpeed's config; None without DeepSpeed.
        dtype: of forward and backward.
        shape: of the largest micro-batch: (1, tokens), or padded (conversations, the longest).
        adapter: of an adapter, of which alone there are gradients and moments, on a frozen model; None where all is
            trained.
        sharded: under FSDP2, what is gathered at a time.
    Returns: weights, gradients, optimizer; `step`, which the optimizer's step needs in place of the following two, of
        the forward and backward pass: activations, logits (in chunks, with their gradient and the output layer's).
    """
    text, (rows, length) = config.get_text_config(), shape
    element = 4 if dtype == torch.float32 else 2
    hidden, vocabulary, tokens = text.hidden_size, text.vocab_size, rows * length
    # Training in fp32 needs 4 bytes a logit and bf16 6, evaluation 8 and 10, fp16 12: made twice, through autograd.
    logits = (8 if element == 4 else 12) * vocabulary * min(tokens, rows_of_a_chunk(vocabulary, element))
    autocast = element == 2 and zero is None and sharded is None and not recipe.use_peft
    held = {
        "activations": tokens * _activations_per_token(recipe, config, num_parameters, autocast, element, length),
        "logits": logits + (4 if element == 4 else 6) * vocabulary * hidden,
    }
    frozen = 0
    if adapter is not None:
        frozen, num_parameters = adapter.frozen_bytes, adapter.weights
        # Each embedding with the rows of new tokens in place, and the gradient of the input's.
        held["logits"] = logits + 3 * element * vocabulary * hidden
    if sharded is not None:
        return {**_of_shards(recipe, num_parameters, num_processes, sharded, element, gpu), **held}
    if zero is None:
        # DDP copies gradients into its buckets (gradient_as_bucket_view is off in Accelerate); autocast keeps copies of
        # the matrices in half precision through the forward pass. AdamW makes no copy of anything.
        return {
            "weights": frozen + num_parameters * (4 if element == 4 else 6),
            "gradients": num_parameters * (8 if num_processes > 1 else 4),
            "optimizer": num_parameters * moment_bytes(recipe),
            "step": 0,
            **held,
        }
    shard = math.ceil(num_parameters / num_processes)
    offloaded = gpu and optimizer_on_host(zero)
    bucket = zero.get("reduce_bucket_size", 5e8)  # the engine's default; "auto" is what Accelerate makes of it
    bucket = hidden**2 if bucket == "auto" else int(bucket)
    if not gpu:  # where memory that is never touched takes no room
        bucket = min(bucket, num_parameters)
    return {
        "weights": frozen + num_parameters * element,
        # Under stage 2 with an optimizer on the host they go there bucket by bucket.
        "gradients": (num_parameters if zero.get("stage") != 2 else 0 if offloaded else shard) * element
        + bucket * element * (2 if zero.get("overlap_comm") else 1),
        "optimizer": 0 if offloaded else shard * 12,  # fp32 masters also where the model is fp32 (stage_1_and_2.py)
        "step": 0 if offloaded else shard * 4,  # the gradients in fp32
        **held,
    }


def _of_shards(
    recipe: Recipe, num_parameters: int, num_processes: int, sharded: ShardedSize, element: int, gpu: bool
) -> dict[str, int]:
    """Under FSDP2: rows in fp32; gathered are all that is in no layer, and two layers of which one comes ahead, or all.

    A layer's gradients are copied in fp32 to be summed. What is gathered arrives in one piece, and is copied too.
    """
    sharding = sharded.sharding
    rows = 0 if gpu and sharding.on_host else math.ceil(num_parameters * sharding.replicas / num_processes)
    gathered = sharded.rest + 2 * sharded.layer if sharding.gather_again else num_parameters
    largest = max(sharded.layer, sharded.rest)
    return {
        "weights": rows * 4 + (gathered + largest) * element,
        "gradients": rows * 4 + (sharded.rest + sharded.layer) * element + largest * 4,
        "optimizer": rows * moment_bytes(recipe),
        "step": 0,
    }


def moment_bytes(recipe: Recipe) -> int:
    """Bytes of Adam's two moments of a parameter, without DeepSpeed."""
    return 4 if recipe.optimizer_state_dtype == "bf16" else 8


def _activations_per_token(
    recipe: Recipe, config: PretrainedConfig, num_parameters: int, autocast: bool, element: int, length: int
) -> int:
    """Bytes that the backward pass needs of each token of a micro-batch, and those of its own work in one layer."""
    text = config.get_text_config()
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads, head = attention_heads(text)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    # Two matrices, or three of a gated MLP: no config says it, but the number of parameters does.
    embeddings = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    mlp = (num_parameters - embeddings) / layers - 2 * hidden * head * (heads + key_heads)
    gated = mlp > 2.5 * hidden * inner

    # Without autocast, weights are in half precision themselves.
    stream = 4 if autocast else element  # the residual stream, which autocast leaves in fp32
    rms = hasattr(text, "rms_norm_eps")  # in transformers in single steps, computed in fp32
    masked = not recipe.padding_free and choose_attention(recipe, config)[0] == "sdpa"
    layer = (
        2 * hidden * (4 if rms else stream)  # inputs of the two norms
        + (2 * hidden * stream if rms else 0)  # before they are scaled
        + (5 if autocast else 2) * hidden * element  # inputs of the matrices, which autocast makes anew for each
        + 6 * heads * head * element  # queries, keys, values with the fused projection, result
        + (length * element if masked else 0)  # a row of the mask, of which each layer holds its own
        + (4 if gated else 2) * inner * element
    )
    if recipe.use_peft:  # what goes into the matrices, once more for A, and which of it dropout has left
        layer += (3 * hidden + heads * head + inner) * (element + (1 if recipe.lora_dropout else 0))
    kept = hidden * stream + heads * (head * element + 4)  # a layer's input, and attention's result with its sums
    saved = layers * kept + layer if recipe.gradient_checkpointing else layers * layer
    inside = 4 * inner if recipe.use_peft else 0  # in fp32, for A
    return saved + (2 * inner + 2 * hidden) * element + inside + 4 * hidden * stream  # gradients in a layer; both ends


def check_memory(
    recipe: Recipe,
    config: PretrainedConfig,
    num_parameters: int,
    zero: dict[str, Any] | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    adapter: AdapterSize | None = None,
    sharded: ShardedSize | None = None,
) -> None:
    """Print the estimate beside the memory of each GPU (without one, of the machine), and a warning if it is over it;
    UserError when weights, gradients and optimizer alone are."""
    gpu, processes, local = has_gpu(), num_processes(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def need(count: int, zero: dict[str, Any] | None, recipe: Recipe = recipe) -> tuple[dict[str, int], int, int]:
        """The estimate; of it what is always there, and the peak."""
        parts = estimate_memory(recipe, config, num_parameters, count, zero, dtype, shape, gpu, adapter, sharded)
        parts = {name: size * (1 if gpu else local) for name, size in parts.items()}
        resident = parts["weights"] + parts["gradients"] + parts["optimizer"]
        return parts, resident, resident + max(parts["step"], parts["activations"] + parts["logits"])

    parts, resident, peak = need(processes, zero)
    if gpu:
        devices = range(min(local, torch.cuda.device_count()))
        memory = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
        where = f"of each GPU ({processes} in all)"
    else:
        memory, where = psutil.virtual_memory().total, f"of memory, for the {counted(local, 'process')} here"
    offload, key = zero and optimizer_on_host(zero), "deepspeed_config: offload_optimizer"
    if sharded:
        offload, key = sharded.sharding.on_host, "the accelerate config: fsdp_offload_params"
    if gpu and offload:
        trained = num_parameters if adapter is None else adapter.weights
        share = math.ceil(trained * (sharded.sharding.replicas if sharded else 1) / processes)
        host, installed = local * share * (8 + moment_bytes(recipe)), psutil.virtual_memory().total
        say(f"memory of the host, estimated: {show_bytes(host)} of {show_bytes(installed)} for the offloaded optimizer")
        if host > installed:
            raise UserError(
                f"{key}: {show_bytes(host)} of fp32 weights, moments and gradients do "
                f"not fit into the host's {show_bytes(installed)}: take more machines, or no offload"
            )
    described = ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items() if name != "step")
    say(f"memory, estimated: {show_bytes(peak)} of the {show_bytes(memory)} {where}: {described}")
    if resident > memory:
        remedy = "take a smaller model" + ("" if gpu else " or a machine with a GPU")
        sizes = (2, 4, 8, 16, 32, 64) if gpu and adapter is None else ()  # no engine shards a frozen model
        if counts := [count for count in sizes if need(count, zero or {"stage": 2})[2] < memory]:
            with_zero = "" if zero or sharded else " and deepspeed_config: ds_configs/zero2.json"
            with_zero += (
                "" if recipe.optimizer_state_dtype == "fp32" or sharded else " with optimizer_state_dtype: fp32"
            )
            remedy = f"{counts[0]} such GPUs{with_zero} would hold it"
        if recipe.use_peft and not recipe.load_in_4bit and gpu and zero is None:
            remedy = "give load_in_4bit: true"
        smaller = recipe.model_copy(update={"optimizer_state_dtype": "bf16"})
        if zero is None and smaller != recipe and need(processes, zero, smaller)[2] < memory:
            remedy = f"optimizer_state_dtype: bf16 would make it fit; or {remedy}"
        raise UserError(
            f"model_name = {recipe.model_name}: {'' if gpu else 'no GPU here, and '}training "
            f"{num_parameters / 1e9:.1f} billion parameters takes {show_bytes(resident)} for weights, gradients and "
            f"optimizer, {'each GPU has' if gpu else 'the memory is'} {show_bytes(memory)}: {remedy}"
        )
    if peak > memory:
        remedies = [] if recipe.gradient_checkpointing else ["gradient_checkpointing: true"]
        if zero is None and recipe.optimizer_state_dtype == "fp32":
            remedies.append("optimizer_state_dtype: bf16")
        if recipe.micro_batch_tokens is not None:
            remedies.append("a smaller micro_batch_tokens (max_length at the least)")
        elif recipe.per_device_train_batch_size > 1:
            remedies.append("a smaller per_device_train_batch_size with more gradient_accumulation_steps")
        remedies.append("a smaller max_length")
        say(f"warning: by this estimate memory will run out: give {', or '.join(remedies)}")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on a GPU; without one, the most that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_bytes(count: int) -> str:
    """In GiB or MiB, to three digits, for a message."""
    number, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
