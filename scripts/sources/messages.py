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
                    `dialog`, `dialogue`, `chat`, `contents`. One that ends with the user's has its reply in a field
                    of the next form, if there is one
    instruction     or `prompt`, `question`, `query`, ...: a text, or a list of messages, of which nothing is learnt;
                    with `output`, `response`, `completion`, `chosen`, `answer`, ...: a text or a list; `chosen`
                    alone is a whole conversation. Text that is JSON of messages, or a transcript, is taken for
                    one in a prompt, in a reply where it goes on from the prompt. A passage in `input`, `context` or
                    `passage` goes below the question, after a blank line; a `history` of earlier turns before it

A text in a field `system` or `system_prompt` becomes the system message where there is none. Every reply is learnt
but one with `"train": false` or `"weight": 0` beside its text; a `weight` of the record is what its tokens count in the
loss. A conversation is user and assistant in turn, with or without a system message in front; what else there is is
dropped, with the reason, and so is the end of a conversation after its last reply. A field that holds another prompt,
reply or the like is counted as not used; a record of no form is refused with the `columns` that would read it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from sources.messages_columns import UNUSED, Columns, check_named, fields_of, names_of
from sources.messages_forms import Dropped, is_said
from sources.messages_hints import columns_for
from sources.messages_records import conversation_of, fields_there, note_unused, refuse_media
from sources.source import PREPARED, Conversation, DatasetOptions, HubSource, Record, Remarks, Source, key
from utils.errors import UserError

# In the language of `datasets`: a name, [from:to] in rows or percent, and how percents are rounded.
SPLIT = r"\w+(?:\.\w+)*(?:\[(?:-?[\d_]+%?)?:(?:-?[\d_]+%?)?\](?:\((?:closest|pct1_dropremainder)\))?)?"


def _split(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(rf"{SPLIT}(?:\s*\+\s*{SPLIT})*", value):
        raise ValueError("should be a split's name, a slice such as train[:5%] or train[100:200], or several with +")
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
        None, "its split, or a slice such as train[:5%], or several with +; null: train", PREPARED
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
        return self


def split_names(split: str) -> list[str]:
    """Those of `train[:5%]` or `train+test`."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def read_messages(record: Record, options: Any, remarks: Remarks, rng_seed: int) -> list[Conversation] | None:
    """The conversation of one record, in whichever form; UserError for none of them, or a field of another type."""
    names = names_of(options.columns)
    if options.columns:
        check_named(record, names, remarks)
    there = fields_there(record, options.columns)
    try:
        refuse_media(record, there)
        messages = conversation_of(record, there, names, remarks)
    except Dropped as dropped:
        remarks[str(dropped)] += 1
        return None
    except UserError as error:
        if options.columns is None and (columns := columns_for(record)):
            raise UserError(f"{error}: `columns: {columns}` reads it") from None
        raise
    note_unused(record, there, options.columns, messages, remarks)
    if not UNUSED.isdisjoint(there):
        remarks.unused.update(name for name in there.keys() & UNUSED if is_said(record.values[there[name]]))
    if remarks.unused:
        remarks.unused.difference_update(map(str.lower, remarks.used))  # what `columns` names
    return [Conversation(messages)]


SOURCE = Source(
    about="chat data of your own; under any other name with `source: messages`",
    licence="that of the data",
    hub=HubSource(None),
    read=read_messages,
    fields=fields_of(None),
    options=MessagesOptions,
)
