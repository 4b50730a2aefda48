"""What the user gave `accelerate launch`, on its command line and in the file of its config.

It hands most of that on by environment variables, which training/launcher_config.py looks at. What it drops on the way
(in 1.15 a misspelt key of a section, and options of an engine that it does not start) is seen here only: by the command
line of the process that started this one, and the file that this names.
"""

import io
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from recipe.load import nearest
from recipe.strict_yaml import parse_yaml
from utils.errors import UserError
from utils.files import read_json, read_text
from utils.launch import has_gpu, launcher_plugin, num_processes

MOST_BYTES = 2**20
# Sections of its config, each with how the options begin that its keys are.
PREFIXES = {
    "fsdp_config": "fsdp_",
    "parallelism_config": "parallelism_config_",
    "dynamo_config": "dynamo_",
    "fp8_config": "fp8_",
    "megatron_lm_config": "megatron_lm_",
    "mpirun_config": "mpirun_",
}
WITHOUT_PREFIX = ("fsdp_config", "dynamo_config", "fp8_config")  # whose keys may be given so
# Of deepspeed_config, whose keys begin in no such way. The first say how processes are started, not what they do:
# recipes/launch.slurm gives one of them beside any config.
STARTING = ("deepspeed_hostfile", "deepspeed_inclusion_filter", "deepspeed_exclusion_filter")
STARTING += ("deepspeed_multinode_launcher",)
DEEPSPEED_KEYS = (
    *("deepspeed_config_file", "zero_stage", "gradient_accumulation_steps", "gradient_clipping"),
    *("offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path", "offload_param_nvme_path"),
    *("zero3_init_flag", "zero3_save_16bit_model", "deepspeed_moe_layer_cls_names"),
    *STARTING,
)
# Sections that only one engine reads: `launcher_plugin`'s name for it, and the distributed_type that starts it.
ENGINES = {"deepspeed_config": ("deepspeed", "DEEPSPEED"), "fsdp_config": ("fsdp", "FSDP")}
IN_A_RECIPE = {"gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_clipping": "max_grad_norm"}
FLAGS = ("use_cpu", "debug", "same_network", "enable_cpu_affinity", "zero3_init_flag", "zero3_save_16bit_model")
BOOLEANS = ("true", "false", "yes", "no", "on", "off")  # of YAML 1.1


def keys_of(section: str) -> list[str]:
    """The keys that Accelerate knows in a section of its config, each the name of an option of `accelerate launch`."""
    if section == "deepspeed_config":
        return [*DEEPSPEED_KEYS]
    options = vars(launch_command_parser().parse_args(["script.py"]))
    own = [name for name in options if name.startswith(PREFIXES[section])]
    return [*own, "fsdp_ignored_modules"] if section == "fsdp_config" else own  # for which there is no option


