"""Phrases by which the original dropped rows of dolly15k, grade_school_math_instructions and code_alpaca."""

from collections import Counter
from functools import cache
from pathlib import Path

FILTER_PHRASES_FILE = Path(__file__).with_suffix(".txt")


@cache
def filter_phrases() -> tuple[str, ...]:
    """In lower case, without those that hold another; a blank at the end counts: "As an AI " is not in "As an AIDE"."""
    phrases = {line.lower() for line in FILTER_PHRASES_FILE.read_text(encoding="utf-8").split("\n") if line}
    return tuple(one for one in sorted(phrases) if not any(other in one for other in phrases - {one}))


def has_no_filter_phrase(question: str, answer: str, dropped: Counter) -> bool:
    text = f"{question}\n{answer}".lower()  # no phrase holds a newline
    for phrase in filter_phrases():  # a plain loop: `any` over a generator took a sixth of all preparation
        if phrase in text:
            dropped["row with a filter phrase"] += 1
            return False
    return True
