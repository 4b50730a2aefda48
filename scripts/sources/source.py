"""What a source is made of: the options a recipe can give, a record of its file, conversations, and where it all is."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from utils.errors import UserError

CHANGES = ("data", "training", "step", "evaluation")


def key(default: Any, meaning: str, changes: str, **limits: Any) -> Any:
    """A key of a recipe, for a pydantic schema: its default (`...` where it has to be given), the line for --help,
    pydantic's limits, such as `gt=0`, and what another value changes, words of `CHANGES`:

        data        what is prepared of the data files, and so made anew;
        training    what is learnt or when, so that a run cannot go on with it;
        step        how the work of a step is cut up: it can, as long as the step itself stays the same;
        evaluation  the figures of an evaluation of the same weights.
    """
    assert set(changes.split()) <= set(CHANGES), changes
    return Field(default, description=meaning, json_schema_extra={"changes": changes.split()}, **limits)


def keys_that_change(what: str, schema: type[BaseModel]) -> set[str]:
    """The keys of a schema of which another value changes the data, the training, the step or the evaluation."""
    return {name for name, field in schema.model_fields.items() if what in field.json_schema_extra["changes"]}


def _hexadecimal_too(value: Any) -> Any:
    """0xa1221f97, which pydantic does not read by itself; what is no number is left for it to refuse."""
    try:
        return int(value, 0) if isinstance(value, str) else value
    except ValueError:
        return value


WholeNumber = Annotated[int, BeforeValidator(_hexadecimal_too)]
PositiveInt = Annotated[WholeNumber, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[WholeNumber, Field(ge=0, lt=2**31)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
MOST_WEIGHT = 1e100  # so that a record's times its data set's is finite, too
Weight = Annotated[float, Field(ge=0, le=MOST_WEIGHT)]


def _path_or_paths(value: Any) -> Any:
    """Checked by hand, since of a choice pydantic says one line for each of its branches."""
    listed = value if isinstance(value, list) and value else [value]
    if not all(isinstance(path, str | None) for path in listed) or (None in listed and value is not None):
        raise ValueError("should be a path, or a list of paths")
    return value


Paths = Annotated[str | list[str] | None, BeforeValidator(_path_or_paths)]


class Schema(BaseModel):
    """Keys that are checked: an unknown one is refused, and so is a text that no file or file name could hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _writable_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\0" in text or text.encode(errors="replace").decode() != text):
                raise ValueError("holds a character that UTF-8 files and file names cannot hold")
        return value


PREPARED = "data training evaluation"  # what most options of a data set change


class DatasetOptions(Schema):
    """What every data set of the mix can be given. Where its files are changes nothing: what is in them counts."""

    input_file_path: Paths = key(
        None, "data file (as given, under cache_dir, or on the hub), folder, pattern or URL, or a list of them", ""
    )
    revision: str | None = key(None, "commit, tag or branch of the hub data set; null: its newest", "")
    val_split: float = key(0.2, "share held out for validation", PREPARED, ge=0, lt=1)
    max_val_set: PositiveInt | None = key(None, "at most this many validation conversations", PREPARED)
    fraction: Share | None = key(None, "share of the training rows used, drawn anew each epoch", "training")
    size: PositiveInt | None = key(None, "number of training rows used, drawn anew each epoch", "training")
    weight: Weight = key(1.0, "what each of its tokens counts in the loss, times its record's own weight", "training")
    train_on: Literal["all", "last"] = key("all", "learn every reply of a conversation, or its last only", PREPARED)
    on_bad_records: Literal["error", "skip"] = key(
        "error", "what to do at a damaged record: stop, or go on and report how many", PREPARED
    )

    @model_validator(mode="after")
    def _one_size(self):
        if self.fraction is not None and self.size is not None:
            raise ValueError("give fraction or size, not both")
        return self


