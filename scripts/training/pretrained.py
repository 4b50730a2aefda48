"""What transformers makes of a folder or a hub name: all of it, or one line; a model's own code only if asked."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, dynamic_module_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from training.adapter_files import is_adapter, read_base
from training.adapters import as_quantized, merge
from training.checkpoint_files import check_model_files
from training.weight_files import hub_is_reachable, model_folder
from utils.errors import UserError, reason
from utils.files import locked
from utils.launch import say

KINDS = {AutoConfig: "config", AutoTokenizer: "tokenizer", AutoModelForCausalLM: "weights"}
UNTRUSTED = "comes with Python code of its own: read that, and give --trust_remote_code to have it run"


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
    kwargs["local_files_only"] = cache_alone(name)
    if auto_class is AutoModelForCausalLM:
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused below, by name
    if not trust_remote_code and _needs_own_code(name):
        raise UserError(f"{who}: {UNTRUSTED}")
    try:
        if trust_remote_code:
            import_own_code(name)
        with modules_lock() if trust_remote_code and auto_class is AutoTokenizer else nullcontext():
            found = auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
        _check_numbers(found[0] if auto_class is AutoModelForCausalLM else found)
    except Exception as error:  # what transformers makes of a bad file ranges from OSError to AttributeError
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(f"{who}: {UNTRUSTED}") from error
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
    if auto_class is AutoTokenizer and kwargs["local_files_only"]:
        found.init_kwargs["local_files_only"] = False  # else it would be saved with it
    if auto_class is AutoTokenizer and set(found.encode("a b c", add_special_tokens=False)) <= {found.unk_token_id}:
        # Where there are no files, transformers makes an empty tokenizer of the model's kind and says nothing.
        raise UserError(f"{who}: no tokenizer: {_where(name)}")
    return found


def cache_alone(name: str) -> bool:
    """Whether a model of the hub is to be read from the cache without asking, since the hub does not answer: each of
    its files would be asked for, in vain, for many seconds."""
    return not os.path.isdir(name) and not hub_is_reachable()


def import_own_code(name: str) -> list[type]:
    """Import what a model's config names of its own code; whatever loads the model later finds these very classes.

    Raises: as many kinds as there is code.
    """
    _, auto_map = _kind_and_code(name)
    references = [auto_map[kind] for kind in ("AutoConfig", "AutoModelForCausalLM") if kind in auto_map]
    with modules_lock():
        own = {"local_files_only": cache_alone(name)}
        return [dynamic_module_utils.get_class_from_dynamic_module(each, name, **own) for each in references]


def modules_lock() -> AbstractContextManager:
    """For one process of a machine at a time to import a model's own code: transformers copies it into a cache that
    they share, and one would read a file that another is about to write (5.23)."""
    dynamic_module_utils.init_hf_modules()
    return locked(Path(dynamic_module_utils.HF_MODULES_CACHE))


@contextmanager
def folder_to_read_back() -> Iterator[Path]:
    """A temporary folder for what is read back as soon as it is saved. By its name transformers calls the modules of a
    model's own code, so it has one for all processes, and its cache of modules does not grow with each start."""
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "read_back"
        folder.mkdir()
        yield folder


def _needs_own_code(name: str) -> bool:
    """Whether a model is another one without the code that it brings. Many of the hub bring what transformers has by
    now, under the same name but for its spelling (MPTForCausalLM, MptForCausalLM), and are read without it."""
    model_type, auto_map = _kind_and_code(name)
    own, built_in = auto_map.get("AutoModelForCausalLM"), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
    return own is not None and _plain(own.rpartition(".")[2]) != _plain(built_in)


def _plain(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


def _kind_and_code(name: str) -> tuple[str, dict[str, str]]:
    """model_type and auto_map of a model's config.json: of what kind it is, and which classes of its own it names; none
    where that cannot be read, which whoever loads it will find."""
    try:
        values, _ = PretrainedConfig.get_config_dict(str(model_folder(name) or name))
    except Exception:  # as many kinds as transformers has
        values = {}
    if not isinstance(values, dict):  # `[]`, say, which is JSON, too
        values = {}
    auto_map = values.get("auto_map")
    entries = auto_map.items() if isinstance(auto_map, dict) else ()
    return str(values.get("model_type")), {kind: own for kind, own in entries if isinstance(own, str)}


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
