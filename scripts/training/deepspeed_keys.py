"""Which keys of a DeepSpeed config sft.py runs with, and with which values.

DeepSpeed (0.19.8) looks at a part of its config when it starts, at others in the middle of a step, and passes over a
misspelt key in silence. Its own models of its sections know names and types; what they do not say is here.
"""

import json
import math
import os
from collections.abc import Collection
from functools import cache
from typing import Any, NoReturn

import torch
from pydantic import BaseModel, ValidationError

from recipe.load import nearest
from utils.errors import UserError, reason
from utils.launch import DTYPES, has_gpu

FLAGS = ("prescale_gradients", "wall_clock_breakdown", "memory_breakdown", "dump_state")
FLAGS += ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
# What a key has to be that is neither the recipe's nor in one of DeepSpeed's models.
DTYPE = ("fp32, fp16 or bf16", lambda value: value is None or (isinstance(value, str) and value in DTYPES))
VALUES = {
    **{name: ("true or false", lambda value: isinstance(value, bool)) for name in FLAGS},
    "steps_per_print": ("a number of at least 1", lambda value: _is_number(value) and value >= 1),
    "gradient_predivide_factor": ("a number over 0", lambda value: _is_number(value) and 0 < value < math.inf),
    "communication_data_type": DTYPE,
    "data_types.grad_accum_dtype": DTYPE,
}
# The names of a section without such a model. Most are filled from the recipe or compared with it, by
# training/deepspeed_config.py.
NAMES = {
    "": (
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("optimizer", "scheduler", "data_types", "fp16", "bf16", "zero_optimization", *VALUES),
    ),
    "optimizer": ("type", "params"),
    "optimizer.params": ("lr", "betas", "eps", "weight_decay"),
    "scheduler": ("type", "params"),
    "scheduler.params": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_type"),
    "data_types": ("grad_accum_dtype",),
}
# Of DeepSpeed's models: what does something in the stages that are supported, and leaves the loop what it is.
SUPPORTED = {
    "fp16": (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        *("consecutive_hysteresis", "min_loss_scale"),
    ),
    "bf16": ("enabled", "check_grad_overflow"),
    "zero_optimization": (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "overlap_comm"),
        *("use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size", "offload_optimizer"),
        *("ignore_unused_parameters", "round_robin_gradients", "parameter_alignment", "enable_sanity_checks"),
        *("offload_param", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
        *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
        *("stage3_gather_16bit_weights_on_model_save", "memory_efficient_linear"),
    ),
    "zero_optimization.offload_optimizer": ("device", "pin_memory"),
    "zero_optimization.offload_param": ("device", "pin_memory"),
}
PLACES = NAMES | SUPPORTED
# What a stage passes over, whatever it says. That a model can be saved under stage 3 is said by the last key where
# DeepSpeed saves it; here it can be anyway.
ONLY_IN_STAGE_3 = [key for key in SUPPORTED["zero_optimization"] if key.startswith("stage3_")]
ONLY_IN_STAGE_3 = ("offload_param", "sub_group_size", "memory_efficient_linear", *ONLY_IN_STAGE_3)
# By the model's hidden_size, as transformers' Trainer and Accelerate do.
BY_HIDDEN_SIZE = {
    "reduce_bucket_size": lambda hidden: hidden**2,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden**2),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
# Where these say "auto" they are filled.
FILLED = ("fp16.enabled", "bf16.enabled", "bf16.check_grad_overflow")
FILLED += tuple(f"zero_optimization.{name}" for name in BY_HIDDEN_SIZE)
# Other keys of DeepSpeed, and what does it here. Where one is switched off it is left out, and nobody need remove it.
NOT_HERE = {
    "activation_checkpointing": "the recipe's gradient_checkpointing does that",
    "bfloat16": "write bf16",
    "tensorboard": "training.png has the curves",
    "wandb": "the recipe's log_wandb does that",
    **dict.fromkeys(
        (
            *("aio", "amp", "autotuning", "checkpoint", "comet", "comms_logger", "compile", "compression_training"),
            *("csv_monitor", "curriculum_learning", "data_efficiency", "dataloader_drop_last", "datastates"),
            *("disable_allgather", "disable_python_gc", "eigenvalue", "elasticity", "expert_parallel"),
            *("flops_profiler", "gradient_allreduce_op", "graph_harvesting", "hybrid_engine", "log_level"),
            *("managed_gradient_accumulation", "mesh_param", "moe", "msamp", "nebula", "pipeline"),
            *("progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type"),
            *("sequence_parallel_size", "sparse_attention", "sparse_gradients", "tensor_parallel", "timers"),
            *("torch_autocast", "use_data_before_expert_parallelism", "vocabulary_size", "weight_quantization"),
        ),
        "remove it",
    ),
}
MOST_ELEMENTS = 2**31  # of a bucket, which is allocated whole: 8 GB in fp32, and more than any model here asks for
LARGEST_POWER = 127  # of two, that fp32 holds


