"""What the scripts show: tables, how far they are, numbers of things in a sentence."""

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

PIPE_WIDTH = 160  # columns; a pipe does not say how wide it is, and this holds every table but compare.py's


def make_console(pipe_width: int = PIPE_WIDTH) -> Console:
    """The screen, as wide as it is; where it is no screen, of a width that wraps no table."""
    return Console(width=None if sys.stdout.isatty() else pipe_width, highlight=False, markup=False)


def make_table(title: str, first: str, *columns: str) -> Table:
    """A table whose first column holds names and whose others hold numbers."""
    table = Table(first, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def progress_bar(iterable: Iterable | None = None, **keys) -> tqdm:
    """tqdm's bar on a terminal. In a log file, which keeps each drawing of a bar (76 KB of an hour's run), lines: one
    at the start, one a minute, one at the total, and one where the description changes."""
    on_terminal = sys.stderr is None or sys.stderr.isatty()  # None where the shell has closed it
    return tqdm(iterable, **keys) if on_terminal else LogLines(iterable, **keys)


class LogLines(tqdm):
    """A tqdm that writes whole lines, and few of them."""

    SECONDS = 60

    def __init__(self, iterable: Iterable | None, desc: str, **keys):
        line = "{desc}{n_fmt}/{total_fmt}, {elapsed} gone, {remaining} to go, {rate_fmt}{postfix}"
        rare = {"mininterval": self.SECONDS, "maxinterval": self.SECONDS, "leave": False}
        super().__init__(iterable, f"{desc}: ", file=WholeLines(sys.stderr), bar_format=line, **keys, **rare)

    def update(self, n: float = 1) -> bool | None:
        shown = super().update(n)
        if self.n == self.total and not shown:
            self.refresh()
        return shown


class WholeLines:
    """A text file that tqdm draws on: what it draws becomes a line, what it wipes out with blanks nothing."""

    def __init__(self, file: TextIO):
        self.file, self.encoding, self.flush = file, file.encoding, file.flush

    def write(self, text: str) -> None:
        if words := text.split():
            self.file.write(" ".join(words) + "\n")


def counted(number: int, what: str) -> str:
    """`1 row with an empty answer`, `2,000 rows with an empty answer`; `what` is of one, its noun the first word."""
    noun, space, rest = what.partition(" ")
    if number != 1:
        if noun.endswith(("s", "x", "ch", "sh")):
            noun += "es"
        elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
            noun = noun[:-1] + "ies"
        else:
            noun += "s"
    return f"{number:,} {noun}{space}{rest}"
