"""The model and its tokenizer: from a folder or the hub, or built; checked, and made ready for the chat tokens."""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from training.attention import attention_dropout, choose_attention, keep_attention
from training.collate import end_to_end
from training.tokenizer_files import check_tokenizer
from utils.errors import UserError, reason
from utils.launch import has_gpu, say

# Of a generation config: what only sampling uses.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
KINDS = {AutoConfig: "config", AutoTokenizer: "tokenizer", AutoModelForCausalLM: "weights"}


def load_pretrained(
    auto_class: Any, name: str, who: str = "", trust_remote_code: bool = False, exact: bool = False, **kwargs: Any
) -> Any:
    """What `auto_class.from_pretrained` makes of a folder or hub name; transformers is never left to ask for trust.

    `who` is how a message names the model, such as `model_name = org/name`; else its name. `exact` refuses weights that
    the config does not call for: base models bring such (buffers, heads for something else), a checkpoint does not.
    Raises: UserError when it is not there, or damaged; or a model's weights or a tokenizer's files are not there.
    """
    who = who or name
    if auto_class is AutoModelForCausalLM:
        kwargs["output_loading_info"] = True
    try:
        found = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:  # what transformers makes of a bad file ranges from OSError to AttributeError
        raise UserError(f"{who}: no usable {KINDS[auto_class]}: {_where(name)}: {reason(error)}") from error
    if auto_class is AutoModelForCausalLM:
        found, info = found
        if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
            raise UserError(f"{who}: its weights lack {_some(missing)}, which its config.json calls for")
        if exact and (unexpected := sorted(info["unexpected_keys"])):
            raise UserError(f"{who}: its weights have {_some(unexpected)}, which its config.json does not call for")
    if auto_class is AutoTokenizer and set(found.encode("a b c", add_special_tokens=False)) <= {found.unk_token_id}:
        # Where there are no files, transformers makes an empty tokenizer of the model's kind and says nothing.
        raise UserError(f"{who}: no tokenizer: {_where(name)}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _where(name: str) -> str:
    """What there is under a name, for a message."""
    if os.path.isdir(name):
        return f"the folder holds {', '.join(sorted(os.listdir(name))[:8]) or 'nothing'}"
    return f"no such folder under {Path.cwd()}, and the hub did not give it"


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
    """The model's config, with the recipe's GELU. What can be known of it without loading weights is checked here.

    Raises: UserError when it cannot be found, is no causal LM's, max_length is over what its positions allow,
        attn_implementation cannot run here, or its weights are cut off.
    """
    config = _load(AutoConfig, recipe)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.max_length > positions:
        raise UserError(f"max_length = {recipe.max_length}: {recipe.model_name} has {positions} positions")
    for name, value in config.get_text_config().to_dict().items():
        if LOGIT_TRANSFORM.search(name) and value not in (None, 1, 1.0):
            raise UserError(f"model_name = {recipe.model_name}: models with {name} are not supported")
    if recipe.fuse_gelu and getattr(config, "hidden_act", None) == "gelu":
        # Saved with the checkpoint, so that it is used as it was trained.
        config.hidden_act = "gelu_pytorch_tanh"
    if not getattr(config.get_text_config(), "num_attention_heads", None):
        kind = f"models of type {config.model_type}, which have no attention heads (Mamba, RWKV)"
        raise UserError(f"model_name = {recipe.model_name}: {kind}, are not supported")
    choose_attention(recipe, config)
    # The headers of a folder's safetensors say how long each file has to be.
    for path in [] if recipe.from_scratch else sorted(Path(recipe.model_name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model_name = {recipe.model_name}: {path}: cut off or damaged: {error}") from error
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


def count_parameters(recipe: Recipe, config: PretrainedConfig) -> int:
    """The model's parameters.  Raises: UserError as `without_weights`."""
    return sum(parameter.numel() for parameter in without_weights(recipe, config).parameters())


def load_model(
    recipe: Recipe, config: PretrainedConfig, tokenizer, dtype: torch.dtype, checkpoint: Path | None = None
) -> PreTrainedModel:
    """The model, its embedding resized to the next multiple of 16 over the tokenizer, ready for training.

    Its weights are of `dtype`: fp32 for autocast (fp32 master weights), the half precision for DeepSpeed's engine,
    which keeps fp32 masters of its own; from model_name, or of the checkpoint in a folder, which the run goes on from
    and whose `config` this is.
    Raises: UserError when the weights cannot be found, are damaged, or not those that the config calls for.
    """
    if checkpoint:
        options = {"exact": True, "config": config, "dtype": dtype}
        model = load_pretrained(
            AutoModelForCausalLM, str(checkpoint), checkpoint.name, recipe.trust_remote_code, **options
        )
    elif recipe.from_scratch:
        # On the GPU where there is one: a CPU draws the 3.6 billion weights of a 3B for 45 s.
        with torch.device(torch.cuda.current_device() if has_gpu() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    else:
        # safetensors where there are any; a .bin is loaded by torch with weights_only, which transformers insists on.
        model = _load(AutoModelForCausalLM, recipe, config=config, dtype=dtype)
    model.eval()  # no dropout in the checks
    check_output_layer(model, recipe.model_name)
    if recipe.padding_free:
        check_padding_free(model, recipe.model_name)
    fit_to_tokenizer(model, tokenizer)
    return ready_for_training(model, recipe)


def fit_to_tokenizer(model: PreTrainedModel, tokenizer, mean_resizing: bool = True) -> None:
    """Give a model the embedding and the special ids that its tokenizer calls for, and a generation config to be saved.

    Rows up to the highest id, which is over the number of tokens where ids have gaps, and on to the next multiple of
    16, as the original: StableLM's 50,432 rows become 50,288 for 50,282 tokens. `mean_resizing` off draws none of them.
    """
    highest = max(tokenizer.get_vocab().values())
    model.resize_token_embeddings(highest + 1, pad_to_multiple_of=16, mean_resizing=mean_resizing)
    rows, generation, defaults = (
        model.get_input_embeddings().num_embeddings,
        model.generation_config,
        GenerationConfig(),
    )
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
    """The model with the attention, the gradient checkpointing and the compiled layers that the recipe asks for."""
    attention, reasons = choose_attention(recipe, model.config)
    name = "sdpa_by_conversation" if attention == "sdpa" and recipe.padding_free else attention
    if name != "sdpa" or recipe.attn_implementation:  # else a model without SDPA keeps what it has
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise UserError(f"attention: this model cannot use {name}: {reason(error)}") from error
    say(f"attention: {'; '.join([model.config._attn_implementation, *reasons])}")
    if recipe.gradient_checkpointing:
        options: dict[str, Any] = {"use_reentrant": False}  # the kind that DDP needs
        if not attention_dropout(model.config):
            # What is kept is not drawn anew: with dropout in it, what a layer draws after it would be another mask, and
            # gradients were off by 41 % (attention and residual dropout of 0.1).
            options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_attention)
        model.activation_checkpointing_enable(options)
    if recipe.torch_compile:
        for layer in model.modules():
            if type(layer).__name__ in model._no_split_modules:
                layer.compile(dynamic=True)
    return model


def _load(auto_class, recipe: Recipe, **kwargs):
    name, who = recipe.model_name, f"model_name = {recipe.model_name}"
    return load_pretrained(auto_class, name, who, trust_remote_code=recipe.trust_remote_code, **kwargs)


@torch.no_grad()
def check_output_layer(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not its output layer's of its body's hidden states, as training/loss.py has them:
    that differ on eight tokens (a scaled, capped or deeper head), or are not finite."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(8, device=model.device) * 997 % vocabulary)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"model_name = {name}: not a model that can be trained here: {reason(error)}") from error
    if not logits.isfinite().all():
        raise UserError(f"model_name = {name}: its weights give logits that are not finite numbers")
    if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise UserError(f"model_name = {name}: its logits are not those of its output layer alone: not supported")


@torch.no_grad()
def check_padding_free(model: PreTrainedModel, name: str) -> None:
    """Refuse a model in which conversations laid end to end see each other, or their positions: where the second of two
    moves with the first, or differs from what it is alone."""
    first, second = (torch.arange(n) * 997 % model.get_input_embeddings().num_embeddings for n in (5, 7))

    def hidden_states(*conversations: torch.Tensor) -> torch.Tensor:
        """Of the last conversation, after the last layer."""
        inputs = end_to_end([*conversations]).to(model.device).model_inputs()
        return model.base_model(**inputs, use_cache=False).last_hidden_state[0, -len(conversations[-1]) :].float()

    try:
        model.set_attn_implementation("sdpa_by_conversation")  # all that runs on a CPU, where the model mostly still is
        alone, together = hidden_states(second), hidden_states(first, second)
        beside_another = hidden_states(first.flip(0), second)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(
            f"model_name = {name}: it takes no padding-free batches ({reason(error)}): give padding_free: false"
        ) from error
    largest = float(alone.abs().max())
    rounding = 8 * torch.finfo(model.dtype).eps  # in a mixture of experts the others change the shape of the products
    if (together - alone).abs().max() > 1e-2 * largest or (together - beside_another).abs().max() > rounding * largest:
        raise UserError(
            f"model_name = {name}: in it, conversations laid end to end see each other: give padding_free: false"
        )
