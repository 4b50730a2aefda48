"""Arrow arrays from their buffers, and back.

`pyarrow.array` and `to_numpy` import pandas, which took half of the time of preparing 9,000 conversations.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import pyarrow as pa


def numbers(values: np.ndarray) -> pa.Array:
    """An Arrow array of integers or booleans."""
    bits = np.packbits(values, bitorder="little") if values.dtype == bool else values
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(bits)])


def texts(values: list[str]) -> pa.Array:
    """An Arrow array of texts, of less than 2 GiB in all (OverflowError)."""
    encoded = [value.encode() for value in values]
    starts, text = pa.py_buffer(starts_of(map(len, encoded), np.int32)), pa.py_buffer(b"".join(encoded))
    return pa.Array.from_buffers(pa.string(), len(values), [None, starts, text])


def starts_of(lengths: Iterable[int], dtype: type) -> np.ndarray:
    """Where each of some stretches begins, and the last ends: [stretches + 1]; OverflowError where that is too far."""
    return np.array([0, *itertools.accumulate(lengths)], dtype=dtype)


def integers(array: pa.Array) -> np.ndarray:
    """An Arrow array of integers without nulls as numpy has it; nothing is copied."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), dtype.itemsize * array.offset)


def booleans(array: pa.Array) -> np.ndarray:
    """An Arrow array of booleans without nulls as numpy has it."""
    first, end = array.offset // 8, -(-(array.offset + len(array)) // 8)  # of the bytes that hold its bits
    bits = np.unpackbits(np.frombuffer(array.buffers()[1], np.uint8)[first:end], bitorder="little")
    return bits[array.offset - 8 * first :][: len(array)].astype(bool)
