"""What transformers makes of a folder or a hub name: all of it, or one line; a model's own code only if asked."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training.adapter_files import is_adapter, read_base
from training.adapters import as_quantized, merge
from training.checkpoint_files import check_model_files
from training.weight_files import hub_is_reachable, model_folder
from utils.errors import UserError, reason
from utils.launch import say

KINDS = {AutoConfig: "config", AutoTokenizer: "tokenizer", AutoModelForCausalLM: "weights"}


def load_pretrained(
    auto_class: Any, name: str, who: str = "", trust_remote_code: bool = False, exact: bool = False, **kwargs: Any
) -> Any:
    """What `auto_class.from_pretrained` makes of a folder or hub name; transformers is never left to ask for trust.

    `who` is how a message names the model, such as `model_name = org/name`; else its name. `exact` refuses weights that
    the config does not call for: base models bring such (buffers, heads for something else), a checkpoint does not.
    Raises: UserError when it is not there, or damaged; or a model's weights or a tokenizer's files are not there; or
        a checkpoint's files are not those that its run wrote (`check_model_files`).
    """
    who = who or name
    reads_weights = auto_class is AutoModelForCausalLM and kwargs.get("device_map") != "meta"
    check_model_files(Path(name), reads_weights)
    if model_folder(name) is None and not hub_is_reachable():
        raise UserError(f"{who}: no such folder under {Path.cwd()}, and the hub cannot be reached")
    if auto_class is not AutoTokenizer and is_adapter(name):
        return _of_adapter(auto_class, Path(name), who, trust_remote_code, **kwargs)
    if auto_class is AutoModelForCausalLM:
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused below, by name
    try:
        found = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
        _check_numbers(found[0] if auto_class is AutoModelForCausalLM else found)
    except Exception as error:  # what transformers makes of a bad file ranges from OSError to AttributeError
        raise UserError(f"{who}: no usable {KINDS[auto_class]}: {_where(name)}: {reason(error)}") from error
    if auto_class is AutoModelForCausalLM:
        found, info = found
        for key, stored, wanted in sorted(info["mismatched_keys"]):
            raise UserError(
                f"{who}: its weights have {key} as {[*stored]}, for which its config.json calls as {[*wanted]}"
            )
        if missing := sorted(info["missing_keys"]):  # transformers would go on with random numbers in their place
            raise UserError(f"{who}: its weights lack {_some(missing)}, which its config.json calls for")
        if (unexpected := sorted(info["unexpected_keys"])) and exact:
            raise UserError(f"{who}: its weights have {_some(unexpected)}, which its config.json does not call for")
        if unexpected:
            say(f"warning: {who}: its config.json has no place for {_some(unexpected)} of its weights: left out")
    if auto_class is AutoTokenizer and set(found.encode("a b c", add_special_tokens=False)) <= {found.unk_token_id}:
        # Where there are no files, transformers makes an empty tokenizer of the model's kind and says nothing.
        raise UserError(f"{who}: no tokenizer: {_where(name)}")
    return found


def _of_adapter(auto_class: Any, folder: Path, who: str, trust_remote_code: bool, **kwargs: Any) -> Any:
    """The config of an adapter's base model, or the base model with the adapter merged into it: a model like any other.

    One that was trained in 4 bits is merged into what those stand for, in `dtype`; without one, in that of training.
    """
    base = read_base(folder)
    who = f"{who}: its base model {base.name}"
    if auto_class is AutoConfig:
        return load_pretrained(AutoConfig, base.name, who, trust_remote_code, **kwargs)
    dtype = kwargs.get("dtype")
    if base.quantization:
        kwargs |= as_quantized(base.quantization)
    model = load_pretrained(AutoModelForCausalLM, base.name, who, trust_remote_code, **kwargs)
    if base.quantization:
        model = model.dequantize()
        model = model.to(dtype) if isinstance(dtype, torch.dtype) else model
    if base.rows and base.rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(base.rows, mean_resizing=False)
    return merge(model, folder)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _check_numbers(found: Any) -> None:
    """Raises ValueError for numbers that transformers takes from a file as they are, and stumbles over later."""
    config = getattr(found, "generation_config", None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config else ():
        ids = getattr(config, key, None)
        for number in ids if isinstance(ids, list) else [ids]:
            if number is not None and not (type(number) is int and -1 <= number < 2**31):  # Llama 1's pad token is -1
                raise ValueError(f"{key} of its generation config is {str(ids)[:40]}")
    if not isinstance(limit := getattr(found, "model_max_length", 0), int | float):
        raise ValueError(f"model_max_length of its tokenizer_config.json is {str(limit)[:40]}")


def _where(name: str) -> str:
    """What there is under a name, for a message."""
    if os.path.isdir(name):
        return f"the folder holds {', '.join(sorted(os.listdir(name))[:8]) or 'nothing'}"
    return f"no such folder under {Path.cwd()}, and the hub did not give it"
