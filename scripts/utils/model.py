"""The model and its tokenizer: loaded or built, made ready for the chat tokens."""

import json
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from utils.dialogue import prepare_tokenizer
from utils.errors import UserError
from utils.launch import has_gpu, say
from utils.recipe import Recipe

# Configs whose models change the logits after the output layer; utils/loss.py applies that layer by itself.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def load_tokenizer(recipe: Recipe):
    """The tokenizer of model_name with the chat tokens and the chat template.

    Raises:
        UserError: it cannot be found, or lacks what a chat model needs.
    """
    tokenizer = _from_hub(AutoTokenizer, recipe)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model_name = {recipe.model_name}: its tokenizer has no tokenizer.json (a fast tokenizer)")
    return prepare_tokenizer(tokenizer)


def load_config(recipe: Recipe) -> PretrainedConfig:
    """The model's config, with the recipe's GELU.

    Raises:
        UserError: it cannot be found, is no causal LM's, or max_length is over what its positions allow.
    """
    config = _from_hub(AutoConfig, recipe)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and recipe.max_length > positions:
        raise UserError(f"max_length = {recipe.max_length}: {recipe.model_name} has {positions} positions")
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"model_name = {recipe.model_name}: models with {name} are not supported")
    if recipe.fuse_gelu and getattr(config, "hidden_act", None) == "gelu":
        # Saved with the checkpoint, so that it is used as it was trained.
        config.hidden_act = "gelu_pytorch_tanh"
    return config


def load_model(recipe: Recipe, config: PretrainedConfig, tokenizer, dtype: torch.dtype) -> PreTrainedModel:
    """The model, its embedding resized to the next multiple of 16 over the tokenizer, ready for training.

    Args:
        dtype: of the weights: fp32 for autocast (fp32 master weights), the half precision for DeepSpeed's engine,
            which keeps fp32 masters of its own.

    Raises:
        UserError: the weights cannot be found, or cannot fit into this machine's memory.
    """
    _refuse_what_cannot_fit(recipe, config)
    kwargs = {"attn_implementation": _attention(recipe, dtype), "trust_remote_code": recipe.trust_remote_code}
    if recipe.from_scratch:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs)
    else:
        # safetensors where there are any; a .bin is loaded by torch with weights_only, which transformers insists on.
        model = _from_hub(AutoModelForCausalLM, recipe, config=config, dtype=dtype, **kwargs)
    # As the original: StableLM's 50,432 rows become 50,288 for 50,282 tokens.
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()  # its default is the non-reentrant kind, which DDP needs
    return model


def _from_hub(auto_class, recipe: Recipe, **kwargs):
    try:
        kwargs.setdefault("trust_remote_code", recipe.trust_remote_code)
        return auto_class.from_pretrained(recipe.model_name, **kwargs)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        what = {AutoTokenizer: "tokenizer", AutoConfig: "config"}.get(auto_class, "weights")
        here = Path(recipe.model_name)
        if here.is_dir():
            found = ", ".join(sorted(path.name for path in here.iterdir())[:8]) or "nothing"
            where = f"the folder holds {found}"
        else:
            where = f"no such folder under {Path.cwd()}, and the hub did not give it"
        reason = " ".join(str(error).split())
        raise UserError(f"model_name = {recipe.model_name}: no {what}: {where}: {reason[:300]}") from error


def _attention(recipe: Recipe, dtype: torch.dtype) -> str:
    if not recipe.use_flash_attention:
        return "sdpa"
    if is_flash_attn_2_available() and has_gpu() and dtype != torch.float32:
        say("attention: flash-attn")
        return "flash_attention_2"
    reason = "there is no GPU" if not has_gpu() else "fp32" if dtype == torch.float32 else "flash-attn is not installed"
    say(f"attention: PyTorch's SDPA ({reason})")
    return "sdpa"


def _refuse_what_cannot_fit(recipe: Recipe, config: PretrainedConfig) -> None:
    """Without a GPU, training needs 16 bytes a parameter of this machine's memory: say so before downloading 30 GB."""
    if has_gpu():
        return
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    need, memory = 16 * parameters / 2**30, psutil.virtual_memory().total / 2**30
    if need > memory:
        raise UserError(
            f"model_name = {recipe.model_name}: no GPU here, and training {parameters / 1e9:.1f} billion parameters "
            f"takes {need:.0f} GiB (16 bytes each) of the {memory:.0f} GiB of memory"
        )
