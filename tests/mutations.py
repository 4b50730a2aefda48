"""Damage, as bit rot, a lost flush or an editor do it: bytes and JSON values that are changed at random, from a seed.

    damaged_bytes(random.Random(7), content)      # one kind of damage to a file's contents
    damaged_json(random.Random(7), values)        # one place of a JSON value is another, missing, or one too many
    reseal(checkpoint)                            # and the checksums of a checkpoint are right again

What is damaged on purpose and sealed again gets past the checksums, to whatever stands behind them.
"""

import copy
import json
import random
from pathlib import Path
from typing import Any

# What stands in JSON where something else was: of other types, out of every range, in no encoding, or not the JSON of
# the standard, which Python takes (NaN).
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, -5, 100, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e30, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "7", "x", "\ud800", "\0", "../../x", "ü" * 300),
    *([], {}, [[]], [0], {"x": 1}, ["x"] * 50),
)
NO_JSON = (
    *(
        b"",
        b"\0" * 64,
        b"\xff\xfe\x00",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b'"text"',
        b"NaN",
        b"1e999",
        b"{",
        b"\xef\xbb\xbf",
    ),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'{"format": 1, "format": 2}', b"\x80abc"),
)


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """The contents with one kind of damage; another size, or the same, but never the same contents."""
    low, high = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    before, between, after = content[:low], content[low:high], content[high:]
    kinds = (
        lambda: flipped(content, rng.randrange(max(1, len(content))), 1 << rng.randrange(8)),
        lambda: before,
        lambda: before + bytes(len(between)) + after,  # as after a lost flush
        lambda: before + rng.randbytes(len(between)) + after,
        lambda: before + after,
        lambda: before + between * 2 + after,
        lambda: content + rng.randbytes(1 + rng.randrange(20)),
        lambda: rng.choice(NO_JSON),
    )
    changed = rng.choice(kinds)()
    return damaged_bytes(rng, content) if changed == content else changed


def flipped(content: bytes, place: int, bits: int = 1) -> bytes:
    """The contents with some bits of one byte the other way round."""
    changed = bytearray(content or b"\0")
    changed[place] ^= bits
    return bytes(changed)


def places(value: Any, above: tuple = ()) -> list[tuple]:
    """Where something stands within a JSON value, as the keys and numbers that lead there; itself first. Of a long list
    a few: a random generator has 624 numbers that are all alike."""
    found = [above]
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = [*enumerate(value)][:3] + [*enumerate(value)][3:][-2:]
    else:
        inside = ()
    for key, entry in inside:
        found += places(entry, (*above, key))
    return found


def damaged_json(rng: random.Random, values: Any) -> Any:
    """A copy in which one place holds another value, is gone, or has a neighbour that does not belong there."""
    values = copy.deepcopy(values)
    place = rng.choice(places(values)[1:])
    holder = values
    for key in place[:-1]:
        holder = holder[key]
    key, old = place[-1], holder[place[-1]]
    kind = rng.choice(("other", "other", "other", "near", "gone", "more"))
    if kind == "gone":
        del holder[key]
    elif kind == "more" and isinstance(holder, dict):
        holder[f"{key}_"] = old
    elif kind == "more":
        holder.append(old)
    elif kind == "near" and type(old) in (int, float):
        holder[key] = rng.choice((old + 1, -old - 1, old * 1000 + 1, float(old) + 0.5, str(old)))
    else:
        holder[key] = rng.choice(VALUES)
    return values


def written_json(values: Any) -> bytes:
    """As a file holds it. 10**400 has fewer digits than Python refuses to write."""
    return json.dumps(values, indent=1).encode()


def reseal(checkpoint: Path) -> None:
    """Give the state.json of a checkpoint the sizes and checksums of the files that it lists, and its own."""
    from run.checkpoint_state import sealed
    from training.checkpoint_files import state_file
    from utils.files import checksum

    file = state_file(checkpoint)
    values = json.loads(file.read_text())
    for name in values["files"]:
        path = checkpoint / name
        values["files"][name] = {"bytes": path.stat().st_size, "checksum": checksum(path)}
    file.write_text(json.dumps(sealed(values), indent=1))


def rewrite_state(checkpoint: Path, **changes: Any) -> None:
    """Change values of a checkpoint's state.json, and seal it again."""
    from run.checkpoint_state import sealed
    from training.checkpoint_files import state_file

    file = state_file(checkpoint)
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | changes), indent=1))