@cache
def _models() -> dict[str, type[BaseModel]]:
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which it would find out by itself, with a warning
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    return {
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    }


def check_keys(config: dict[str, Any], source: str) -> None:
    """Take out of a config, as the user wrote it, what is switched off and not supported.

    Raises: UserError, naming `source` and the key, for one that is unknown (with the nearest that is known), that
        sft.py does not run with, or of another type or value than DeepSpeed takes.
    """
    for section, names in NAMES.items():
        _check_names(_at(config, source, section), source, section, names)
    given = [section for section in SUPPORTED if _is_given(config, source, section)]
    for section in given:
        _check_names(_at(config, source, section), source, section, _defaults(section).keys())
    for key, (what, fits) in VALUES.items():
        section, _, name = key.rpartition(".")
        values = _at(config, source, section)
        if name in values and not fits(values[name]):
            _refuse(source, key, values[name], f"should be {what}")
    zero, fp16 = _at(config, source, "zero_optimization"), _at(config, source, "fp16")
    if "stage" not in zero:
        raise UserError(f"{source}: zero_optimization.stage is missing: give 1, 2 or 3")
    stage = zero["stage"]
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        _refuse(source, "zero_optimization.stage", stage, "stages 1, 2 and 3 are supported")  # 0 tells no gradient norm
    for section in ("offload_optimizer", "offload_param"):
        if isinstance(own := zero.get(section), dict) and own.get("device") == "nvme":  # in files of no checkpoint
            _refuse(source, f"zero_optimization.{section}.device", "nvme", "sft.py does not run with this: give cpu")
    for section in reversed(given):  # what lies within first
        _check_section(config, source, section)
    if stage != 3:
        _check_no_stage_3(zero, source)
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if _is_number(zero.get(name)) and zero[name] > MOST_ELEMENTS:
            _refuse(source, f"zero_optimization.{name}", zero[name], f"over {MOST_ELEMENTS:,} elements")
    if zero.get("allgather_bucket_size", 0) % 2:
        _refuse(source, "zero_optimization.allgather_bucket_size", zero["allgather_bucket_size"], "has to be even")
    _check_gradient_factors(config, source)
    if not 0 <= fp16.get("initial_scale_power", 0) <= LARGEST_POWER:
        _refuse(source, "fp16.initial_scale_power", fp16["initial_scale_power"], f"should be 0 to {LARGEST_POWER}")
    if fp16.get("hysteresis", 1) < 1:
        _refuse(source, "fp16.hysteresis", fp16["hysteresis"], "should be at least 1")


def _check_no_stage_3(zero: dict[str, Any], source: str) -> None:
    """Refuse what would be passed over in stages 1 and 2: somebody counts on it."""
    defaults = _defaults("zero_optimization")
    for name in ONLY_IN_STAGE_3:
        given = zero.get(name)
        off = given == {"device": "none"} if isinstance(given, dict) else given in (None, defaults[name])
        if not off:
            _refuse(source, f"zero_optimization.{name}", given, "is for stage 3 only: remove it")


def _check_gradient_factors(config: dict[str, Any], source: str) -> None:
    """Refuse factors of the gradients where the engine stops at them, in stage 2, or with gradients of another size, in
    stage 3: where the factor is the number of processes they came out divided by both (stage3.py)."""
    zero = config["zero_optimization"]
    for name, neutral in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if config.get(name, neutral) == neutral:
            continue
        if zero["stage"] == 3:
            _refuse(source, name, config[name], "is not for stage 3: remove it")
        if zero["stage"] == 2 and zero.get("reduce_scatter", True):
            _refuse(source, name, config[name], "needs zero_optimization.reduce_scatter = false in stage 2")


