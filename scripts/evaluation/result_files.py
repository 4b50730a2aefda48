"""The result files of the evaluation scripts: their schema, and reading them back. Only light imports.

The result of an evaluation is CHECKPOINT/eval/<name>.json. `evaluation/results.py` writes it, with `format`, and for
whoever reads it `created`, `seconds`, `processes`, `device`, `versions` and what an evaluation adds of its own. Files
that were written before there was a number have no `format`, and are of format 1.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from utils.errors import UserError
from utils.files import read_json
from utils.schemas import Schema, checked
from utils.tables import counted

FORMAT = 1  # of a result file; a newer one is refused
OWN_KEYS = {"checkpoint", "results"}  # one of which even a damaged result has
MOST = 2**53  # of a count, which is computed with in float64


def _shown(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("should be one line of text")
    return text


def _written(text: str) -> str:
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half of a surrogate pair")
    return text


Name = Annotated[str, AfterValidator(_shown)]
Count = Annotated[NonNegativeInt, Field(le=MOST)]
# The perplexity of a model that diverged is up to e to the power of 700, 1e304; what is drawn of more is over float64.
Figure = Annotated[float, Field(ge=-1e305, le=1e305)]


class Metric(Schema):
    """A figure of a checkpoint, with its 95 % interval as far as there is one.

    A metric that is the sum of a field of the items over that of another can be paired, item by item, with that of
    another result (`evaluation/intervals.py`).
    """

    value: Figure | None  # None where the model gives none, as the loss of one whose weights are not finite
    low: Figure | None = None
    high: Figure | None = None
    better: Literal["higher", "lower"] | None = None
    n: Count | None = None
    ratio: Annotated[tuple[str | None, str | None], Field(strict=False)] | None = None  # None counts the items
    where: dict[str, JsonValue] = Field({})  # {field: value} of the items that take part
    exp: bool = False  # whether it is e to the power of that ratio

    @model_validator(mode="after")
    def _has_an_interval_or_none(self) -> "Metric":
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"its low {self.low} is over its high {self.high}")
        return self

    @property
    def ends(self) -> tuple[float | None, float | None, float | None]:
        return self.low, self.value, self.high

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high; None where one is missing, or the value is not between them, as somebody has changed it."""
        known = None not in self.ends
        return (self.low, self.high) if known and self.low <= self.value <= self.high else None


class Item(TypedDict, total=False):
    """What was measured on an item; its other fields are the evaluation's own."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    times: Count  # how often it counts; else once
    dataset: str
    group: str


class EvaluatedCheckpoint(Schema):
    name: str
    step: Annotated[NonNegativeInt, Field(lt=2**63)] | None = None
    fingerprint: str | None = None  # of its weights, config and tokenizer (`evaluation/chat_model.py`)


class Contamination(Schema):
    """Whether the questions of a benchmark were in training (`eval_gsm8k.py`)."""

    contaminated: bool | None = None  # None where that is not known
    verdict: str | None = None


class ResultFile(Schema):
    """All that is read back."""

    format: PositiveInt = 1
    name: Name  # of the evaluation
    checkpoint: EvaluatedCheckpoint
    settings: dict[Name, JsonValue] = Field({})  # the same ones on the same weights give the same results
    results: dict[Name, Metric] = Field(min_length=1)
    warnings: list[Annotated[str, AfterValidator(_written)]] = Field([])  # what whoever reads the results has to know
    items: dict[str, Item] = Field({})
    contamination: Contamination = Contamination()

    @model_validator(mode="after")
    def _items_can_be_paired(self) -> "ResultFile":
        fields = {field for metric in self.results.values() for field in metric.ratio or () if field is not None}
        for key, item in self.items.items():
            for field in fields & item.keys():
                value = item[field]
                if value is not None and not (isinstance(value, int | float) and abs(value) <= sys.float_info.max):
                    raise ValueError(f"items.{key}.{field} should be a finite number")
        return self


class OtherFile(UserError):
    """Of JSON, and not meant to be a result: a sampling report, a model's config."""


def read_result(path: Path) -> ResultFile:
    """A result file.

    Raises: OtherFile for one that holds other things; UserError, with the field, for a damaged one, with the number for
        one of a newer format.
    """
    content = read_json(path, "result file")
    if content and isinstance(content, dict) and not OWN_KEYS & content.keys():
        raise OtherFile(f"{path}: not a result file of the eval scripts")
    number = content.get("format") if isinstance(content, dict) else None
    if type(number) is int and number > FORMAT:
        newer = f"newer than the {FORMAT} that these scripts know: update them"
        raise UserError(f"{path}: its format is {str(number)[:20]}, {newer}")
    return checked(ResultFile, content, path, "a result file of the eval scripts")


# ---- Those of checkpoints ----


@dataclass
class Column:
    """A checkpoint with its results by the name of the evaluation."""

    name: str
    run: str
    files: dict[str, ResultFile]

    @property
    def step(self) -> int | None:
        return next(iter(self.files.values())).checkpoint.step


def read_columns(paths: Iterable[Path]) -> tuple[list[Column], list[str]]:
    """The checkpoints of all paths that have results, and what is wrong with each path or file that was passed over.

    A path is a checkpoint, a run (all its checkpoints), a result file, or a folder of them.
    Raises: UserError where no column is left.
    """
    columns, problems = [], []
    for path in paths:
        try:
            found, passed_over = _columns_of(path)
        except OSError as error:
            found, passed_over = [], [f"{path}: {error.strerror}"]
        columns += found
        problems += passed_over if found or passed_over else [f"{path}: no results; run an eval_*.py on it first"]
    if not columns:
        more = f" (and {counted(len(problems) - 1, 'file')} more)" * (len(problems) > 1)
        raise UserError(f"{problems[0]}{more}")
    return columns, problems


def _columns_of(path: Path) -> tuple[list[Column], list[str]]:
    if not path.is_dir():
        if not path.exists():
            return [], [f"{path}: no such file or folder"]
        try:
            result = read_result(path)
        except UserError as error:
            return [], [str(error)]
        return [Column(str(path), str(path.parent), {result.name: result})], []
    columns, problems = [], []
    for folder in [*path.glob("checkpoint-*"), path]:
        files, passed_over = results_in(folder / "eval")
        if not files and folder == path:  # a folder of --output
            files, more = results_in(path)
            passed_over += more
        problems += passed_over
        if files:
            columns.append(Column(str(folder), str(path), files))
    columns.sort(key=lambda column: (column.step is None, column.step or 0, column.name == str(path)))
    return columns, problems


def results_in(folder: Path) -> tuple[dict[str, ResultFile], list[str]]:
    """The results of a folder; other files of JSON are left out without a word."""
    files: dict[str, ResultFile] = {}
    taken: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.glob("*.json"), key=lambda path: (len(path.name), path.name)):  # <name>.json first
        try:
            result = read_result(path)
        except OtherFile:
            continue
        except UserError as error:
            problems.append(str(error))
            continue
        if result.name in files:
            problems.append(f"{path}: {taken[result.name]} is shown, which is of the same evaluation ({result.name})")
            continue
        files[result.name], taken[result.name] = result, path
    return files, problems
