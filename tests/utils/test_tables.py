"""Tables on screens of any width; numbers of things in a sentence; how far a script is, on a terminal and in a log."""

import io
import itertools
import os
import pty
import re
import sys
import termios

import pytest
from hypothesis import strategies as st
from mixes import given

from utils.tables import counted, make_table, progress_bar, show_table


class Output(io.StringIO):
    """A file, or a screen, which rich asks COLUMNS for."""

    def __init__(self, columns: int | None):
        super().__init__()
        self.columns = columns

    def isatty(self) -> bool:
        return self.columns is not None


def shown(rows: list[list[str]], names: int, columns: int | None) -> list[list[list[str]]]:
    """The tables that are printed of one, by rows of cells; a header first, its lines joined."""
    table = make_table(None, *rows[0], names=names)
    for row in rows[1:]:
        table.add_row(*row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Output(columns))
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm")
        show_table(table)
        printed = re.sub(r"\x1b\[\d*m", "", sys.stdout.getvalue())
    assert columns is None or max(map(len, printed.splitlines())) <= max(columns, 16 * names + 40)
    found = []
    for part in printed.split("┏")[1:]:
        head, body = (
            [[cell.strip() for cell in line.strip("┃│").split(bar)] for line in lines.splitlines() if line[0] == bar]
            for lines, bar in zip(part.split("┡"), "┃│", strict=True)
        )
        found.append([[" ".join(lines).strip() for lines in zip(*head, strict=True)], *body])
    return found


numbers = st.one_of(
    st.integers(0, 10**12).map("{:,}".format), st.floats(0, 1).map("{:.4f} [+0.1234, -0.1234]".format), st.just("")
)


@given(st.data(), examples=60)
def test_no_number_is_ever_cut(data):
    """On a screen of any width, and in a file."""
    names, count = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 8))
    titles = [data.draw(st.sampled_from(["loss", "GB sent a step", "exact_match"])) for _ in range(count)]
    rows = [[*["name"] * names, *titles]]
    for row in range(data.draw(st.integers(1, 4))):
        rows.append([f"row {row}" + "x" * data.draw(st.integers(0, 8))] * names + [data.draw(numbers) for _ in titles])
    columns = data.draw(st.one_of(st.none(), st.integers(1, 200)))
    parts = shown(rows, names, columns)
    assert columns is not None or len(parts) == 1
    for row, cells in enumerate(rows):
        assert [cell for part in parts for cell in part[row][names:]] == cells[names:]
        assert all(part[row][:names] == cells[:names] for part in parts)


def test_a_long_name_is_broken_where_there_is_no_room():
    """As many characters of it as there are, and the numbers whole."""
    rows = [["data set", "tokens"], ["grade_school_math_instructions", "1,234,567,890"]]
    ((header, *body),) = shown(rows, 1, 40)
    assert header == rows[0]
    assert "".join(name for name, _ in body) == rows[1][0]
    assert [number for _, number in body if number] == [rows[1][1]]
    assert len(body) == 2


@pytest.mark.parametrize(
    ("number", "what", "words"),
    [
        (1, "step", "1 step"),
        (0, "step", "0 steps"),
        (2, "process", "2 processes"),
        (3, "batch of 4", "3 batches of 4"),
        (1, "thread with a deleted message", "1 thread with a deleted message"),
        (1234, "thread with a deleted message", "1,234 threads with a deleted message"),
        (2, "reply", "2 replies"),
        (2, "turn away", "2 turns away"),
        (2, "day", "2 days"),
    ],
)
def test_counted(number, what, words):
    assert counted(number, what) == words


def steps(count: int, total: int) -> None:
    """As a run shows them: with its figures after each, and an evaluation in the middle."""
    with progress_bar(total=total, desc="training", unit="step", initial=1) as bar:
        for step in range(2, count + 1):
            bar.update()
            bar.set_postfix({"loss": step}, refresh=False)
            if step == total // 2:
                bar.set_description("evaluating")
                bar.set_description("training")


@pytest.mark.parametrize(
    ("count", "lines"), [(1000, ["training: 1/", "evaluating: 500/", "training: 500/", "training: 1000/"]), (300, None)]
)
def test_a_log_file_gets_few_whole_lines(monkeypatch, count, lines):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    steps(count, total=1000)
    written = file.getvalue()
    assert "\r" not in written
    assert written.endswith("\n")
    shown = written.splitlines()
    assert [line.split("1000,")[0] for line in shown] == (lines or ["training: 1/"])
    assert lines is None or shown[1].endswith("loss=500")


def test_a_long_run_gets_a_line_a_minute(monkeypatch):
    """By a clock of which each step takes 4 seconds."""
    file, clock = io.StringIO(), itertools.count(0, 4)
    monkeypatch.setattr(sys, "stderr", file)
    with progress_bar(total=151, desc="solving", miniters=1) as bar:
        bar._time = clock.__next__
        bar.start_t = bar.last_print_t = 0
        for _ in range(150):
            bar.update()
    numbers = [int(line.split(": ")[1].split("/")[0]) for line in file.getvalue().splitlines()]
    assert len(numbers) == pytest.approx(150 * 4 / 60, abs=4)
    assert numbers[1] <= 16


def test_a_terminal_has_a_bar(monkeypatch):
    keyboard, screen = pty.openpty()
    termios.tcsetwinsize(screen, (40, 100))
    with open(screen, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        steps(40, total=1000)
        file.flush()
        drawn = os.read(keyboard, 2**16).decode()
    os.close(keyboard)
    assert "%|" in drawn
