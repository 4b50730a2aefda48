r"""A conversation in the forms that people keep it in, as messages: who speaks, what is text, what is learnt.

A list of messages is any of these, or JSON text of one:

    [{"role": "user", "content": "Hi"}, ...]        or from, value (ShareGPT); speaker, text; ...
    [{"user": "Hi", "assistant": "Hello"}, ...]     a turn or two of them under their speakers' names
    [["Hi", "Hello"], ...]                          questions with their replies
    ["Hi", "Hello", ...]                            the user speaks first
    {"role": ["user", ...], "content": ["Hi", ...]} as `datasets` keeps a sequence of structs
    "\n\nHuman: Hi\n\nAssistant: Hello..."            all of it in one text, as `messages_transcripts.py` has it

A content is a text, or a list of text parts, which are joined.
"""

import re
from functools import lru_cache
from typing import Any

from sources.messages_transcripts import from_notation, turns_of_text
from sources.source import Message, Record, kind_of
from utils.files import KeyTwice

ROLES = {
    **dict.fromkeys(("system", "developer", "sys"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "gpt4", "gpt-4", "llm"), "assistant"
    ),
    **dict.fromkeys(("bing", "bard", "claude"), "assistant"),  # in ShareGPT's collections
}
TOOLS = {"tool", "tools", "function", "tool_call", "tool_calls", "tool_response", "tool_result", "tool_use"}
TOOLS |= {"function_call", "function_response", "function_result", "observation", "ipython", "environment"}
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "parts")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "user", "human")
# A solution is worked out, and the answer beside it a number (MATH, NuminaMath, LIMO).
ANSWERS = ("output", "response", "completion", "chosen", "solution", "answer", "reply", "target", "targets")
ANSWERS += ("assistant", "gpt", "bot")
SPEAKER_KEYS = dict.fromkeys((*QUESTIONS, "input"), "user") | dict.fromkeys(ANSWERS, "assistant") | ROLES
TEXT_PARTS = {"text", "input_text", "output_text"}
MEDIA = {"image", "images", "image_url", "audio", "audios", "video", "videos", "pixel_values"}
# What else may be said beside a text, and is not learnt from.
THOUGHTS = {"reasoning_content", "reasoning", "thinking", "thought", "thoughts", "chain_of_thought", "cot", "rationale"}
THOUGHTS |= {"complex_cot", "thinking_trajectories"}
UNUSED_IN_MESSAGE = THOUGHTS | {"loss", "mask", "train_on_turn", "training", "train_detail"}
CALLS = {"tool_calls", "function_call", "tool_call_id"}
SAID_BESIDE = UNUSED_IN_MESSAGE | MEDIA | CALLS | {"weight", "train"}
NOTHING = ("[]", "{}", "null", "None", "nan", "[null]", "[None]")  # as tables keep it in text
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")


class Dropped(Exception):
    """A conversation that is none to be learnt from; the message is the reason, as it is counted."""


def unknown_speaker(speaker: str | None) -> Dropped:
    return Dropped(f"conversation with a speaker other than system, user and assistant ({shown(speaker)})")


def shown(value: Any) -> str:
    """What a reason quotes: short, on one line, and nothing that no terminal takes."""
    text = "null" if value is None else " ".join(str(value).split()) or "blank"
    return text[:40].encode(errors="replace").decode()


def is_there(value: Any) -> bool:
    """Whether a field has a value: null, NaN (pandas' null), a blank text and an empty list or object are none."""
    if isinstance(value, str):
        return value != "" and not value.isspace()
    return value is not None and value != [] and value != {} and value == value


def is_said(value: Any) -> bool:
    """Whether what stands beside a text is any of it: `[null]` and tables' text for null or an empty list is not."""
    if isinstance(value, list | dict):
        return any(one is not None for one in (value.values() if isinstance(value, dict) else value))
    return is_there(value) and value not in NOTHING


