"""Low-rank adapters on a frozen model, by peft: LoRA (Hu et al. 2021), and QLoRA (Dettmers et al. 2023) in 4 bits.

The one place that knows how they are put on: the layers of peft take their places inside the model, which stays what
the loss, the engines and the checkpoints know. Trained are two small matrices for each linear layer of the body,
W + scale * B A, and the rows of input and output embedding that the base model has not learnt: those of the tokens that
its own tokenizer lacks.

The embedding only grows, by the rows that are missing, and never shrinks to a multiple of 16 as in full fine-tuning:
the adapter has to fit the base model as it is.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recipe.keys import Recipe
from training.adapter_files import (
    ADAPTER,
    BASE_FILE,
    BaseModel,
    Quantization,
    adapter_tensors,
    base_fingerprint,
    read_adapter,
)
from training.weight_files import hub_name
from utils.errors import UserError, reason
from utils.launch import DTYPES, say, training_dtype


def check_adapters(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse what cannot be adapted as the recipe says.

    Args:
        model: without weights in memory.

    Raises: UserError where 4 bits are not for this model, or a name of lora_target_modules fits no linear layer of the
        body.
    """
    linear = linear_layers(model)
    if recipe.load_in_4bit and any(isinstance(layer, Conv1D) for layer in linear.values()):
        # bitsandbytes holds them turned round, and merged they would be written like that (transformers 5.23).
        raise UserError(f"load_in_4bit = true: {recipe.model_name} has transformers' Conv1D in place of linear layers")
    for name in recipe.lora_target_modules or ():
        if not any(_is_named(layer, name) for layer in linear):
            last = sorted({layer.rpartition(".")[2] for layer in linear})
            raise UserError(
                f"lora_target_modules: {name} is no linear layer of the body of {recipe.model_name}, which has "
                f"{', '.join(last[:12])}"
            )


def linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Those of the body, by name."""
    body = {id(module) for module in model.base_model.modules()} - {id(model.get_output_embeddings())}
    kinds = (torch.nn.Linear, Conv1D)  # of which those in 4 bits are
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds) and id(module) in body}


def check_reached(recipe: Recipe, model: PreTrainedModel, left_out: list[str]) -> None:
    """Refuse a name of lora_target_modules that fits only layers which no text reaches, as of a tower for images.

    Args:
        left_out: names of the modules and parameters that are not.
    """
    for name in recipe.lora_target_modules or ():
        own = [layer for layer in linear_layers(model) if _is_named(layer, name)]
        if own and all(_lies_in(layer, left_out) for layer in own):
            raise UserError(
                f"lora_target_modules: {name} is no layer of {recipe.model_name} that a text reaches: it is of {own[0]}"
            )


def check_rows(recipe: Recipe, model: PreTrainedModel, new_tokens: list[int]) -> None:
    """Refuse a model whose rows of these tokens cannot be learnt: peft has none of an output layer's bias."""
    if new_tokens and model.get_output_embeddings().bias is not None:
        raise UserError(f"use_peft: the output layer of {recipe.model_name} has a bias: its new rows cannot be learnt")


class AdapterSize(NamedTuple):
    """Of an adapter and of the model that it is put on."""

    weights: int  # that are trained: the matrices A and B, and DoRA's lengths; without the rows of tokens
    frozen_bytes: int


