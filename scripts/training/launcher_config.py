"""What `accelerate launch` says of the engine, by environment variables, and is read or done nowhere else.

Each key of an accelerate config is honoured or refused: one that is passed over trains something else than its user
believes. (Accelerate 1.15 has them in utils/launch.py; `mixed_precision`, beside which the recipe's dtype wins with a
line, is no more than that.)
"""

import difflib
import os
from typing import Any

from recipe.load import nearest
from training.launch_command import DEEPSPEED_KEYS, check_launch_command, keys_of
from utils.errors import UserError
from utils.launch import FALSE, TRUE, launcher_plugin

CONFIG, ENVIRONMENT = "the accelerate config", "the environment"
PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"
# What nobody does here: its variable, the value that asks for nothing, and what to do.
NOT_HERE = {
    "dynamo_backend": ("ACCELERATE_DYNAMO_BACKEND", "no", "remove it: the recipe's torch_compile compiles the layers"),
    "megatron_lm_config": ("ACCELERATE_USE_MEGATRON_LM", "false", "Megatron-LM is not supported: take fsdp2.yaml"),
    # Experts that are modules of their own, for which it is, are not trained by several processes.
    "deepspeed_moe_layer_cls_names": ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "", "remove it: ZeRO-3 needs none"),
}
SIZES = [f"parallelism_config_{name}_size" for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")]
# Keys of its deepspeed_config that are DeepSpeed's own under other names: the variable, and the place in the JSON.
DEEPSPEED = {
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_optimization.stage"),
    "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps"),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping"),
    "offload_optimizer_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
        "zero_optimization.offload_optimizer.device",
    ),
    "offload_param_device": ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "zero_optimization.offload_param.device"),
}
# Whether an engine is asked for. Accelerate and we take `true` alone for yes (1.15).
ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", PARALLELISM)
WORDS = {**dict.fromkeys(ENGINES, ("true", "false")), "ACCELERATE_USE_CPU": (*TRUE, *FALSE)}
# Of a variable's name, to be taken for a misspelt one of ours. The others that Accelerate knows are like them by 0.88
# at most (ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH).
ALIKE = 0.9


def check_launcher() -> None:
    """Refuse what nobody does here, or not beside the plugin that the config brings, and what would be passed over.

    Raises: UserError, with the key and the remedy; as `check_launch_command`.
    """
    check_launch_command()
    _check_environment()
    for key, (variable, nothing, remedy) in NOT_HERE.items():
        if os.environ.get(variable, nothing).lower() != nothing:
            raise UserError(f"{CONFIG}: {key}: {remedy}")
    if launcher_plugin() != "fsdp" and os.environ.get(PARALLELISM, "false").lower() == "true":
        for key in SIZES:
            if (size := os.environ.get(key.upper(), "1")) != "1":
                remedy = (
                    "remove it: hybrid shards are had by distributed_type: FSDP, as in accelerate_configs/hsdp.yaml"
                )
                raise UserError(f"{CONFIG}: {key} = {size}: {remedy}")
    known = [*DEEPSPEED_KEYS, "mixed_precision"]  # which the launcher adds
    for name in filter(None, os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")):
        if name not in known:
            raise UserError(f"{CONFIG}: its deepspeed_config: unknown key {name}{nearest(name, known, '')}")


def _check_environment() -> None:
    """Refuse variables that somebody has set by hand, and that would be passed over."""
    for variable, words in WORDS.items():
        if (value := os.environ.get(variable, words[0])).lower() not in words:
            raise UserError(f"{ENVIRONMENT}: {variable} = {value}: should be true or false")
    if (device := os.environ.get("ACCELERATE_TORCH_DEVICE")) is not None:
        remedy = "remove it: ACCELERATE_USE_CPU = true takes the CPU, CUDA_VISIBLE_DEVICES a GPU"
        raise UserError(f"{ENVIRONMENT}: ACCELERATE_TORCH_DEVICE = {device}: {remedy}")
    parts = {  # what is read where a variable is true only
        "ACCELERATE_USE_FSDP": _variables("fsdp_config"),
        "ACCELERATE_USE_DEEPSPEED": [*(name for name, _ in DEEPSPEED.values()), "ACCELERATE_DEEPSPEED_CONFIG_FILE"],
        PARALLELISM: _variables("parallelism_config"),
    }
    for whole, variables in parts.items():
        if os.environ.get(whole, "").lower() != "true" and (found := sorted(os.environ.keys() & variables)):
            raise UserError(
                f"{ENVIRONMENT}: {found[0]}: passed over without {whole} = true: give that too, or remove it"
            )
    known = [
        *WORDS,
        "ACCELERATE_MIXED_PRECISION",
        *(variable for variable, *_ in NOT_HERE.values()),
        *_variables("dynamo_config"),
    ]
    known += [variable for variables in parts.values() for variable in variables]
    for name in sorted(os.environ.keys() - {*known}):
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            for meant in difflib.get_close_matches(name, known, n=1, cutoff=ALIKE):
                raise UserError(f"{ENVIRONMENT}: unknown variable {name}: did you mean {meant}?")


def _variables(section: str) -> list[str]:
    """By which `accelerate launch` hands on the keys of a section."""
    prefix = "ACCELERATE_" * (section == "dynamo_config")
    names = [prefix + name.upper() for name in keys_of(section)]
    return [name.replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS") for name in names]


def check_beside_file(config: dict[str, Any], file: str) -> None:
    """Refuse what the accelerate config says of DeepSpeed in other words than the file that it names.

    Args:
        config: of the file, complete.

    Raises: UserError, with both.
    """
    if launcher_plugin() != "deepspeed":
        return
    for key, (variable, place) in DEEPSPEED.items():
        if (given := os.environ.get(variable)) is None:
            continue
        value: Any = config
        for name in place.split("."):
            value = (value or {}).get(name)
        value = "none" if value is None else value
        if not _is_same(given, value):
            raise UserError(f"{CONFIG}: {key} = {given} contradicts {file}, by which {place} = {value}: remove it")


def _is_same(given: str, value: Any) -> bool:
    try:
        return float(given) == float(value)
    except (TypeError, ValueError):
        return given == value


def hide_plugins(*names: str) -> None:
    """Keep what the launcher said of them, once it is read here, from Accelerate and transformers, which would act on
    it in ways of their own."""
    for name in names:
        os.environ.pop(f"ACCELERATE_USE_{name.upper()}", None)
    os.environ.pop(PARALLELISM, None)
