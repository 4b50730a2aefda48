"""What a source is: where its data are, how a record is read, and what a conversation looks like."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sources.options import DatasetOptions
from sources.record import Record


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `properties` of a reply (lang, quality, humor, creativity, context) are used by system tags only."""

    role: str  # "user", "assistant" or "system"
    content: str
    properties: dict[str, str | float] = field(default_factory=dict)
    train: bool = True  # of a reply: whether it is scored


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: list[Message]

    def as_dicts(self) -> list[dict[str, str]]:
        """[{"role": ..., "content": ...}], the form of `apply_chat_template` and of the prepared data."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def pair(question: str, answer: str, properties: dict | None = None) -> Conversation:
    """A conversation of one question and one answer."""
    return Conversation([Message("user", question), Message("assistant", answer, properties or {})])


@dataclass(frozen=True)
class HubSource:
    """Where a data set lives on the hub: `files` are fnmatch patterns within the data set repository `repo`.

    The first pattern that matches any file counts. Without a `repo`, only this machine is searched.
    """

    repo: str | None
    files: tuple[str, ...]
    hint: str = ""  # what to try when the file is not found, put at the end of the error message


# Turns a record, with the data set's options, into the conversations it holds, which stay together in a split; or None
# when the split is drawn without it. What it drops it counts by reason; the last argument is rng_seed.
Reader = Callable[[Record, Any, Counter, int], list[Conversation] | None]


@dataclass(frozen=True)
class Source:
    """A data set that a recipe can name: each file of this room that defines `SOURCE` is one, by the file's name.

    Attributes:
        about: what it holds, for --help.
        licence: of the data, and their size.
        options: the schema of what a recipe can say of it.
        split: scikit-learn's over the records kept, or torch's "random_split" over them, each with a seed of its own.
        shuffled: whether records are shuffled, by random.Random(42), before they are split.
    """

    about: str
    licence: str
    hub: HubSource
    read: Reader
    options: type[DatasetOptions] = DatasetOptions
    split: Literal["train_test_split", "random_split"] = "train_test_split"
    shuffled: bool = False
