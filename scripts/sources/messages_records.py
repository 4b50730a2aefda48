"""The fields of a record of chat data together: its conversation, or what it has before a reply that is asked for."""

from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import Any

from sources.messages_columns import Columns, Names, fields_of, made_of, names_of, no_form
from sources.messages_forms import MEDIA, ROLES, Dropped, is_said, is_there, or_listed, read_turns, text_of
from sources.messages_transcripts import split_prompt, turns_of_text
from sources.source import Message, Record, Remarks, kind_of
from utils.errors import UserError


def read_prompt(record: Record) -> list[Message] | None:
    """What a record in any of the forms has before a reply that is asked for; one beside a question is passed over.

    Returns: the messages, of which the last need not be the user's; None for a record of no form.
    Raises: Dropped, or UserError, as in chat data.
    """
    names, remarks, there = names_of(None), Remarks(), fields_there(record, None)
    refuse_media(record, there)
    if listed := _listed(record, there, names):
        messages = _turns(record, listed, record.values[listed], names, remarks)
    elif question := _first(names.questions, there):
        asked, _ = _asked(record, there, question, None, names)
        before, prompt = _prompt(record, there, question, asked, names, remarks)
        messages = [*before, *prompt]
    else:
        return None
    messages = _in_turn(record, there, messages, names, remarks)
    _check_said(messages)
    return messages


def fields_there(record: Record, columns: Columns | None) -> dict[str, str]:
    """The fields that have a value, by their names in lower case; UserError for two of one name that count."""
    for one, other in _alike(tuple(record.values)):
        if is_there(record.values[one]) and is_there(record.values[other]) and other.lower() in fields_of(columns):
            raise record.error(f"fields {one!r} and {other!r} have one name: rename one")
    return {name.lower(): name for name, value in record.values.items() if is_there(value)}


