r"""The data sources: what each makes of one record of its file.

oasst_export, vicuna, dolly15k, grade_school_math_instructions and code_alpaca, by the rules of Open-Assistant's
model_training (custom_datasets/oasst_dataset.py, qa_datasets.py, instruction.py, utils.py), April 2023; and messages,
for chat data of one's own. What the original drew without a seed (the filler for empty prompts) depends on rng_seed,
the data set and the record number only.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from utils.data_files import HubSource
from utils.dialogue import Conversation, Message
from utils.messages_source import read_messages
from utils.records import Record

FILLERS = ("...", "Please continue", "Go on", "")  # an empty human message of ShareGPT becomes one of these
MAX_CHARACTERS = 32 * 1024  # of a ShareGPT message
NUMBER_MARK = re.compile(r"\[\s?\d+\s?\]")  # [1], [ 12 ]
FILTER_PHRASES_FILE = Path(__file__).with_name("filter_phrases.txt")
REFERENCE_MARKS = re.compile(r"\[\d+(?:,\s*\d+)*?\]|\[citation needed\]|\[[a-zA-Z]\]")  # [3], [1, 2], [a]

# Turns a record, with the data set's options, into the conversations it holds, which stay together in a split; or None
# when the split is drawn without it. What it drops it counts by reason; the last argument is rng_seed.
Reader = Callable[[Record, Any, Counter, int], list[Conversation] | None]


@dataclass(frozen=True)
class Source:
    about: str  # licence and size
    hub: HubSource
    read: Reader
    # scikit-learn's over the records kept, or torch's "random_split" over them, each with a seed of its own.
    split: Literal["train_test_split", "random_split"] = "train_test_split"
    shuffled: bool = False  # whether records are shuffled, by random.Random(42), before they are split


def read_oasst(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    """A message tree: its threads, depth first, if it is ready, reviewed and in one of the languages."""
    prompt = record.get("prompt", dict)
    if record.values.get("tree_state") != "ready_for_export":
        dropped["tree not ready for export"] += 1
    elif not prompt.get("review_result"):
        dropped["tree whose prompt was not accepted in review"] += 1
    elif record.inside(prompt, "prompt", "lang") not in _languages(options.lang):
        dropped["tree in another language"] += 1
    else:
        return [Conversation(thread) for thread in _threads(record, [prompt], [], options.top_k, dropped)]
    return None


@cache
def _languages(lang: str) -> frozenset[str]:
    return frozenset(code.strip() for code in lang.split(","))


def _threads(
    record: Record, path: list[dict], above: list[Message], top_k: int | None, dropped: Counter
) -> Iterator[list[Message]]:
    """The kept threads below path[-1], depth first, replies in the order of the file; `above` is path[:-1] read."""
    messages = [*above, _oasst_message(record, path[-1], len(above))]
    replies = path[-1].get("replies") or []
    if not isinstance(replies, list):
        raise record.error("field 'message.replies' is not a list")
    for reply in replies:
        yield from _threads(record, [*path, reply], messages, top_k, dropped)
    if replies or len(path) == 1:
        return
    if messages[-1].role == "user" and path[-2]["replies"][0] != path[-1]:
        return  # an unanswered prompt: the thread up to its parent counts once, with the parent's first reply
    if any(node.get("deleted") or node.get("synthetic") for node in path):
        dropped["thread with a deleted or synthetic message"] += 1
    elif top_k is not None and any(_rank(record, path, place) >= top_k for place in range(1, len(path))):
        dropped["thread with a reply of rank top_k or worse"] += 1
    else:
        yield messages[:-1] if messages[-1].role == "user" else messages


def _rank(record: Record, path: list[dict], place: int) -> float:
    """A reply without a rank passes every top_k if it is the only one, and none if it has siblings."""
    rank, siblings = path[place].get("rank"), path[place - 1]["replies"]
    if path[place]["role"] != "assistant" or (rank is None and len(siblings) == 1):
        return -1
    return float("inf") if rank is None else record.inside(path[place], "message", "rank", int)


def _oasst_message(record: Record, node: dict, place: int) -> Message:
    text, role = record.inside(node, "message", "text"), record.inside(node, "message", "role")
    if role != ("prompter", "assistant")[place % 2]:
        raise record.error(f"message {place + 1} of a thread is of role {role!r}")
    if role == "prompter":
        return Message("user", text)
    properties = {"lang": record.inside({"lang": None} | node, "message", "lang", nullable=True)}
    try:
        for name in ("quality", "humor", "creativity"):
            label = (node.get("labels") or {}).get(name) or {}
            properties[name] = None if label.get("value") is None else float(label["value"])
    except (AttributeError, TypeError, ValueError):
        raise record.error(f"field 'message.labels' has no number as the value of {name!r}") from None
    return Message(role, text, {key: value for key, value in properties.items() if value is not None})


def read_vicuna(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    """A ShareGPT conversation; speakers other than human and gpt only end the message before them."""
    lines = record.get("conversations", list)
    speakers = [record.inside(line, "conversations", "from") for line in lines]
    texts = [record.inside(line, "conversations", "value", nullable=True) for line in lines]
    if not lines or speakers[0] != "human":
        dropped["conversation that does not start with human"] += 1
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
    pairs = (_pair(*texts).messages for texts in zip(prompts, replies, strict=True))
    return [Conversation([message for pair in pairs for message in pair])]


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
    if not _is_kept(question, answer, dropped):
        return None
    context = REFERENCE_MARKS.sub("", context)
    if options.context == "prompt":
        return [_pair(f"{question}\n\n{context}" if context.strip() else question, answer)]
    return [_pair(question, answer, {"context": context})]


def read_math(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    question, answer = (record.get(name, nullable=True) or "" for name in ("INSTRUCTION", "RESPONSE"))
    if not question.strip() or not answer.strip():
        dropped["row with a blank question or answer"] += 1
        return None
    return [_pair(question, answer)] if _is_kept(question, answer, dropped) else None


def read_alpaca(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation]:
    """No conversation, but not None, for a row that is dropped: the split is drawn before the filter."""
    question, given, answer = record.get("instruction"), record.get("input"), record.get("output")
    question = f"{question}\n{given}" if given else question
    return [_pair(question, answer)] if _is_kept(question, answer, dropped) else []


def _pair(question: str, answer: str, properties: dict | None = None) -> Conversation:
    return Conversation([Message("user", question), Message("assistant", answer, properties or {})])


@cache
def filter_phrases() -> tuple[str, ...]:
    """In lower case, without those that hold another; a blank at the end counts: "As an AI " is not in "As an AIDE"."""
    phrases = {line.lower() for line in FILTER_PHRASES_FILE.read_text(encoding="utf-8").split("\n") if line}
    return tuple(one for one in sorted(phrases) if not any(other in one for other in phrases - {one}))


def _is_kept(question: str, answer: str, dropped: Counter) -> bool:
    text = f"{question}\n{answer}".lower()  # no phrase holds a newline
    for phrase in filter_phrases():  # a plain loop: `any` over a generator took a sixth of all preparation
        if phrase in text:
            dropped["row with a filter phrase"] += 1
            return False
    return True


OASST_HINT = "2023-04-12_oasst_release_ready_synth.jsonl.gz was never published, its public twin is the default file"
SOURCES: dict[str, Source] = {
    "oasst_export": Source(
        "Apache-2.0; 10,364 trees",
        HubSource("OpenAssistant/oasst1", ("2023-04-12_oasst_ready.trees.jsonl.gz",), OASST_HINT),
        read_oasst,
        "random_split",
    ),
    "vicuna": Source(
        "texts shared by ChatGPT users, without a licence of theirs; about 94,000 conversations",
        HubSource("Aeala/ShareGPT_Vicuna_unfiltered", ("ShareGPT_V4.3_unfiltered_cleaned_split.json",)),
        read_vicuna,
    ),
    "dolly15k": Source(
        "CC BY-SA 3.0; about 15,000 rows", HubSource("OllieStanley/oa_dolly_15k", ("*train*.parquet",)), read_dolly
    ),
    "grade_school_math_instructions": Source(
        "MIT; 8,792 rows: GSM8K's 7,473 train and 1,319 TEST rows, so a GSM8K score afterwards is contaminated",
        HubSource("qwedsacf/grade-school-math-instructions", ("*train*.parquet",)),
        read_math,
        shuffled=True,
    ),
    "code_alpaca": Source(
        "CC BY-NC 4.0 in its authors' repository, written by an OpenAI model; about 20,000 rows",
        HubSource("sahil2801/CodeAlpaca-20k", ("code_alpaca_20k.json",)),
        read_alpaca,
        "random_split",
    ),
    "messages": Source("chat data of one's own, or of the hub", HubSource(None, ()), read_messages),
}
TRAIN_FILES = tuple(f"*train*{suffix}" for suffix in (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz"))


def find_source(name: str, options: Any) -> Source:
    """The source of a data set of the mix: the one of its name, or messages for a data set of any other name."""
    if name in SOURCES and name != "messages":
        return SOURCES[name]
    files = (options.files,) if options.files else TRAIN_FILES
    hint = "name its data files by a pattern, `files: data/train_sft-*.parquet`" if options.hub_name else ""
    return replace(SOURCES["messages"], hub=HubSource(options.hub_name, files, hint))
