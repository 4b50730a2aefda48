"""What a card says of starting the run anew: a command that whoever has the collection can type."""

import shlex

from publishing.provenance import RunRecord, shareable_path
from recipe.keys import Recipe

PREFIX = "ACCELERATE_DEEPSPEED_"  # of the launcher's variables for DeepSpeed


def command_of(recipe: Recipe, record: RunRecord | None) -> dict[str, str]:
    """`command`, for the collection's folder, which starts the engine that the run had: the launcher's where that had
    one, else the recipe's. `zero_file`: the DeepSpeed config that has to be written first, '' where none has."""
    launcher = record.command.launcher if record else {}
    options, keys, zero = [], [], recipe.deepspeed_config
    if launcher.get("ACCELERATE_USE_FSDP") == "true":
        groups, own = (launcher.get(f"PARALLELISM_CONFIG_DP_{size}_SIZE", "1") for size in ("REPLICATE", "SHARD"))
        options.append(f"--config_file accelerate_configs/{'fsdp2' if groups == '1' else 'hsdp'}.yaml")
        if groups != "1":
            options.append(f"--parallelism_config_dp_replicate_size {shlex.quote(groups)}")
            options.append(f"--parallelism_config_dp_shard_size {shlex.quote(own)}")
    if file := launcher.get(f"{PREFIX}CONFIG_FILE"):
        zero = file
        keys.append(f"--deepspeed_config {shlex.quote(shareable_path(file))}")
    elif stage := launcher.get(f"{PREFIX}ZERO_STAGE"):
        options.append(f"--use_deepspeed --zero_stage {shlex.quote(stage)}")
        for name in ("offload_optimizer_device", "offload_param_device"):
            if (device := launcher.get(PREFIX + name.upper(), "none")) != "none":
                options.append(f"--{name} {shlex.quote(device)}")
    if launcher and record.num_processes:
        options.append(f"--num_processes {record.num_processes}")
    start = "python" if record and not launcher else " ".join(["accelerate launch", *options])
    has_to_be_written = zero and record and record.deepspeed and not shareable_path(zero).startswith("ds_configs/")
    return {
        "command": " ".join([start, "scripts/sft.py recipe.yaml --output_dir NEW", *keys]),
        "zero_file": shareable_path(zero) if has_to_be_written else "",
    }


def without_deepspeed(record: RunRecord | None) -> str:
    """Why a card has no DeepSpeed config."""
    if record is None or record.deepspeed_config:
        return "not known, the record of the run does not hold it"
    if record.command.launcher.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "spelled out in the accelerate config, without a file"
    return "none, the run did without DeepSpeed"
