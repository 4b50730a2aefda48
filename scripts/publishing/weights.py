"""What a model's files hold, from their headers: how many weights, in which precision, how many bytes."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from utils.errors import UserError

# safetensors' names of dtypes, as a recipe names them.
NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16}  # else 8


@dataclass(frozen=True)
class Weights:
    """Of a folder's safetensors files.

    Attributes:
        count: numbers in all of its tensors, shared ones once.
        dtype: of most of them, fp32, fp16 or bf16 where it is one of these.
        size: bytes of its files.
        files: how many.
    """

    count: int
    dtype: str
    size: int
    files: int

    def __str__(self) -> str:
        files = f" in {self.files} files" if self.files > 1 else ""
        return f"{self.count:,} parameters, {self.dtype}, {decimal_bytes(self.size)}{files}"


def read_weights(folder: Path) -> Weights | None:
    """None where a folder has no safetensors files.  Raises: UserError for one that is cut off or damaged."""
    counts, size, files = Counter(), 0, sorted(folder.glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    tensor = file.get_slice(name)
                    counts[tensor.get_dtype()] += prod(tensor.get_shape())
            size += path.stat().st_size
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cut off or damaged: {error}") from error
    if not counts:
        return None
    most = max(counts, key=lambda dtype: counts[dtype] * BITS.get(dtype, 8))
    return Weights(sum(counts.values()), NAMES.get(most, most), size, len(files))


def decimal_bytes(size: float) -> str:
    """`15.7 GB`, in powers of 1,000 as the hub and --max_shard_size count."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:,.1f} {unit}"
    return f"{size:,.0f} bytes"