@lru_cache(1000)  # as the records of a file have the same names
def _alike(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Those of a record's names that differ by upper and lower case alone."""
    return [pair for pair in combinations(names, 2) if pair[0].lower() == pair[1].lower()]


def refuse_media(record: Record, there: dict[str, str]) -> None:
    """Dropped where a field beside the conversation holds a picture or the like."""
    if not MEDIA.isdisjoint(there):
        for name in sorted(there.keys() & MEDIA):
            if is_said(record.values[there[name]]):
                raise Dropped(f"conversation with what is not text ({name})")


def conversation_of(record: Record, there: dict[str, str], names: Names, remarks: Remarks) -> list[Message]:
    """The messages of a record up to its last reply.  Raises: Dropped, or UserError for a record of no form."""
    listed = _listed(record, there, names)
    if listed:
        remarks.used = (listed,)
        messages = _turns(record, listed, record.values[listed], names, remarks)
        answer = None
        if messages and messages[-1].role == "user":  # beside a list `gpt` has the name of a model, and no reply
            answer = _first(tuple(name for name in names.answers if name not in ROLES), there)
        if answer and isinstance(record.values[answer], str | list | dict):  # which is the reply that it waits for
            messages = _answered(record, answer, _one_text(record, answer), True, [], messages, names, remarks)
    else:
        messages = _pair(record, there, names, remarks)
    messages = _in_turn(record, there, messages, names, remarks)
    if messages[-1].role == "user":
        messages = messages[:-1]
    if not messages or messages[-1].role != "assistant":
        raise Dropped("conversation without a reply")
    _check_said(messages)
    return messages


def note_unused(
    record: Record, there: dict[str, str], columns: Columns | None, messages: list[Message], remarks: Remarks
) -> None:
    """Remark the fields that a conversation could have been made of, and that hold nothing of what it was made of."""
    if len(there) == len(remarks.used):  # as most records, of which the sets would take a twentieth of all reading
        return
    left = made_of(columns) & there.keys()
    said, used = [message.content.strip() for message in messages], [record.values[name] for name in remarks.used]
    for name in left:
        value = record.values[there[name]]
        if value not in used and not (isinstance(value, str) and value.strip() in said):
            remarks.unused.add(name)


def _in_turn(
    record: Record, there: dict[str, str], messages: list[Message], names: Names, remarks: Remarks
) -> list[Message]:
    """With the record's system message, where there is none in front; Dropped unless user and assistant take turns."""
    messages = [message for message in messages if message.role != "system" or is_there(message.content)]
    if (not messages or messages[0].role != "system") and (system := _first(names.systems, there)):
        remarks.used += (system,)
        messages = [Message("system", text_of(record, system, record.values[system], remarks.unused)), *messages]
    roles = [message.role for message in messages]
    if roles and roles[0] == "system":
        roles = roles[1:]
    if "system" in roles:
        raise Dropped("conversation with a system message that is not the first")
    if not roles or roles[0] != "user":
        raise Dropped("conversation that does not start with a user's message")
    if "assistant" in roles[::2] or "user" in roles[1::2]:
        raise Dropped("conversation whose speakers do not take turns")
    return messages


def _check_said(messages: list[Message]) -> None:
    for message in messages:
        if message.role != "system" and not is_there(message.content):
            raise Dropped(f"conversation with an empty {'reply' if message.role == 'assistant' else 'prompt'}")


def _pair(record: Record, there: dict[str, str], names: Names, remarks: Remarks) -> list[Message]:
    question, answer = _first(names.questions, there), _first(names.answers, there)
    if question is None and answer == there.get("chosen") and isinstance(record.values.get(answer), list | str):
        remarks.used = (answer,)  # a data set of preferences that repeats its prompts in both of its conversations
        return _turns(record, answer, record.values[answer], names, remarks)
    if question is None or answer is None:
        known = {name.lower() for name in record.values}
        if known & {*names.questions} and known & {*names.answers}:
            raise Dropped(f"conversation with an empty {'reply' if answer is None else 'prompt'}")
        if (known - there.keys()) & {*names.lists}:
            return []
        raise no_form(record)
    asked, replied = _asked(record, there, question, _one_text(record, answer), names)
    before, prompt = _prompt(record, there, question, asked, names, remarks)
    return _answered(record, answer, replied, isinstance(asked, list | dict), before, prompt, names, remarks)


def _answered(
    record: Record,
    answer: str,
    replied: Any,
    listed: bool,
    before: list[Message],
    prompt: list[Message],
    names: Names,
    remarks: Remarks,
) -> list[Message]:
    """The earlier turns, a prompt and the reply to it; `listed`: the prompt was a list of messages."""
    remarks.used += (answer,)
    beginnings = ([*before, *prompt], prompt) if before else (prompt,)
    if isinstance(replied, str):
        reply = _turns_in_text(record, answer, replied, listed, beginnings, names, remarks)
    elif isinstance(replied, list | dict):
        reply = _turns(record, answer, replied, names, remarks)
    else:
        raise record.error(f"field {answer!r} is {kind_of(replied)}, not a string")
    if reply and reply[0].role != "assistant":  # the whole conversation once more, as in many data sets of preferences
        for known in beginnings:
            if (rest := _after(reply, known)) is not None:
                system = reply[:1] if reply[0].role == "system" and known[0].role != "system" else []
                return [*system, *before, *prompt, *rest]
        return reply
    return [*before, *prompt, *reply]


def _one_text(record: Record, name: str) -> Any:
    """A field's value; of a list with one text the text.  Raises: UserError for one with more texts."""
    value = record.values[name]
    if isinstance(value, list) and isinstance(value[0], str):
        if len(value) > 1:
            raise record.error(f"field {name!r} is a list of texts, of which one would have to be chosen")
        return value[0]
    return value


def _asked(record: Record, there: dict[str, str], question: str, replied: Any, names: Names) -> tuple[Any, Any]:
    """A prompt, as a list of messages where its text holds one, and the reply to it."""
    asked = or_listed(record, question, _one_text(record, question), names.roles, names.contents)
    if not isinstance(asked, str) or _passage(there, question, names):  # that is of one question
        return asked, replied
    return split_prompt(asked, replied)


def _passage(there: dict[str, str], question: str, names: Names) -> str | None:
    """The field of what a question is about."""
    for name in names.passages:
        if name in there and there[name] != question:
            return there[name]
    return None


def _prompt(
    record: Record, there: dict[str, str], question: str, asked: Any, names: Names, remarks: Remarks
) -> tuple[list[Message], list[Message]]:
    """The earlier turns in a field of their own, and the messages of a prompt, of which nothing is learnt."""
    passage, history = _passage(there, question, names), _first(names.histories, there)
    listed = isinstance(asked, list | dict)
    passage = None if listed else passage
    remarks.used = tuple([name for name in (question, passage, history) if name])
    if listed:
        prompt = [replace(message, train=False) for message in _turns(record, question, asked, names, remarks)]
    else:
        text = text_of(record, question, asked, remarks.unused)
        prompt = [Message("user", f"{text}\n\n{record.get(passage)}" if passage else text)]
    return _turns(record, history, record.values[history], names, remarks) if history else [], prompt


def _turns_in_text(
    record: Record,
    answer: str,
    text: str,
    listed: bool,
    beginnings: tuple[list[Message], ...],
    names: Names,
    remarks: Remarks,
) -> list[Message]:
    """The turns of a reply that is text: one, unless it is JSON of a reply to a prompt that was `listed`, too, or a
    whole conversation, in JSON or in one text, that has one of the `beginnings`: it is often JSON that is asked for."""
    value = or_listed(record, answer, text, names.roles, names.contents)
    value = turns_of_text(text) if value is text else value
    if value:
        turns, unused = [], {*remarks.unused}
        with suppress(Dropped, UserError):  # it is text then
            turns = read_turns(record, answer, value, unused, names.roles, names.contents)
        begun = turns and any(_after(turns, known) is not None for known in beginnings)
        if begun or (turns and listed and turns[0].role == "assistant"):
            remarks.unused |= unused
            return turns
    return [Message("assistant", text_of(record, answer, text, remarks.unused))]


def _after(turns: list[Message], prompt: list[Message]) -> list[Message] | None:
    """What follows the prompt in a conversation that begins with it; None in any other."""
    if not prompt:
        return None
    if turns[0].role == "system" and prompt[0].role != "system":
        turns = turns[1:]
    begun = [(message.role, message.content) for message in turns[: len(prompt)]]
    is_begun = begun == [(message.role, message.content) for message in prompt]
    return turns[len(prompt) :] if is_begun and len(turns) > len(prompt) else None


def _turns(record: Record, name: str, value: Any, names: Names, remarks: Remarks) -> list[Message]:
    return read_turns(record, name, value, remarks.unused, names.roles, names.contents)


def _listed(record: Record, there: dict[str, str], names: Names) -> str | None:
    """The field with a list of messages: by the name of Gemini's, `contents`, others have passages, which are texts."""
    name = _first(names.lists, there)
    if name is None or name.lower() != "contents" or name in names.required:
        return name
    value = or_listed(record, name, record.values[name], names.roles, names.contents)
    return name if all(isinstance(one, dict) for one in (value if isinstance(value, list) else [value])) else None


def _first(names: tuple[str, ...], there: dict[str, str]) -> str | None:
    for name in names:  # a plain loop, as of every record: `next` over a generator takes four times as long
        if name in there:
            return there[name]
    return None
