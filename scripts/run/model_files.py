"""A model's folder as it leaves the house: read by transformers 4 and 5 with the same ids, rotary values and logits.

transformers 5 writes what 4 (and llama.cpp's converter, and many servers) cannot read, or reads as something else:
a tokenizer's class that 4 does not have, with its special tokens under another name; and rotary embeddings only as
`rope_parameters`, for want of which 4 takes a quarter of each head and base 10,000, without a word (seen with 4.57.6).
So both forms are written. The names of the weights are those that `save_pretrained` gives them, `embed_out.weight` for
GPT-NeoX's output layer, whatever they are in memory.
"""

import contextlib
import copy
import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from recipe.keys import Recipe
from run.model_parts import save_weights
from run.processes import Processes
from run.snapshot import Weights
from training.adapter_files import save_adapter
from training.adapters import has_adapter
from training.model import fit_to_tokenizer, without_weights
from training.pretrained import cache_alone, folder_to_read_back, load_pretrained
from training.tokenizer_files import save_tokenizer
from utils.errors import UserError, reason
from utils.files import read_json

OLDER_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # the kinds of transformers 4.57
# Keys of a config.json of which no weight and no logit depends.
NO_PART_OF_THE_MODEL = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
)


def save_model(model: PreTrainedModel, tokenizer, folder: Path, max_shard_size: str = "5GB") -> None:
    """Write a whole model and its tokenizer as AutoModelForCausalLM and AutoTokenizer read them.

    Raises: OSError and the like.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_beside_weights(tokenizer, folder)


def save_trained(model: PreTrainedModel, tokenizer, folder: Path, weights: Weights, processes: Processes) -> None:
    """Write a model and tokenizer in the same form from what the processes hold of it; of one with adapters these
    alone. Every process calls this.

    Args:
        model: for its names and its configs, an `Engine.outline`.
        weights: this process's.

    Raises: on the first process OSError and the like.
    """
    if has_adapter(model):
        if processes.is_first:
            save_adapter(model, weights.adapter, folder)
            save_tokenizer(tokenizer, folder)
            as_readable_as_others(folder)
        return
    save_weights(model, folder, weights, processes)
    if processes.is_first:
        name = str(weights.dtype).removeprefix("torch.")
        _rewrite(folder / "config.json", lambda config: config | {"dtype": name})  # not that of fp32 masters
        _save_beside_weights(tokenizer, folder)


def check_savable(recipe: Recipe, config: PretrainedConfig, tokenizer, fetch: bool = True) -> None:
    """Save all but the weights and read it back, so that what would fail at the first save fails before the first step.
    (The tokenizer as it was loaded: `load_tokenizer`.)

    Args:
        fetch: the generation config from the hub, where it is not on this machine.

    Raises:
        UserError: it cannot be saved, or is not read back as it was.
    """
    model = without_weights(recipe, copy.deepcopy(config))
    with folder_to_read_back() as folder:
        try:
            if not recipe.from_scratch:
                with contextlib.suppress(OSError):  # there need not be one
                    model.generation_config = GenerationConfig.from_pretrained(
                        recipe.model_name, local_files_only=not fetch or cache_alone(recipe.model_name)
                    )
            fit_to_tokenizer(model, tokenizer, mean_resizing=False)
            model.generation_config.save_pretrained(folder)
            without_weights(recipe, _saved_config(model, folder, recipe))
        except Exception as error:  # as many kinds as transformers has
            raise UserError(
                f"model_name = {recipe.model_name}: what a run saves of it could not be read back: {reason(error)}"
            ) from error


def config_of_run(recipe: Recipe, config: PretrainedConfig, tokenizer) -> PretrainedConfig:
    """The config of the model that a run trains, as it is saved and read back: that of model_name, and an embedding for
    the tokenizer."""
    model = without_weights(recipe, copy.deepcopy(config))
    fit_to_tokenizer(model, tokenizer, mean_resizing=False)
    with folder_to_read_back() as folder:
        return _saved_config(model, folder, recipe)


def _saved_config(model: PreTrainedModel, folder: Path, recipe: Recipe) -> PretrainedConfig:
    """A model's config, saved in a folder as `save_pretrained` of the model would, and read back."""
    if model._auto_class:  # a class of the model's own code, which goes into each folder that names it
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    _for_other_readers(folder)
    return load_pretrained(AutoConfig, str(folder), trust_remote_code=recipe.trust_remote_code)


def config_changes(then: PretrainedConfig, now: PretrainedConfig) -> list[str]:
    """What of a model is another: `key: then, now`. Not what the weights are saved as, by whom, or where from."""
    old, new = (_flat(each.to_dict()) for each in (then, now))
    keys = [key for key in sorted(old | new) if key.rpartition(".")[2] not in NO_PART_OF_THE_MODEL]
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in keys}
    return [f"{key}: {before} then, {after} now" for key, (before, after) in pairs.items() if before != after]


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _save_beside_weights(tokenizer, folder: Path) -> None:
    save_tokenizer(tokenizer, folder)
    _for_other_readers(folder)
    as_readable_as_others(folder)


def _for_other_readers(folder: Path) -> None:
    """Have a config.json say what other versions read of it, and name no code that is not in the folder: a model of
    the hub that brings what transformers has by now is trained, and saved, without it."""

    def is_here(reference: Any) -> bool:  # file.Class; org/name--file.Class is looked for on the hub
        name = str(reference)
        return "--" in name or (folder / f"{name.partition('.')[0]}.py").is_file()

    def changed(config: dict[str, Any]) -> dict[str, Any]:
        given = config.pop("auto_map", None)
        auto_map = {kind: own for kind, own in given.items() if is_here(own)} if isinstance(given, dict) else {}
        return with_older_rope(config | ({"auto_map": auto_map} if auto_map else {}))

    _rewrite(folder / "config.json", changed)


def as_readable_as_others(folder: Path) -> None:
    """Give the files below a folder the permissions that the umask says; safetensors makes its own 0600."""
    umask = _umask()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _umask() -> int:
    """This process's. Asked for by setting it, it would be another for a moment, in which a thread may make a file."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not on Linux
        os.umask(umask := os.umask(0))
        return umask
    return int(re.search(r"^Umask:\s*(\d+)", text, flags=re.MULTILINE)[1], 8)


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with its rotary embeddings in the form of transformers 4, too, also those of its text model."""
    if isinstance(config.get("text_config"), dict):
        config = config | {"text_config": with_older_rope(config["text_config"])}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    older = {}
    if isinstance(rope.get("full_attention"), dict):  # Gemma 3: one base for each kind of layer
        if theta := rope.get("sliding_attention", {}).get("rope_theta"):
            older["rope_local_base_freq"] = theta
        rope = rope["full_attention"]
    if rope.get("rope_type", "default") not in OLDER_ROPES:
        return config  # of a model that transformers 4 does not have
    neox = config.get("model_type") == "gpt_neox"
    names = {
        "rope_theta": "rotary_emb_base" if neox else "rope_theta",
        "partial_rotary_factor": "rotary_pct" if neox else "partial_rotary_factor",
    }
    older |= {name: rope[key] for key, name in names.items() if rope.get(key) is not None}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in names}
    return older | config


def _rewrite(path: Path, change) -> None:
    path.write_text(json.dumps(change(read_json(path)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
