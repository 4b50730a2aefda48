"""What a repeat of a run needs, gathered at its start for OUTPUT_DIR/run.json, and what differs from an earlier start.

Reading and writing the file, and keeping secrets out of it, are `run/record_file.py`.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache

from data.files import source_files
from data.mix import Mix
from recipe.keys import Recipe
from run.record_file import FORMAT, read_record, redact, utc_now, write_record
from run.starts import earlier_starts, new_start
from utils.files import fingerprint, read_json
from utils.launch import has_gpu, launcher_plugin, num_processes, say

SCRIPTS = Path(__file__).parent.parent
PACKAGES = (
    *("torch", "accelerate", "transformers", "deepspeed", "datasets", "evaluate", "safetensors", "tokenizers"),
    *("numpy", "pyarrow", "wandb", "flash-attn", "liger-kernel", "peft", "bitsandbytes"),
)
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.index.json", "*.model", "tokenizer*"),
    *("vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.py"),
)
# By the labels of `differences`. The recipe has the model's name, git's changes say whether the tree is dirty.
NOT_COMPARED = re.compile(r"data set \S+ files|model name|recipe output_dir|git dirty|platform|memory_bytes")
DATA_CONTENT = re.compile(r"data set \S+ fingerprint: ")


def begin_record(path: Path, recipe: Recipe, mix: Mix, dtype: torch.dtype, earlier: Path | None, step: int) -> None:
    """Write the record of a run that is about to start after this step, and first say what differs from an earlier one.

    Raises: UserError when the earlier one cannot be read, or this one not be written.
    """
    record = describe_start(recipe, mix, num_processes(), dtype)
    record["starts"] = [*earlier_starts(path), new_start(record, step)]
    for line in differences(read_record(earlier), record) if earlier else []:
        say(f"differs from {earlier}: {line}")
    write_record(record, path)


def describe_start(recipe: Recipe, mix: Mix, num_processes: int, dtype: torch.dtype) -> dict[str, Any]:
    """The record of a run that is about to start, as JSON takes it; every secret is replaced. For the first process.

    Call it where the data are prepared and the Accelerator is not built yet: DeepSpeed and Accelerate then change the
    launcher's variables. The hardware is this machine's, the first of several.
    """
    # Of all environment variables, what the launcher said is all that is recorded.
    variables = sorted(os.environ.items())
    said = re.compile(r"ACCELERATE_|PARALLELISM_CONFIG_DP_|(LOCAL_)?WORLD_SIZE$")
    launcher = {name: value for name, value in variables if said.match(name)}
    # The DeepSpeed file that counts, the accelerate config's before the recipe's.
    deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") if launcher_plugin() else recipe.deepspeed_config
    record = {
        "format": FORMAT,
        "status": "running",
        "started": utc_now(),
        "command": {"folder": os.getcwd(), "launcher": launcher},
        "recipe": recipe.values(),
        "data": {name: _describe_data(name, index, recipe, mix) for index, name in enumerate(mix.names)},
        "model": _describe_model(recipe.model_name),
        "deepspeed_config": fingerprint(Path(deepspeed)) if deepspeed and os.path.isfile(deepspeed) else None,
        "deepspeed": read_json(Path(deepspeed)) if deepspeed and os.path.isfile(deepspeed) else None,  # for the card
        "dtype": str(dtype).removeprefix("torch."),
        "num_processes": num_processes,
        "packages": _versions(),
        "git": describe_git(SCRIPTS),
        "hardware": _describe_hardware(),
    }
    return redact(record)


def _describe_data(name: str, index: int, recipe: Recipe, mix: Mix) -> dict[str, Any]:
    paths = source_files(name, recipe, download=False) or []
    splits = {"train": mix.train, "validation": mix.validation}
    return {
        "fingerprint": mix.reports[name]["fingerprint"],
        "conversations": {which: int((split.dataset == index).sum()) for which, split in splits.items()},
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in paths],
    }


def _describe_model(name: str) -> dict[str, Any]:
    """Its files' fingerprints where it is a folder, its commit where it came from the hub."""
    if os.path.isdir(name):
        paths = {path for pattern in MODEL_FILES for path in Path(name).glob(pattern) if path.is_file()}
        return {"name": name, "files": {path.name: fingerprint(path) for path in sorted(paths)}}
    cached = try_to_load_from_cache(name, "config.json")  # CACHE/models--org--name/snapshots/COMMIT/config.json
    return {"name": name, "commit": Path(cached).parent.name if isinstance(cached, str) else None}


def _versions() -> dict[str, str]:
    """Of the packages that are installed, Python and the CUDA that torch was built for."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | ({"CUDA": torch.version.cuda} if torch.version.cuda else {})


def describe_git(folder: Path) -> dict[str, Any] | None:
    """The commit, whether a file of `folder` is changed or new since, and a hash of these changes.

    None without git or outside of a repository.
    """

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changed = git("status", "--porcelain", "--", ".")
        changes = changed + git("diff", "--no-ext-diff", "--no-textconv", "--binary", "HEAD", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    fingerprint = hashlib.blake2b(changes, digest_size=10).hexdigest() if changed else None
    return {"commit": commit, "dirty": bool(changed), "changes": fingerprint}


def _describe_hardware() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)  # what taskset or a container leaves; Linux only
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count() if has_gpu() else 0)]
    cpu = None
    with suppress(OSError):
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return {
        "platform": platform.platform(),
        "CPU": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "GPUs": [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus],
    }


def differences(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between a recorded start and this one, a line each, what matters most first: the data's content.

    Times, the command, output_dir, memory and the paths of data files do not count.
    """
    parts = {
        "data": "data set",
        "model": "model",
        "recipe": "recipe",
        "deepspeed_config": "DeepSpeed config",
        "dtype": "dtype",
        "num_processes": "processes",
        "packages": "",
        "git": "git",
        "hardware": "",
    }
    lines = []
    for part, label in parts.items():
        then, here = (_flat(start.get(part) or {}, label) for start in (record, now))
        for name in dict.fromkeys([*then, *here]):
            before, after = then.get(name, "absent"), here.get(name, "absent")
            if before != after and not NOT_COMPARED.fullmatch(name):
                lines.append(f"{name}: {before} then, {after} now")
    return sorted(lines, key=lambda line: not DATA_CONTENT.match(line))


def _flat(value: Any, label: str) -> dict[str, str]:
    """Every value below this one as one line of text, by the keys that lead to it."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) and len(entry) == 1 for entry in value):
        value = {name: options for entry in value for name, options in entry.items()}  # the recipe's mix
    if isinstance(value, dict):
        return {
            name: text for key, entry in value.items() for name, text in _flat(entry, f"{label} {key}".strip()).items()
        }
    if isinstance(value, list):
        text = ", ".join(f"{count} x {entry}" for entry, count in Counter(map(str, value)).items())
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return {label: " ".join(text.split()) or "none"}