def read_turns(
    record: Record,
    where: str,
    value: Any,
    unused: set[str],
    role_keys: tuple[str, ...] = ROLE_KEYS,
    content_keys: tuple[str, ...] = CONTENT_KEYS,
) -> list[Message]:
    """The messages of a list in any form.

    Args:
        where: the field that it is in, for errors.
        unused: gets the names of fields that could matter and are not used.
        role_keys, content_keys: names of a message's speaker and text; the first that is not null counts.
    Raises: Dropped, or UserError for what is none of the forms.
    """
    entries = value if type(value) is list else _entries(record, where, value, role_keys)
    if entries and not isinstance(entries[0], dict):
        if all(isinstance(entry, str | None) for entry in entries):
            texts = [text_of(record, where, entry, unused) for entry in entries]
            return [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
        if all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
            entries = _of_pairs(entries)
    messages = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise record.error(f"an entry of {where!r} is not an object")
        messages += _read_entry(record, where, entry, unused, role_keys, content_keys)
    return messages


def _entries(record: Record, where: str, value: Any, role_keys: tuple[str, ...]) -> list:
    if isinstance(value, str):
        try:
            value = from_notation(value)
        except KeyTwice as error:
            raise record.error(f"field {where!r}: {error}") from None
        if isinstance(value, str) and not (value := turns_of_text(value)):
            raise record.error(f"field {where!r} is a string, not a list, nor JSON text of one")
    if isinstance(value, dict):
        columns = list(value.values())
        if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return [dict(zip(value, entry, strict=True)) for entry in zip(*columns, strict=True)]
        if any(key in value for key in role_keys):
            return [value]
    if not isinstance(value, list):
        raise record.error(f"field {where!r} is {kind_of(value)}, not a list")
    return value


def or_listed(record: Record, where: str, value: Any, role_keys: tuple[str, ...], content_keys: tuple[str, ...]) -> Any:
    """The list of messages that a text is JSON of, as CSV keeps a prompt that is one; any other value as it is.

    Any other list of objects is text: `[{"author": "Tolkien", "title": "The Hobbit"}]` is a reply like any.
    Raises: UserError for messages with a key twice.
    """
    if isinstance(value, str) and LIST_OF_OBJECTS.match(value):
        listed = from_notation(value, each_once=False)
        if isinstance(listed, list) and all(is_message(one, role_keys, content_keys) for one in listed):
            return _entries(record, where, value, role_keys)
    return value


def is_message(
    entry: Any, role_keys: tuple[str, ...] = ROLE_KEYS, content_keys: tuple[str, ...] = CONTENT_KEYS
) -> bool:
    """Whether an object has a role that is known, and a key for its text."""
    role = isinstance(entry, dict) and (key := _first(role_keys, entry)) and entry[key]
    known = isinstance(role, str) and role.strip().lower() in ROLES.keys() | TOOLS
    contents = [entry[key] for key in content_keys if key in entry] if known else []
    return bool(contents) and all(isinstance(content, str | list | None) for content in contents)


def _of_pairs(entries: list[list]) -> list[dict]:
    """Of [["user", "Hi"], ...] or [["Hi", "Hello"], ...], objects."""
    if all(isinstance(first, str) and first.strip().lower() in ROLES for first, _ in entries):
        return [{"role": role, "content": content} for role, content in entries]
    # A pair has both, so that its null is an empty text, not a speaker who is not there.
    pairs = [["" if text is None else text for text in pair] for pair in entries]
    return [{"user": question, "assistant": answer} for question, answer in pairs]


def _read_entry(
    record: Record,
    where: str,
    entry: dict[str, Any],
    unused: set[str],
    role_keys: tuple[str, ...],
    content_keys: tuple[str, ...],
) -> list[Message]:
    role_key, content_key = _first(role_keys, entry), _first(content_keys, entry)
    if role_key is None or content_key is None:
        lowered = _lowered(record, where, entry)
        if lowered.keys() != entry.keys() and not any(key in entry for key in (*role_keys, *content_keys)):
            return _read_entry(record, where, lowered, unused, role_keys, content_keys)
    if role_key is None:
        if any(key in entry for key in role_keys) and content_key is not None:
            raise unknown_speaker(None)
        return _of_speakers(record, where, entry, unused, role_keys)
    speaker = record.inside(entry, where, role_key)
    role = ROLES.get(speaker) or ROLES.get(speaker.strip().lower())
    if role is None and speaker.strip().lower() in TOOLS:
        raise Dropped("conversation with a tool's turn")
    if role is None:
        raise unknown_speaker(speaker)
    train = not _says_more(tuple(entry)) or _is_learnt(record, where, _lowered(record, where, entry), unused)
    if content_key is None and not any(key in entry for key in content_keys):
        record.inside(entry, where, content_keys[0])  # says which fields are there
    text = entry[content_key] if content_key else ""
    if not isinstance(text, str) or not text.isascii():
        text = text_of(record, f"{where}.{content_key}", text, unused)
    return [Message(role, text, train=train)]


def _of_speakers(
    record: Record, where: str, entry: dict[str, Any], unused: set[str], role_keys: tuple[str, ...]
) -> list[Message]:
    """The messages of an object that has them under their speakers' names; a null, which Arrow puts in, is none."""
    named = [key for key in entry if str(key).lower() in SPEAKER_KEYS]
    if not named:
        if any(key in entry for key in role_keys):
            raise unknown_speaker(None)
        record.inside(entry, where, role_keys[0])  # says which fields are there
    replies = [key for key in named if SPEAKER_KEYS[key.lower()] == "assistant"]
    speakers: dict[str, str] = {}
    for key in named:
        if key.lower() == "model" and len(replies) > 1:  # it names what wrote the reply
            continue
        if entry[key] is None:
            continue
        first = speakers.setdefault(SPEAKER_KEYS[key.lower()], key)
        if not is_there(entry[first]):
            speakers[SPEAKER_KEYS[key.lower()]] = key
        elif first != key and is_there(entry[key]):
            unused.add(key)
    beside = _lowered(record, where, entry)
    if any(is_said(beside[name]) for name in beside.keys() & TOOLS):
        raise Dropped("conversation with a tool's turn")
    train = _is_learnt(record, where, beside, unused)
    return [
        Message(role, text_of(record, f"{where}.{speakers[role]}", entry[speakers[role]], unused), train=train)
        for role in ("system", "user", "assistant")
        if role in speakers
    ]


@lru_cache(1000)  # as the messages of a file have the same keys
def _says_more(keys: tuple[str, ...]) -> bool:
    """Whether something that counts stands beside a message's text, in upper or lower case."""
    return not SAID_BESIDE.isdisjoint(str(key).lower() for key in keys)


def _lowered(record: Record, where: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An object with its keys in lower case; of two that are one then, the value that is not null."""
    lowered: dict[str, Any] = {}
    for key, value in entry.items():
        name = str(key).lower()
        if is_there(lowered.get(name)) and is_there(value):
            raise record.error(f"an entry of {where!r} has the key {name!r} twice, in upper and lower case: rename one")
        lowered[name] = value if is_there(value) else lowered.get(name, value)
    return lowered


def _first(keys: tuple[str, ...], entry: dict[str, Any]) -> str | None:
    for key in keys:  # a plain loop, as of every message: `next` over a generator takes four times as long
        if entry.get(key) is not None:
            return key
    return None


def _is_learnt(record: Record, where: str, entry: dict[str, Any], unused: set[str]) -> bool:
    """Whether a reply is, by what is said beside its text; what else is said there is counted.  Raises: Dropped."""
    beside = {name for name in entry.keys() & SAID_BESIDE if is_said(entry[name])}
    if beside & CALLS:
        raise Dropped("conversation with a tool's turn")
    if media := sorted(beside & MEDIA):
        raise Dropped(f"conversation with what is not text ({media[0]})")
    unused.update(beside & UNUSED_IN_MESSAGE)
    weight = entry.get("weight")
    if weight is not None and weight not in (0, 1):
        raise record.error(f"field '{where}.weight' is {str(weight)[:40]!r}, not 0 or 1")
    train = entry.get("train")
    if train is not None and not isinstance(train, bool):
        raise record.error(f"field '{where}.train' is {kind_of(train)}, not true or false")
    return train is not False and weight != 0


def text_of(record: Record, where: str, content: Any, unused: set[str]) -> str:
    """The text of a message, whose content is a text, text parts, or null."""
    if isinstance(content, str):
        return content if content.isascii() else record.inside({where: content}, "", where)
    if content is None:
        return ""
    if isinstance(content, dict):
        content = content["parts"] if isinstance(content.get("parts"), list) else [content]  # Gemini's, of a message
    if not isinstance(content, list):
        raise record.error(f"field {where!r} is {kind_of(content)}, not a string")
    texts = []
    for part in content:
        if isinstance(part, dict):
            kind = part.get("type")
            if kind in THOUGHTS or kind == "redacted_thinking":
                unused.add(kind)
                continue
            if kind in TOOLS:
                raise Dropped("conversation with a tool's turn")
            text = part.get("text")
            is_text = kind in TEXT_PARTS and isinstance(text, str | None) if kind else isinstance(text, str)
            if not is_text:
                named = kind or ", ".join(sorted(name for name in part if is_there(part[name]))) or "nothing"
                raise Dropped(f"conversation with what is not text ({shown(named)})")
            part = text
        elif part is not None and not isinstance(part, str):
            raise record.error(f"field {where!r} has a part that is {kind_of(part)}, not a text")
        texts.append(text_of(record, where, part, unused))
    return "".join(texts)
