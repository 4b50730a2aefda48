"""FSDP2: each process holds a share of every parameter's rows, of its gradient and of Adam's moments.

torch's `fully_shard` is applied here, to each layer and to the rest of the model, by what the accelerate config says of
FSDP. Accelerate itself would do so on GPUs only, and on CPU processes train under DDP without a word (1.15, state.py):
so its own plugin is read, and then kept from its sight.

The weights that are trained are fp32 and lie in rows, cut as evenly as they go; a layer's are gathered, in the
precision of the forward pass, when it computes. Gradients come back as rows, summed in fp32. The optimizer sees the
rows of this process as plain tensors: torch's fused AdamW and the kernel of training/adamw.py run as they are.
"""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recipe.keys import Recipe
from training.host_weights import receive_weights
from utils.errors import UserError, reason
from utils.launch import launcher_plugin, num_processes

CONFIG = "the accelerate config"


@dataclass(frozen=True)
class Sharding:
    """How the processes share a model.

    Attributes:
        replicas: groups of processes that each hold all of the model between them (hybrid shards); 1 for FSDP itself.
        gather_again: a layer's weights are given up after its forward pass, and gathered again for the backward pass.
        on_host: rows, gradients and moments lie in the host's memory, where the optimizer works.
        layers: names of the classes that are sharded one by one; None for the model's decoder layers.
    """

    replicas: int
    gather_again: bool
    on_host: bool
    layers: tuple[str, ...] | None

    @property
    def shards(self) -> int:
        """Processes among which the model is cut."""
        return num_processes() // self.replicas


@dataclass
class Shard:
    """What this process holds of a parameter, which has it as its attribute `shard`.

    Attributes:
        rows: what the optimizer updates, fp32; a view of the parameter's own rows. There may be none.
        start: its first element in the flattened parameter.
        dtype: in which the parameter computes.
        written: by this process; of replicas the first writes.
    """

    rows: torch.nn.Parameter
    start: int
    dtype: torch.dtype
    written: bool


# ---- What the launcher asked for ----


def find_sharding(recipe: Recipe) -> Sharding | None:
    """How the accelerate config wants the model sharded; None where it does not speak of FSDP.

    Raises: UserError for what it cannot be, or what cannot be trained so.
    """
    if launcher_plugin() != "fsdp":
        return None
    if recipe.use_peft:
        raise UserError(
            f"use_peft = true: {CONFIG} asks for FSDP, which shards what is trained: use DDP or one process"
        )
    if num_processes() == 1:
        raise UserError(f"{CONFIG} asks for FSDP, which shards a model among processes, and there is one")
    try:
        plugin, parallel = FullyShardedDataParallelPlugin(), ParallelismConfig()
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(f"{CONFIG}: FSDP: {reason(error)}") from None
    if plugin.fsdp_version != 2:
        raise UserError(
            f"{CONFIG}: fsdp_version = {plugin.fsdp_version}: only FSDP2 is supported: give fsdp_version: 2"
        )
    for key, remedy in {
        "fsdp_activation_checkpointing": "the recipe's gradient_checkpointing says it",
        "fsdp_forward_prefetch": "remove it: FSDP2 gathers the next layer by itself",
        "fsdp_ignored_modules": "remove it: every module is sharded",
        "fsdp_state_dict_type": "remove it: a checkpoint has one form, which every engine reads",
    }.items():
        value = os.environ.get(key.upper(), "false")
        if value.lower() not in ("false", "none", ""):
            raise UserError(f"{CONFIG}: {key} = {value}: {remedy}")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if policy.upper() != "TRANSFORMER_BASED_WRAP":
        raise UserError(f"{CONFIG}: fsdp_auto_wrap_policy = {policy}: only TRANSFORMER_BASED_WRAP is supported")
    for name in ("tp", "cp", "sp"):
        if getattr(parallel, f"{name}_size") > 1:
            raise UserError(f"{CONFIG}: parallelism_config_{name}_size: only dp_replicate and dp_shard are supported")
    replicas, shards = parallel.dp_replicate_size, parallel.dp_shard_size
    if replicas * shards not in (1, num_processes()) or (replicas > 1 and shards == 1):
        raise UserError(
            f"{CONFIG}: parallelism_config_dp_replicate_size = {replicas} times parallelism_config_dp_shard_size = "
            f"{shards} (at least 2) has to be the {num_processes()} processes"
        )
    layers = plugin.transformer_cls_names_to_wrap
    return Sharding(replicas, plugin.reshard_after_forward, bool(plugin.cpu_offload), layers and tuple(layers))


