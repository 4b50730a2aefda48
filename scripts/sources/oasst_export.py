"""Open-Assistant's message trees: every thread from the prompt to a last reply is a conversation.

By the rules of Open-Assistant's model_training (custom_datasets/oasst_dataset.py), April 2023: trees that are ready for
export, whose prompt was accepted in review and is in one of the languages; threads without a deleted or synthetic
message. A last prompt without an answer is left out.
"""

import difflib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import field_validator

from sources.source import PREPARED, Conversation, DatasetOptions, HubSource, Message, PositiveInt, Record, Source, key

# ISO 639-1, and those of Open-Assistant's trees that name a country.
LANGUAGE_CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st "
    "su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu "
    "nb-NO pt-BR uk-UA zh-CN zh-TW"
)
LANGUAGES = frozenset(LANGUAGE_CODES.split())


class OasstOptions(DatasetOptions):
    """With the keys of `oasst_export` alone."""

    lang: str = key("en", "languages of the prompts to use, comma-separated codes", PREPARED)
    top_k: PositiveInt | None = key(None, "use replies of rank below this; null: all", PREPARED)

    @field_validator("lang")
    @classmethod
    def _known_languages(cls, value: str) -> str:
        for code in map(str.strip, value.split(",")):
            if code not in LANGUAGES:
                close = [code.lower(), *difflib.get_close_matches(code, LANGUAGES, n=1), code[:2].lower()]
                hint = next((f": did you mean {other}?" for other in close if other in LANGUAGES), "")
                raise ValueError(f"{code!r} is not the code of a language{hint}")
        return value


def read_oasst(record: Record, options: Any, dropped: Counter, rng_seed: int) -> list[Conversation] | None:
    """A message tree: its threads, depth first, if it is ready, reviewed and in one of the languages."""
    prompt = record.get("prompt", dict)
    if record.values.get("tree_state") != "ready_for_export":
        dropped["tree not ready for export"] += 1
    elif not prompt.get("review_result"):
        dropped["tree whose prompt was not accepted in review"] += 1
    elif record.inside(prompt, "prompt", "lang") not in map(str.strip, options.lang.split(",")):
        dropped["tree in another language"] += 1
    else:
        return [Conversation(thread) for thread in _threads(record, [prompt], [], options.top_k, dropped)]
    return None


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


SOURCE = Source(
    about="Open-Assistant message trees",
    licence="Apache-2.0; 10,364 trees",
    hub=HubSource(
        "OpenAssistant/oasst1",
        ("2023-04-12_oasst_ready.trees.jsonl.gz",),
        "2023-04-12_oasst_release_ready_synth.jsonl.gz was never published, its public twin is the default file",
    ),
    read=read_oasst,
    fields=("tree_state", "prompt"),
    options=OasstOptions,
    split="random_split",
)