@dataclass(frozen=True)
class Record:
    """One record of a data file with its place, so that an error can name it."""

    values: dict[str, Any]
    path: Path
    number: int  # in its file
    index: int  # over all files, from 1
    unit: str = "record"  # what is counted by `number`, in errors

    def get(self, name: str, kind: type = str, nullable: bool = False) -> Any:
        """A field of the record, as `inside`."""
        return self.inside(self.values, "", name, kind, nullable)

    def inside(self, values: Any, where: str, name: str, kind: type = str, nullable: bool = False) -> Any:
        """A field of something within the record, e.g. of its METADATA, checked to be a `kind` (str, dict, list, bool).

        With `nullable` null comes through, as None; the field must be there all the same.

        Raises: UserError naming file, record number, field and the fields that are there; also for a string with half
            of a surrogate pair (`\\ud83d` alone): JSON can write it, but no UTF-8 text, hence no tokenizer, hold it.
        """
        if not isinstance(values, dict):
            raise self.error(f"an entry of {where!r} is not an object")
        value = values.get(name)
        if kind is str and isinstance(value, str) and value.isascii():  # as most are: nothing is asked of them twice
            return value
        full = f"{where}.{name}" if where else name
        if name not in values:
            there = ", ".join(map(str, values)) or "none"
            raise self.error(f"no field {full!r}; fields there: {there}")
        if value is None and nullable:
            return None
        if not isinstance(value, kind):
            raise self.error(f"field {full!r} is {kind_of(value)}, not {kind_of(kind())}")
        if kind is str and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.error(f"field {full!r} holds half of a surrogate pair") from None
        return value

    @property
    def weight(self) -> float:
        """What its field `weight`, in upper or lower case, says that each of its tokens counts in the loss; 1.0 without
        one, or with null.  Raises: UserError for what is no number from 0 to `MOST_WEIGHT`."""
        names = [name for name in self.values if name.lower() == "weight"]
        if not names:
            return 1.0
        if len(names) > 1:
            raise self.error(f"fields {names[0]!r} and {names[1]!r} have one name: rename one")
        name, value = names[0], self.values[names[0]]
        if value is None:
            return 1.0
        is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= MOST_WEIGHT:
            shown = str(value)[:20] if is_number else kind_of(value)
            raise self.error(f"field {name!r} is {shown}: what a record counts in the loss is a number, 0 or more")
        return float(value)

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}, {self.unit} {self.number}: {what}")


def kind_of(value: Any) -> str:
    names = {str: "a string", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


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
    weight: float = 1.0  # what each of its tokens counts in the loss

    def as_dicts(self) -> list[dict[str, str]]:
        """[{"role": ..., "content": ...}], the form of `apply_chat_template` and of the prepared data."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def pair(question: str, answer: str, properties: dict | None = None) -> Conversation:
    """A conversation of one question and one answer."""
    return Conversation([Message("user", question), Message("assistant", answer, properties or {})])


@dataclass(frozen=True)
class HubSource:
    """Where a data set lives on the hub: `files` are fnmatch patterns within the data set repository `repo`.

    The first pattern that matches any file counts. Without one the files of a split do, by what `datasets` makes of the
    repository, or of `data_files` in place of what it says itself. Without a `repo`, only this machine is searched.
    """

    repo: str | None
    files: tuple[str, ...] = ()
    hint: str = ""  # what to try when the file is not found, put at the end of the error message
    config: str | None = None  # None: its default one
    split: str | None = None  # in the language of `datasets`, slices included; None: train
    data_files: str | list | dict | None = None  # as `datasets.load_dataset` takes them


class Remarks(Counter):
    """What is to be said of a record: how much of it was dropped, by reason; and of its fields."""

    def __init__(self):
        super().__init__()
        self.used: tuple[str, ...] = ()  # fields that its conversation was made of, where a reader has a choice
        self.unused: set[str] = set()  # fields that could matter and are not used
        self.absent: set[str] = set()  # fields that its options name, and that it does not have

    def forget(self) -> None:
        """Make it that of another record."""
        self.clear()
        self.unused.clear()
        self.absent.clear()


# Turns a record, with the data set's options, into the conversations it holds, which stay together in a split; or None
# when the split is drawn without it. What it drops it counts by reason; the last argument is rng_seed.
Reader = Callable[[Record, Any, Remarks, int], list[Conversation] | None]


@dataclass(frozen=True)
class Source:
    """A data set that a recipe can name: each file of this room that defines `SOURCE` is one, by the file's name."""

    about: str  # what it holds, for --help
    licence: str  # of the data, and their size
    hub: HubSource
    read: Reader
    # Of a record, in lower case, that `read` uses; no other column of a parquet file is read, but `weight`.
    fields: tuple[str, ...]
    languages: tuple[str, ...] = ()  # that most of it is in, ISO 639-1; none where only the options can tell
    options: type[DatasetOptions] = DatasetOptions  # the schema of what a recipe can say of it
    # scikit-learn's over the records kept, or torch's "random_split" over them, each with a seed of its own
    split: Literal["train_test_split", "random_split"] = "train_test_split"
    shuffled: bool = False  # whether records are shuffled, by random.Random(42), before they are split


@cache
def filter_phrases() -> tuple[str, ...]:
    """By which the original dropped rows of dolly15k, grade_school_math_instructions and code_alpaca.

    In lower case, without those that hold another; a blank at the end counts: "As an AI " is not in "As an AIDE".
    """
    text = Path(__file__).with_name("filter_phrases.txt").read_text(encoding="utf-8").lower()
    phrases = {line for line in text.split("\n") if line}
    return tuple(one for one in sorted(phrases) if not any(other in one for other in phrases - {one}))


def has_no_filter_phrase(question: str, answer: str, dropped: Counter) -> bool:
    text = f"{question}\n{answer}".lower()  # no phrase holds a newline
    for phrase in filter_phrases():  # a plain loop: `any` over a generator took a sixth of all preparation
        if phrase in text:
            dropped["row with a filter phrase"] += 1
            return False
    return True
