#!/usr/bin/env python3
"""All evaluation results of some checkpoints in one table: the best marked, differences with their intervals.

    python scripts/compare.py base_results stablelm_7b/checkpoint-4000 stablelm_7b/checkpoint-12000
    python scripts/compare.py stablelm_7b --plot curves.png        # a run: all its checkpoints, and curves of them
    python scripts/compare.py stablelm_7b --all                    # each data set, language and turn, every checkpoint
    python scripts/compare.py stablelm_7b other_run --markdown     # for a pull request or a model card

Each argument is a checkpoint (its eval/ folder is read), a run (all its checkpoints), or what --output of an evaluation
was: a result file, or a folder of them. Below each value stands its difference to the first column's, with the 95 %
interval. Where both results keep what was measured on each item, it is a paired bootstrap over the items that both
have; else, marked ~, it comes from the two intervals as if they were of different items, and is wider. A difference
whose interval holds 0 may be chance. A metric has one row, of all items; --all adds its rows of single data sets,
languages and turns. Of a run with more than 8 checkpoints the first, the newest 3 and the best are shown, with --all
each; the plot has them all. What has no results, a damaged result file, or one of a newer format, is passed over with a
line that names it.
"""

from utils.command_line import OneLineParser
from utils.errors import UserError, one_line_errors


