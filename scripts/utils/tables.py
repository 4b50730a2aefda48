"""Tables on the screen."""

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