def adapter_size(recipe: Recipe, model: PreTrainedModel, dtype: torch.dtype) -> AdapterSize:
    """What `put_on` would add.

    Args:
        model: without weights in memory.
        dtype: of the frozen model.
    """
    shapes = [module.weight.shape for module in _adapted(recipe, model).values()]
    added = sum(recipe.lora_r * (rows + columns) + (rows if recipe.use_dora else 0) for rows, columns in shapes)
    count = sum(parameter.numel() for parameter in model.parameters())
    in_4_bits = 0
    if recipe.load_in_4bit:  # the linear layers, each 64 weights with a factor in fp32
        in_4_bits = sum(layer.weight.numel() for layer in linear_layers(model).values())
    return AdapterSize(added, (count - in_4_bits) * dtype.itemsize + in_4_bits * 9 // 16)


def _adapted(recipe: Recipe, model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The linear layers that the recipe asks adapters for, by name."""
    wanted = recipe.lora_target_modules
    found = linear_layers(model)
    return {name: found[name] for name in found if wanted is None or any(_is_named(name, one) for one in wanted)}


def quantization_options(recipe: Recipe) -> dict:
    """What `from_pretrained` is given to hold the frozen model as the recipe says."""
    if not recipe.load_in_4bit:
        return {}
    return {"quantization_config": _in_4_bits(recipe.bnb_4bit_quant_type, training_dtype(recipe.dtype, announce=False))}


def keep_exact(model: PreTrainedModel) -> None:
    """Have layers in 4 bits compute with the same weights in training and evaluation: where a CPU has AVX-512's bf16,
    bitsandbytes 0.50 packs them anew for evaluation, their factors rounded to bf16, for good."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def as_quantized(quantization: Quantization) -> dict:
    """What `from_pretrained` is given to load a base model as it was when its adapter was trained."""
    dtype = DTYPES[quantization.dtype]
    return {"dtype": dtype, "quantization_config": _in_4_bits(quantization.kind, dtype)}


def _in_4_bits(kind: str, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def grow(model: PreTrainedModel, new_tokens: list[int]) -> list[int]:
    """Give the embedding of a base model the rows that it lacks for new tokens, no more.

    Returns: the ids whose rows the base model has not learnt: these tokens, and any that it has been given beside them.
    """
    rows = model.get_input_embeddings().num_embeddings
    if (last := max(new_tokens, default=0)) < rows:
        return new_tokens
    model.resize_token_embeddings(last + 1)
    say(
        f"adapters: the base model's embedding has {rows:,} rows, {last + 1:,} are needed: what is saved is loaded by "
        "AutoPeftModelForCausalLM, which adds them, and not by AutoModelForCausalLM, unless it is merged"
    )
    return sorted({*new_tokens, *range(rows, last + 1)})


def put_on(
    model: PreTrainedModel, recipe: Recipe, new_tokens: list[int], left_out: list[str], dtype: torch.dtype
) -> None:
    """Freeze a model and put adapters on it, whose B is zero: it computes what it did before.

    Args:
        new_tokens: ids whose rows the base model has not learnt, as `grow` returns them.
        left_out: names of modules and parameters that no text reaches.
        dtype: of what is trained: fp32 for autocast, the half precision for DeepSpeed's engine.

    Raises: UserError where peft cannot; as `check_reached` and `check_rows`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_rows(recipe, model, new_tokens)
    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    places = {id(module): name for name, module in model.named_modules()}
    trained = [model.get_input_embeddings()] + [head] * (not tied)
    check_reached(recipe, model, left_out)
    layers = [name for name in _adapted(recipe, model) if not _lies_in(name, left_out)]
    base = _describe_base(recipe, model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=layers,
        trainable_token_indices={places[id(each)]: new_tokens for each in trained} if new_tokens else None,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
    )
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"use_peft: no adapters for {recipe.model_name}: {reason(error)}") from error
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if new_tokens else ():
        layer.token_adapter.register_buffer("row_ids", torch.tensor(new_tokens), persistent=False)
    adapter = adapter_tensors(model).values()
    model.requires_grad_(False)
    for parameter in adapter:
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    model.adapter_base = base
    count, whole = sum(parameter.numel() for parameter in adapter), model.num_parameters()
    say(f"adapters: {count:,} of {whole:,} weights are trained, with the rows of {len(new_tokens)} new tokens")


@torch.no_grad()
def take_over(model: PreTrainedModel, folder: Path) -> None:
    """Put the weights of the adapter in a folder into the one on a model.  Raises: UserError as `read_adapter`."""
    parameters = dict(model.named_parameters())
    for name, tensor in read_adapter(folder, model).items():
        parameters[name].copy_(tensor)


def has_adapter(model: torch.nn.Module) -> bool:
    return hasattr(model, "adapter_base")


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base model with the adapter in a folder added to its weights, in their dtype; in place.

    Raises: UserError where the adapter's weights are damaged, or do not fit the model.
    """
    from peft import PeftConfig, get_peft_model

    ours, left_over = (folder / BASE_FILE).exists(), []
    try:
        config = PeftConfig.from_pretrained(folder)
        wrapped = get_peft_model(model, config)
        in_weights = hasattr(wrapped.base_model, "merge_and_unload")
        if in_weights and not ours:  # of another's making, which may hold what `read_adapter` does not look for
            found = wrapped.load_adapter(folder, ADAPTER)
            left_over = [*found.missing_keys, *found.unexpected_keys]
    except Exception as error:  # as many kinds as peft has
        raise UserError(f"{folder}: no usable adapter: {reason(error)}") from error
    if not in_weights:
        raise UserError(f"{folder}: an adapter of kind {config.peft_type.value}, which cannot be merged into weights")
    if left_over:
        raise UserError(f"{folder}: not of this base model: its weights and the model's do not meet in {left_over[0]}")
    if ours:
        take_over(wrapped.get_base_model(), folder)
    return wrapped.merge_and_unload()


def learnt_rows(layer: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Parameter | None, torch.Tensor | None]:
    """What is in peft's wrapper around an embedding or an output layer: the layer, which is frozen, the rows that are
    trained in place of its own, [tokens, hidden], and their ids, int64 [tokens]. Without one, the layer itself."""
    wrapped = getattr(layer, "token_adapter", None)
    if wrapped is None:
        return layer, None, None
    rows = wrapped.trainable_tokens_delta[ADAPTER]  # not what is added to a row, but all of it (peft 0.21)
    return wrapped.base_layer, rows, wrapped.row_ids


def adapted_weights(model: PreTrainedModel) -> list[int]:
    """How many weights each frozen linear layer of a model with adapters has; none of another."""
    if not has_adapter(model):
        return []
    frozen = [layer for layer in linear_layers(model).values() if not layer.weight.requires_grad]
    # Of 4 bits each, two weights share a byte.
    return [
        layer.weight.numel() if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
        for layer in frozen
    ]


def _describe_base(recipe: Recipe, model: PreTrainedModel) -> BaseModel:
    name = recipe.model_name
    if os.path.isdir(name):  # under which others can load the adapter, else this machine
        name = hub_name(Path(name)) or os.path.abspath(name)
    quantization = None
    if recipe.load_in_4bit:
        dtype = next(name for name, dtype in DTYPES.items() if dtype == training_dtype(recipe.dtype, announce=False))
        quantization = Quantization(kind=recipe.bnb_4bit_quant_type, dtype=dtype)
    rows = model.get_input_embeddings().num_embeddings
    return BaseModel(name=name, fingerprint=base_fingerprint(name), rows=rows, quantization=quantization)


def _is_named(layer: str, name: str) -> bool:
    """As peft matches a name of its list of target modules."""
    return layer == name or layer.endswith(f".{name}")


def _lies_in(layer: str, names: list[str]) -> bool:
    return any(f"{layer}.".startswith(f"{name}.") for name in names)
