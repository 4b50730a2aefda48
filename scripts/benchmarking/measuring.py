"""What the benchmarks share: each measurement in a fresh process, and what it was made on."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError

RUN = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
measure = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])
print(json.dumps(measure(*json.loads(sys.argv[4]))))
"""


def in_a_process(
    measure: Callable[..., dict], *arguments, limit: float | None = None, without_gpu: bool = False
) -> dict:
    """Call a module's function in a process of its own, with arguments and a result that JSON can hold.

    Raises: UserError when it fails, or is not done after `limit` seconds.
    """
    place = [str(Path(__file__).parents[1]), measure.__module__, measure.__name__, json.dumps(arguments)]
    # The environment has what scripts/utils sets for threads and for the GPU's memory: the same for all.
    command = [sys.executable, "-c", RUN, *place]
    try:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if without_gpu else {})
        process = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"benchmark: {measure.__name__}: not done after {limit:.0f} s") from error
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise UserError(f"benchmark: {measure.__name__} failed: {reason}")
    return json.loads(process.stdout.splitlines()[-1])


def machine() -> dict[str, str | int]:
    """What the figures were measured on, and with which libraries."""
    import torch

    found = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    found["python"] = platform.python_version()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    packages = "torch transformers accelerate tokenizers fastokens datasets trl flash-attn liger-kernel"
    for name in packages.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
