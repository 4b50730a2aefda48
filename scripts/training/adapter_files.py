"""The folder of an adapter: what peft and transformers load as it stands, and which base model it belongs to.

    adapter_config.json         peft's: rank, scale, layers, the rows of the chat tokens, where the base model is
    adapter_model.safetensors   the adapter's weights, by names that peft reads
    base_model.json             the base model's fingerprint, the rows of its embedding, its quantization

The last is of this collection: the first two load on any model of the same shapes, and give nonsense on another one.
"""

import hashlib
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from training.weight_files import model_folder
from utils.errors import UserError
from utils.files import fingerprint, read_json
from utils.requirements import require
from utils.schemas import Schema, read_as

ADAPTER_FILES = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE = ADAPTER_FILES
REQUIREMENTS = "requirements-lora.txt"
PREFIX = "base_model.model."  # of the names in a file, which are those in peft's wrapper around the model
ADAPTER = "default"  # peft's name for the one adapter of a model


class Quantization(Schema):
    """Of a base model in 4 bits a weight: their kind, and the dtype that it was loaded and computes in."""

    kind: Literal["nf4", "fp4"]
    dtype: Literal["fp32", "fp16", "bf16"]


class BaseModel(Schema):
    """base_model.json."""

    name: Annotated[str, Field(min_length=1)]  # a folder, absolute or (exported) ./..., or a hub name
    fingerprint: str | None = None  # of its config and weights; None of an adapter from elsewhere
    rows: Annotated[int, Field(ge=1)] | None = None  # of the embedding, grown for the tokenizer; None: as they are
    quantization: Quantization | None = None


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter, by peft's own rule (transformers' `find_adapter_config_file`)."""
    return os.path.isfile(os.path.join(name, ADAPTER_CONFIG))


def require_packages(in_4_bits: bool) -> None:
    """UserError where peft, or for 4 bits bitsandbytes, is not installed."""
    require("peft", REQUIREMENTS)
    if in_4_bits:
        require("bitsandbytes", REQUIREMENTS)
    # What they say of each other and of the hub, to nobody's use: bitsandbytes, which peft imports where it is there,
    # that its kernels for a CPU are not from the hub; transformers, what peft has to call by another name one day.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def read_base(folder: str | Path) -> BaseModel:
    """The base model of the adapter in a folder.

    Raises: UserError where peft is not installed, the files are damaged, the base is gone, or is another one.
    """
    folder = Path(folder)
    if os.path.lexists(folder / BASE_FILE):
        base = read_as(BaseModel, folder / BASE_FILE, "the base of an adapter")
    else:  # of an adapter from elsewhere
        config = read_json(folder / ADAPTER_CONFIG, "adapter's config")
        name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not (isinstance(name, str) and name):
            raise UserError(f"{folder / ADAPTER_CONFIG}: does not name its base model (base_model_name_or_path)")
        base = BaseModel(name=name)
    if base.name.startswith(("/", "./")) and not os.path.isdir(base.name):
        under = "" if os.path.isabs(base.name) else f" under {Path.cwd()}"
        raise UserError(f"{folder}: an adapter whose base model is gone: no folder {base.name}{under}")
    if os.path.realpath(base.name) == os.path.realpath(folder):
        raise UserError(f"{folder}: an adapter that names itself as its base model")
    if base.fingerprint:
        now = base_fingerprint(base.name)
        if now and now != base.fingerprint:
            raise UserError(
                f"{folder}: an adapter for another base model: what is in {base.name} now is not what it was trained on"
            )
    require_packages(in_4_bits=base.quantization is not None)
    return base


def check_base(folder: Path, name: str, who: str) -> None:
    """See that the adapter in a folder is of a base model of this name as it is now.

    `who` is how a message names the adapter.  Raises: UserError where it is another one.
    """
    base = read_as(BaseModel, folder / BASE_FILE, "the base of an adapter")
    now = base_fingerprint(name)
    if base.fingerprint and now and now != base.fingerprint:
        raise UserError(
            f"{who}: an adapter for another base model: model_name = {name} is not what it was trained on: give "
            "another --output_dir"
        )


def base_fingerprint(name: str) -> str | None:
    """A hash of a model's config and of a sample of its weights; None where it is not on this machine."""
    folder = model_folder(name)
    if folder is None:
        return None
    weights = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    parts = [f"{path.name} {fingerprint(path)}" for path in (folder / "config.json", *weights) if path.is_file()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=10).hexdigest()


def save_adapter(model: PreTrainedModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter that `training/adapters.py` has put on a model, its tensors as `adapter_tensors` names them.

    Raises: OSError and the like.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(folder)
    (folder / BASE_FILE).write_text(model.adapter_base.model_dump_json(indent=1) + "\n", encoding="utf-8")


def adapter_tensors(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of the adapter on a model, by their names in a file."""
    from peft import get_peft_model_state_dict

    # By what is given to it, which it hands back under other names: so no list of these is needed here.
    parameters = dict(model.named_parameters())
    found = get_peft_model_state_dict(model, parameters, ADAPTER, save_embedding_layers=False)
    return {PREFIX + _name_for_both(name): parameter for name, parameter in found.items()}


def _name_for_both(name: str) -> str:
    """A name by which transformers finds a tensor, too: peft 0.21 leaves out the last part of that of DoRA's lengths,
    and reads either; transformers 5.23 would load the adapter with new ones in their place."""
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def read_adapter(folder: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the adapter in a folder, by their names in the model, on the CPU.

    Raises: UserError where they are not those that the adapter on `model` calls for, or not finite.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted, found = adapter_tensors(model), {}
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = {_name_for_both(key): key for key in list(file.keys())}
            for what, keys in {
                "lacks": wanted.keys() - stored.keys(),
                "has, without a place for it,": stored.keys() - wanted.keys(),
            }.items():
                if keys:
                    more = f" and {len(keys) - 1} more" * (len(keys) > 1)
                    raise UserError(f"{folder / ADAPTER_WEIGHTS}: it {what} {min(keys)}{more}")
            for key, parameter in wanted.items():
                tensor = file.get_tensor(stored[key])
                if tensor.shape != parameter.shape:
                    raise UserError(f"{folder / ADAPTER_WEIGHTS}: {key} is {[*tensor.shape]}, not {[*parameter.shape]}")
                if not tensor.isfinite().all():
                    raise UserError(f"{folder / ADAPTER_WEIGHTS}: {key} holds values that are no finite numbers")
                found[names[id(parameter)]] = tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: cut off or damaged: {error}") from error
    return found