def hide_plugin() -> None:
    """Keep what the launcher said of FSDP from Accelerate and from transformers, once it is read here."""
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        os.environ.pop(variable, None)


def sharding_of(accelerator: Accelerator) -> Sharding | None:
    """How the processes share the model; None where each has all of it, or DeepSpeed shares it."""
    return getattr(accelerator, "sharding", None)


# ---- Sharding a model ----


def shard_model(model: torch.nn.Module, language_model: PreTrainedModel, accelerator: Accelerator, dtype: torch.dtype):
    """Move a model from the first process to all of them, layer by layer, each keeping its rows.

    Args:
        model: what is called, with the language model inside.
        dtype: of forward and backward.

    Raises: UserError where it has no layers to be sharded one by one.
    """
    sharding, device = sharding_of(accelerator), accelerator.device
    names = sharding.layers or tuple(language_model._no_split_modules or ())
    layers = [module for module in language_model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"FSDP: the model has no layer {' or '.join(names) or 'that transformers names'} to shard")
    mesh = init_device_mesh(device.type, (sharding.replicas, sharding.shards), mesh_dim_names=("replica", "shard"))
    options = {
        "mesh": mesh if sharding.replicas > 1 else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if sharding.on_host else OffloadPolicy(),
    }
    for layer in reversed(layers):  # one within another comes first
        receive_weights(layer, device)
        fully_shard(layer, reshard_after_forward=sharding.gather_again, **options)
    receive_weights(model, device)
    fully_shard(model, reshard_after_forward=None, **options)  # what its backward pass begins with stays
    # Nor does an evaluation leave whole weights behind: between steps every parameter is its rows.
    model.register_forward_hook(lambda root, *_: None if torch.is_grad_enabled() else root.reshard())
    number = mesh["shard"].get_local_rank()
    for parameter in model.parameters():
        rows = torch.nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
        start = min(-(-parameter.shape[0] // sharding.shards) * number, parameter.shape[0])
        start *= parameter.shape[1:].numel()
        parameter.shard = Shard(rows, start, dtype, written=mesh["replica"].get_local_rank() == 0)


def updated(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What the optimizer updates of a parameter: its rows here, or where it is not sharded itself."""
    return parameter.shard.rows if isinstance(parameter, DTensor) else parameter


def shard_number(model: torch.nn.Module) -> int:
    """Which share of the parameters this process has, from 0."""
    parameter = next(model.parameters())
    return parameter.device_mesh.get_local_rank(-1) if isinstance(parameter, DTensor) else 0


# ---- A step ----


def begin_micro_batch(model: FSDPModule, last: bool, sharding: Sharding) -> None:
    """Before each micro-batch of a step: gradients are summed as rows, and travel between replicas in the last alone.

    Where weights stay gathered from forward to backward, they do from one micro-batch to the next.
    """
    model.set_is_last_backward(last)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or sharding.gather_again)


def hand_over_gradients(model: torch.nn.Module) -> None:
    """Give the gradients of a step to what the optimizer updates."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            parameter.shard.rows.grad, parameter.grad = parameter.grad.to_local(), None


def norm_over_shards(norm: torch.Tensor, model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """The norm of all rows together from those of each process, fp32 scalar on `device`."""
    square = norm.to(device, torch.float64).square()
    mesh = next(model.parameters()).device_mesh
    torch.distributed.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    return square.sqrt().float()


def make_scaler(device: torch.device) -> ShardedGradScaler:
    """The loss scaler of fp16: where the gradients of one process overflow, all leave the step out."""
    return ShardedGradScaler(device.type)
