"""What the accelerate config says of FSDP: read by Accelerate's own plugin, and refused where it cannot be had.

Accelerate would shard on GPUs only, and on CPU processes train under DDP without a word (1.15, state.py). So
training/fsdp.py does it, on either, and Accelerate itself is not told.
"""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import PreTrainedModel

from recipe.keys import Recipe
from recipe.load import nearest
from training.launcher_config import CONFIG
from utils.errors import UserError, reason
from utils.launch import has_gpu, launcher_plugin, num_processes

# Keys of its fsdp_config, each with the values that are what is done here, or mean that nothing was said, and what to
# do about others. Of the keys that are not here the plugin checks the value, or FSDP2 has no use for them.
SUPPORTED = {
    "fsdp_version": ("2", "give 2: FSDP1 is not supported"),
    "fsdp_reshard_after_forward": ("true false", "give true or false"),
    "fsdp_offload_params": ("true false", "give true or false"),
    "fsdp_cpu_ram_efficient_loading": ("true false", "give true or false"),
    "fsdp_sync_module_states": ("true false", "give true or false"),
    "fsdp_use_orig_params": ("true false", "give true or false"),
    "fsdp_auto_wrap_policy": ("transformer_based_wrap", "remove it: a model is sharded layer by layer"),
    "fsdp_sharding_strategy": (
        "full_shard 1",
        "remove it, which is of FSDP1: fsdp_reshard_after_forward says it, or accelerate_configs/hsdp.yaml",
    ),
    # Which `accelerate config` writes by itself.
    "fsdp_state_dict_type": ("sharded_state_dict", "remove it: a checkpoint has one form, which every engine reads"),
    "fsdp_activation_checkpointing": ("false", "remove it: the recipe's gradient_checkpointing says it"),
    "fsdp_activation_checkpointing_offload": ("false", "remove it: activations stay where they are"),
    "fsdp_min_num_params": ("100000000", "remove it: a model is sharded layer by layer"),
    "fsdp_backward_prefetch": ("backward_pre", "remove it: FSDP2 gathers the next layer ahead by itself"),
    "fsdp_forward_prefetch": ("false", "remove it: FSDP2 gathers the next layer ahead by itself"),
    "fsdp_ignored_modules": ("none", "remove it: every module is sharded"),
    "parallelism_config_tp_size": ("1", "remove it: only dp_replicate_size and dp_shard_size are supported"),
    "parallelism_config_cp_size": ("1", "remove it: only dp_replicate_size and dp_shard_size are supported"),
    "parallelism_config_sp_size": ("1", "remove it: only dp_replicate_size and dp_shard_size are supported"),
}


@dataclass(frozen=True)
class Sharding:
    """How the processes share a model.

    Attributes:
        replicas: groups of processes that each hold all of the model between them (hybrid shards); 1 for FSDP itself.
        gather_again: a layer's weights are given up after its forward pass, and gathered again for the backward pass.
        on_host: rows, gradients and moments lie in the host's memory, where the optimizer works.
        layers: names of the classes that are sharded one by one; None for those that transformers names.
    """

    replicas: int
    gather_again: bool
    on_host: bool
    layers: tuple[str, ...] | None = None

    @property
    def shards(self) -> int:
        """Processes among which the model is cut."""
        return num_processes() // self.replicas


def find_sharding(recipe: Recipe, dtype: torch.dtype) -> Sharding | None:
    """How the accelerate config wants the model sharded; None where it does not ask for FSDP.

    Args:
        dtype: of forward and backward.

    Raises: UserError for what it cannot be, or what cannot be trained so.
    """
    if launcher_plugin() != "fsdp":
        return None
    if recipe.use_peft:
        raise UserError(
            f"use_peft = true: {CONFIG} asks for FSDP, which is not for adapters: give ddp.yaml or zero2.yaml"
        )
    if num_processes() == 1:
        raise UserError(f"{CONFIG} asks for FSDP, which shards a model among processes, and there is one")
    for key, (values, remedy) in SUPPORTED.items():
        value = os.environ.get(key.upper(), "").lower()
        if value and value not in values.split():
            raise UserError(f"{CONFIG}: {key} = {value}: {remedy}")
    try:
        plugin, parallel = FullyShardedDataParallelPlugin(), ParallelismConfig()
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(f"{CONFIG}: its fsdp_config: {reason(error)}") from None
    replicas, shards = parallel.dp_replicate_size, parallel.dp_shard_size
    if replicas * shards not in (1, num_processes()) or (replicas > 1 and shards == 1):
        raise UserError(
            f"{CONFIG}: parallelism_config_dp_replicate_size = {replicas} times parallelism_config_dp_shard_size = "
            f"{shards} (at least 2) has to be the number of processes, {num_processes()}"
        )
    on_host = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    if on_host and has_gpu() and dtype == torch.float16:
        # torch's fused AdamW on the host would read there, not waited for, whether a gradient on the GPU overflowed.
        raise UserError(f"dtype = fp16: {CONFIG}: fsdp_offload_params = true needs bf16 or fp32")
    # Of fsdp_transformer_layer_cls_to_wrap, which the plugin passes over where no fsdp_auto_wrap_policy is named.
    layers = tuple(filter(None, map(str.strip, os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(","))))
    return Sharding(replicas, plugin.reshard_after_forward, on_host, layers or None)


def sharding_of(accelerator: Accelerator) -> Sharding | None:
    """How its processes share the model; None where each has all of it, or DeepSpeed shares it."""
    return getattr(accelerator, "sharding", None)


def sharded_layers(model: PreTrainedModel, sharding: Sharding) -> list[torch.nn.Module]:
    """The modules that are gathered one by one, one within another before it.  Raises: UserError where there are none.

    Args:
        model: with or without memory for its weights.
    """
    names = sharding.layers or tuple(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    key, missing = "fsdp_transformer_layer_cls_to_wrap", {*names} - {type(layer).__name__ for layer in layers}
    if missing and (sharding.layers or not layers):
        near = nearest(min(missing), sorted({type(module).__name__ for module in model.modules()}), "")
        raise UserError(f"{CONFIG}: {key} = {','.join(names)}: the model has no layer {min(missing)}{near}")
    if not layers:
        raise UserError(f"{CONFIG}: give {key}: transformers has none")
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}  # and a tied embedding's
    for layer in layers:
        if any(id(parameter) in head for parameter in layer.parameters()):
            raise UserError(
                f"{CONFIG}: {key} = {','.join(names)}: {type(layer).__name__} holds the output layer, with which the "
                "loss computes outside of it: name the decoder layers, or remove the key"
            )
    return layers[::-1]
