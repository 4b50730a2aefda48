"""What the scripts show: tables, how far they are, numbers of things in a sentence."""

import sys
from collections.abc import Iterable
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

ENDLESS = 10**6  # columns: of a pipe, and of a table, whose width is chosen here and not by rich, which would cut it
NARROWEST = 16  # columns of the screen that a name is broken into where there is no room


def make_console() -> Console:
    """The screen, as wide as it is; where it is no screen, of a width that breaks no line."""
    on_screen = sys.stdout is not None and sys.stdout.isatty()  # None where the shell has closed it
    return _console(None if on_screen else ENDLESS)


def _console(width: int | None) -> Console:
    return Console(width=width, highlight=False, markup=False, emoji=False)


def make_table(title: str | None, *header: str, names: int = 1) -> Table:
    """A table whose first columns, `names` of them, say what a row is of, and whose others hold numbers."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < names else "right")
    return table


def show_table(table: Table) -> None:
    """Print a table of `make_table`, every number whole.

    A screen that is too narrow gets its headers in lines of a word or so; then as many of the columns as there is room
    for, and the others in tables below, with the names again. Only a name is ever broken.
    """
    names = sum(column.justify == "left" for column in table.columns)
    title = table.title
    for columns in _side_by_side(table.columns, names, make_console().width):
        part = make_table(title)
        for column, width in columns:
            part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
        for row, *cells in zip(table.rows, *(column.cells for column, _ in columns), strict=True):
            part.add_row(*cells, end_section=row.end_section)
        _console(ENDLESS).print(part)
        title = None


def _side_by_side(columns: list[Column], names: int, screen: int) -> list[list[tuple[Column, int]]]:
    """The columns of each table that a screen has room for, with their widths."""

    def total(widths: Iterable[int]) -> int:
        return sum(width + 3 for width in widths) + 1  # with what rich draws between them

    whole = [_width(column, [column.header]) for column in columns]
    if total(whole) <= screen:
        return [list(zip(columns, whole, strict=True))]
    widths = [_width(column, column.header.split()) for column in columns]
    while total([*widths[:names], max(widths[names:], default=0)]) > screen and max(widths[:names]) > NARROWEST:
        widths[widths.index(max(widths[:names]))] -= 1
    found: list[list[int]] = [[]]
    for number in range(names, len(columns)):
        if found[-1] and total(widths[each] for each in [*range(names), *found[-1], number]) > screen:
            found.append([])
        found[-1].append(number)
    return [[(columns[each], widths[each]) for each in [*range(names), *numbers]] for numbers in found]


def _width(column: Column, header: list[str]) -> int:
    lines = [line for cell in column.cells for line in cell.splitlines()]
    return max(map(cell_len, [*header, *lines]), default=0)


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
