"""Tables on the screen, and numbers of things in a sentence."""

import sys

from rich.console import Console
from rich.table import Table

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
