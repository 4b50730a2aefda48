"""FSDP2: each process holds a share of every parameter's rows, of its gradient and of Adam's moments.

torch's `fully_shard` is applied to each layer and to the rest of the model, on GPUs as on CPU processes. The weights
that are trained are fp32 and lie in rows, cut as evenly as they go; a layer's are gathered, in the precision of the
forward pass, when it computes. Gradients come back as rows, summed in fp32. The optimizer sees the rows of this process
as plain tensors: torch's fused AdamW and the kernel of training/adamw.py run as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from training.fsdp_config import Sharding, sharded_layers, sharding_of
from training.host_weights import receive_weights


@dataclass
class Shard:
    """What this process holds of a parameter, which has it as its attribute `shard`.

    Attributes:
        rows: what the optimizer updates, fp32; a view of the parameter's own rows. There may be none.
        start: its first element in the flattened parameter.
        dtype: in which the parameter computes.
    """

    rows: torch.nn.Parameter
    start: int
    dtype: torch.dtype


def shard_model(
    model: torch.nn.Module, language_model: PreTrainedModel, accelerator: Accelerator, dtype: torch.dtype
) -> None:
    """Move a model from the first process to all of them, layer by layer, each keeping its rows. Every process does.

    Args:
        model: what is called, with the language model inside; as `host_weights.load_model` left it.
        dtype: of forward and backward.
    """
    sharding, device = sharding_of(accelerator), accelerator.device
    mesh = init_device_mesh(device.type, (sharding.replicas, sharding.shards), mesh_dim_names=("replica", "shard"))
    options = {
        "mesh": mesh if sharding.replicas > 1 else mesh["shard"],
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if sharding.on_host else OffloadPolicy(),
    }
    for layer in sharded_layers(language_model, sharding):
        receive_weights(layer, device)
        fully_shard(layer, reshard_after_forward=sharding.gather_again, **options)
    receive_weights(model, device)
    fully_shard(model, reshard_after_forward=None, **options)  # stays gathered: the backward pass begins with it
    model.register_forward_hook(_after_forward)
    number = mesh["shard"].get_local_rank()
    for parameter in model.parameters():
        rows = torch.nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
        first = min(-(-parameter.shape[0] // sharding.shards) * number, parameter.shape[0])
        parameter.shard = Shard(rows, first * parameter.shape[1:].numel(), dtype)


def _after_forward(model: FSDPModule, *_) -> None:
    if not torch.is_grad_enabled():
        _shard_again(model)


def _shard_again(model: FSDPModule) -> None:
    """Where no backward pass follows, which does it: between steps, every parameter is its rows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered_root(model: torch.nn.Module) -> Iterator[None]:
    """With what lies in no layer gathered, as it is in a forward pass of the whole, for one without a gradient of what
    is inside; nothing where it is not sharded."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        _shard_again(model)


def updated(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What the optimizer updates of a parameter: its rows here; where it is not sharded, itself."""
    return parameter.shard.rows if isinstance(parameter, DTensor) else parameter


def shard_number(model: torch.nn.Module) -> int:
    """Which share of the parameters this process has, from 0."""
    parameter = next(model.parameters())
    return parameter.device_mesh.get_local_rank(-1) if isinstance(parameter, DTensor) else 0


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
    """The norm of all rows together from those of this process, fp32 scalar, where the optimizer works.

    Args:
        device: of the process group.
    """
    square = norm.to(device, torch.float64).square()
    mesh = next(model.parameters()).device_mesh
    torch.distributed.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    return square.sqrt().float().to(norm.device)


class ShardScaler(torch.amp.GradScaler):
    """The loss scaler of fp16, whose processes agree: where rows of one overflow, all leave the step out.

    (torch's own `ShardedGradScaler` says so in one dimension, which its fused AdamW refuses: 2.13.)
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale. Every process calls this."""
        super().unscale_(optimizer)
        for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            torch.distributed.all_reduce(found)
