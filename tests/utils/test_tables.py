"""Numbers of things in a sentence."""

import pytest

from utils.tables import counted


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
