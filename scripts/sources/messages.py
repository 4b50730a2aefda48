"""The source `messages`: chat data of one's own, or of the hub, in any of the usual forms, with no code.

    datasets:
      - support_chats:                        # any name; --datasets.support_chats.fraction, eval_support_chats_loss
          source: messages
          input_file_path: support.jsonl      # a file, a list of them, a folder, a pattern, or a URL
      - ultrachat:
          source: messages
          hub_name: HuggingFaceH4/ultrachat_200k
          split: train_sft[:5%]
      - faq:
          source: messages
          input_file_path: faq.csv
          columns: {prompt: query, response: answer, system: persona}

A record is taken for the first of these forms whose fields it has, in upper or lower case, null and blank being none:

    messages        a list of messages, as `sources/messages_forms.py` has them; or `conversations`, `conversation`,
                    `dialog`, `dialogue`, `chat`
    instruction     or `prompt`, `question`, `query`, ...: a text, or a list of messages, of which nothing is learnt;
                    with `output`, `response`, `completion`, `chosen`, `answer`, ...: a text or a list; `chosen`
                    alone is a whole conversation. A passage in `input` or `context` goes below the question, after a
                    blank line; a `history` of earlier turns before it

A text in a field `system` or `system_prompt` becomes the system message where there is none. Every reply is learnt
but one with `"train": false` or `"weight": 0` beside its text; a `weight` of the record is what its tokens count in the
loss. A conversation is user and assistant in turn, with or without a system message in front; what else there is is
dropped, with the reason, and so is the end of a conversation after its last reply.
"""

import re
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from sources.messages_columns import UNUSED, Columns, Names, check_named, fields_of, names_of, no_form
from sources.messages_forms import ANSWERS, MEDIA, Dropped, is_there, or_listed, read_turns, text_of, turns_of_text
from sources.source import PREPARED, Conversation, DatasetOptions, HubSource, Message, Record, Remarks, Source, key

# In the language of `datasets`: a name, [from:to] in rows or percent, and how percents are rounded.
SPLIT = r"(?:[\w.]+(?:\[(?:-?[\d_]+%?)?:(?:-?[\d_]+%?)?\](?:\((?:closest|pct1_dropremainder)\))?)?)"


def _split(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(rf"{SPLIT}(?:\s*\+\s*{SPLIT})*", value):
        raise ValueError("should be the name of a split, or a slice such as train[:5%] or train[100:200]")
    return value


def _patterns(value: Any) -> Any:
    """Checked by hand, since of a choice pydantic says one line for each of its branches."""
    if value is None:
        return None
    lists = value.values() if isinstance(value, dict) else [value]
    texts = [text for one in lists for text in (one if isinstance(one, list) else [one])]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("should be a name or pattern, a list of them, or `split: names` for each split")
    return value


class MessagesOptions(DatasetOptions):
    """With the keys of chat data of one's own."""

    source: Literal["messages"] = key(..., "messages; it lets a data set have any name", PREPARED)
    hub_name: str | None = key(None, "data set on the hub, as org/name", "")
    config: str | None = key(None, "its configuration; null: its default one", "")
    split: Annotated[str | None, AfterValidator(_split)] = key(
        None, "its split, or a slice such as train[:5%]; null: train", PREPARED
    )
    data_files: Annotated[str | list | dict | None, BeforeValidator(_patterns)] = key(
        None, "names or patterns of its files, in place of what it says its splits are", ""
    )
    columns: Columns | None = key(None, "names of its fields, e.g. {messages: dialog}", PREPARED)

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, values: Any) -> Any:
        """`files`, as data_files was called till November 2026: recipes of earlier runs are still read."""
        if isinstance(values, dict) and "files" in values:
            files, values = values["files"], {name: value for name, value in values.items() if name != "files"}
            values.setdefault("data_files", files)
        return values

    @model_validator(mode="after")
    def _one_place(self):
        if self.input_file_path is None and self.hub_name is None:
            raise ValueError("give input_file_path or hub_name, where its data are")
        if self.data_files is not None and (self.input_file_path is not None or self.hub_name is None):
            raise ValueError("data_files are those of hub_name, in place of input_file_path")
        if self.split and "+" in self.split and "[" in self.split and len(split_names(self.split)) > 1:
            raise ValueError("slices of several splits: make a data set of each")
        return self


def split_names(split: str) -> list[str]:
    """Those of `train[:5%]` or `train+test`."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def read_messages(record: Record, options: Any, remarks: Remarks, rng_seed: int) -> list[Conversation] | None:
    """The conversation of one record, in whichever form; UserError for none of them, or a field of another type."""
    names = names_of(options.columns)
    if options.columns:
        check_named(record, names, remarks)
    there = {name.lower(): name for name, value in record.values.items() if is_there(value)}
    for one, other in _alike(tuple(record.values)):
        if (
            is_there(record.values[one])
            and is_there(record.values[other])
            and other.lower() in fields_of(options.columns)
        ):
            raise record.error(f"fields {one!r} and {other!r} have one name: rename one")
    try:
        if not MEDIA.isdisjoint(there):
            raise Dropped(f"conversation with what is not text ({min(there.keys() & MEDIA)})")
        messages = _conversation(record, there, names, remarks)
    except Dropped as dropped:
        remarks[str(dropped)] += 1
        return None
    if not UNUSED.isdisjoint(there):
        remarks.unused.update(there.keys() & UNUSED)
    if remarks.unused:
        remarks.unused.difference_update(map(str.lower, remarks.used))  # what `columns` names
    return [Conversation(messages)]


@lru_cache(1000)  # as the records of a file have the same names
def _alike(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Those of a record's names that differ by upper and lower case alone."""
    return [pair for pair in combinations(names, 2) if pair[0].lower() == pair[1].lower()]


