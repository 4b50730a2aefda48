"""What training needs of each device's memory, estimated, and whether this machine has it; and what it came to."""

import math
import os
import resource
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from recipe.keys import Recipe
from training.adapters import AdapterSize
from training.attention import attention_heads, choose_attention, largest
from training.loss import rows_of_a_chunk
from training.plan import accumulation_steps
from training.state_layout import ModelSize, StateLayout, deepspeed_layout, device_state, host_state
from utils.errors import UserError
from utils.launch import has_gpu, say
from utils.tables import counted

MOST_OF_MEMORY = 0.7  # of what the host has free, for a checkpoint's copies: training goes on beside them


def estimate_memory(
    recipe: Recipe,
    config: PretrainedConfig,
    num_parameters: int,
    layout: StateLayout,
    dtype: torch.dtype,
    shape: tuple[int, int],
    gpu: bool,
    adapter: AdapterSize | None = None,
    frozen: int = 0,
) -> dict[str, int]:
    """Bytes that training needs on each device, by what they are for.

    What an engine keeps of weights, gradients and optimizer is that of `training/state_layout.py`. Activations follow
    Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4.1: 34 bytes a
    token and hidden unit, with dropout), without the attention matrix, which SDPA and flash-attn never hold, and with
    what transformers adds: norms in fp32, a fused projection that stays whole, SDPA's mask of padded batches. An
    activation function written out in Python, as GPT-2's, and attention without SDPA need more.

    Measured on a CPU with 7 to 55 million parameters and 1024 tokens, the sum is 6 to 15 % over the peak of a process
    whose allocator gives all back at once, 11 to 35 % under gradient checkpointing, most with the fewest parameters.
    What it really holds is more by what the allocator cannot give back: with glibc's, at 55 million, from 5 % over to
    5 % under it.

    Args:
        dtype: of forward and backward.
        shape: of the largest micro-batch: (1, tokens), or padded (conversations, the longest).
        adapter: of an adapter, of which alone there are gradients and moments, on a frozen model; None without one.
        frozen: weights of the model that no text reaches, as those of a tower for images.
    Returns: weights, gradients, optimizer; `step`, which the optimizer's step needs in place of the following, of the
        forward and backward pass: transient, activations, logits (in chunks, with their gradient and the output
        layer's).
    """
    text, (rows, length) = config.get_text_config(), shape
    element = 4 if dtype == torch.float32 else 2
    hidden, vocabulary, tokens = text.hidden_size, text.vocab_size, rows * length
    # Training in fp32 needs 4 bytes a logit and bf16 6, evaluation 8 and 10, fp16 12: made twice, through autograd.
    logits = (8 if element == 4 else 12) * vocabulary * min(tokens, rows_of_a_chunk(vocabulary, element))
    # With adapters each embedding with the rows of new tokens in place, and the gradient of the input's.
    whole = (3 * element if adapter else 4 if element == 4 else 6) * vocabulary * hidden
    size = model_size(config, num_parameters, adapter, frozen, element if layout.is_deepspeed else 4)
    reached, accumulates = num_parameters - frozen, accumulation_steps(recipe, layout.processes) > 1
    return {
        **device_state(layout, size, element, moment_bytes(recipe), gpu, accumulates),
        "activations": tokens * _activations_per_token(recipe, config, reached, layout, element, length),
        "logits": logits + whole,
    }


def peak_of(parts: dict[str, int]) -> int:
    """The most that is held at once, of the bytes of `estimate_memory`."""
    passes = parts["transient"] + parts["activations"] + parts["logits"]
    return resident_of(parts) + max(parts["step"], passes)


def resident_of(parts: dict[str, int]) -> int:
    """What is always there."""
    return parts["weights"] + parts["gradients"] + parts["optimizer"]


def model_size(
    config: PretrainedConfig,
    num_parameters: int,
    adapter: AdapterSize | None = None,
    frozen: int = 0,
    frozen_element: int = 4,
) -> ModelSize:
    """The weights of a model, or of an adapter and its frozen model, by what an engine does with them.

    Args:
        frozen: weights that are not trained, of `frozen_element` bytes each.
    """
    num_parameters -= frozen
    text = config.get_text_config()
    ends = text.vocab_size * text.hidden_size * (1 if config.tie_word_embeddings else 2)
    layer = max(0, num_parameters - ends) // text.num_hidden_layers
    if adapter is not None:
        return ModelSize(adapter.weights, adapter.frozen_bytes, layer, ends, text.hidden_size)
    return ModelSize(num_parameters, frozen * frozen_element, layer, ends, text.hidden_size)


