"""What a process of an engine takes for two steps, beyond what it had before its model; of test_state_layout.py.

    accelerate launch --config_file CONFIG --num_processes 2 tests/training/memory_worker.py FILE large

Writes {"measured": bytes of the process that took most, "processes"}.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "run")]

import torch
from accelerate.utils import gather_object
from mixes import make_mix, make_recipe
from test_preflight import make_batch, make_scored_loss

from run.stats import Clock, TrainingStats
from sft import train_step
from training.deepspeed_config import deepspeed_config
from training.engine import prepare_engine, start_accelerator
from utils.launch import M_MMAP_THRESHOLD


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    from test_state_layout import KEYS, SIZES, TOKENS

    config = SIZES[sys.argv[2]]
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # every larger block goes back to the system at once
    recipe = make_recipe(**KEYS)
    deepspeed = deepspeed_config(recipe, 10, torch.float32)
    accelerator = start_accelerator(recipe, torch.float32, deepspeed)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    engine = prepare_engine(accelerator, make_scored_loss(config, **KEYS).model, recipe, total_steps=10)
    stats = TrainingStats(make_mix([[2]]), accelerator.device, Clock())
    for _ in range(2):  # the second micro-batch of the second step finds moments and gradients there
        train_step(engine, [make_batch(config.vocab_size, (1, TOKENS), True) for _ in range(2)], recipe, stats)
    taken = gather_object([kilobytes("VmHWM") - before])
    if accelerator.is_main_process:
        found = {"measured": max(taken) * 1024, "processes": accelerator.num_processes}
        Path(sys.argv[1]).write_text(json.dumps(found))
    engine.close()
    os._exit(0)
