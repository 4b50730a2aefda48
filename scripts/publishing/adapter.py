"""An adapter by itself, for others: what its folder says, but for where this machine keeps its base model."""

import json
import shutil
from pathlib import Path

from publishing.foreign import last_part, public_name
from publishing.weights import read_weights
from training.adapter_files import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_WEIGHTS, BASE_FILE, is_adapter, read_base
from training.tokenizer_files import save_tokenizer
from utils.errors import UserError
from utils.files import read_json

NAMES = {ADAPTER_CONFIG: "base_model_name_or_path", BASE_FILE: "name"}  # of the base model, by file


def check_adapter(folder: Path) -> int:
    """The bytes of an adapter's weights.

    Raises: UserError where a folder holds no adapter, its base model is gone or another one, or its weights are not in
        safetensors, or cut off.
    """
    if not is_adapter(str(folder)):
        raise UserError(f"--adapter: {folder} is no adapter: leave it out, to export the model that it is")
    read_base(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"--adapter: {folder} holds no {ADAPTER_WEIGHTS}, the weights")
    return read_weights(folder).size


def copy_adapter(source: Path, tokenizer, folder: Path) -> None:
    """Write an adapter and its tokenizer, as AutoPeftModelForCausalLM and AutoTokenizer read them.

    Raises: OSError and the like.
    """
    for name in ADAPTER_FILES:
        if (source / name).exists():  # one of another's making has no base_model.json
            shutil.copyfile(source / name, folder / name)
    save_tokenizer(tokenizer, folder)


def name_base_for_others(folder: Path) -> str:
    """Have an adapter's files name its base model by its hub name (in the hub's cache, too), or where that is any other
    folder of this machine as ./<its last part>, which is no hub name: so a reader looks for it there and nowhere else.
    Returns: that name.

    Raises: OSError.
    """
    base = read_base(folder).name
    name = public_name(base) or f"./{last_part(base)}"
    for file, key in NAMES.items():
        if (folder / file).exists():
            values = read_json(folder / file) | {key: name}
            (folder / file).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return name
