"""The recipe: one flat YAML file that says everything about a run.

`load_recipe(path, overrides)` reads it; `utils/recipe_keys.py` has its keys, which `--help` shows.
Whatever is wrong (YAML that does not parse, a misspelt key, an impossible value) becomes one line that names the file,
the line and the key. Only light imports here, so that this answers before torch is loaded.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from utils.errors import UserError
from utils.recipe_keys import DatasetOptions, Datasets, Recipe
from utils.record_file import REDACTED, read_record
from utils.strict_yaml import parse_yaml

SECTIONS = {"model_name": "Model", "datasets": "Data", "dtype": "Training", "output_dir": "Output"}


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
            lines += [f"    {source:<32}{entry.description}" for source, entry in Datasets.model_fields.items()]
            lines.append("    each with these options, e.g. --datasets.vicuna.fraction 0.5")
            shared = DatasetOptions.model_fields
            lines += [line(option, entry, 6) for option, entry in shared.items()]
            for source in Datasets.model_fields:
                own = Datasets.options_of(source).model_fields.items()
                lines += [line(option, entry, 6) + f" [{source}]" for option, entry in own if option not in shared]
    return "\n".join(lines)


def load_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        overrides: dotted key to text, as on the command line: `{"datasets.vicuna.fraction": "0.5"}`. It is taken as it
            stands, so that any path can be given; only null, quotes, [lists] and {mappings} are read as YAML.

    Raises:
        UserError: one line with the file, the line and the key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read this recipe: {error.strerror} (looked in {Path.cwd()})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    values, lines = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {'list' if isinstance(values, list) else 'text'}"
        raise UserError(f"{path}: a recipe is `key: value` lines, this is {what}")
    return _checked(values, {key: f"{path} line {line}" for key, line in lines.items()}, path, overrides or {})


def _checked(
    values: dict[str, Any], places: dict[tuple[str, ...], str], path: str | Path, overrides: Mapping[str, str]
) -> Recipe:
    """The recipe that these values make with the overrides; `places` says where in `path` each key stands."""
    for key, override in overrides.items():
        parts = tuple(key.split("."))
        value = parse_yaml(override, f"--{key}")[0] if re.match(r"[\[{\"']|(null|~)$", override) else override
        _override(values, parts, value)
        # What it replaces is no longer on any line of the file.
        places = {place: line for place, line in places.items() if place[: len(parts)] != parts}
        places[parts] = "command line"
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(detail, places, path) for detail in error.errors())) from error


def _override(values: dict[str, Any], parts: tuple[str, ...], value: Any) -> None:
    """Set a dotted key. A data set's option is looked up in the recipe's list, so that a mix never grows unasked."""
    if len(parts) == 1:
        values[parts[0]] = value
        return
    name = ".".join(parts)
    if parts[0] != "datasets":
        raise UserError(f"command line: unknown key {name}{_nearest(parts[0], Recipe.model_fields)}")
    if len(parts) != 3:
        raise UserError(f"command line: unknown key {name}: an option of a data set is datasets.NAME.OPTION")
    mix = values.get("datasets")
    entries = [{entry: None} if isinstance(entry, str) else entry for entry in mix] if isinstance(mix, list) else []
    for position, entry in enumerate(entries):
        if isinstance(entry, dict) and list(entry) == [parts[1]] and isinstance(entry[parts[1]] or {}, dict):
            mix[position] = {parts[1]: {**(entry[parts[1]] or {}), parts[2]: value}}
            return
    known = [key for entry in entries if isinstance(entry, dict) for key in entry]
    raise UserError(f"command line: {name}: {parts[1]} is not in this recipe's mix{_nearest(parts[1], known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f": did you mean {close[0]}?"
    return f" (known: {', '.join(known)})" if len(known) < 10 else " (--help lists the keys)"


# Where pydantic speaks of Python's types.
MESSAGES = {"model_type": "should be a mapping of options", "path_type": "should be a path"}


def _explain(detail: Any, places: dict[tuple[str, ...], str], path: str | Path) -> str:
    """One error of pydantic's as `FILE line N: key = value: what is wrong`."""
    key = tuple(str(part) for part in detail["loc"])
    place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), str(path))
    name = ".".join(key)
    if detail["type"] == "missing" and len(key) > 1:  # `source`, of a data set that is no source
        nearest = _nearest(key[1], Datasets.model_fields)
        return f"{place}: unknown key {'.'.join(key[:-1])}{nearest} (data of your own need `source: messages`)"
    if detail["type"] == "missing":
        return f"{path}: {name} is missing: {Recipe.model_fields[name].description}"
    if detail["type"] == "extra_forbidden":
        known = Recipe if len(key) == 1 else Datasets.options_of(key[1])
        return f"{place}: unknown key {name}{_nearest(key[-1], known.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").split(", unable to")[0]
    message = MESSAGES.get(detail["type"], message)
    value = "null" if detail["input"] is None else " ".join(str(detail["input"]).split())
    value = "" if isinstance(detail["input"], (dict, list)) else f" = {value[:80]}{'...' * (len(value) > 80)}"
    return f"{place}: {name}{value}: {message}" if name else f"{place}: {message}"


