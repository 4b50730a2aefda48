"""Numbers of things in a sentence; how far a script is, on a terminal and in a log file."""

import io
import itertools
import os
import pty
import sys
import termios

import pytest

from utils.tables import counted, progress_bar


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