def fill_by_hidden_size(zero: dict[str, Any], hidden_size: int) -> None:
    """Give the sizes in the section `zero_optimization` that say "auto" their numbers of elements."""
    for name, size in BY_HIDDEN_SIZE.items():
        if zero.get(name) == "auto":
            zero[name] = size(hidden_size)


def check_precision(config: dict[str, Any], source: str, dtype: torch.dtype) -> None:
    """UserError where a complete config for training in `dtype` has gradients added up as the engine cannot."""
    zero, accumulated = config["zero_optimization"], config.get("data_types", {}).get("grad_accum_dtype")
    if accumulated is None or DTYPES[accumulated] == dtype:
        return
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        # Each norm is no finite number, so that no step changes the weights.
        what = f"does not go with offload_optimizer and {dtype}"
    elif zero["stage"] == 1 and (dtype, accumulated) == (torch.bfloat16, "fp32"):
        # For this alone DeepSpeed takes its BF16_Optimizer, without a loss scaler and with other partitions.
        what = "does not go with stage 1 and bf16: take stage 2"
    else:
        return
    _refuse(source, "data_types.grad_accum_dtype", accumulated, f"{what}, or leave it out")


def _check_section(config: dict[str, Any], source: str, section: str) -> None:
    """The values of one that has a model of DeepSpeed's."""
    values, model, defaults = _at(config, source, section), _models()[section], _defaults(section)
    fields = {field.alias or name: name for name, field in model.model_fields.items()}
    for name in [name for name in values if name not in SUPPORTED[section]]:
        given = values.pop(name)
        if f"{section}.{name}" in SUPPORTED:
            continue  # checked, and off
        if given != defaults[name] or isinstance(given, bool) != isinstance(defaults[name], bool):
            _refuse(source, f"{section}.{name}", given, "sft.py does not run with this: remove it")
    try:
        found = model(**values)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join([section, *map(str, detail["loc"])])
        _refuse(source, key, detail["input"], detail["msg"].removeprefix("Value error, ").removeprefix("Input "))
    except Exception as error:  # of the models' own code
        raise UserError(f"{source}: {section}: {reason(error)}") from None
    for name, given in values.items():
        taken = getattr(found, fields[name])
        if given == "auto" and f"{section}.{name}" not in FILLED:
            _refuse(source, f"{section}.{name}", given, "no key of the recipe says this: give a value")
        if given == "auto" or isinstance(given, dict):
            continue
        if isinstance(given, bool) != isinstance(taken, bool) or isinstance(given, str) != isinstance(taken, str):
            what = "true or false" if isinstance(taken, bool) else "a number"
            _refuse(source, f"{section}.{name}", given, f"should be {what}")
        if isinstance(taken, int) and not isinstance(taken, bool):
            values[name] = int(taken)  # 1e9, which JSON writes as a float


def _is_given(config: dict[str, Any], source: str, section: str) -> bool:
    parent, _, own = section.rpartition(".")
    return _at(config, source, parent).get(own) is not None


def _defaults(section: str) -> dict[str, Any]:
    """Of DeepSpeed's model of a section, by the names of its keys."""
    fields = _models()[section].model_fields
    return {field.alias or name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def _check_names(values: dict[str, Any], source: str, section: str, known: Collection[str]) -> None:
    for name in list(values):
        key = f"{section}.{name}" if section else name
        if name in known:
            continue
        if not section and name in NOT_HERE:
            if not _is_off(values.pop(name)):
                raise UserError(f"{source}: {key}: sft.py does not run with this of DeepSpeed's: {NOT_HERE[name]}")
            continue
        if len(homes := [f"in {other}" if other else "at the top" for other in PLACES if name in PLACES[other]]) == 1:
            raise UserError(f"{source}: unknown key {key}: its place is {homes[0]}")
        raise UserError(f"{source}: unknown key {key}{nearest(name, known, ': remove it')}")


def _at(config: dict[str, Any], source: str, section: str) -> dict[str, Any]:
    """The values of a section, {} where it is not there."""
    for name in section.split(".") if section else ():
        config = config.get(name, {})
        if not isinstance(config, dict):
            _refuse(source, section, config, "not a JSON object")
    return config


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or all(map(_is_off, value.values()))
    return value is None or value is False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(source: str, key: str, value: Any, what: str) -> NoReturn:
    raise UserError(f"{source}: {key} = {_shown(value)}: {what}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text[:80] + "..." * (len(text) > 80)
