"""What `accelerate launch` says of the engine, by environment variables, and is read or done nowhere else.

Each key of an accelerate config is honoured or refused: one that is passed over trains something else than its user
believes. (Accelerate 1.15 has them in utils/launch.py; `mixed_precision`, beside which the recipe's dtype wins with a
line, is no more than that.)
"""

import os
from typing import Any

from recipe.load import nearest
from utils.errors import UserError
from utils.launch import launcher_plugin

CONFIG = "the accelerate config"
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
# The others: of the launcher, or of no account here, where weights are loaded and saved in one way.
OTHERS = ("deepspeed_config_file", "deepspeed_hostfile", "deepspeed_inclusion_filter", "deepspeed_exclusion_filter")
OTHERS += ("deepspeed_multinode_launcher", "zero3_init_flag", "zero3_save_16bit_model", "mixed_precision")
OTHERS += ("offload_optimizer_nvme_path", "offload_param_nvme_path", "deepspeed_moe_layer_cls_names")


def check_launcher() -> None:
    """Refuse what nobody does here, or not beside the plugin that the config brings.

    Raises: UserError, with the key and the remedy.
    """
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
    known = [*DEEPSPEED, *OTHERS]
    for name in filter(None, os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")):
        if name not in known:
            raise UserError(f"{CONFIG}: its deepspeed_config: unknown key {name}{nearest(name, known, '')}")


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
