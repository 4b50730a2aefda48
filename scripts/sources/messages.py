"""The source `messages`: chat data of one's own, or of the hub, in any of the usual forms, with no code.

    datasets:
      - support_chats:                        # any name; --datasets.support_chats.fraction, eval_support_chats_loss
          source: messages
          input_file_path: support.jsonl      # .jsonl, .json (each also .gz) or .parquet
      - ultrachat:
          source: messages
          hub_name: HuggingFaceH4/ultrachat_200k
          files: data/train_sft-*.parquet

A record is taken for the first of these forms whose field it has, in upper or lower case:

    messages        [{"role", "content"}], as of the hub's chat data sets and chat templates
    conversations   [{"from", "value"}], as of ShareGPT (also `conversation`, and either naming in either list)
    instruction     or `prompt` or `question`, a text; with `output`, `response`, `completion` or `answer`; a passage in
                    `input` or `context` goes below the question, after a blank line

A text in a field `system` or `system_prompt` becomes the system message of the last two. Every reply is learnt but one
with `"train": false` or `"weight": 0` beside its text; a `weight` of the record is what its tokens count in the loss. A
conversation is user and assistant in turn, with or without a system message in front; what else there is is dropped,
with the reason, and so is the end of a conversation after its last reply.
"""

from collections import Counter
from itertools import pairwise
from typing import Any, Literal

from pydantic import model_validator

from sources.source import PREPARED, Conversation, DatasetOptions, HubSource, Message, Record, Source, key

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}
LISTS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question")
PASSAGES = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
SYSTEMS = ("system", "system_prompt")


class MessagesOptions(DatasetOptions):
    """With the keys of chat data of one's own."""

    source: Literal["messages"] = key(..., "messages; it lets a data set have any name", PREPARED)
    hub_name: str | None = key(None, "data set on the hub, as org/name", "")
    files: str | None = key(None, "pattern of its data files; null: those of its training split", "")

    @model_validator(mode="after")
    def _one_place(self):
        if self.input_file_path is None and self.hub_name is None:
            raise ValueError("give input_file_path or hub_name, where its data are")
        if self.files is not None and (self.input_file_path is not None or self.hub_name is None):
            raise ValueError("files is a pattern for hub_name, in place of input_file_path")
        return self


def read_messages(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    """The conversation of one record, in whichever form; UserError for none of them, or a field of another type."""
    fields = {name.lower(): name for name in record.values}  # INSTRUCTION and RESPONSE are as usual
    listed = next((fields[name] for name in LISTS if name in fields), None)
    messages = _from_list(record, listed, dropped) if listed else _from_pair(record, fields)
    if messages is None:
        return None
    if listed is None or not messages or messages[0].role != "system":
        messages = _system(record, fields) + messages
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns or turns[0].role != "user":
        reason = "conversation that does not start with a user's message"
    elif any(message.role == "system" for message in turns):
        reason = "conversation with a system message that is not the first"
    elif any(before.role == after.role for before, after in pairwise(turns)):
        reason = "conversation whose speakers do not take turns"
    elif len(turns) < 2:
        reason = "conversation without a reply"
    elif any(message.role == "assistant" and not message.content.strip() for message in turns):
        reason = "conversation with an empty reply"
    else:
        return [Conversation(messages[:-1] if turns[-1].role == "user" else messages)]
    dropped[reason] += 1
    return None


def _from_list(record: Record, name: str, dropped: Counter) -> list[Message] | None:
    messages = []
    for entry in record.get(name, list):
        speaker = record.inside(entry, name, "from" if isinstance(entry, dict) and "from" in entry else "role")
        role = ROLES.get(speaker.strip().lower())
        if role is None:
            dropped["conversation with a speaker other than system, user and assistant"] += 1
            return None
        # null where a message is not text, as of tool calls
        content = record.inside(entry, name, "value" if "value" in entry else "content", nullable=True)
        train = record.inside({"train": None} | entry, name, "train", bool, nullable=True)
        weight = entry.get("weight")
        if weight not in (None, 0, 1):
            raise record.error(f"field '{name}.weight' is {str(weight)[:40]!r}, not 0 or 1")
        messages.append(Message(role, content or "", train=train is not False and weight != 0))
    return messages


def _from_pair(record: Record, fields: dict[str, str]) -> list[Message]:
    def first(names: tuple[str, ...]) -> str | None:
        return next((fields[name] for name in names if name in fields), None)

    question, answer, passage = first(QUESTIONS), first(ANSWERS), first(PASSAGES)
    if question is None or answer is None:
        there = ", ".join(record.values) or "none"
        raise record.error(
            f"no field 'messages', 'conversations', or 'instruction' with 'output' (or the like); fields there: {there}"
        )
    text = record.get(question)
    below = record.get(passage, nullable=True) if passage else None
    if below and below.strip():
        text = f"{text}\n\n{below}"
    return [Message("user", text), Message("assistant", record.get(answer, nullable=True) or "")]


def _system(record: Record, fields: dict[str, str]) -> list[Message]:
    name = next((fields[name] for name in SYSTEMS if name in fields), None)
    text = record.get(name, nullable=True) if name else None
    return [Message("system", text)] if text and text.strip() else []


SOURCE = Source(
    about="chat data of your own; under any other name with `source: messages`",
    licence="that of the data",
    hub=HubSource(None),
    read=read_messages,
    fields=(*LISTS, *QUESTIONS, *PASSAGES, *ANSWERS, *SYSTEMS),
    options=MessagesOptions,
)
