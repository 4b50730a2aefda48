"""The recipe: one flat YAML file that says everything about a run.

`load_recipe(path, overrides)` reads it; `recipe/keys.py` has its keys, which `--help` shows.
Whatever is wrong (YAML that does not parse, a misspelt key, an impossible value) becomes one line that names the file,
the line and the key. Only light imports here, so that this answers before torch is loaded.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipe.dataset_keys import Datasets
from recipe.keys import IGNORED, Recipe, problem_of_ignored
from recipe.refusals import Problem, problems_of, secrets_of
from recipe.strict_yaml import parse_yaml
from sources.messages_columns import Columns
from utils.errors import UserError
from utils.files import read_text

# What is given in place of a recipe, by a key that it has.
OTHER_FILES = {
    "distributed_type": "an accelerate config: give it to accelerate launch --config_file, and a recipe to the script",
    "zero_optimization": "a DeepSpeed config: give it to the recipe's deepspeed_config",
}
MOST_BYTES = 2**20  # of a recipe: the longest that ships has 7 KB, and YAML is read at 570 KB a second


def load_recipe(path: str | Path | None, overrides: Mapping[str, str] | None = None, for_a_run: bool = False) -> Recipe:
    """Read and check a recipe; UserError, with the file, the line and the key, for what is wrong or no path at all.

    `overrides` are dotted keys and texts, as on the command line: `{"datasets.vicuna.fraction": "0.5"}`. A text is
    taken as it stands, so that any path can be given; only null, quotes, [lists] and {mappings} are read as YAML.
    `for_a_run` refuses what no run is to begin with, as `recipe/refusals.py` has it; that of an earlier one may.
    """
    if path is None:
        raise UserError("command line: no recipe given (--help shows how)")
    values, lines = parse_yaml(read_text(Path(path), "recipe", MOST_BYTES), str(path))
    if not isinstance(values, dict):
        what = "empty" if values is None else f"a {'list' if isinstance(values, list) else 'text'}"
        raise UserError(f"{path}: a recipe is `key: value` lines, this is {what}")
    for name, what in OTHER_FILES.items():
        if name in values:
            raise UserError(f"{path}: no recipe, but {what}")
    places = {key: f"{path} line {line}" for key, line in lines.items()}
    return checked_recipe(values, places, path, overrides or {}, for_a_run)


def checked_recipe(
    values: dict[str, Any],
    places: dict[tuple[str, ...], str],
    path: str | Path,
    overrides: Mapping[str, str],
    for_a_run: bool,
) -> Recipe:
    """The recipe that these values make with the overrides; `places` says where in `path` each key stands."""
    for key, override in overrides.items():
        parts = tuple(key.split("."))
        value = parse_yaml(override, f"--{key}")[0] if re.match(r"[\[{\"']|(null|~)$", override) else override
        _override(values, parts, value)
        # What it replaces is no longer on any line of the file.
        places = {place: line for place, line in places.items() if place[: len(parts)] != parts}
        places[parts] = "command line"
    if for_a_run:
        _refuse(secrets_of(values), places, path)  # before any message that shows a value
    problems = [
        f"{places.get((name,), path)}: {name} = {values[name]}: {problem}"
        for name in values.keys() & IGNORED.keys()
        if (problem := problem_of_ignored(name, values[name]))
    ]
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail, places, path) for detail in error.errors()]
    if problems:
        raise UserError("; ".join(problems))
    if for_a_run:
        _refuse(problems_of(recipe, values), places, path)
    return recipe


def _refuse(problems: list[Problem], places: dict[tuple[str, ...], str], path: str | Path) -> None:
    lines = []
    for key, problem in problems:
        colon = "" if problem.startswith("=") else ":"
        lines.append(f"{_place(key, places, path)}: {'.'.join(key)}{colon} {problem}" if key else f"{path}: {problem}")
    if lines:
        raise UserError("; ".join(lines))


def _place(key: tuple[str, ...], places: dict[tuple[str, ...], str], path: str | Path) -> str:
    """Where the key stands, or the nearest above it that has a place."""
    return next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), str(path))


def _override(values: dict[str, Any], parts: tuple[str, ...], value: Any) -> None:
    """Set a dotted key. A data set's option is looked up in the recipe's list, so that a mix never grows unasked."""
    if len(parts) == 1:
        values[parts[0]] = value
        return
    name = ".".join(parts)
    if parts[0] != "datasets":
        raise UserError(f"command line: unknown key {name}{nearest(parts[0], Recipe.model_fields)}")
    if len(parts) != 3:
        raise UserError(f"command line: unknown key {name}: an option of a data set is datasets.NAME.OPTION")
    mix = values.get("datasets")
    entries = [{entry: None} if isinstance(entry, str) else entry for entry in mix] if isinstance(mix, list) else []
    for position, entry in enumerate(entries):
        if isinstance(entry, dict) and list(entry) == [parts[1]] and isinstance(entry[parts[1]] or {}, dict):
            mix[position] = {parts[1]: {**(entry[parts[1]] or {}), parts[2]: value}}
            return
    known = [key for entry in entries if isinstance(entry, dict) for key in entry]
    raise UserError(f"command line: {name}: {parts[1]} is not in this recipe's mix{nearest(parts[1], known)}")


def nearest(name: str, known: Iterable[str], otherwise: str = " (--help lists the keys)") -> str:
    """What to say behind a name that is none of the known ones; `otherwise` where none is near, of ten or more."""
    known = list(known)
    plain = {other.lower().replace("-", "_"): other for other in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1)
    if close:
        return f": did you mean {plain[close[0]]}?"
    return f" (known: {', '.join(known)})" if len(known) < 10 else otherwise


# Where pydantic speaks of Python's types.
MESSAGES = {"model_type": "should be a mapping of options", "path_type": "should be a path"}


def _explain(detail: Any, places: dict[tuple[str, ...], str], path: str | Path) -> str:
    """One error of pydantic's as `FILE line N: key = value: what is wrong`."""
    key = tuple(str(part) for part in detail["loc"])
    place = _place(key, places, path)
    name = ".".join(key)
    if detail["type"] == "missing" and len(key) > 1:  # `source`, of a data set that is no source
        hint = nearest(key[1], Datasets.model_fields)
        return f"{place}: unknown key {'.'.join(key[:-1])}{hint} (data of your own need `source: messages`)"
    if detail["type"] == "missing":
        return f"{path}: {name} is missing: {Recipe.model_fields[name].description}"
    if detail["type"] == "extra_forbidden":
        known = Recipe if len(key) == 1 else Datasets.options_of(key[1])
        known = Columns if key[2:-1] == ("columns",) else known
        return f"{place}: unknown key {name}{nearest(key[-1], known.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").split(", unable to")[0]
    message = MESSAGES.get(detail["type"], message)
    value = "null" if detail["input"] is None else " ".join(str(detail["input"]).split())
    value = "" if isinstance(detail["input"], (dict, list)) else f" = {value[:80]}{'...' * (len(value) > 80)}"
    return f"{place}: {name}{value}: {message}" if name else f"{place}: {message}"