def arguments():
    parser = OneLineParser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="CHECKPOINT", help="or a run, a result file, a folder of results")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    more = "show each data set, language and turn too, and every checkpoint of a run, however many it has"
    parser.add_argument("--all", action="store_true", help=more)
    parser.add_argument("--plot", metavar="FILE", help="write curves over the steps of a run's checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS = arguments()

import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from evaluation.intervals import RESAMPLES, paired_differences
from evaluation.result_files import Column, Metric, ResultFile, read_columns
from utils.tables import counted, make_table, show_table

MOST_OF_A_RUN = 8  # checkpoints; a column takes 30 characters, of 200 a line took 6,400
NEWEST = BEST = 3  # of a run that has more


def main(options) -> None:
    columns, problems = read_columns(map(Path, options.paths))
    for problem in problems:
        print(f"passed over: {' '.join(problem.split())}", file=sys.stderr)
    shown, left_out = (columns, []) if options.all else some_of(columns)
    rows, notes = table_rows(shown, columns, options.all)
    show = print_markdown if options.markdown else print_table
    show(shown, rows, [*left_out, *notes])
    if options.plot:
        plot(columns, Path(options.plot), options.all)


# ---- Choosing ----


def some_of(columns: list[Column]) -> tuple[list[Column], list[str]]:
    """The columns to show, and a line for each run that has more: of it the first (of all: what the others are compared
    with), the newest, the best by its first metric that can be better, the best of each further evaluation."""
    shown, notes = [], []
    for run in dict.fromkeys(column.run for column in columns):
        own = [column for column in columns if column.run == run]
        chosen = {0, *range(len(own) - NEWEST, len(own))}
        if len(own) <= MOST_OF_A_RUN:
            shown += own
            continue
        names = dict.fromkeys(name for column in own for name in column.files)
        for count, evaluation in zip([BEST] + [1] * len(names), names, strict=False):
            chosen.update(best_by(evaluation, own)[:count])
        shown += [column for number, column in enumerate(own) if number in chosen]
        notes.append(
            f"{run}: {len(chosen)} of {len(own)} checkpoints are shown, the first, the newest {NEWEST} and the best; a "
            "row without * has its best among the others: --all shows them, --plot FILE draws them"
        )
    return shown, notes


def best_by(evaluation: str, columns: list[Column]) -> list[int]:
    """The columns from the best on, by an evaluation's first metric that can be better; of equals the earliest."""
    results = [column.files[evaluation].results if evaluation in column.files else {} for column in columns]
    ranked = ((name, metric.better) for own in results for name, metric in own.items() if metric.better)
    name, better = next(ranked, (None, None))
    values = {number: own[name].value for number, own in enumerate(results) if has_value(own.get(name))}
    return sorted(values, key=lambda number: values[number] if better == "lower" else -values[number])


def has_value(metric: Metric | None) -> bool:
    return metric is not None and metric.value is not None


def is_part(name: str, results: dict[str, Metric]) -> bool:
    """Whether a metric is of a data set, a language or a turn alone, and stands beside the same of all items.

    What is left without the problems that a model was trained on is no part: it is what the score is worth.
    """
    kind, slash, _ = name.partition("/")
    return bool(slash) and kind in results and "in_training" not in results[name].where


# ---- Comparing ----


@dataclass
class Cell:
    """A metric of a column: its value, whether it is the row's best, and its difference to the first column's."""

    value: float | None
    best: bool = False
    difference: str = ""


def table_rows(
    columns: list[Column], every: list[Column], parts: bool
) -> tuple[list[tuple[str, str, list[Cell]]], list[str]]:
    """(evaluation, metric, cells) for each metric that any column has, with or without those of parts, the best that
    of `every` one, shown or not; and what has to be said below the table."""
    rows, notes, left_out = [], [], 0
    for evaluation in dict.fromkeys(name for column in columns for name in column.files):
        files = [column.files.get(evaluation) for column in columns]
        pairs = [paired_differences(files[0], file) if files[0] and file else {} for file in files]
        notes += differing_settings(evaluation, columns)
        names = {name: is_part(name, file.results) for file in files if file for name in file.results}
        left_out += 0 if parts else sum(names.values())
        for name in (name for name, part in names.items() if parts or not part):
            metrics = [file.results.get(name) if file else None for file in files]
            of_every = [column.files[evaluation].results.get(name) for column in every if evaluation in column.files]
            values = [metric.value for metric in of_every if has_value(metric)]
            better = next(metric.better for metric in metrics if metric)
            best = {"higher": max, "lower": min}[better](values) if better and len(set(values)) > 1 else None
            shown = [metric.value if metric else None for metric in metrics]
            cells = [Cell(value, value is not None and value == best) for value in shown]
            for cell, metric, pair in zip(cells[1:], metrics[1:], pairs[1:], strict=True):
                if has_value(metrics[0]) and has_value(metric):
                    cell.difference = describe_difference(metrics[0], metric, pair.get(name))
            rows.append((evaluation, name, cells))
        for column, file in zip(columns, files, strict=True):
            notes += [f"{column.name}, {evaluation}: {problem}" for problem in (said_of(file) if file else [])]
    if left_out:
        notes.append(f"--all adds {counted(left_out, 'row')} of single data sets, languages and turns")
    return rows, notes


def said_of(file: ResultFile) -> list[str]:
    """What has to be known of a result: its own warnings, and metrics that are not what they say."""
    odd = [name for name, metric in file.results.items() if None not in metric.ends and not metric.interval]
    return [" ".join(warning.split()) for warning in file.warnings] + [
        f"the interval of {name} does not hold its value, and is left out" for name in odd
    ]


def differing_settings(evaluation: str, columns: list[Column]) -> list[str]:
    """A line for each column whose evaluation was not that of the first that has it."""
    first, *others = [column for column in columns if evaluation in column.files]
    usual, notes = first.files[evaluation].settings, []
    for column in others:
        settings = column.files[evaluation].settings
        if keys := [key for key in {**usual, **settings} if usual.get(key) != settings.get(key)]:
            notes.append(f"{evaluation}: {column.name} and {first.name} differ in {', '.join(keys)}")
    return notes


def describe_difference(first: Metric, other: Metric, pair: tuple | None) -> str:
    """`-0.4100 [-0.5200, -0.3000]`; ~ where it is not paired."""
    if pair and math.isfinite(pair[0]):
        difference, (low, high), items = pair
        over = f" ({items:,} in both)" if {items} != {first.n, other.n} else ""
        return f"{difference:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low is not None else "") + over
    difference = other.value - first.value
    if not first.interval or not other.interval:
        return f"{difference:+.4f}"
    # The distances of the ends from the values add up as squares (Newcombe's method 10, where these are Wilson's).
    low = difference - math.hypot(other.value - other.low, first.high - first.value)
    high = difference + math.hypot(other.high - other.value, first.value - first.low)
    return f"~{difference:+.4f} [{low:+.4f}, {high:+.4f}]"


# ---- Showing ----


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def column_titles(columns: list[Column]) -> list[str]:
    """Their paths without the folder that all are in, and their steps."""
    names = [os.path.abspath(column.name) for column in columns]
    common = os.path.dirname(os.path.commonpath(names)) if len(set(names)) == 1 else os.path.commonpath(names)
    titles = [os.path.relpath(name, common) for name in names]
    titles = [os.path.basename(common) if title == "." else title for title in titles]
    steps = ["" if column.step is None else f" (step {column.step:,})" for column in columns]
    return [title + step for title, step in zip(titles, steps, strict=True)]


def legend(rows, notes: list[str]) -> list[str]:
    """What the marks of a table mean, as far as it has them, and its notes."""
    lines = [f"* best; below each value the difference to the first column, 95 % interval ({RESAMPLES:,} resamples)"]
    if any(cell.difference.startswith("~") for *_, cells in rows for cell in cells):
        lines.append("~ not paired: from the two intervals")
    return [*lines, *(f"note: {note}" for note in notes)]


def print_table(columns: list[Column], rows, notes: list[str]) -> None:
    table = make_table(None, "evaluation", "metric", *column_titles(columns), names=2)
    last = None
    for evaluation, metric, cells in rows:
        if last not in (None, evaluation):
            table.add_section()
        texts = [f"{figure(cell.value)}{'*' * cell.best}\n{cell.difference}".rstrip("\n") for cell in cells]
        table.add_row(evaluation if evaluation != last else "", metric, *texts)
        last = evaluation
    show_table(table)
    print("\n".join(legend(rows, notes)))


def print_markdown(columns: list[Column], rows, notes: list[str]) -> None:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    print(line(["evaluation", "metric", *column_titles(columns)]))
    print(line(["---", "---", *["---:"] * len(columns)]))
    for evaluation, metric, cells in rows:
        values = [f"**{figure(cell.value)}**" if cell.best else figure(cell.value) for cell in cells]
        texts = [f"{value}<br>{cell.difference}" for value, cell in zip(values, cells, strict=True)]
        print(line([evaluation, metric, *(text.removesuffix("<br>") for text in texts)]))
    print()
    for text in legend(rows, notes):
        print(text.replace("* best", "**bold**: best", 1) + "  ")


def plot(columns: list[Column], path: Path, parts: bool) -> None:
    """Draw every metric over the steps: a panel for each kind, in it a line for each run, and for each part if wanted.

    A perplexity, which is its loss on another scale, is left to the table.

    Raises: UserError where no run has results at two steps.
    """
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    runs = dict.fromkeys(column.run for column in columns)
    for column in columns:
        for evaluation, file in column.files.items() if column.step is not None else ():
            for name, metric in file.results.items():
                kind, _, part = name.partition("/")
                label = " ".join([part or "all", *([column.run] if len(runs) > 1 else [])])
                if has_value(metric) and not metric.exp and (parts or not is_part(name, file.results)):
                    title = kind if kind == evaluation else f"{evaluation}: {kind}"
                    panels[title][label].append((column.step, metric))
    if not any(len({step for step, _ in points}) > 1 for lines in panels.values() for points in lines.values()):
        raise UserError("--plot: needs results at two steps of a run, evaluate more of its checkpoints")
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure((6 * across, 4.5 * down), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(down, across, place)
        # A run has more parts than there are colours: the eleventh line has the first one's, and is dashed.
        axis.set_prop_cycle(cycler(linestyle=["-", "--", ":", "-."]) * rcParams["axes.prop_cycle"])
        for label, points in lines.items():
            steps, metrics = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            whole = label.startswith("all")
            axis.plot(steps, [metric.value for metric in metrics], marker="o", lw=2.5 if whole else 1, label=label)
            intervals = [metric.interval for metric in metrics]
            if whole and all(intervals):
                axis.fill_between(steps, *zip(*intervals, strict=True), alpha=0.2)
        axis.set(xlabel="step")
        axis.set_title(title, parse_math=False)  # a name may hold $
        axis.grid(alpha=0.3)
        for text in axis.legend(fontsize=7).get_texts():
            text.set_parse_math(False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: cannot be written: {error}") from error
    print(f"curves: {path}")


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS)
