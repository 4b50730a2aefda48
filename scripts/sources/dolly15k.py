"""databricks-dolly-15k, in its own layout or in that of Open-Assistant's copy.

By the rules of Open-Assistant's model_training (custom_datasets/qa_datasets.py, instruction.py), April 2023.
"""

import re
from collections import Counter
from typing import Any, Literal

from sources.source import (
    PREPARED,
    Conversation,
    DatasetOptions,
    HubSource,
    Record,
    Source,
    has_no_filter_phrase,
    key,
    pair,
)

REFERENCE_MARKS = re.compile(r"\[\d+(?:,\s*\d+)*?\]|\[citation needed\]|\[[a-zA-Z]\]")  # [3], [1, 2], [a]


class DollyOptions(DatasetOptions):
    """With the key of `dolly15k` alone."""

    context: Literal["drop", "prompt"] = key(
        "drop", "the passage that a question is about: left out, as the original did, or put below it", PREPARED
    )


def read_dolly(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    """A row of either layout; its context is a passage that the question is about, where it is not blank.

    The original made the context a property of the reply, which without use_system_tag is never seen in training.
    Under `context: prompt` it stands below the question, after a blank line.
    """
    if "instruction" in record.values:
        question, answer, context = record.get("instruction"), record.get("response"), record.get("context")
    else:
        question, answer = record.get("INSTRUCTION"), record.get("RESPONSE")
        context = record.inside(record.get("METADATA", dict), "METADATA", "CONTEXT")
    if not question or not answer:
        dropped["row with an empty question or answer"] += 1
        return None
    if not has_no_filter_phrase(question, answer, dropped):
        return None
    context = REFERENCE_MARKS.sub("", context)
    if options.context == "prompt":
        return [pair(f"{question}\n\n{context}" if context.strip() else question, answer)]
    return [pair(question, answer, {"context": context})]


SOURCE = Source(
    about="databricks-dolly-15k",
    licence="CC BY-SA 3.0; about 15,000 rows",
    hub=HubSource("OllieStanley/oa_dolly_15k"),
    read=read_dolly,
    fields=("instruction", "response", "context", "metadata"),
    languages=("en",),
    options=DollyOptions,
)
