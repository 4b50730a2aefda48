"""What to say of a record that has none of the forms: the option `columns` that would have it read."""

import difflib
import itertools
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import yaml

from sources.messages_columns import HISTORIES, LISTS, Columns, names_of
from sources.messages_forms import ANSWERS, CONTENT_KEYS, QUESTIONS, ROLE_KEYS, Dropped, is_message, or_listed
from sources.messages_records import conversation_of, fields_there
from sources.messages_transcripts import turns_of_text
from sources.source import Record, Remarks
from utils.errors import UserError

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# Names, and words of names, in the order in which they are tried.
TURNS = (*LISTS, "turns", "data", "log", "items", "utterances", "trajectory")
PROMPTS = (*QUESTIONS, "input", "source", "context", "message")
REPLIES = (*ANSWERS, "generation", "generated")
WHOLE = {"src": "source", "tgt": "target", "q": "question", "a": "answer", "text": "generated"}  # no words of others
PASSAGES = {"context", "source"}  # less likely a prompt than any other name of one
SPEAKERS = {"user", "human", "assistant", "gpt", "bot"}  # of such a name another word has to say what it is
# A name that ends in one of these words is that of something about a prompt or a reply.
ABOUT = ("id", "idx", "key", "index", "label", "type", "start", "length", "score", "model", "rating", "history")
ABOUT += ("name", "hash", "url", "time", "lang", "language", "category", "source", "count", "tokens", "quality")
MOST_TRIED = 100


def columns_for(record: Record) -> str | None:
    """The option `columns` under which the record is read, as a recipe has it; None where none is found.

    A field that is null may be one that was not read of a parquet file: there its name decides.
    """
    for columns in itertools.islice(_candidates(record), MOST_TRIED):
        named = columns.model_dump()
        if None in map(record.values.get, named.values()) or _is_read(record, columns):
            return yaml.safe_dump(
                named, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
            ).strip()
    return None


def _candidates(record: Record) -> Iterator[Columns]:
    for name, value in record.values.items():
        is_list = _is_listed(record, name) or (isinstance(value, str) and turns_of_text(value))
        if (is_list and "history" not in _words(name)) or (isinstance(value, list) and name.lower() in TURNS):
            yield Columns(messages=name)
    for prompt, response in itertools.product(_by_rank(record, PROMPTS), _by_rank(record, REPLIES)):
        # Beside anything but a target, a source is where a record is from.
        is_origin = {"source", "src"} & _words(prompt) and not {"target", "tgt"} & _words(response)
        if prompt.lower() != response.lower() and not is_origin:
            yield Columns(prompt=prompt, response=response)
            for name, value in record.values.items():
                if name.lower() in HISTORIES and isinstance(value, str):  # which is no list of turns, but can be shown
                    yield Columns(prompt=prompt, input=name, response=response)


def _is_listed(record: Record, name: str) -> bool:
    with suppress(UserError):
        listed = or_listed(record, name, record.values[name], ROLE_KEYS, CONTENT_KEYS)
        return isinstance(listed, list) and bool(listed) and all(map(is_message, listed))
    return False


def _by_rank(record: Record, known: tuple[str, ...]) -> list[str]:
    """The fields that can hold a prompt, or a reply, by their names, the nearest first."""
    ranks = {name: rank for name in record.values if (rank := _rank(name, known)) is not None}
    ranks = {name: rank for name, rank in ranks.items() if _is_text(record.values[name]) or _is_listed(record, name)}
    return sorted(ranks, key=ranks.__getitem__)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | None) or (isinstance(value, list) and len(value) == 1 and isinstance(value[0], str))


def _rank(name: str, known: tuple[str, ...]) -> tuple[int, int] | None:
    """How near a name is to known ones, the lower the nearer: it is one of them, or holds one as a
    word, or is nearly spelt so."""
    lowered = WHOLE.get(name.lower(), name.lower())
    if lowered in known:
        return 2 if lowered in PASSAGES else 0, known.index(lowered)
    own = _words(name)
    other = {*PROMPTS, *REPLIES} - {*known} - SPEAKERS
    if own & other or name.lower().endswith(ABOUT):
        return None
    near = own | {*difflib.get_close_matches(lowered, known, n=1, cutoff=0.8)}
    return next(((1, place) for place, word in enumerate(known) if word in near - SPEAKERS), None)


def _words(name: str) -> set[str]:
    return {form for word in WORD.findall(name) for form in (word.lower(), word.lower().removesuffix("s"))}


def _is_read(record: Record, columns: Columns) -> bool:
    with suppress(Dropped, UserError):
        there = fields_there(record, columns)
        return bool(conversation_of(record, there, names_of(columns), Remarks()))
    return False
