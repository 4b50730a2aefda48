"""The model and its tokenizer: from a folder or the hub, or built; checked, and made ready for the chat tokens."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from data.dialogue import prepare_tokenizer
from recipe.keys import Recipe
from training.adapter_files import is_adapter, require_packages
from training.adapters import check_adapters, check_reached, grow, keep_exact, put_on, quantization_options, take_over
from training.attention import attention_dropout, choose_attention, describe_attention, keep_attention
from training.family import (
    check_output_layer,
    check_own_loss,
    check_padding_free,
    check_training_kind,
    freeze_unreached,
    tiny_config,
)
from training.pretrained import load_pretrained
from training.tokenizer_files import check_tokenizer
from training.weight_files import check_headers, model_folder
from utils.errors import UserError, reason
from utils.launch import has_gpu, num_processes, say, training_dtype

# Of a generation config: what only sampling uses.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")

# Config keys of models that change the logits after the output layer, which training/loss.py applies by itself. Weights
# can be too small for `check_output_layer` to see a cap.
LOGIT_TRANSFORM = re.compile(r"logits?_(soft)?_?(cap|scal)|lm_head_mult")


def load_tokenizer(recipe: Recipe):
    """The tokenizer of model_name made ready for chat, and checked: its chat template gives the ids of training.

    Raises: UserError when it is not found, lacks what a chat model needs, or cannot be saved as it is here.
    """
    tokenizer = _load(AutoTokenizer, recipe)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model_name = {recipe.model_name}: its tokenizer has no tokenizer.json (a fast tokenizer)")
    prepare_tokenizer(tokenizer)
    check_tokenizer(tokenizer, recipe.model_name, recipe.trust_remote_code)
    return tokenizer


def load_config(recipe: Recipe) -> PretrainedConfig:
    """The model's config, as `ready_config` has it.

    Raises: UserError also where it, whole weights, or what trains adapters is missing.
    """
    if recipe.use_peft:
        require_packages(recipe.load_in_4bit)
    config = ready_config(recipe, _load(AutoConfig, recipe))
    folder = model_folder(recipe.model_name)
    if folder and not recipe.from_scratch:
        check_headers(folder, f"model_name = {recipe.model_name}")
    return config


def ready_config(recipe: Recipe, config: PretrainedConfig) -> PretrainedConfig:
    """A config with the recipe's GELU; what can be known of it without loading weights is checked here.

    Raises: UserError when it is no causal LM's, max_length is over what its positions allow, or attn_implementation
        cannot run here.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.max_length > positions:
        raise UserError(f"max_length = {recipe.max_length}: {recipe.model_name} has {positions} positions")
    for name, value in config.get_text_config().to_dict().items():
        if LOGIT_TRANSFORM.search(name) and value not in (None, 1, 1.0):
            raise UserError(f"model_name = {recipe.model_name}: models with {name} are not supported")
    if recipe.fuse_gelu and getattr(config, "hidden_act", None) == "gelu":
        if recipe.use_peft:
            raise UserError(
                f"fuse_gelu = true: {recipe.model_name} has exact GELU, and an adapter is loaded on it as it is: give "
                "fuse_gelu: false"
            )
        # Saved with the checkpoint, so that it is used as it was trained.
        config.hidden_act = "gelu_pytorch_tanh"
    check_training_kind(config, recipe.model_name)
    choose_attention(recipe, config)
    if recipe.use_peft:
        check_adapters(recipe, without_weights(recipe, config))
    return config


