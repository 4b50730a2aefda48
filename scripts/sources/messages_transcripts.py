r"""A conversation that is one text, in which its speakers' names stand: of HH-RLHF, BELLE and Guanaco.

"\n\nHuman: Hi\n\nAssistant: Hello..."            the whole of it
"Human:Hi\nAssistant:Hello\nHuman:Bye\nAssistant:"  all that was said before a reply
"""

import re
from typing import Any

from sources.source import Record

# Before each speaker: an empty line (HH-RLHF), a new line (BELLE), ### (Guanaco).
MARKS = (
    re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):"),
    re.compile(r"(?:\A\s*|\n)(Human|Assistant):"),
    re.compile(r"\s*### (Human|Assistant):"),
)
OPENING = re.compile(r"\s*(?:### )?(Human|Assistant):")
ENDING = "Assistant:"  # of a prompt


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


def split_prompt(record: Record, where: str, prompt: str, reply: Any) -> tuple[Any, Any]:
    """The turns of a prompt that is such a text, and the reply, without blanks around it; any other as they are.

    It is one where it begins with `Human:`, and ends with `Assistant:` or a question after a reply; or the reply begins
    with a speaker.
    Raises: UserError where it has the beginning and the end, and no line begins with a speaker in between.
    """
    opening = OPENING.match(prompt)
    named = OPENING.match(reply) if isinstance(reply, str) else None
    is_ended = prompt.rstrip().endswith(ENDING)
    if not opening or opening[1] != "Human":
        return prompt, reply
    turns = turns_of_text(prompt)
    has_replies = [turn["role"] for turn in turns[-2:]] == ["Assistant", "Human"]
    if not (is_ended or named or has_replies):
        return prompt, reply
    if is_ended and (not turns or turns.pop() != {"role": "Assistant", "content": ""}):
        raise record.error(
            f"field {where!r} begins with Human: and ends with {ENDING}, as a conversation in one text, but does not "
            "split into turns: begin a line with each speaker"
        )
    if isinstance(reply, str):
        reply = (reply[named.end() :] if named and named[1] == "Assistant" else reply).strip()
    return turns, reply
