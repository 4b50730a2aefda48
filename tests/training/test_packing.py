"""Best fit decreasing against the rule written down plainly, and against what any packing needs at least."""

import math
import time

import numpy as np
from hypothesis import strategies as st
from mixes import given

from training.plan import best_fit_decreasing


@st.composite
def capacities_and_lengths(draw, count: int = 60) -> tuple[int, list[int]]:
    capacity = draw(st.integers(1, 50))
    return capacity, draw(st.lists(st.integers(1, capacity), max_size=count))


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The bin of each item, every bin looked at for every item; of equally full ones the last that got something."""
    found, room, last_filled = [0] * len(lengths), [], []
    for now, item in enumerate(sorted(range(len(lengths)), key=lambda item: -lengths[item])):
        fitting = [number for number in range(len(room)) if room[number] >= lengths[item]]
        if fitting:
            chosen = min(fitting, key=lambda number: (room[number], -last_filled[number]))
        else:
            chosen = len(room)
            room.append(capacity)
            last_filled.append(now)
        room[chosen] -= lengths[item]
        last_filled[chosen] = now
        found[item] = chosen
    return found


@given(capacities_and_lengths())
def test_it_is_best_fit_decreasing(case):
    capacity, lengths = case
    assert best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity).tolist() == plain_best_fit_decreasing(
        lengths, capacity
    )


@given(capacities_and_lengths(count=300))
def test_all_are_in_a_bin_that_holds_them(case):
    capacity, lengths = case
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert len(bins) == len(lengths)
    filled = np.bincount(bins, weights=lengths)
    assert sorted(set(bins)) == list(range(len(filled)))  # none is empty
    assert filled.sum() == sum(lengths)
    assert (filled <= capacity).all()


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """By trying every partition."""
    best = len(lengths)

    def place(item: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if item == len(lengths):
            best = len(rooms)
            return
        for number, room in enumerate(rooms):
            if room >= lengths[item]:
                place(item + 1, [*rooms[:number], room - lengths[item], *rooms[number + 1 :]])
        place(item + 1, [*rooms, capacity - lengths[item]])

    place(0, [])
    return best


@given(capacities_and_lengths(count=8))
def test_never_more_than_the_stated_bound_over_the_fewest(case):
    capacity, lengths = case
    count = len(set(best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity).tolist()))
    assert fewest_bins(lengths, capacity) <= count <= 11 / 9 * fewest_bins(lengths, capacity) + 6 / 9


@given(st.integers(0, 2**32 - 1), st.sampled_from([256, 1024, 4096]))
def test_many_conversations_fill_their_packs(seed, capacity):
    """Of lengths as conversations have them (most short, some at max_length): near what any packing needs."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(5, 1, 2000).astype(np.int64) + 1, capacity)
    count = best_fit_decreasing(lengths, capacity).max() + 1
    needed = math.ceil(lengths.sum() / capacity)
    assert needed <= count <= 1.02 * max(needed, (lengths > capacity / 2).sum())


def test_a_hundred_thousand_conversations_take_no_time():
    lengths = np.random.default_rng(0).integers(1, 4097, 100_000)
    started = time.process_time()
    best_fit_decreasing(lengths, 4096)
    assert time.process_time() - started < 2  # 0.2 s on an idle core
