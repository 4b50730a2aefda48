"""The names of the fields that chat data keep a conversation in: the usual ones, and those of the option `columns`."""

import difflib
from functools import cache
from typing import NamedTuple

from pydantic import model_serializer, model_validator

from sources.messages_forms import ANSWERS, CONTENT_KEYS, MEDIA, QUESTIONS, ROLE_KEYS, THOUGHTS
from sources.source import PREPARED, Record, Remarks, Schema, key
from utils.errors import UserError

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "contents")
PASSAGES = ("input", "context", "passage", "inputs")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction", "meta_instruction")
HISTORIES = ("history", "chat_history", "conversation_history", "dialog_history", "dialogue_history")
UNUSED = THOUGHTS | {"rejected", "rejected_response", "label", "tools", "functions", "train", "answers", "is_correct"}
UNUSED |= {"document", "documents", "article", "story", "choices", "options", "persona", "speakers"}


class Columns(Schema):
    """The names that the fields of a data set have; the usual ones need none."""

    messages: str | None = key(None, "list of messages", PREPARED)
    role: str | None = key(None, "speaker of a message", PREPARED)
    content: str | None = key(None, "text of a message", PREPARED)
    prompt: str | None = key(None, "question", PREPARED)
    input: str | None = key(None, "passage that a question is about", PREPARED)
    response: str | None = key(None, "reply", PREPARED)
    system: str | None = key(None, "system message", PREPARED)
    history: str | None = key(None, "earlier turns", PREPARED)

    @model_serializer
    def _given(self) -> dict[str, str]:
        return {name: value for name, value in self if value is not None}

    @model_validator(mode="after")
    def _one_form(self):
        if self.messages is not None and (self.prompt or self.input or self.response or self.history):
            raise ValueError("name messages, or prompt and response")
        fields = [value.lower() for name, value in self if value is not None and name not in ("role", "content")]
        if len({*fields}) < len(fields):
            raise ValueError("one field is named twice")
        if (self.role is None) != (self.content is None):
            raise ValueError("name both role and content of a message, or neither")
        return self


class Names(NamedTuple):
    """In lower case the names of the fields that count, the first that is there before the others."""

    lists: tuple[str, ...] = LISTS
    roles: tuple[str, ...] = ROLE_KEYS
    contents: tuple[str, ...] = CONTENT_KEYS
    questions: tuple[str, ...] = (*QUESTIONS, "definition", "input", "inputs")  # by Natural Instructions' definition
    passages: tuple[str, ...] = PASSAGES
    answers: tuple[str, ...] = ANSWERS
    systems: tuple[str, ...] = SYSTEMS
    histories: tuple[str, ...] = HISTORIES
    required: tuple[str, ...] = ()  # as they are written, those that each record has to have
    optional: tuple[str, ...] = ()  # those that one record has to have


@cache
def names_of(columns: Columns | None) -> Names:
    """The names that count under the option `columns`."""
    if columns is None:
        return Names()
    fields = {
        "messages": "lists",
        "prompt": "questions",
        "input": "passages",
        "response": "answers",
        "system": "systems",
        "history": "histories",
    }
    given = {fields[name]: (value.lower(),) for name, value in columns if value and name in fields}
    named = {field for (field,) in given.values()}  # for what it is by `columns`, and for nothing else
    given = {of: tuple(name for name in getattr(Names(), of) if name not in named) for of in fields.values()} | given
    if columns.role:
        given |= {"roles": (columns.role,), "contents": (columns.content,)}
    if columns.prompt:  # `inputs` is a prompt, too, which P3 has beside it in token ids
        given["passages"] = tuple(name for name in given["passages"] if name != "inputs")
    if columns.messages:
        given |= {"questions": (), "answers": ()}
    elif columns.prompt or columns.response:
        given["lists"] = ()
    required = tuple(filter(None, (columns.messages, columns.prompt, columns.response)))
    return Names(
        **given, required=required, optional=tuple(filter(None, (columns.input, columns.system, columns.history)))
    )


@cache
def made_of(columns: Columns | None) -> frozenset[str]:
    """In lower case, the fields that a conversation can be made of: the usual ones, and those that are named."""
    both = (names_of(None), names_of(columns))
    kinds = [(n.lists, n.questions, n.passages, n.answers, n.systems, n.histories) for n in both]
    return frozenset(field for one in kinds for fields in one for field in fields)


@cache
def fields_of(columns: Columns | None) -> tuple[str, ...]:
    """In lower case, the fields of a record that are used, or counted."""
    return tuple(sorted({*made_of(columns), *UNUSED, *MEDIA}))


def check_named(record: Record, names: Names, remarks: Remarks) -> None:
    """UserError where a record lacks a field that it has to have by `columns`; the others are remarked."""
    known = {name.lower() for name in record.values}
    for name in names.required:
        if name.lower() not in known:
            there = ", ".join(record.values) or "none"
            near = difflib.get_close_matches(name, record.values, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise record.error(f"no field {name!r}, which `columns` names{hint} (fields there: {there})")
    remarks.absent.update(name for name in names.optional if name.lower() not in known)


def no_form(record: Record) -> UserError:
    """What is wrong with a record that has none of the forms."""
    return record.error(
        "no field 'messages', 'conversations', or 'instruction' with 'output' (or the like), nor `columns` to name "
        f"others; fields there: {', '.join(record.values) or 'none'}"
    )
