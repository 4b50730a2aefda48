"""What somebody else has written of a model, its card and its configs, for others: without the paths of this machine.

peft writes where it loaded the base model from into a card's front matter and a tag, a Trainer into a link, too.
"""

import json
import os
import re
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from publishing.provenance import ABSOLUTE_PATH
from training.weight_files import cached_name
from utils.files import read_json

CONFIGS = "config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"
SYSTEM = {"bin", "dev", "etc", "lib", "proc", "sys", "usr"}  # where paths are alike on all machines: /dev/null
FILE_URL = re.compile(r"(?<![\w-])file://+(?:localhost)?(/[^\s'\",;:()|`<>]+)")


def public_name(model: str) -> str | None:
    """What a model is called on the hub, also one whose folder is in the hub's cache; None for any other folder."""
    if os.path.isdir(folder := os.path.expanduser(model)):
        return cached_name(Path(folder))
    return _hub_name(model)


def last_part(path: str) -> str:
    """Of a folder its own name, also of `.` and `..`."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def without_folders(value: Any) -> Any:
    """A structure of JSON or YAML, of whose texts each absolute path of this machine is its last part alone."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if _is_of_this_machine(value) and os.path.lexists(value):  # with blanks, too
        return PurePath(value).name
    return ABSOLUTE_PATH.sub(_without_folder, FILE_URL.sub(_without_folder, value))


def clean_configs(folder: Path) -> None:
    """Have the configs in a folder hold no path of this machine (`name_or_path`, `cache_dir`).  Raises: OSError."""
    for path in (folder / name for name in CONFIGS):
        if path.is_file() and (cleaned := without_folders(values := read_json(path))) != values:
            path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shareable_card(text: str, base: str | None = None) -> str:
    """A card whose front matter names models of the hub alone, and whose text has no path of this machine.

    Args:
        base: where its base model is, by other files.
    """
    block = REGEX_YAML_BLOCK.search(text)
    try:
        values = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        return without_folders(_with_public_names(text, [base] if base else []))
    given = values.get("base_model")
    bases = [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
    tags = values.get("tags")
    cleaned = without_folders(values)
    if isinstance(given, str | list):
        cleaned["base_model"] = [name for name in map(_name_in_card, bases) if name]
        if isinstance(given, str):
            cleaned["base_model"] = next(iter(cleaned["base_model"]), None)
        if not cleaned["base_model"]:
            del cleaned["base_model"]
    if isinstance(tags, list):
        cleaned["tags"] = without_folders([tag for tag in map(_public_tag, tags) if tag is not None])
        if tags and not cleaned["tags"]:
            del cleaned["tags"]
    body = without_folders(_with_public_names(text[block.end() :], [*bases, *([base] if base else [])]))
    if cleaned == values:
        return block[0] + body
    if not cleaned:
        return body
    head = yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{head}---\n{body}"


def _name_in_card(name: str) -> str | None:
    """`public_name`, where `org/name` is of the hub also if the working directory happens to have such a folder."""
    return public_name(name) if name.startswith(("/", ".", "~")) else _hub_name(name)


def _hub_name(name: str) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _public_tag(tag: Any) -> Any:
    """None for the tag of a base model (`base_model:adapter:org/name`) that is not on the hub."""
    found = re.fullmatch(r"(base_model:(?:[a-z_]+:)?)(.+)", tag) if isinstance(tag, str) else None
    if not found:
        return tag
    name = _name_in_card(found[2])
    return name and found[1] + name


def _with_public_names(text: str, models: list[str]) -> str:
    """A text in which these models are called as others know them."""
    for model in models:
        if (name := _name_in_card(model)) != model and "/" in model:
            parts = re.split(rf"(?<![\w.~])(?:file://)?{re.escape(model)}(?![\w-])", text)
            text = (name or last_part(model)).join(parts)
    return text


def _without_folder(found: re.Match) -> str:
    path = found[found.lastindex or 0]
    return PurePath(path).name if _is_of_this_machine(unquote(path)) else found[0]


def _is_of_this_machine(text: str) -> bool:
    """Whether it is an absolute path whose first two parts are here; the first alone (/opt, /home) is everywhere."""
    parts = PurePath(text).parts
    return len(parts) > 2 and parts[0] == "/" and parts[1] not in SYSTEM and os.path.lexists(f"/{parts[1]}/{parts[2]}")