def moment_bytes(recipe: Recipe) -> int:
    """Bytes of Adam's two moments of a parameter, without DeepSpeed."""
    return 4 if recipe.optimizer_state_dtype == "bf16" else 8


def _activations_per_token(
    recipe: Recipe, config: PretrainedConfig, num_parameters: int, layout: StateLayout, element: int, length: int
) -> int:
    """Bytes that the backward pass needs of each token of a micro-batch, and those of its own work in one layer."""
    text = config.get_text_config()
    hidden, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads, head = attention_heads(text)
    key_heads = largest(text, "num_key_value_heads") or heads
    inner = largest(text, "intermediate_size") or 4 * hidden
    # Two matrices, or three of a gated MLP: no config says it, but the number of parameters does.
    embeddings = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    mlp = (num_parameters - embeddings) / layers - 2 * hidden * head * (heads + key_heads)
    gated = mlp > 2.5 * hidden * inner

    # Else weights are in half precision themselves.
    autocast = element == 2 and not layout.keeps_half_weights and not recipe.use_peft
    stream = 4 if autocast else element  # the residual stream, which autocast leaves in fp32
    rms = hasattr(text, "rms_norm_eps")  # in transformers in single steps, computed in fp32
    attention = recipe.attn_implementation or choose_attention(recipe, config)[0]
    masked = not recipe.padding_free and attention == "sdpa"
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
    layout: StateLayout,
    dtype: torch.dtype,
    shape: tuple[int, int],
    adapter: AdapterSize | None = None,
    frozen: int = 0,
) -> int:
    """Print the estimate beside the memory of each GPU (without one, of the machine), and a warning if it is over it.

    Returns: bytes of this machine's own memory that are always taken.
    Raises: UserError when weights, gradients and optimizer alone are over it.
    """
    gpu, local = has_gpu(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def need(layout: StateLayout, recipe: Recipe = recipe) -> dict[str, int]:
        parts = estimate_memory(recipe, config, num_parameters, layout, dtype, shape, gpu, adapter, frozen)
        return {name: size * (1 if gpu else local) for name, size in parts.items()}

    parts = need(layout)
    resident, peak = resident_of(parts), peak_of(parts)
    on_host = resident
    if gpu:
        devices = range(min(local, torch.cuda.device_count()))
        memory = min(torch.cuda.get_device_properties(device).total_memory for device in devices)
        where = f"of each GPU ({layout.processes} in all)"
        size = model_size(config, num_parameters, adapter, frozen, dtype.itemsize)
        on_host = _check_host(local, layout, host_state(layout, size, dtype.itemsize, moment_bytes(recipe)))
    else:
        memory, where = psutil.virtual_memory().total, f"of memory, for the {counted(local, 'process')} here"
    shown = {name: size for name, size in parts.items() if name != "step" and (size or name != "transient")}
    described = ", ".join(f"{name} {show_bytes(size)}" for name, size in shown.items())
    say(f"memory, estimated: {show_bytes(peak)} of the {show_bytes(memory)} {where}: {described}")
    if resident > memory:
        remedy = "take a smaller model" + ("" if gpu else " or a machine with a GPU")
        cut = deepspeed_layout({"stage": 2}, 1) if layout.engine == "plain" else layout
        more = [replace(cut, shards=count, replicas=1) for count in (2, 4, 8, 16, 32, 64)]
        if gpu and adapter is None and (fit := [each for each in more if peak_of(need(each)) < memory]):
            with_zero = "" if cut is layout else " and deepspeed_config: ds_configs/zero2.json"
            with_zero += (
                ""
                if recipe.optimizer_state_dtype == "fp32" or not cut.is_deepspeed
                else " with optimizer_state_dtype: fp32"
            )
            remedy = f"{fit[0].shards} such GPUs{with_zero} would hold it"
        if recipe.use_peft and not recipe.load_in_4bit and gpu and layout.engine == "plain":
            remedy = "give load_in_4bit: true"
        smaller = recipe.model_copy(update={"optimizer_state_dtype": "bf16"})
        if not layout.is_deepspeed and smaller != recipe and peak_of(need(layout, smaller)) < memory:
            remedy = f"optimizer_state_dtype: bf16 would make it fit; or {remedy}"
        raise UserError(
            f"model_name = {recipe.model_name}: {'' if gpu else 'no GPU here, and '}training "
            f"{num_parameters / 1e9:.1f} billion parameters takes {show_bytes(resident)} for weights, gradients and "
            f"optimizer, {'each GPU has' if gpu else 'the memory is'} {show_bytes(memory)}: {remedy}"
        )
    if peak > memory:
        remedies = [] if recipe.gradient_checkpointing else ["gradient_checkpointing: true"]
        if not layout.is_deepspeed and recipe.optimizer_state_dtype == "fp32":
            remedies.append("optimizer_state_dtype: bf16")
        if recipe.micro_batch_tokens is not None:
            remedies.append("a smaller micro_batch_tokens (max_length at the least)")
        elif recipe.per_device_train_batch_size > 1:
            remedies.append("a smaller per_device_train_batch_size with more gradient_accumulation_steps")
        remedies.append("a smaller max_length")
        say(f"warning: by this estimate memory will run out: give {', or '.join(remedies)}")
    return on_host


def _check_host(local: int, layout: StateLayout, of_each: dict[str, int]) -> int:
    """The same of the host's memory, for what the `local` processes here have offloaded to it."""
    if not of_each:
        return 0
    host, installed, what = local * sum(of_each.values()), psutil.virtual_memory().total, " and ".join(of_each)
    say(f"memory of the host, estimated: {show_bytes(host)} of {show_bytes(installed)} for the offloaded {what}")
    if host > installed:
        is_deepspeed = layout.is_deepspeed
        key = "deepspeed_config: offload_optimizer" if is_deepspeed else "the accelerate config: fsdp_offload_params"
        raise UserError(
            f"{key}: {show_bytes(host)} of fp32 weights, moments and gradients do "
            f"not fit into the host's {show_bytes(installed)}: take more machines, or no offload"
        )
    return host


# ---- The copies of a checkpoint that is written behind the training (save_in_background) ----


def background_copies(recipe: Recipe, layout: StateLayout, model: int, state: int, local: int) -> int:
    """Bytes of the first machine's memory for them: the model as it is saved, by the first process or each its shard,
    and every process's fragments of what resuming needs; 0 where training waits for a checkpoint, or there is none.

    Args:
        model, state: bytes of a checkpoint's model and of its trainer_state.
        local: processes of that machine.
    """
    if not recipe.save_in_background or (recipe.save_strategy == "no" and not recipe.keep_best):
        return 0
    share = min(local, layout.shards) / layout.shards
    return math.ceil((model * share if layout.engine in ("zero3", "fsdp2") else model) + state * share)


def background_copies_fit(size: int, free: int) -> bool:
    """Whether they may take so much of what a machine has free; else training waits for each save."""
    return size <= MOST_OF_MEMORY * free


def describe_background_copies(recipe: Recipe, layout: StateLayout, model: int, state: int, taken: int) -> None:
    """Print what they will take of this machine's memory, and whether they will fit.

    Args:
        model, state: as of `background_copies`.
        taken: bytes of that memory that training will take, which has not begun.
    """
    size = background_copies(recipe, layout, model, state, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    free = max(0, free_memory() - taken)
    if size:
        say(
            f"memory of the host, estimated: {show_bytes(size)} of the {show_bytes(free)} that training leaves free, "
            "for the copies of a checkpoint that is written behind it (save_in_background)"
            + ("" if background_copies_fit(size, free) else ": they do not fit, and training will wait for each save")
        )


def free_memory() -> int:
    """Bytes of the host that processes can still take: what the machine has free, or what a container is allowed to."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no cgroup of the second version, or no limit ("max")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))  # cached files go when memory is asked for
    return free


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch held on a GPU; without one, the most that was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show_bytes(count: int) -> str:
    """In GiB or MiB, to three digits, for a message."""
    number, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
