"""What a script that takes a recipe is called with: RECIPE, each of its keys as an option, and the script's own."""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

from recipe.dataset_keys import Datasets
from recipe.keys import IGNORED, Recipe
from recipe.load import nearest
from sources.registry import SOURCES
from sources.source import DatasetOptions
from utils.command_line import OneLineParser
from utils.errors import UserError

SECTIONS = {"model_name": "Model", "datasets": "Data", "dtype": "Training", "output_dir": "Output"}

# Of its options those that are given most, which behind the script's name are the script's.
OF_THE_LAUNCHER = ("config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip")
OF_THE_LAUNCHER += ("main_process_port", "multi_gpu", "use_deepspeed", "use_fsdp", "gpu_ids", "mixed_precision")


def recipe_parser(usage: str) -> OneLineParser:
    """A parser for the script's own options; --help shows its docstring, `usage`, and every key of a recipe."""
    parser = OneLineParser(usage)
    parser.usage = "%(prog)s RECIPE [--key value ...] [options]"
    parser.epilog = f"Keys of a recipe, each also an option (--learning_rate 2e-5):\n{describe_keys()}"
    return parser


def parse_with_recipe(
    parser: OneLineParser, arguments: list[str] | None = None
) -> tuple[argparse.Namespace, str | None, dict[str, str]]:
    """Read `RECIPE [--key value ...]` with the script's own options anywhere among them; without any, print the help.

    A key that is true or false may stand without a value, before another option or at the end: it is true then.

    Returns: the script's own; the recipe's file, None where none is given; the overrides for `load_recipe`.
    Raises: UserError when an argument is none of these.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help()
        sys.exit(2)
    options, rest = parser.parse_known_args(arguments)
    known = [*Recipe.model_fields, *IGNORED]
    recipe_file: str | None = None
    overrides: dict[str, str] = {}
    while rest:
        argument, *rest = rest
        if not argument.startswith("-"):
            if recipe_file is not None:
                raise UserError(f"command line: {argument}: one recipe at a time, {recipe_file} is the recipe already")
            recipe_file = argument
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name.split(".")[0] not in known:
            if name.replace("-", "_") in OF_THE_LAUNCHER:
                raise UserError(f"command line: --{name} is for accelerate launch: give it before the script's name")
            raise UserError(f"command line: unknown key {name}{nearest(name, [*known, *vars(options)])}")
        if not equals and is_flag(name) and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not equals:
            value, *rest = rest or [""]
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"command line: --{name} needs a value (null for none)")
        overrides[name] = value
    return options, recipe_file, overrides


def is_flag(name: str) -> bool:
    """Whether a key of a recipe is true or false."""
    return name in Recipe.model_fields and Recipe.model_fields[name].annotation is bool


def describe_keys() -> str:
    """Every key with its meaning and default, for --help."""

    def line(name: str, field: Any, indent: int) -> str:
        default = field.default if not isinstance(field.default, Path) else str(field.default)
        shown = "required" if field.is_required() else yaml.safe_dump(default).split("\n")[0]
        return f"{' ' * indent}{name:<{34 - indent}}{field.description} ({shown})"

    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        if name in SECTIONS:
            lines.append(f"\n{SECTIONS[name]}")
        lines.append(line(name, field, 2))
        if name == "datasets":
            lines += [f"    {source:<32}{entry.about}" for source, entry in SOURCES.items()]
            lines.append("    each with these options, e.g. --datasets.vicuna.fraction 0.5")
            shared = DatasetOptions.model_fields
            lines += [line(option, entry, 6) for option, entry in shared.items()]
            for source in SOURCES:
                own = Datasets.options_of(source).model_fields.items()
                lines += [line(option, entry, 6) + f" [{source}]" for option, entry in own if option not in shared]
    ignored = textwrap.fill(", ".join(IGNORED), 118, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, "\nOf the original's recipes these are accepted and do nothing here", ignored])
