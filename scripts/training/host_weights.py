"""A model's weights are read by one process; the others get theirs from it, and hold no whole copy on their host.

Eight processes of a machine that each read 7.87 billion weights in half precision held 126 GB of its memory. Four on a
CPU that each read 135 million in fp32, then kept their rows under FSDP2, held 3.1 GiB beyond their imports; now 1.7, of
which all but the first 0.3 to 0.4 each: their rows (0.13), and what is gathered of the first's at a time.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from recipe.keys import Recipe
from training import model as whole
from utils.errors import UserError
from utils.launch import num_processes, process_index, stop_all


def load_model(
    recipe: Recipe, config: PretrainedConfig, tokenizer, dtype: torch.dtype, checkpoint: Path | None = None
) -> PreTrainedModel:
    """As `training.model.load_model`, which the first process alone does, with all its checks.

    On the others the parameters have names, shapes and dtypes, but no memory (they are on the device `meta`), until
    `receive_weights` fills them. Adapters and the frozen model under them each process loads for itself. Every process
    calls this, in a process group.

    Raises: UserError as `training.model.load_model`, on the first process; the others end in silence.
    """
    if num_processes() == 1 or recipe.use_peft:
        return whole.load_model(recipe, config, tokenizer, dtype, checkpoint)
    model, told = None, ("", [], [])
    if process_index() == 0:
        try:
            model = whole.load_model(recipe, config, tokenizer, dtype, checkpoint)
            own = model.named_parameters()
            parameters = [(name, parameter.dtype, parameter.requires_grad) for name, parameter in own]
            told = "", parameters, [(name, buffer.dtype) for name, buffer in model.named_buffers()]
        except UserError as error:
            told = str(error), [], []
    ((problem, parameters, buffers),) = broadcast_object_list([told])
    if problem:
        stop_all(problem)
    return model or _build_empty(recipe, config, tokenizer, dtype, parameters, buffers)


def _build_empty(
    recipe: Recipe,
    config: PretrainedConfig,
    tokenizer,
    dtype: torch.dtype,
    parameters: list[tuple],
    buffers: list[tuple],
) -> PreTrainedModel:
    """The model whose tensors are to be received: (name, dtype, whether it is trained) of each parameter, a tied one
    once, and (name, dtype) of each buffer: some are made in the dtype of the model (Gemma's `embed_scale`)."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    model.tie_weights()  # which lose each other where they lose their memory
    whole.fit_to_tokenizer(model, tokenizer, mean_resizing=False)
    _fit_parameters(model, parameters)
    own = dict(model.named_buffers())
    for name, buffer_dtype in buffers:
        own[name].data = own[name].data.to(buffer_dtype)
    return whole.ready_for_training(model, recipe)


def _fit_parameters(model: PreTrainedModel, parameters: list[tuple]) -> None:
    """Give each parameter its dtype, and say whether it is trained."""
    for name, dtype, trained in parameters:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trained)


def receive_weights(module: torch.nn.Module, device: torch.device) -> None:
    """Move a module, but for what is sharded already, to the device of each process, as the first has it there.

    Every process calls this. None needs more than the module's own memory on the device.
    """
    if num_processes() == 1:
        module.to(device)
        return
    for tensor in [*module.parameters(), *module.buffers()]:
        if isinstance(tensor, DTensor):
            continue
        if tensor.is_meta:
            empty = torch.empty_like(tensor, device=device)
            if isinstance(tensor, torch.nn.Parameter):
                empty = torch.nn.Parameter(empty, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, empty)  # the same object, so that tied modules keep it in common
        elif tensor.device != device:
            tensor.data = tensor.data.to(device)
        torch.distributed.broadcast(tensor.detach(), src=0)
