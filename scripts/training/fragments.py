"""Which part of each parameter, and of its optimizer's state, this process holds under each engine.

Everything that a checkpoint stores goes through here, as flat fragments of parameters by their names in memory: so it
does not matter which engine wrote them, or with how many processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from training.adamw import MOMENTS, allocate_state
from training.fsdp import updated
from training.fsdp_config import sharding_of


@dataclass
class Fragment:
    """A part of a parameter that this process holds."""

    name: str
    start: int  # its first element in the flattened parameter
    # Flat views [elements]: `weights` (which the optimizer updates) in fp32, `exp_avg` and `exp_avg_sq` as it has them;
    # or `model`, what goes into the model's own files
    tensors: dict[str, torch.Tensor]


def allocate_moments(accelerator: Accelerator, optimizer) -> None:
    """Make Adam's state, zeros at step 0, which the optimizers would make at their first step."""
    zero, adam = zero_optimizer(accelerator), adam_of(accelerator, optimizer)
    parts = _zero3_parts(zero)
    for number, part in enumerate(parts):  # which are in Adam's groups only while they are updated
        adam.param_groups[zero.sub_group_to_group_id[number]]["params"].append(part)
    allocate_state(adam)
    for group in adam.param_groups if parts else ():
        group["params"].clear()


def update_from_weights(accelerator: Accelerator) -> None:
    """The fp32 weights were changed: let what computes be cast from them anew, where the engine keeps it apart."""
    zero = zero_optimizer(accelerator)
    if parts := _zero3_parts(zero):
        zero.parameter_offload.partition_all_parameters()  # let go of what is gathered: it would stay as it was
        for number in range(len(parts)):
            zero._reassign_or_swap_out_partitioned_parameters(number)  # as its own step does
    elif zero:
        zero.update_lp_params()


def trained_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of adapters on a frozen model, theirs."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)


def model_fragments(accelerator: Accelerator, model: PreTrainedModel) -> Iterator[Fragment]:
    """Of each parameter what this process gives to the model's files, in `file_dtype`; a tied one comes once. Over all
    processes every element comes once: where each holds all of the model, from the first; of shards from the first
    replica.

    Args:
        model: the language model itself, as its engine has left it.
    """
    for name, parameter in model.named_parameters():
        if is_part(parameter):
            start, count = _own_part(parameter)
            if count:
                yield Fragment(name, start, {"model": parameter.ds_tensor.detach().narrow(0, 0, count)})
        elif isinstance(parameter, DTensor):
            shard = parameter.shard
            if shard.rows.numel() and writes_fragments(accelerator):
                yield Fragment(name, shard.start, {"model": shard.rows.detach().view(-1).to(shard.dtype)})
        elif accelerator.is_main_process:
            yield Fragment(name, 0, {"model": parameter.detach().reshape(-1)})


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of a parameter, of which this process may hold only a part."""
    return parameter.ds_shape if is_part(parameter) else parameter.shape


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether the engine has left each process only a part of the model's weights."""
    return any(is_part(parameter) or isinstance(parameter, DTensor) for parameter in model.parameters())


def is_part(parameter: torch.nn.Parameter) -> bool:
    """Whether this process holds only a part of a parameter, and the whole while a module computes with it: ZeRO-3."""
    return hasattr(parameter, "ds_tensor")


def writes_fragments(accelerator: Accelerator) -> bool:
    """Whether a checkpoint takes the fragments of this process: of those that hold the same, only the first's."""
    if sharding := sharding_of(accelerator):
        return accelerator.process_index < sharding.shards
    return zero_optimizer(accelerator) is not None or accelerator.is_main_process


def file_dtype(accelerator: Accelerator, model: PreTrainedModel) -> torch.dtype:
    """Of the model's files in a checkpoint; where it is not fp32, fragments of the fp32 weights lie beside them."""
    parameter = next(model.parameters())
    return parameter.shard.dtype if isinstance(parameter, DTensor) else trained_dtype(model)


def zero_optimizer(accelerator: Accelerator):
    """DeepSpeed's ZeRO optimizer; None without DeepSpeed."""
    engine = getattr(accelerator, "deepspeed_engine_wrapped", None)  # which it has once it has prepared one
    return engine.engine.optimizer if engine else None


def adam_of(accelerator: Accelerator, optimizer) -> torch.optim.Optimizer:
    """The innermost optimizer, which holds the moments."""
    zero = zero_optimizer(accelerator)
    return zero.optimizer if zero else optimizer.optimizer


def fragments(accelerator: Accelerator, model: PreTrainedModel, optimizer) -> Iterator[Fragment]:
    """Of each trained parameter what this process's optimizer updates.

    Args:
        model: the language model itself, as its engine has left it.
        optimizer: as Accelerate has prepared it.
    """
    zero, adam = zero_optimizer(accelerator), adam_of(accelerator, optimizer)
    for name, parameter in model.named_parameters():
        if zero is None:
            own, start = updated(parameter), parameter.shard.start if isinstance(parameter, DTensor) else 0
            state = adam.state.get(own)  # none for one that is not trained
            if state and own.numel():
                tensors = {"weights": own.data} | {moment: state[moment] for moment in MOMENTS}
                yield Fragment(name, start, {kind: tensor.view(-1) for kind, tensor in tensors.items()})
        elif is_part(parameter):
            start, count = _own_part(parameter)
            if parameter.requires_grad and count:
                number, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[number]
                tensors = {"weights": flat.data} | {moment: adam.state[flat][moment] for moment in MOMENTS}
                yield Fragment(name, start, {kind: tensor[offset : offset + count] for kind, tensor in tensors.items()})
        elif getattr(parameter, "_hp_mapping", None) is not None:  # trained, and some of it lies in this partition
            mapping = parameter._hp_mapping
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            tensors = {"weights": flat.data} | {moment: adam.state[flat][moment] for moment in MOMENTS}
            here = mapping.hp_fragment_address
            own = {kind: tensor.narrow(0, here.start, here.numel) for kind, tensor in tensors.items()}
            yield Fragment(name, mapping.lp_fragment_address.start, own)


def _zero3_parts(zero) -> list[torch.Tensor]:
    """The fp32 weights that this process updates under ZeRO-3, flat; none under another engine."""
    return getattr(zero, "fp32_partitioned_groups_flat", [])


def _own_part(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Of a parameter under ZeRO-3, the first element of this process's part and how many it has.

    Parts are as large as each other: the last is filled up, and with few elements the last ones hold nothing else.
    """
    size = parameter.ds_tensor.ds_numel
    start = size * parameter.ds_zero_partition_rank
    return start, max(0, min(size, parameter.ds_numel - start))
