"""GSM8K as instructions: its training problems, and in the published file its test problems too.

By the rules of Open-Assistant's model_training (custom_datasets/instruction.py), April 2023.
"""

from collections import Counter
from typing import Any

from sources.source import Conversation, HubSource, Record, Source, has_no_filter_phrase, pair


def read_math(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    question, answer = (record.get(name, nullable=True) or "" for name in ("INSTRUCTION", "RESPONSE"))
    if not question.strip() or not answer.strip():
        dropped["row with a blank question or answer"] += 1
        return None
    return [pair(question, answer)] if has_no_filter_phrase(question, answer, dropped) else None


SOURCE = Source(
    about="GSM8K as instructions",
    licence="MIT; 8,792 rows: GSM8K's 7,473 train and 1,319 TEST rows, so a GSM8K score afterwards is contaminated",
    hub=HubSource("qwedsacf/grade-school-math-instructions"),
    read=read_math,
    fields=("instruction", "response"),
    languages=("en",),
    shuffled=True,
)
