"""What an evaluation is called with, and the model that it looks at. Only light imports.

A checkpoint is OUTPUT_DIR/checkpoint-N (its recipe lies one level up) or a link to it, OUTPUT_DIR itself (the final
model), or any other model by folder or hub name, which has no recipe.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt

from utils.command_line import OneLineParser, positive
from utils.errors import UserError
from utils.files import parse_json, read_text
from utils.schemas import Schema, checked


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate."""

    name: str  # its folder or hub name, as given
    recipe_file: Path | None = None  # of the run that wrote it
    step: int | None = None  # optimizer steps it was trained for, None where that is not known
    trust_remote_code: bool = False  # whether Python code that comes with it is run

    @property
    def folder(self) -> Path | None:
        """Its folder, None for a model of the hub."""
        return Path(self.name) if os.path.isdir(self.name) else None


def find_model(name: str, trust_remote_code: bool = False) -> EvaluatedModel:
    """The model of this folder or hub name, and the recipe beside it.

    OUTPUT_DIR/best is the checkpoint that it leads to now: a run that goes on may have it lead to another at any time.
    Whether the model's own code is run is said on the command line alone (`trust_option`), never by a recipe beside it,
    which is from whoever made the model.

    Raises: UserError for a folder that is not a model's, or a path that is neither a folder nor can be a hub name.
    """
    folder = Path(name)
    if not os.path.isdir(folder):
        if os.path.lexists(folder) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
            raise UserError(f"{name}: no such folder under {Path.cwd()}, nor is it a hub name (org/name)")
        return EvaluatedModel(name, trust_remote_code=trust_remote_code)
    if folder.is_symlink() and re.fullmatch(r"checkpoint-\d+", link := os.readlink(folder)):
        folder = folder.parent / link
        name = str(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        runs = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
        names = [path.name for path in runs or sorted(folder.iterdir())]
        what = "a run that has no final model yet; give one of" if runs else "not a model, no config.json; it holds"
        raise UserError(f"{name}: {what} {', '.join(names[:8]) or 'nothing'}{', ...' * (len(names) > 8)}")
    number = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    run = folder.resolve().parent if number else folder
    recipe_file = run / "recipe.yaml"
    step = int(number[1]) if number else _last_step(run / "metrics.jsonl")
    return EvaluatedModel(name, recipe_file if recipe_file.is_file() else None, step, trust_remote_code)


class _MetricsLine(Schema):
    step: NonNegativeInt


def _last_step(metrics: Path) -> int | None:
    """The step of the last whole line of a run's metrics.jsonl; where it is damaged, a line says so."""
    if not os.path.lexists(metrics):
        return None
    try:
        *lines, _ = read_text(metrics, errors="replace").split("\n")  # the last is empty, or was cut off
        if not lines:
            return None
        values = parse_json(lines[-1], metrics, len(lines))
        return checked(_MetricsLine, values, f"{metrics} line {len(lines)}", "metrics").step
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {error}: the result does not say of which step the model is", file=sys.stderr)
        return None


def trust_option(parser: OneLineParser) -> None:
    """The option by which a script runs the Python code that a model brings; of those with a recipe it is a key."""
    help_text = "run the Python code that comes with the model (auto_map in its config.json)"
    parser.add_argument("--trust_remote_code", action="store_true", help=help_text)


def evaluation_parser(usage: str, batch_size: Callable[[str], int | str] = positive) -> OneLineParser:
    """The arguments that all evaluation scripts have in common; a script, whose docstring is `usage`, adds its own."""
    parser = OneLineParser(usage)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model (a run's checkpoint), or hub name")
    parser.add_argument("--output", metavar="PATH", help=".json file or folder of the result; else CHECKPOINT/eval")
    parser.add_argument("--batch_size", type=batch_size, metavar="N", help="at once on each process")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of the model")
    return parser
