"""DeepSpeed's config: found, every `auto` filled from the recipe, and refused where it contradicts it.

The recipe owns every number. Accelerate (1.15) fills only some `auto` values itself: betas and eps stop it, and
`gradient_clipping` silently becomes 1.0; so all of them are filled here, before it looks.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin

from recipe.keys import Recipe
from training.deepspeed_keys import check_keys, check_precision
from training.launcher_config import CONFIG, check_beside_file, check_launcher
from training.optimizer import shortest_warmup
from training.plan import accumulation_steps, micro_batch_size
from utils.errors import UserError, reason
from utils.files import read_json
from utils.launch import launcher_plugin, num_processes, say_once
from utils.requirements import require


def optimizer_on_host(zero: dict[str, Any]) -> bool:
    """Whether ZeRO's section of the config keeps fp32 weights, moments and a step's gradients off the GPU."""
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def find_config(recipe: Recipe) -> tuple[dict[str, Any], str] | None:
    """The DeepSpeed config that this run uses and where it comes from; None for a run without DeepSpeed.

    The accelerate config's plugin wins over the recipe's `deepspeed_config`.
    Raises: UserError when the file is missing or not JSON; as `check_launcher`.
    """
    check_launcher()
    plugin = launcher_plugin()
    if plugin and recipe.deepspeed_config:
        say_once(f"the accelerate config brings {plugin}: it wins over the recipe's deepspeed_config")
    if plugin == "fsdp":
        return None
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") if plugin else recipe.deepspeed_config
    if path is None:
        return None
    require("deepspeed")
    if path == "none":  # the accelerate config spells the plugin out, without a JSON file
        try:
            return DeepSpeedPlugin().deepspeed_config, CONFIG
        except ValueError as error:  # of a number that is none
            raise UserError(f"{CONFIG}: its deepspeed_config: {reason(error)}") from None
    if Path(path).suffix in (".yaml", ".yml"):
        remedy = f"an accelerate config is given by accelerate launch --config_file {path}"
        raise UserError(f"deepspeed_config = {path}: should be a JSON file of DeepSpeed's; {remedy}")
    config = read_json(Path(path), "deepspeed_config")
    if not isinstance(config, dict):
        raise UserError(f"deepspeed_config: {path}: not a JSON object")
    return config, path


def fill_config(
    config: dict[str, Any], source: str, recipe: Recipe, total_steps: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """A copy of the config with every `auto` filled from the recipe.

    A config without an optimizer or scheduler section gets the seed's (AdamW, WarmupDecayLR). `total_steps` is None
    where it is not known yet, as in a dry run by epochs.

    Raises: UserError for a key or value that sft.py cannot run with, a fixed value that contradicts the recipe (both
        are named), or moments that are not in fp32.
    """
    if recipe.optimizer_state_dtype != "fp32":
        raise UserError(
            f"optimizer_state_dtype = {recipe.optimizer_state_dtype}: {source}: DeepSpeed's optimizer keeps Adam's "
            "moments in fp32, and shares them among the processes: give fp32, or train without DeepSpeed"
        )
    if recipe.load_in_4bit:
        raise UserError(
            f"load_in_4bit = true: {source}: DeepSpeed would make half precision of what is packed: train by one "
            "process, or DistributedDataParallel"
        )
    config = copy.deepcopy(config)
    check_keys(config, source)
    if config["zero_optimization"]["stage"] == 3:
        _check_for_stage_3(recipe, source)
    # By micro_batch_tokens steps have different numbers of micro-batches; the engine is told the most. It only divides
    # the loss by that, which sft.py undoes, and learns from sft.py which micro-batch ends a step.
    micro_batch, accumulation = micro_batch_size(recipe), accumulation_steps(recipe, num_processes())
    by_number = recipe.micro_batch_tokens is None
    filled = {  # DeepSpeed's key: the recipe's key, the value
        "fp16.enabled": (f"enabled for {dtype}", dtype == torch.float16),
        "bf16.enabled": (f"enabled for {dtype}", dtype == torch.bfloat16),
        # As in fp16 and fp32: a step whose gradient norm is no finite number leaves the weights as they are.
        "bf16.check_grad_overflow": ("bad steps are left out", True),
        "optimizer.type": ("the optimizer of every run", "AdamW"),
        "optimizer.params.lr": ("learning_rate", recipe.learning_rate),
        "optimizer.params.betas": ("adam_beta1, adam_beta2", [recipe.adam_beta1, recipe.adam_beta2]),
        "optimizer.params.eps": ("adam_epsilon", recipe.adam_epsilon),
        "optimizer.params.weight_decay": ("weight_decay", recipe.weight_decay),
        "scheduler.type": ("the schedule of every run", "WarmupDecayLR"),
        "scheduler.params.warmup_min_lr": ("the start of warm-up", 0.0),
        "scheduler.params.warmup_max_lr": ("learning_rate", recipe.learning_rate),
        "scheduler.params.warmup_num_steps": ("warmup_steps", shortest_warmup(recipe.warmup_steps)),
        "scheduler.params.warmup_type": ("the schedule of every run", "log"),
        "scheduler.params.total_num_steps": ("the steps of this run", total_steps),
        "gradient_accumulation_steps": (
            "gradient_accumulation_steps" if by_number else "the most micro-batches a step",
            accumulation,
        ),
        "gradient_clipping": ("max_grad_norm", recipe.max_grad_norm),
        "train_micro_batch_size_per_gpu": (
            "per_device_train_batch_size" if by_number else "micro_batch_tokens // max_length",
            micro_batch,
        ),
        "train_batch_size": ("conversations a step", micro_batch * accumulation * num_processes()),
    }
    for key, (ours, value) in filled.items():
        section, name = _section(config, source, key)
        present = section.get(name, "auto")
        if value is not None and present != "auto" and present != value:
            remedy = "remove it" if source == CONFIG else 'write "auto" there'
            raise UserError(f"{source}: {key} = {present} contradicts the recipe: {ours} = {value}; {remedy}")
        section[name] = value
    check_precision(config, source, dtype)
    if source != CONFIG:
        check_beside_file(config, source)
    return config


def _check_for_stage_3(recipe: Recipe, source: str) -> None:
    """Refuse what the stage that shards the weights cannot do, or not better than without it."""
    which = f"{source}: zero_optimization.stage = 3"
    if recipe.use_peft:
        raise UserError(
            f"use_peft = true: {which} shards what is trained, and would gather a frozen model layer by layer: take "
            "stage 2, or train without DeepSpeed"
        )
    if recipe.torch_compile:
        # Its hooks break every layer into its single operations, until the compiler gives up (torch 2.13).
        raise UserError(
            f"torch_compile = true: {which} gathers weights between the operations of a layer, so that nothing is "
            "compiled: give torch_compile: false, or take stage 2"
        )


def _section(config: dict[str, Any], source: str, key: str) -> tuple[dict[str, Any], str]:
    """The innermost dict that holds a dotted key, created where it is missing, and the key's name in it."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise UserError(f"{source}: {key.rpartition('.')[0]} = {json.dumps(config)}: not a JSON object")
    return config, name


def deepspeed_config(recipe: Recipe, total_steps: int | None, dtype: torch.dtype) -> dict[str, Any] | None:
    """The complete config of this run's engine; None for a run without DeepSpeed.  Raises: UserError as its parts."""
    found = find_config(recipe)
    return found and fill_config(*found, recipe, total_steps, dtype)
