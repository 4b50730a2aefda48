"""Files of prompts, for replies to look at: of the sampling report, and while a run trains. Only light imports."""

import json
import re
from pathlib import Path
from typing import Any

from sources.messages_columns import made_of, names_of
from sources.messages_forms import ROLE_KEYS, Dropped
from sources.messages_records import read_prompt
from sources.source import Record
from utils.errors import UserError
from utils.files import parse_json, read_text

NAMES = names_of(None)
FORMS = (
    'a text, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}, '
    "or the like in another form of chat data"
)
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
HOLDERS = {"prompts", "questions", "instructions", "queries", "problems", "examples", "data"}  # in a list's name
# What makes an object a prompt; texts under their speakers' names may be turns of a conversation.
PROMPT_FIELDS = {*NAMES.lists, *NAMES.questions} - {"user", "human"}


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Prompts as conversations, [{"role", "content"}], whose last message is a user's.

    A .txt file has one a line. In JSON (a list, or an object with one) or JSON Lines a prompt is a text, a list of
    messages, or an object that has them, or a question, in the forms of chat data (`sources/messages.py`); a reply
    beside a question is passed over.

    Raises: UserError with the place of what is no prompt, or where there is none.
    """
    text = read_text(path)
    start = text.lstrip()[:1]
    if path.suffix.lower() == ".txt" or (not path.suffix and start not in ("[", "{", '"')):
        values = [("line", number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif path.suffix.lower() not in (".json", ".jsonl", ".ndjson", "") and start not in ("[", "{", '"', ""):
        raise UserError(f"{path}: neither JSON nor by its name text: name it .txt if it has a prompt a line")
    else:
        values = _json_values(text, path)
    if not values:
        raise UserError(f"{path}: it holds no prompts")
    return [_as_messages(value, path, unit, number) for unit, number, value in values]


def _json_values(text: str, path: Path) -> list[tuple[str, int, Any]]:
    """What stands in JSON Lines by its line, in JSON by its place."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return []
    first = lines[0][1].lstrip()
    if len(lines) == 1 or (first[0] in "[{" and not _is_json(first)):  # a list or an object over several lines
        return [("record", number, value) for number, value in enumerate(_entries(parse_json(text, path), path), 1)]
    return [("line", number, parse_json(line, path, number)) for number, line in lines]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _entries(value: Any, path: Path) -> list[Any]:
    """Of {"my_prompts": [...]}, a list of prompts, or one."""
    if isinstance(value, dict) and not _asks(value):
        held = [key for key, inner in value.items() if isinstance(inner, list) and _holds_prompts(key, inner)]
        if len(held) > 1:
            raise UserError(f"{path}: holds prompts under {held[0]!r} and under {held[1]!r}: make a file of each")
        if held and (beside := [key for key in value if key.lower() in made_of(None)]):
            raise UserError(
                f"{path}: has {beside[0]!r}, as a prompt has, beside the prompts under {held[0]!r}: give each its own"
            )
        value = value[held[0]] if held else value
    is_list = isinstance(value, list) and not all(isinstance(entry, dict) and _is_message(entry) for entry in value)
    return (value if is_list else [value]) if value != [] else []


def _holds_prompts(key: str, inner: list[Any]) -> bool:
    """Whether a list under a key is of prompts: by the key's name, or by its first; it could be a conversation."""
    if not HOLDERS.isdisjoint(word.lower() for word in WORD.findall(key)):
        return True
    return bool(inner) and isinstance(inner[0], dict) and not PROMPT_FIELDS.isdisjoint(map(str.lower, inner[0]))


def _asks(values: dict[str, Any]) -> bool:
    """Whether an object has a field with a conversation or a question."""
    return not {*map(str.lower, values)}.isdisjoint((*NAMES.lists, *NAMES.questions))


def _is_message(values: dict[str, Any]) -> bool:
    return any(key in values for key in ROLE_KEYS) and not _asks(values)


def _as_messages(prompt: Any, path: Path, unit: str, number: int) -> list[dict[str, str]]:
    values = {str: {"prompt": prompt}, list: {"messages": prompt}, dict: prompt}.get(type(prompt), {})
    record = Record(values, path, number, number, unit)
    try:
        messages = read_prompt(record)
    except Dropped as dropped:
        raise record.error(f"{dropped}, which no prompt is") from None
    if messages is None:
        raise record.error(f"neither {FORMS}")
    if messages[-1].role != "user":
        raise record.error("its last message is not the user's: leave out the reply that is asked for")
    return [{"role": message.role, "content": message.content} for message in messages]
