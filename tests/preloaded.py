# ruff: noqa: I001, utils comes before whatever loads torch: it says how long its threads spin
"""What the processes of `forking.py` have imported before they begin; nothing here computes anything."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported here without a GPU, would say that it guesses

import utils
import accelerate.commands.launch
import deepspeed
import evaluate
import matplotlib.figure
import sft

MODULES = utils, accelerate.commands.launch, deepspeed, evaluate, matplotlib.figure, sft
