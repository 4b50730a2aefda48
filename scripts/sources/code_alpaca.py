"""Code Alpaca: an instruction, with or without an input.

By the rules of Open-Assistant's model_training (custom_datasets/qa_datasets.py), April 2023.
"""

from collections import Counter
from typing import Any

from sources.source import Conversation, HubSource, Record, Source, has_no_filter_phrase, pair


def read_alpaca(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation]:
    """No conversation, but not None, for a row that is dropped: the split is drawn before the filter."""
    question, given, answer = record.get("instruction"), record.get("input"), record.get("output")
    question = f"{question}\n{given}" if given else question
    return [pair(question, answer)] if has_no_filter_phrase(question, answer, dropped) else []


SOURCE = Source(
    about="Code Alpaca",
    licence="CC BY-NC 4.0 in its authors' repository, written by an OpenAI model; about 20,000 rows",
    hub=HubSource("sahil2801/CodeAlpaca-20k", ("code_alpaca_20k.json",)),
    read=read_alpaca,
    fields=("instruction", "input", "output"),
    languages=("en",),
    split="random_split",
)
