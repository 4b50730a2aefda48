"""A model's weights are read by one process; the others get theirs from it, and hold no whole copy on their host.

Eight processes of a machine that each read 7.87 billion weights in half precision held 126 GB of its memory. Four on a
CPU that each read 135 million in fp32, then kept their rows under FSDP2, held 3.1 GiB beyond their imports; now 1.7, of
which all but the first 0.3 to 0.4 each: their rows (0.13), and what is gathered of the first's at a time.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dill
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from recipe.keys import Recipe
from training import model as whole
from training.attention import describe_attention
from training.pretrained import import_own_code
from utils.errors import UserError, reason
from utils.launch import num_processes, process_index, say, stop_all


def load_model(
    recipe: Recipe, config: PretrainedConfig, tokenizer, dtype: torch.dtype, checkpoint: Path | None = None
) -> PreTrainedModel:
    """As `training.model.load_model`, which the first process alone does, with all its checks, adapters among them.

    The others have the same model, but its tensors have no memory (they are on the device `meta`), until
    `receive_weights` fills them. Every process calls this, in a process group.

    Raises: UserError as `training.model.load_model`, on the first process; the others end in silence.
    """
    if num_processes() == 1:
        return whole.load_model(recipe, config, tokenizer, dtype, checkpoint)
    _import_own_code(recipe, config, checkpoint)
    model, told = None, ("", None)
    if process_index() == 0:
        try:
            model = whole.read_model(recipe, config, tokenizer, dtype, checkpoint)
            told = "", packed(outline_of(model), recipe.model_name)
            whole.ready_for_training(model, recipe)
            say(describe_attention(recipe, model.config))
        except UserError as error:
            told = str(error), None
    ((problem, outline),) = broadcast_object_list([told])
    if problem:
        stop_all(problem)
    # Behind the journey: what it hooks to the embedding and compiles does not travel.
    return model or whole.ready_for_training(dill.loads(outline), recipe)


def _import_own_code(recipe: Recipe, config: PretrainedConfig, checkpoint: Path | None) -> None:
    """Of a model with code of its own, import that as transformers will, under the same name on each machine, so that
    an outline finds its classes. Every process calls this.

    Raises: UserError, on the first process, where one of them cannot, or has other code; the others end in silence.
    """
    folder = checkpoint if checkpoint and not recipe.use_peft else recipe.model_name  # as `read_model` chooses
    names, problem = [type(config).__module__], ""
    if recipe.trust_remote_code:
        try:
            names += [own.__module__ for own in import_own_code(str(folder))]
        except Exception as error:  # as many kinds as there is code
            problem = f"{folder}: its own code cannot be imported: {reason(error)}"
    everyone = gather_object([(problem, names)])
    if problems := [each for each, _ in everyone if each]:
        stop_all(problems[0])
    if any(names != everyone[0][1] for _, names in everyone):
        stop_all(f"{folder}: its own code is not the same for all processes: give each machine the same *.py files")


def packed(outline: PreTrainedModel, name: str) -> bytes:
    """An outline as it travels. By dill, since pickle knows a class or a function by its name alone, and of a model's
    own code some have none: the class that transformers derives from one with a `prepare_inputs_for_generation` (5.23),
    a lambda. (A Llama of 80 layers takes 0.2 s.)

    Raises: UserError where something in it cannot travel at all.
    """
    try:
        return dill.dumps(outline)
    except Exception as error:  # as many kinds as there is code
        raise UserError(
            f"model_name = {name}: it holds what cannot be sent to other processes: {reason(error)}: train it in one"
        ) from error


def outline_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose tensors have no memory: they are on the device `meta`."""
    tensors = [*tensors_of(model)]
    memo: dict[int, Any] = {id(tensor): _empty_like(tensor, "meta") for tensor in tensors}
    for tensor in tensors:
        vars(memo[id(tensor)]).update(copy.deepcopy(vars(tensor), memo))  # of 4 bits: how they are to be read
    return copy.deepcopy(model, memo)


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A module's parameters and buffers, and of parameters in 4 bits the factors and the numbers that they stand for,
    which bitsandbytes keeps beside them."""
    for tensor in [*module.parameters(), *module.buffers()]:
        yield tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield from (own for own in vars(state).values() if isinstance(own, torch.Tensor))


def _empty_like(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor or parameter of the same class, shape and dtype, without its attributes."""
    empty = torch.empty_like(tensor.detach(), device=device)
    if hasattr(tensor, "quant_state"):
        from bitsandbytes.nn import Params4bit  # of which pickle makes a plain parameter

        empty = torch.Tensor._make_subclass(Params4bit, empty)
    elif isinstance(tensor, torch.nn.Parameter):
        empty = torch.nn.Parameter(empty, tensor.requires_grad)
    return empty


def receive_weights(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module, but for what is sharded already, to the device of each process, as the first has it there.

    Every process calls this. None needs more than the module's own memory on the device.
    """
    if num_processes() == 1:
        module.to(device)
        return
    for tensor in tensors_of(module):
        if not isinstance(tensor, DTensor):
            receive_tensor(tensor, device)


def receive_tensor(tensor: torch.Tensor, device: torch.device) -> None:
    """The same of one tensor, which stays the same object, so that all that share it have it."""
    if tensor.is_meta:
        empty = _empty_like(tensor, device)
        vars(empty).update(vars(tensor))
        torch.utils.swap_tensors(tensor, empty)
    elif tensor.device != device:
        tensor.data = tensor.data.to(device)
    torch.distributed.broadcast(tensor.detach(), src=0)