def _recorded_recipe(path: Path, overrides: Mapping[str, str]) -> Recipe:
    """The recipe of a record that `utils/record_file.py` wrote, for an output folder beside the recorded one."""
    values = read_record(path)["recipe"]
    if "output_dir" in values:
        values["output_dir"] = f"{values['output_dir']}-reproduced"
    recipe = _checked(values, {}, path, overrides)
    if left_out := next((line.strip() for line in recipe.to_yaml().splitlines() if REDACTED in line), None):
        raise UserError(f"{path}: {left_out}: left out of the record, as it looks like a secret: give it as an option")
    return recipe


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for.

    Attributes:
        recipe_file: as the user wrote it; None for a run that is repeated from its record.
        allow_changes: go on from a checkpoint although the recipe or the data were changed.
        reproduced: the record of an earlier run that this one repeats; None for a run from a recipe.
    """

    recipe: Recipe
    recipe_file: Path | None
    dry_run: bool
    allow_changes: bool
    reproduced: Path | None


def recipe_from_command_line(usage: str, arguments: list[str]) -> CommandLine:
    """Read `RECIPE [--key value ...] [--dry_run] [--allow_changes]`; prints every key and exits on --help.

    In place of a recipe `--reproduce OUTPUT_DIR/run.json` takes the one that a run recorded.

    Raises:
        UserError: as `load_recipe` or `read_record`, or for arguments that are not of that form.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(
            f"{usage.strip()}\n\nIn place of a recipe, --reproduce OUTPUT_DIR/run.json repeats the run that wrote it, "
            f"in OUTPUT_DIR-reproduced.\n--dry_run only checks what can be checked without loading weights. "
            f"--allow_changes goes on from a checkpoint\nalthough the recipe or the data were changed since.\n\n"
            f"Keys of a recipe, each also an option (--learning_rate 2e-5):\n"
            f"{describe_keys()}"
        )
        sys.exit(0 if arguments else 2)
    path: str | None = None
    overrides: dict[str, str] = {}
    flags = dict.fromkeys(("dry_run", "allow_changes"), False)
    known = [*Recipe.model_fields, *flags, "reproduce"]
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            if path is not None:
                raise UserError(f"command line: {argument}: one recipe at a time, {path} is the recipe already")
            path = argument
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key.split(".")[0] not in known:
            raise UserError(f"command line: unknown key {key}{_nearest(key, known)}")
        if key in flags:
            if equals:
                raise UserError(f"command line: --{key} takes no value")
            flags[key] = True
            continue
        if not equals:
            value = next(rest, "")
        if not value or (not equals and value.startswith("--")):
            raise UserError(f"command line: --{key} needs a value (null for none)")
        overrides[key] = value
    reproduced = overrides.pop("reproduce", None)
    if reproduced is not None:
        if path is not None:
            raise UserError(f"command line: --reproduce {reproduced} brings its recipe: leave out {path}")
        return CommandLine(_recorded_recipe(Path(reproduced), overrides), None, **flags, reproduced=Path(reproduced))
    if path is None:
        raise UserError("command line: no recipe given; usage: scripts/sft.py RECIPE [--key value ...]")
    return CommandLine(load_recipe(path, overrides), Path(path), **flags, reproduced=None)
