r"""A conversation that is one text: JSON, or one in which its speakers' names stand: of HH-RLHF, BELLE and Guanaco.

"\n\nHuman: Hi\n\nAssistant: Hello..."            the whole of it
"Human:Hi\nAssistant:Hello\nHuman:Bye\nAssistant:"  all that was said before a reply
"""

import ast
import json
import re
from functools import partial
from typing import Any

from utils.files import KeyTwice, each_key_once

# Before each speaker: an empty line (HH-RLHF), a new line (BELLE), ### (Guanaco).
MARKS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"(?:\A\s*|\n)(Human|Assistant):"),
    re.compile(r"\s*### (Human|Assistant):"),
)
OPENING = re.compile(r"\s*(?:### )?(Human|Assistant):")
ENDING = "Assistant:"  # of a prompt


def from_notation(text: str, each_once: bool = True) -> Any:
    """What JSON text holds, or Python's own notation, which pandas writes into CSV; the text where it is neither.

    Raises: with `each_once` KeyTwice.
    """
    hook = each_key_once if each_once else dict
    for parse in (partial(json.loads, object_pairs_hook=hook), ast.literal_eval):
        try:
            value = parse(text.strip())
            return json.loads(value, object_pairs_hook=hook) if isinstance(value, str) else value
        except KeyTwice:
            raise
        except (ValueError, SyntaxError, MemoryError, TypeError, RecursionError):
            continue
    return text


def turns_of_text(text: str) -> list[dict[str, str]]:
    """The turns of a conversation that is one text; none where it is no such text.

    By the first mark whose speakers take turns, since a turn may hold what another mark is; else by the first that
    begins with the user.
    """
    opening = OPENING.match(text)
    if not opening or opening[1] != "Human":  # most texts, of which the marks would take half of all reading
        return []
    otherwise, is_prompt = [], text.rstrip().endswith(ENDING)
    for mark in MARKS:
        before, *found = mark.split(text)
        if before:
            continue
        speakers, said = found[::2], [one.strip() for one in found[1::2]]
        turns = [{"role": role, "content": content} for role, content in zip(speakers, said, strict=True)]
        in_turn = len(turns) > 1 and "Assistant" not in speakers[::2] and "Human" not in speakers[1::2]
        if in_turn and not (is_prompt and said[-1]):
            return turns
        otherwise = otherwise or turns
    return otherwise


def split_prompt(prompt: str, reply: Any) -> tuple[Any, Any]:
    """The turns of a prompt that is such a text, and the reply, without blanks around it; any other as they are.

    It is one where it begins with `Human:` and ends with `Assistant:`, or the reply begins with that, or with the
    prompt. Else it may be a text that somebody has a question about.
    """
    opening = OPENING.match(prompt)
    named = OPENING.match(reply) if isinstance(reply, str) else None
    is_ended, is_named = prompt.rstrip().endswith(ENDING), named is not None and named[1] == "Assistant"
    is_repeated = named is not None and reply.strip().startswith(prompt.strip())
    if not opening or opening[1] != "Human" or not (is_ended or is_named or is_repeated):
        return prompt, reply
    turns = turns_of_text(prompt)
    if is_ended and (not turns or turns.pop() != {"role": "Assistant", "content": ""}):
        return prompt, reply
    if isinstance(reply, str):
        reply = (reply[named.end() :] if is_named else reply).strip()
    return turns, reply
