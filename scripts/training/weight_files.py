"""Where a model's files are on this machine, and what the headers of its weights say, before any is loaded."""

import contextlib
import functools
import os
from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.files import read_json

# In the order in which transformers looks for them; an index names the files of weights in several.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FLOATS = ("F64", "F32", "F16", "BF16")


def model_folder(name: str) -> Path | None:
    """The folder of a model: its own, or of a hub name the one in the hub's cache; None where it is not here.

    Raises: UserError where it is neither a folder nor a hub name.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        raise UserError(f"model_name = {name}: neither a model's folder nor a hub name") from None
    return Path(config).parent if isinstance(config, str) else None


def hub_name(folder: Path) -> str | None:
    """The hub's name of a model whose folder is the one in the hub's cache (CACHE/models--org--name/snapshots/COMMIT)
    that this name stands for; None for any other folder."""
    name = cached_name(folder)
    with contextlib.suppress(UserError):  # no name at all
        found = model_folder(name) if name else None
        return name if found and os.path.samefile(found, folder) else None
    return None


def cached_name(folder: Path) -> str | None:
    """The hub's name of a model whose folder is in a cache of the hub's, of whatever commit; None for any other."""
    snapshots = folder.resolve().parent
    kind, *parts = snapshots.parent.name.split("--")
    return "/".join(parts) if kind == "models" and parts and snapshots.name == "snapshots" else None


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers at all, by one try of 5 seconds: huggingface_hub itself tries each file six times, which
    took 46 s before it said so. True where HF_HUB_OFFLINE forbids to ask, since it says that at once."""
    try:
        constants.HF_HUB_OFFLINE or get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # its own, httpx's and the system's errors
        return False
    return True


def weights_are_here(folder: Path) -> bool:
    """Whether a folder of the hub's cache, which holds what was fetched, has all files of the weights."""
    found = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if found is None:
        return False
    names = set(read_json(found)["weight_map"].values()) if found.suffix == ".json" else ()
    return all((folder / name).exists() for name in names)


def check_headers(folder: Path, who: str) -> None:
    """Refuse safetensors that are cut off (a header says how long its file has to be), or hold no numbers to train.

    `who` is how a message names the model.  Raises: UserError.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys() if name.endswith("weight")}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{who}: {path}: cut off or damaged: {error}") from error
        for name, kind in kinds.items():
            if kind not in FLOATS:
                raise UserError(
                    f"{who}: {path}: {name} is quantized ({kind}), and cannot be trained: give it in bf16 or fp32"
                )
