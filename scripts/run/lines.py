"""metrics.jsonl, bad_steps.jsonl and samples.jsonl: lines are added, and read back; what is none does not count."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from utils.errors import UserError
from utils.launch import say
from utils.schemas import Schema


class Line(Schema):
    """A line of bad_steps.jsonl or samples.jsonl, as far as it is read back."""

    step: Annotated[int, Field(ge=0, le=2**63 - 1)]


class MetricsLine(Line):
    """A line of metrics.jsonl: numbers, or null where one was not finite."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to one of these files.  Raises: UserError where the disk is full."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}; the checkpoints are whole") from error


def parse_line(text: str | bytes, schema: type[Line]) -> dict[str, Any] | None:
    """The values of a line; None for what is no such line."""
    try:
        values = json.loads(text)
        schema.model_validate(values)
    except (ValueError, RecursionError, ValidationError):
        return None
    return values


def metrics_lines(path: Path, start: int = 0, having: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a metrics.jsonl from a byte on, each with the byte after it; none where somebody has taken the
    file away. Only those that hold the text `having` are parsed: at 100,000 lines that is a 20th of the time."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):  # which is being written, or was cut off by a full disk
                return
            start += len(line)
            if having.encode() in line and (values := parse_line(line, MetricsLine)):
                yield start, values


def best_point(path: Path, name: str) -> tuple[int, float] | None:
    """The first (step, value) at which a metric was lowest; None where it never was a number."""
    lines = metrics_lines(path, having=f'"{name}"')
    found = ((line[name], line["step"]) for _, line in lines if line.get(name) is not None)
    value, step = min(found, default=(None, None))
    return None if value is None else (step, value)


def lines_up_to(path: Path, step: int, evaluation_due: bool) -> str:
    """The text of the lines of steps up to this one, but for its evaluation where that is to be made again.

    Says which lines it leaves out as damaged.  Raises: OSError.
    """
    schema = MetricsLine if path.name == "metrics.jsonl" else Line
    of_evaluation = (lambda values: True) if path.name == "samples.jsonl" else (lambda values: "eval_loss" in values)
    # Not splitlines: what the others quote may hold U+2028. A full disk may have cut a character.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    for number, line in enumerate(lines, 1):
        values = parse_line(line, schema)
        if values is None:
            if line and number < len(lines):  # else the last one of a run that was killed while writing it
                say(f"{path} line {number}: left out, it is damaged")
        elif values["step"] < step or (values["step"] == step and not (evaluation_due and of_evaluation(values))):
            kept.append(f"{line}\n")
    return "".join(kept)
