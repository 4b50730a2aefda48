"""ShareGPT conversations, cleaned and unfiltered.

By the rules of Open-Assistant's model_training (custom_datasets/qa_datasets.py), April 2023. The filler for an empty
prompt, which it drew without a seed, depends on rng_seed and the record's number only.
"""

import random
import re
from collections import Counter
from typing import Any

from sources.source import Conversation, HubSource, Record, Source, pair

FILLERS = ("...", "Please continue", "Go on", "")  # an empty human message becomes one of these
MAX_CHARACTERS = 32 * 1024  # of a message
NUMBER_MARK = re.compile(r"\[\s?\d+\s?\]")  # [1], [ 12 ]


def read_vicuna(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    """A ShareGPT conversation; speakers other than human and gpt only end the message before them."""
    lines = record.get("conversations", list)
    speakers = [record.inside(line, "conversations", "from") for line in lines]
    texts = [record.inside(line, "conversations", "value", nullable=True) for line in lines]
    if not lines or speakers[0] != "human":
        dropped["conversation without human at its start"] += 1
        return None
    if ("gpt", True) in zip(speakers, (not text for text in texts), strict=True):
        dropped["conversation with an empty gpt message"] += 1
        return None
    dice = random.Random(f"{rng_seed} vicuna {record.index}")
    turns: list[tuple[str, list[str]]] = []
    for speaker, text in zip(speakers, texts, strict=True):
        text = text or (dice.choice(FILLERS) if speaker == "human" else "")
        # The data set's markdown converter had escaped every underscore and asterisk.
        text = NUMBER_MARK.sub("", text.replace(r"\_", "_").replace(r"\*", "*"))
        if not turns or turns[-1][0] != speaker:
            turns.append((speaker, []))
        turns[-1][1].append(text.strip())
    joined = [(speaker, "\n".join(parts)[:MAX_CHARACTERS]) for speaker, parts in turns]
    prompts, replies = ([text for who, text in joined if who == speaker] for speaker in ("human", "gpt"))
    if len(prompts) != len(replies):
        dropped["conversation with unequal numbers of prompts and replies"] += 1
        return None
    pairs = (pair(*texts).messages for texts in zip(prompts, replies, strict=True))
    return [Conversation([message for pair in pairs for message in pair])]


SOURCE = Source(
    about="ShareGPT conversations",
    licence="texts shared by ChatGPT users, without a licence of theirs; about 94,000 conversations",
    hub=HubSource("Aeala/ShareGPT_Vicuna_unfiltered", ("ShareGPT_V4.3_unfiltered_cleaned_split.json",)),
    read=read_vicuna,
    fields=("conversations",),
    languages=("en",),
)
