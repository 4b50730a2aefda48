r"""The five data sources of the Open-Assistant SFT-7 mix: from data files to conversations, split and filtered.

oasst_export, vicuna, dolly15k, grade_school_math_instructions and code_alpaca, by the rules of Open-Assistant's
model_training (custom_datasets/oasst_dataset.py, qa_datasets.py, instruction.py, utils.py), April 2023. Where the
original drew without a seed (filler for empty prompts, max_val_set), the draw here depends on rng_seed, the data
set and the record number only. `fraction` and `size` are the sampler's, as they are drawn anew each epoch.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from utils.data_files import HubSource, read_records, required_field
from utils.dialogue import Conversation, Message
from utils.errors import UserError

SPLIT_SEED = 287631038922  # of torch's random_split
SKLEARN_SEED = 666  # of scikit-learn's train_test_split
FILLERS = ("...", "Please continue", "Go on", "")  # an empty human message of ShareGPT becomes one of these
MAX_CHARACTERS = 32 * 1024  # of a ShareGPT message
NUMBER_MARK = re.compile(r"\[\s?\d+\s?\]")  # [1], [ 12 ]
FILTER_PHRASES_FILE = Path(__file__).with_name("filter_phrases.txt")
REFERENCE_MARKS = re.compile(r"\[\d+(?:,\s*\d+)*?\]|\[citation needed\]|\[[a-zA-Z]\]")  # [3], [1, 2], [a]


@dataclass(frozen=True)
class Record:
    """One record of a data file with its place, so that an error can name it."""

    values: dict[str, Any]
    path: Path
    number: int  # in its file
    index: int  # over all files, from 1

    def get(self, name: str, kind: type = str, nullable: bool = False) -> Any:
        return required_field(self.values, name, kind, self.path, self.number, nullable=nullable)

    def inside(self, values: Any, where: str, name: str, kind: type = str, nullable: bool = False) -> Any:
        """A field of something within the record, e.g. of one message of a tree."""
        if not isinstance(values, dict):
            raise UserError(f"{self.path}, record {self.number}: an entry of {where!r} is not an object")
        return required_field(values, name, kind, self.path, self.number, where, nullable)


@dataclass(frozen=True)
class SourceSplit:
    train: list[Conversation]
    validation: list[Conversation]
    rows_read: int  # records in the files: trees, conversations or rows
    dropped: dict[str, int]  # reason -> trees, threads, conversations or rows, as the reason says


# Turns records into what the split is drawn over: one list of conversations per tree or row, which stay together.
Reader = Callable[[Iterator[Record], Any, Counter, int], list[list[Conversation]]]


@dataclass(frozen=True)
class Source:
    about: str  # licence and size
    hub: HubSource
    read: Reader
    split: str = "train_test_split"  # scikit-learn's, with SKLEARN_SEED; or torch's "random_split", with SPLIT_SEED


def read_oasst(records: Iterator[Record], options: Any, dropped: Counter, rng_seed: int) -> list[list[Conversation]]:
    """Message trees: the threads of each tree that is ready, reviewed and in one of the languages, depth first."""
    languages = {code.strip() for code in options.lang.split(",")}
    trees = []
    for record in records:
        prompt = record.get("prompt", dict)
        if record.get("tree_state") != "ready_for_export":
            dropped["tree not ready for export"] += 1
        elif not prompt.get("review_result"):
            dropped["tree whose prompt was not accepted in review"] += 1
        elif record.inside(prompt, "prompt", "lang") not in languages:
            dropped["tree in another language"] += 1
        else:
            threads = _threads(record, [prompt], [], options.top_k, dropped)
            trees.append([Conversation(thread) for thread in threads])
    return trees


def _threads(
    record: Record, path: list[dict], above: list[Message], top_k: int | None, dropped: Counter
) -> Iterator[list[Message]]:
    """The kept threads below path[-1], depth first, replies in the order of the file; `above` is path[:-1] read."""
    messages = [*above, _oasst_message(record, path[-1], len(above))]
    replies = path[-1].get("replies") or []
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
        raise UserError(f"{record.path}, record {record.number}: message {place + 1} of a thread is of role {role!r}")
    if role == "prompter":
        return Message("user", text)
    properties = {"lang": node.get("lang")}
    for name in ("quality", "humor", "creativity"):
        label = (node.get("labels") or {}).get(name) or {}
        properties[name] = None if label.get("value") is None else float(label["value"])
    return Message(role, text, {key: value for key, value in properties.items() if value is not None})


def read_vicuna(records: Iterator[Record], options: Any, dropped: Counter, rng_seed: int) -> list[list[Conversation]]:
    """ShareGPT conversations; speakers other than human and gpt only end the message before them."""
    kept = []
    for record in records:
        lines = record.get("conversations", list)
        speakers = [record.inside(line, "conversations", "from") for line in lines]
        texts = [record.inside(line, "conversations", "value", nullable=True) for line in lines]
        if not lines or speakers[0] != "human":
            dropped["conversation that does not start with human"] += 1
            continue
        if ("gpt", True) in zip(speakers, (not text for text in texts), strict=True):
            dropped["conversation with an empty gpt message"] += 1
            continue
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
            continue
        pairs = (_pair(*texts).messages for texts in zip(prompts, replies, strict=True))
        kept.append([Conversation([message for pair in pairs for message in pair])])
    return kept


def read_dolly(records: Iterator[Record], options: Any, dropped: Counter, rng_seed: int) -> list[list[Conversation]]:
    """Both layouts. The context is a property of the reply: without use_system_tag it is never seen in training."""
    kept = []
    for record in records:
        if "instruction" in record.values:
            question, answer, context = record.get("instruction"), record.get("response"), record.get("context")
        else:
            question, answer = record.get("INSTRUCTION"), record.get("RESPONSE")
            context = record.inside(record.get("METADATA", dict), "METADATA", "CONTEXT")
        if not question or not answer:
            dropped["row with an empty question or answer"] += 1
        elif _is_kept(question, answer, dropped):
            kept.append([_pair(question, answer, {"context": REFERENCE_MARKS.sub("", context)})])
    return kept


def read_math(records: Iterator[Record], options: Any, dropped: Counter, rng_seed: int) -> list[list[Conversation]]:
    rows = list(records)
    random.Random(42).shuffle(rows)
    kept = []
    for record in rows:
        question, answer = (record.get(name, nullable=True) or "" for name in ("INSTRUCTION", "RESPONSE"))
        if not question.strip() or not answer.strip():
            dropped["row with a blank question or answer"] += 1
        elif _is_kept(question, answer, dropped):
            kept.append([_pair(question, answer)])
    return kept


def read_alpaca(records: Iterator[Record], options: Any, dropped: Counter, rng_seed: int) -> list[list[Conversation]]:
    """One unit per row, an empty one where the row is dropped, as the split is drawn before the filter."""
    units = []
    for record in records:
        question, given, answer = record.get("instruction"), record.get("input"), record.get("output")
        question = f"{question}\n{given}" if given else question
        units.append([_pair(question, answer)] if _is_kept(question, answer, dropped) else [])
    return units


def _pair(question: str, answer: str, properties: dict | None = None) -> Conversation:
    return Conversation([Message("user", question), Message("assistant", answer, properties or {})])


@cache
def filter_phrases() -> tuple[str, ...]:
    """In lower case; a blank at the end counts ("As an AI " does not hit "As an AIDE")."""
    lines = FILTER_PHRASES_FILE.read_text(encoding="utf-8").split("\n")
    return tuple(dict.fromkeys(line.lower() for line in lines if line))


def _is_kept(question: str, answer: str, dropped: Counter) -> bool:
    texts = question.lower(), answer.lower()
    if any(phrase in text for text in texts for phrase in filter_phrases()):
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
    ),
    "code_alpaca": Source(
        "CC BY-NC 4.0 in its authors' repository, written by an OpenAI model; about 20,000 rows",
        HubSource("sahil2801/CodeAlpaca-20k", ("code_alpaca_20k.json",)),
        read_alpaca,
        "random_split",
    ),
}


def load_source(name: str, options: Any, paths: list[Path], rng_seed: int) -> SourceSplit:
    """Read one source and split it. Within each split the order is the file's (shuffled for grade school math).

    Args:
        options: has val_split (0 to below 1), max_val_set (or None) and, for oasst_export, lang and top_k (or None).
        paths: as `find_data_file` returns them.
        rng_seed: for what the original drew without a seed.
    Raises: UserError for a damaged file, a field missing, or when nothing is left to train on.
    """
    source, dropped, rows_read = SOURCES[name], Counter(), 0

    def records() -> Iterator[Record]:
        nonlocal rows_read
        for path in paths:
            for number, values in read_records(path):
                rows_read += 1
                yield Record(values, Path(path), number, rows_read)

    units = source.read(records(), options, dropped, rng_seed)
    held_out = _validation_places(source.split, len(units), options.val_split)
    train = [conversation for place, unit in enumerate(units) if place not in held_out for conversation in unit]
    validation = [conversation for place, unit in enumerate(units) if place in held_out for conversation in unit]
    if not train:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing"
        where = ", ".join(map(str, paths))
        raise UserError(f"data set {name}: no conversation left to train on in {where}; dropped: {reasons}")
    if options.max_val_set is not None and len(validation) > options.max_val_set:
        drawn = random.Random(f"{rng_seed} {name} max_val_set").sample(range(len(validation)), options.max_val_set)
        validation = [validation[place] for place in sorted(drawn)]
    return SourceSplit(train, validation, rows_read, dict(dropped))


def _validation_places(split: str, count: int, val_split: float) -> set[int]:
    """Which of `count` units are held out; a share that rounds to nothing or everything holds out none or all."""
    if count == 0 or val_split == 0:
        return set()
    if split == "random_split":
        import torch

        generator = torch.Generator().manual_seed(SPLIT_SEED)
        sizes = [1.0 - val_split, val_split]
        return set(torch.utils.data.random_split(range(count), sizes, generator=generator)[1].indices)
    if count == 1:
        return set()  # scikit-learn holds out one of one and then refuses to train on none
    from sklearn.model_selection import train_test_split

    return set(train_test_split(range(count), test_size=val_split, random_state=SKLEARN_SEED, shuffle=True)[1])