def without_weights(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """The model built without memory for its weights; UserError when none can be built."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # ZeroDivisionError for no heads, KeyError for an unknown activation, and so on
        raise UserError(
            f"model_name = {recipe.model_name}: no causal language model can be made of its config: {reason(error)}"
        ) from error


def count_parameters(recipe: Recipe, config: PretrainedConfig, within: list[str] | None = None) -> int:
    """The model's parameters, or those of some of its modules.  Raises: UserError as `without_weights`."""
    parameters = without_weights(recipe, config).named_parameters()
    inside = None if within is None else tuple(f"{name}." for name in within)
    return sum(own.numel() for name, own in parameters if inside is None or f"{name}.".startswith(inside))


def load_model(
    recipe: Recipe, config: PretrainedConfig, tokenizer, dtype: torch.dtype, checkpoint: Path | None = None
) -> PreTrainedModel:
    """`read_model`, ready for training.  Raises: UserError as `read_model` and `ready_for_training`."""
    model = ready_for_training(read_model(recipe, config, tokenizer, dtype, checkpoint), recipe)
    say(describe_attention(recipe, model.config))
    return model


def read_model(
    recipe: Recipe, config: PretrainedConfig, tokenizer, dtype: torch.dtype, checkpoint: Path | None = None
) -> PreTrainedModel:
    """The model, its embedding resized to the next multiple of 16 over the tokenizer.

    Its weights are of `dtype`: fp32 for autocast (fp32 master weights), the half precision for DeepSpeed's engine,
    which keeps fp32 masters of its own; from model_name, or of the checkpoint in a folder, which the run goes on from
    and whose `config` this is. Under adapters (`training/adapters.py`) only theirs are: the model that they are put on
    is model_name's, as it is, in the precision of the forward pass.
    Raises: UserError when the weights cannot be found, are damaged, or not those that the config calls for.
    """
    if recipe.use_peft:
        options = {"dtype": training_dtype(recipe.dtype, announce=False), **quantization_options(recipe)}
        model = _load(AutoModelForCausalLM, recipe, config=config, **options)
        keep_exact(model)
    elif checkpoint:
        options = {"exact": True, "config": config, "dtype": dtype}
        model = load_pretrained(
            AutoModelForCausalLM, str(checkpoint), checkpoint.name, recipe.trust_remote_code, **options
        )
    elif recipe.from_scratch:
        # On the GPU of a process alone: a CPU draws the 3.6 billion weights of a 3B for 45 s. Of several processes the
        # first may have room for its share only.
        with torch.device(torch.cuda.current_device() if has_gpu() and num_processes() == 1 else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    else:
        # safetensors where there are any; a .bin is loaded by torch with weights_only, which transformers insists on.
        model = _load(AutoModelForCausalLM, recipe, config=config, dtype=dtype)
    if left_out := check_family(model, recipe):
        say(f"not trained, since no text reaches them: {', '.join(left_out)}")
    if recipe.use_peft:
        new_tokens = grow(model, tokens_to_learn(recipe, tokenizer))
        set_special_ids(model, tokenizer)
        put_on(model, recipe, new_tokens, left_out, dtype)
        if checkpoint:
            take_over(model, checkpoint)
    elif is_adapter(recipe.model_name):  # which is evaluated: merged into a base model that has all rows it needs
        set_special_ids(model, tokenizer)
    else:
        fit_to_tokenizer(model, tokenizer)
    return model


def tokens_to_learn(recipe: Recipe, tokenizer) -> list[int]:
    """The ids of its tokens that the base model's own tokenizer lacks."""
    known = _load(AutoTokenizer, recipe).get_vocab()
    return sorted(number for token, number in tokenizer.get_vocab().items() if token not in known)


def load_merged(recipe: Recipe, folder: Path, tokenizer) -> PreTrainedModel:
    """The model of a run with its adapter, which is in a folder, merged into its weights: added in fp32, on the CPU,
    then rounded to the run's precision. Of a model in 4 bits, into the weights that those stand for."""
    options = {"dtype": torch.float32} | ({"device_map": "cpu"} if recipe.load_in_4bit else {})
    model = load_pretrained(
        AutoModelForCausalLM, str(folder), "merge_adapter = true", recipe.trust_remote_code, **options
    )
    bits = f", what its 4 bits ({recipe.bnb_4bit_quant_type}) stand for" if recipe.load_in_4bit else ""
    say(f"the adapter is merged, in fp32, into the weights of {recipe.model_name}{bits}")
    fit_to_tokenizer(model, tokenizer, mean_resizing=False)
    return model.to(training_dtype(recipe.dtype, announce=False))


def check_family(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Refuse a model of a kind that cannot be trained here, or not padding-free; take out of training what no text
    reaches, and return its names."""
    model.eval()  # no dropout in the checks
    check_output_layer(model, recipe.model_name)
    left_out = freeze_unreached(model, recipe.model_name)
    if recipe.padding_free:
        check_padding_free(model, recipe.model_name)
    return left_out


def check_tiny(recipe: Recipe, config: PretrainedConfig) -> list[str] | None:
    """Find on a tiny model of the same kind, without any weights, what `load_model` would refuse in its kind.

    Returns: what it will take out of training, by names; None where there is no tiny model, since the sizes of some do
        not fit together when they are made smaller.
    Raises: UserError in the words of `load_model`.
    """
    try:
        tiny = AutoModelForCausalLM.from_config(
            tiny_config(config), dtype=torch.float32, trust_remote_code=recipe.trust_remote_code
        ).train()  # as RWKV would change its weights already
        with torch.no_grad():
            logits = tiny(input_ids=torch.arange(8)[None], use_cache=False).logits
    except Exception:  # as many kinds as there are models
        return None
    if not logits.isfinite().all():
        return None
    left_out = check_family(tiny, recipe)
    if recipe.use_peft:
        check_reached(recipe, tiny, left_out)
    check_own_loss(tiny, recipe.model_name)
    ready_for_training(tiny, recipe)
    return left_out


def check_weights(recipe: Recipe, config: PretrainedConfig) -> None:
    """Find what loading the weights of model_name, all on this machine, would refuse, by names and shapes alone: none
    is read. (A 7B model takes 1.5 s and 20 MiB.)

    Raises: UserError in the words of `load_model`.
    """
    folder, who = str(model_folder(recipe.model_name)), f"model_name = {recipe.model_name}"
    config, dtype = copy.deepcopy(config), torch.float32  # transformers notes in it what it was loaded as
    trust = recipe.trust_remote_code
    load_pretrained(AutoModelForCausalLM, folder, who, trust, config=config, dtype=dtype, device_map="meta")


def fit_to_tokenizer(model: PreTrainedModel, tokenizer, mean_resizing: bool = True) -> None:
    """Give a model the embedding and the special ids that its tokenizer calls for, and a generation config to be saved.

    Rows up to the highest id, which is over the number of tokens where ids have gaps, and on to the next multiple of
    16, as the original: StableLM's 50,432 rows become 50,288 for 50,282 tokens. `mean_resizing` off draws none of them.
    """
    highest = max(tokenizer.get_vocab().values())
    model.resize_token_embeddings(highest + 1, pad_to_multiple_of=16, mean_resizing=mean_resizing)
    set_special_ids(model, tokenizer)


def set_special_ids(model: PreTrainedModel, tokenizer) -> None:
    """Let the generation config name the tokenizer's end and pad tokens, and nothing a row that is no more."""
    rows = model.get_input_embeddings().num_embeddings
    generation, defaults = model.generation_config, GenerationConfig()
    for config in (model.config, model.config.get_text_config(), generation):
        for name, own in {"pad_token_id": None, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}.items():
            ids = getattr(config, name, None)
            if any(one is not None and one >= rows for one in (ids if isinstance(ids, list) else [ids])):
                setattr(config, name, own)  # of a row that is no more, with which nothing loads
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not generation.do_sample:  # sampling values beside it, as Llama-2 and Vicuna shipped, are refused at a save
        for name in SAMPLING:
            setattr(generation, name, getattr(defaults, name, None))


def ready_for_training(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """The model with the attention, the gradient checkpointing and the compiled layers that the recipe asks for.

    Raises: UserError when it has no such attention, or no gradient checkpointing.
    """
    attention, _ = choose_attention(recipe, model.config)
    name = "sdpa_by_conversation" if attention == "sdpa" and recipe.padding_free else attention
    if name != "sdpa" or recipe.attn_implementation:  # else a model without SDPA keeps what it has
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise UserError(f"attention: this model cannot use {name}: {reason(error)}") from error
    if recipe.gradient_checkpointing:
        options: dict[str, Any] = {"use_reentrant": False}  # the kind that DDP needs
        if not attention_dropout(model.config):
            # What is kept is not drawn anew: with dropout in it, what a layer draws after it would be another mask, and
            # gradients were off by 41 % (attention and residual dropout of 0.1).
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
        try:
            model.activation_checkpointing_enable(options)
        except ValueError as error:
            raise UserError(f"gradient_checkpointing = true: {recipe.model_name}: {reason(error)}") from error
    if recipe.torch_compile:
        for layer in model.modules():
            if type(layer).__name__ in model._no_split_modules:
                layer.compile(dynamic=True)
    return model


def _load(auto_class, recipe: Recipe, **kwargs):
    name, who = recipe.model_name, f"model_name = {recipe.model_name}"
    return load_pretrained(auto_class, name, who, trust_remote_code=recipe.trust_remote_code, **kwargs)
