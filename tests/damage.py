"""Damage to a file of JSON, made up by hypothesis: to its values, its text, its bytes."""

import copy
import json
import re
from typing import Any

from hypothesis import strategies as st

nan, inf = float("nan"), float("inf")
deep: list = []
for _ in range(900):
    deep = [deep]
values = st.sampled_from([None, True, False, -1, 0, 1, 7.5, 2**53, 1e308, -1e308, 10**400, nan, inf, -inf])
values |= st.sampled_from(
    ["", "x", "0", "loss", "\ud800", "\0", "a\nb", "\x1b[2J", "$x_{", [], {}, [[]], [1], {"a": 1}, deep]
)
whole_files = st.sampled_from(
    [b"", b" ", b"5", b"null", b"[]", b"{}", b'"x"', b"NaN", b"true", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 9]
)
number = re.compile(rb"(?<=[ \[:])-?\d[\d.e+-]*")
key = re.compile(rb'"[^"\\]*": ')


@st.composite
def damaged(draw, content: Any) -> bytes:
    """A JSON file with this content and one thing wrong with it, if anything."""
    kind = draw(st.sampled_from(["value"] * 8 + ["text"] * 2 + ["bytes"] * 2 + ["whole"]))
    if kind == "value":
        return json.dumps(_changed(draw, content)).encode()
    text = json.dumps(content).encode()
    if kind == "whole":
        return draw(whole_files)
    if kind == "text":
        found = draw(st.sampled_from([*number.finditer(text), *key.finditer(text)]))
        other = b"1e999" if text[found.start() : found.start() + 1] != b'"' else found[0] + b"null, " + found[0]
        return text[: found.start()] + other + text[found.end() :]
    start = draw(st.integers(0, len(text)))
    end = draw(st.sampled_from([start, min(start + 1, len(text)), len(text)]))
    return text[:start] + draw(st.binary(max_size=2)) + text[end:]


def _changed(draw, content: Any) -> Any:
    """A copy in which one value is another, missing, or new."""
    content = inside = copy.deepcopy(content)
    while True:
        place = draw(st.sampled_from(list(inside) if isinstance(inside, dict) else range(len(inside))))
        if not (isinstance(inside[place], dict | list) and inside[place] and draw(st.integers(0, 3))):
            break
        inside = inside[place]
    match draw(st.sampled_from(["other", "other", "other", "missing", "new"])):
        case "other":
            inside[place] = draw(values)
        case "missing":
            del inside[place]
        case "new" if isinstance(inside, dict):
            inside[draw(st.sampled_from(["", "\ud800", "new", "\0", "format"]))] = draw(values)
        case "new":
            inside.insert(place, draw(values))
    return content