def check_launch_command() -> None:
    """As `check_arguments`, of the command that started this process, where it can be seen: not behind pdsh."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which every launcher of Accelerate's sets
        return
    try:
        parents = psutil.Process().parents()
    except (psutil.Error, OSError):  # of a machine that does not show its processes
        return
    for process in parents:
        if arguments := launch_arguments(process):
            check_arguments(arguments)
            return


def check_arguments(arguments: Namespace) -> None:
    """Refuse what `accelerate launch` was given and has dropped.

    Raises: UserError, with the file and line or the option, and the remedy.
    """
    file = arguments.config_file or ("" if arguments.cpu else default_config_file)
    # Not where it is gone, as what a shell's `<(command)` has given.
    config = check_config_file(Path(file), arguments.cpu) if os.path.isfile(file) else {}
    for section, (plugin, kind) in ENGINES.items():
        given = arguments.nondefault.intersection(keys_of(section)).difference(STARTING)
        for name in sorted(given) if launcher_plugin() != plugin else ():
            remedy = f"the recipe's {IN_A_RECIPE[name]} says that" if name in IN_A_RECIPE else f"give --use_{plugin}"
            raise UserError(f"accelerate launch --{name}: passed over, since this start is without {kind}: {remedy}")
    source, count = file, config.get("num_processes")
    if arguments.num_processes is not None:
        source, count = "accelerate launch", arguments.num_processes
    if num_processes() == 1 and not arguments.mpirun_hostfile and str(count).isdigit() and int(count) > 1:
        raise UserError(
            f"{source}: num_processes = {count}: it has started one: give distributed_type: MULTI_GPU, or --multi_gpu, "
            "which without a GPU starts CPU processes"
        )


def launch_arguments(process: psutil.Process) -> Namespace | None:
    """What a process reads that is `accelerate launch`, in any spelling of it; None where it is something else."""
    try:
        words = process.cmdline()
    except (psutil.Error, OSError):  # another user's, or gone
        return None
    for number, word in enumerate(words, 1):
        name, following = os.path.basename(word), words[number:]
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith(
            "accelerate/commands/launch.py"
        ):
            return _parsed(following)
        is_cli = name in ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py")
        if is_cli and following[:1] == ["launch"]:
            return _parsed(following[1:])
    return None


def _parsed(words: list[str]) -> Namespace | None:
    """None for what the launcher itself would refuse: another program has `accelerate launch` among its own words."""
    try:
        with redirect_stderr(io.StringIO()):
            return launch_command_parser().parse_args(words)
    except SystemExit:
        return None


def check_config_file(file: Path, without_plugins: bool = False) -> dict[str, Any]:
    """The values of an accelerate config, scalars as texts.

    Args:
        without_plugins: by `--cpu`.

    Raises: UserError, with the file and the line, for a key that Accelerate passes over, with the nearest that it
        knows; for a section of another engine than was started; for a flag that is neither true nor false.
    """
    if file.suffix == ".json":
        config, lines = read_json(file, "accelerate config"), {}
    else:
        config, lines = parse_yaml(read_text(file, "accelerate config", MOST_BYTES), str(file))
    if not isinstance(config, dict):
        raise UserError(f"{file}: not an accelerate config: `key: value` lines are expected")
    for key, problem in _problems(config, without_plugins):
        line = f" line {lines[key]}" if key in lines else ""
        raise UserError(f"{file}{line}: {problem}")
    return config


def _problems(config: dict[str, Any], without_plugins: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each with the key that it is of."""
    for section in (*ENGINES, *(name for name in PREFIXES if name not in ENGINES)):
        own = config.get(section) or {}
        if not isinstance(own, dict):
            yield (section,), f"{section} = {str(own)[:80]}: should be a mapping of options"
            continue
        for name, value in own.items():
            if problem := _problem_of_name(section, str(name)) or _problem_of_value(str(name), value):
                yield (section, str(name)), problem
        plugin, kind = ENGINES.get(section, (None, ""))
        if own and plugin and launcher_plugin() != plugin:
            given = config.get("distributed_type")
            remedy = f"give distributed_type: {kind}, or remove it"
            if without_plugins and given == kind:
                remedy = "leave out --cpu: without a GPU it starts CPU processes"
            yield (section,), f"{section}: passed over, since this start is without {kind}: {remedy}"
    for name, value in config.items():
        if problem := _problem_of_value(str(name), value):
            yield (str(name),), problem
    if str(config.get("use_cpu")).lower() in ("true", "yes", "on") and has_gpu():  # by what was handed on
        remedy = "set ACCELERATE_USE_CPU=true in the environment"
        yield ("use_cpu",), f"use_cpu = true: passed over, since it is handed on to a process alone only: {remedy}"


def _problem_of_value(name: str, value: Any) -> str | None:
    """By the option of this name, for which an argument of `accelerate launch` would have been looked at."""
    if value in (None, "auto") or isinstance(value, dict | list):
        return None
    if name in FLAGS:
        return None if str(value).lower() in BOOLEANS else f"{name} = {value}: should be true or false"
    kind = next((action.type for action in launch_command_parser()._actions if action.dest == name), None)
    if kind in (int, float):
        try:
            kind(value)
        except ValueError:
            return f"{name} = {value}: should be {'a whole number' if kind is int else 'a number'}"
    return None


def _problem_of_name(section: str, name: str) -> str | None:
    prefix = PREFIXES.get(section, "")
    whole = name if name.startswith(prefix) else prefix + name
    known = keys_of(section)
    if whole in known and (whole == name or section in WITHOUT_PREFIX):
        return None
    for other in ("deepspeed_config", *PREFIXES):
        if other != section and name in keys_of(other):
            return f"unknown key {section}.{name}: its place is in {other}"
    return f"unknown key {section}.{name}{nearest(whole, known, ': remove it')}"
