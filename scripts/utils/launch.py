"""What the launcher decided (processes, plugins) and what this machine can do (GPU, precision), in one place.

The launcher speaks through environment variables, so everything here is known before a process group exists.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import NoReturn

import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler, gather_object

from utils.errors import UserError, another_is_gone, reason

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
# While the first process writes a checkpoint the others wait: 31 GB to a slow disk take longer than NCCL's ten minutes.
PATIENCE = timedelta(hours=3)
TRUE, FALSE = ("true", "1", "yes", "on", "y", "t"), ("false", "0", "no", "off", "n", "f")  # as Accelerate's str_to_bool
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # by the names of a recipe


def num_processes() -> int:
    """Processes that the launcher started, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_index() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", 0))


def say(message: str) -> None:
    """Print on the first process only."""
    if process_index() == 0:
        print(message, flush=True)


say_once = cache(say)  # what is come by several times


def stop_all(reason: str) -> NoReturn:
    """End the run, where every process comes to the same end: the first says why, the others leave in silence."""
    if process_index():
        raise SystemExit(2)
    raise UserError(reason)


def has_gpu() -> bool:
    """Whether a CUDA (or ROCm) device is there and the launcher did not ask for the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in TRUE


def launcher_plugin() -> str | None:
    """`deepspeed` or `fsdp` when the accelerate config brings that plugin, else None."""
    for plugin in ("deepspeed", "fsdp"):
        if os.environ.get(f"ACCELERATE_USE_{plugin.upper()}", "false").lower() == "true":
            return plugin
    return None


def training_dtype(dtype: str, announce: bool = True) -> torch.dtype:
    """The precision of forward and backward here.

    fp16 without a GPU becomes fp32, with a line that says so where it is to `announce` it: neither PyTorch's autocast
    nor DeepSpeed offers it on ordinary CPUs, and the seed's recipe (fp16) is to run anywhere.

    Raises: UserError for bf16 on a GPU that lacks it (before Ampere), where it would be emulated.
    """
    if dtype == "bf16" and has_gpu() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"dtype = bf16: {torch.cuda.get_device_name()} has no bf16; use dtype: fp16 or fp32")
    if dtype == "fp16" and not has_gpu():
        if announce:
            say("dtype fp16 needs a GPU and there is none here: computing in fp32")
        return torch.float32
    return DTYPES[dtype]


def set_up_process() -> None:
    """Share a CPU machine's cores among its processes and keep its memory; leave progress bars to the training loop."""
    transformers.utils.logging.disable_progress_bar()
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Accelerate imports DeepSpeed in passing, which would guess
        share_cores()
        # By default glibc hands every large block back to the system and fetches it again, page by page and zeroed:
        # 160,000 page faults a step of the small model of `scripts/benchmark.py train`, which took a fifth longer.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt:
            mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older ones take
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_cores() -> None:
    """Let PyTorch use this process's share of the machine's cores, unless the user has said how many threads."""
    if not _user_chose_threads():
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        affinity = getattr(os, "sched_getaffinity", None)  # what taskset or a container leaves; Linux only
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS, which PyTorch has followed already, is the user's word.

    `accelerate launch` and torchrun put 1 there for whoever has said nothing; their own environment shows whether
    anybody has.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if os.environ.get("OMP_NUM_THREADS") != "1" or not launched:
        return "OMP_NUM_THREADS" in os.environ
    try:
        return "OMP_NUM_THREADS" in psutil.Process().parent().environ()
    except (psutil.Error, AttributeError):  # another user's process, or none
        return False


def process_group_options(deepspeed: bool) -> list[KwargsHandler]:
    """For the Accelerator: the backend of the machine, patience, and DDP without a broadcast in each forward pass. None
    for a process alone, for which Accelerate would look up a group that does not exist."""
    if not deepspeed and num_processes() == 1:
        return []
    group = InitProcessGroupKwargs(backend="nccl" if has_gpu() else "gloo", timeout=PATIENCE)
    # A language model's buffers, such as its rotary frequencies, never change: sent again, they make each pass wait.
    return [group, DistributedDataParallelKwargs(broadcast_buffers=False)]


@contextmanager
def meeting_by_gloo() -> Iterator[None]:
    """Around what makes a process group.  Raises: UserError where gloo's processes do not reach each other; not where
    one of them has ended, which says why itself."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error).lower() or another_is_gone(error):
            raise
        raise UserError(
            f"the processes do not reach each other by gloo: {reason(error)}: set GLOO_SOCKET_IFNAME to the network "
            "between the machines, as `ip address` names it (docs/clusters.md)"
        ) from error


def check_processes(accelerator: Accelerator, step: int = 0) -> None:
    """Stop several processes that each believe they are alone: they would train the same run twice.

    Raises: UserError when fewer have found each other than the launcher started, or they found other checkpoints, after
        which they would begin at another `step`.
    """
    if accelerator.num_processes != num_processes():
        raise UserError(
            f"the launcher started {num_processes()} processes, but {accelerator.num_processes} found each other: "
            "check the accelerate config against this machine"
        )
    steps = sorted(set(gather_object([step])))
    if len(steps) > 1:  # an earlier start was still saving, or a network disk lags behind
        stop_all(f"the processes found checkpoints of different steps ({steps}): start again")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "", accelerator.mixed_precision):
        say(f"the accelerate config says mixed_precision: {precision}; the recipe's dtype wins")