def _conversation(record: Record, there: dict[str, str], names: Names, remarks: Remarks) -> list[Message]:
    listed = _first(names.lists, there)
    if listed:
        remarks.used = (listed,)
        messages = _turns(record, listed, record.values[listed], names, remarks)
    else:
        messages = _pair(record, there, names, remarks)
    messages = [message for message in messages if message.role != "system" or is_there(message.content)]
    if (not messages or messages[0].role != "system") and (system := _first(names.systems, there)):
        remarks.used += (system,)
        messages = [Message("system", text_of(record, system, record.values[system], remarks.unused)), *messages]
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    roles = [message.role for message in turns]
    if "system" in roles:
        raise Dropped("conversation with a system message that is not the first")
    if not roles or roles[0] != "user":
        raise Dropped("conversation that does not start with a user's message")
    if "assistant" in roles[::2] or "user" in roles[1::2]:
        raise Dropped("conversation whose speakers do not take turns")
    if len(turns) < 2:
        raise Dropped("conversation without a reply")
    if turns[-1].role == "user":
        messages, turns = messages[:-1], turns[:-1]
    for message in turns:
        if not is_there(message.content):
            raise Dropped(f"conversation with an empty {'reply' if message.role == 'assistant' else 'prompt'}")
    return messages


def _pair(record: Record, there: dict[str, str], names: Names, remarks: Remarks) -> list[Message]:
    question, answer = _first(names.questions, there), _first(names.answers, there)
    if question is None and answer == there.get("chosen") and isinstance(record.values.get(answer), list | str):
        remarks.used = (answer,)  # a data set of preferences that repeats its prompts in both of its conversations
        return _turns(record, answer, record.values[answer], names, remarks)
    if question is None or answer is None:
        known = {name.lower() for name in record.values}
        if known & {*names.questions} and known & {*names.answers}:
            raise Dropped(f"conversation with an empty {'reply' if answer is None else 'prompt'}")
        if known & {*names.lists}:
            return []
        raise no_form(record, names)

    asked, replied = record.values[question], record.values[answer]
    if not isinstance(asked, str) or not isinstance(replied, str) or asked[0] == "[" or replied[0] == "[":
        asked, replied = or_listed(asked, names.roles), or_listed(replied, names.roles)
        for name, value in ((question, asked), (answer, replied)):
            if isinstance(value, list) and len(value) > 1 and isinstance(value[0], str):
                raise record.error(f"field {name!r} is a list of texts, of which one would have to be chosen")

    if len(there) > 2:
        remarks.unused.update(name for name in ANSWERS if name in there and there[name] not in (answer, question))
    passage, history = _first(names.passages, there), _first(names.histories, there)
    if passage == question:
        passage = _first(names.passages[1:], there)
    if isinstance(asked, str) and asked.endswith("Assistant:"):  # HH-RLHF's, with all that was said before the reply
        asked = turns_of_text(asked)[:-1] or asked
    listed = isinstance(asked, list | dict)
    if listed and passage:
        remarks.unused.add(passage)
        passage = None
    remarks.used = tuple([name for name in (question, passage, history, answer) if name])
    if listed:
        prompt = [replace(message, train=False) for message in _turns(record, question, asked, names, remarks)]
    else:
        text = record.get(question)
        prompt = [Message("user", f"{text}\n\n{record.get(passage)}" if passage else text)]
    before = _turns(record, history, record.values[history], names, remarks) if history else []
    if isinstance(replied, list) and len(replied) == 1 and isinstance(replied[0], str):
        return [*before, *prompt, Message("assistant", replied[0])]
    if not isinstance(replied, list | dict):
        return [*before, *prompt, Message("assistant", record.get(answer))]
    reply = _turns(record, answer, replied, names, remarks)
    if reply and reply[0].role != "assistant":  # the whole conversation once more, as in many data sets of preferences
        same = [
            message.role == earlier.role and message.content == earlier.content
            for message, earlier in zip(reply, prompt, strict=False)
        ]
        known = len(prompt) if all(same) and len(reply) > len(prompt) else 0
        return [*prompt[:known], *reply[known:]]
    return [*before, *prompt, *reply]


def _turns(record: Record, name: str, value: Any, names: Names, remarks: Remarks) -> list[Message]:
    return read_turns(record, name, value, remarks.unused, names.roles, names.contents)


def _first(names: tuple[str, ...], there: dict[str, str]) -> str | None:
    for name in names:  # a plain loop, as of every record: `next` over a generator takes four times as long
        if name in there:
            return there[name]
    return None


SOURCE = Source(
    about="chat data of your own; under any other name with `source: messages`",
    licence="that of the data",
    hub=HubSource(None),
    read=read_messages,
    fields=fields_of(None),
    options=MessagesOptions,
)
