# ruff: noqa: I001, utils comes before whatever loads torch: it says how long its threads spin
"""What the processes of `forking.py` have imported before they begin, and no picture of their curves.

Nothing here computes anything.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported here without a GPU, would say that it guesses
os.environ.setdefault("TORCH_WARM_POOL", "0")  # torch's compiler would start processes of its own

import utils
import accelerate.commands.launch
import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # by each engine, and with it torch's compiler: 2 CPU seconds
import evaluate
import matplotlib.figure
import sft
from run.curves import Curves

MODULES = utils, accelerate.commands.launch, deepspeed, evaluate, matplotlib.figure, sft


def no_picture(curves: Curves, image: Path) -> None:
    """In place of a drawing after each evaluation, half a CPU second, of which most of a small run was made. Curves are
    drawn in tests/run/test_log.py, and by runs that are started anew, as in tests/test_demo.py."""
    image.write_bytes(b"")


Curves.draw = no_picture
# What is imported by now stays: a collection would look through it, 0.4 CPU seconds of a run's 1.5, and so copy its
# memory, which the forked process shares.
gc.freeze()
