"""What an operation costs a device: the FLOPs of its matrix products and attention, and the bytes that it moves.

Bytes are those of tensors that come and go, each read once and written once; what a kernel reads twice or keeps in a
cache is not seen. Views are free. FLOPs of attention are those that causal attention has to do, over each conversation:
4 times queries by keys by the head's size, twice that in the backward pass, as training/flops.py counts them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch.utils.flop_counter import flop_registry

from training.attention import KERNELS

FLASH = ("torch_attn::_varlen_attn", "flash_attn::", "aten::_flash_attention")  # boundaries in place of a batch
BACKWARD_KERNELS = tuple(f"{name}_backward" for name in KERNELS)
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_addmm_activation": 1}  # where the two matrices begin
# What they read or write of a tensor is as much as they are given or give.
GATHERS = ("embedding", "index_select", "gather", "index", "take_along_dim")
SCATTERS = ("scatter_add_", "index_add_", "index_put_", "scatter_", "index_copy_")
OVERWRITES = ("copy_", "zero_", "fill_", "uniform_", "normal_", "bernoulli_", "random_")
FILLS = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like", "randn_like")
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")


@dataclass(frozen=True, slots=True)
class Access:
    """A tensor that an operation reads or writes.

    Attributes:
        storage: a number of its own for each block of memory.
        place: the first element, the shape and the strides, by which two views of a block are told apart.
        size: bytes that are moved.
    """

    storage: int
    place: tuple
    size: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a kernel.

    Attributes:
        name: as `mm.default`.
        part: of the step, for the table.
        kind: `product`, `attention` or `memory`, by which its rate is chosen.
        dtype: of its first tensor; of a product, of what is multiplied.
        layer: the compiled layer that it belongs to; None where what runs is the operation itself.
        backward: whether it ran in a backward pass.
    """

    name: str
    part: str
    kind: str
    dtype: torch.dtype | None
    flops: int
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    layer: int | None
    backward: bool

    @property
    def bytes(self) -> int:
        return sum(access.size for access in (*self.reads, *self.writes))


def short(func) -> str:
    """The name of an operator without its namespace and its overload, as `mm`."""
    return func._schema.name.split("::")[1]


def kind_of(func) -> str:
    """`product`, `attention` or `memory`."""
    name = func._schema.name
    if name in KERNELS or name in BACKWARD_KERNELS or name.startswith(FLASH):
        return "attention"
    return "product" if short(func) in PRODUCTS or func.overloadpacket in flop_registry else "memory"


def matrices_of(func, args: tuple) -> tuple:
    """The two that a product multiplies; none of another operation."""
    return args[PRODUCTS[short(func)] :][:2] if short(func) in PRODUCTS else ()


def flops_of(func, args: tuple, kwargs: dict, out, lengths: tuple[int, ...]) -> int:
    """FLOPs of a call; `lengths` are the tokens of the conversations that lie end to end in it."""
    kind, name = kind_of(func), short(func)
    if kind == "attention":
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        if func._schema.name.startswith(FLASH):  # [tokens, heads, head size]
            pairs, heads, size = sum(n * (n + 1) // 2 for n in lengths), query.shape[-2], query.shape[-1]
        else:  # [batch, heads, tokens, head size]
            batch, heads, tokens, size = query.shape
            causal = bool(_argument(func, args, kwargs, "is_causal"))
            pairs = batch * (tokens * (tokens + 1) // 2 if causal else tokens * key.shape[2])
        return (8 if backward else 4) * pairs * heads * size
    if name in PRODUCTS:
        left, right = matrices_of(func, args)
        return 2 * left.numel() * right.shape[-1]
    return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out) if kind == "product" else 0


def _argument(func, args: tuple, kwargs: dict, name: str):
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == name:
            return value
    return kwargs.get(name)


def tensors_in(value) -> Iterator[torch.Tensor]:
    """Of an argument or a result that is a tensor, a list of them, or neither."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements; those that an expanded tensor repeats count once."""
    return tensor.element_size() * prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


def moved(func, args: tuple, kwargs: dict, out) -> tuple[list, list]:
    """Which tensors a call reads and which it writes, each with the bytes of it that are moved."""
    schema, name = func._schema, short(func)
    given = [*zip(schema.arguments, args, strict=False)]
    given += [(argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs]
    inputs = [(argument, tensor) for argument, value in given for tensor in tensors_in(value)]
    results = [*tensors_in(out)]
    storages = {tensor.untyped_storage()._cdata for _, tensor in inputs}
    new = [tensor for tensor in results if tensor.untyped_storage()._cdata not in storages]
    written = [tensor for argument, tensor in inputs if _writes(func, argument, kwargs)]
    if name in NOTHING or (not new and not written):
        return [], []
    if name in GATHERS:
        sizes = sum(map(size_of, results))
        return [(inputs[0][1], sizes), *((tensor, size_of(tensor)) for _, tensor in inputs[1:])], _sized(results)
    if func.namespace == "neox" and name == "rotate":  # of queries and keys the first dimensions
        target, angles = inputs[0][1], inputs[1][1]
        touched = size_of(target) * 2 * angles.shape[-1] // target.shape[-1]
        return [(target, touched), *_sized([tensor for _, tensor in inputs[1:]])], [(target, touched)]
    if name in SCATTERS:
        target, given_to_it = inputs[0][1], [tensor for _, tensor in inputs[1:]]
        touched = target.element_size() * max(tensor.numel() for tensor in given_to_it)
        return [(target, touched), *_sized(given_to_it)], [(target, touched)]
    if name in FILLS:
        return [], _sized(new)
    reads = [tensor for argument, tensor in inputs if not (argument.is_out or _overwrites(func, argument))]
    reads, writes = _sized(reads), _sized([*written, *new])
    if name in ("slice_backward", "select_backward", "embedding_dense_backward"):  # zeros first, then what there is
        writes += [(new[0], size_of(inputs[0][1]))]
    return reads, writes


def _sized(tensors: list[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    return [(tensor, size_of(tensor)) for tensor in tensors]


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _overwrites(func, argument) -> bool:
    """Whether what was there is of no use to the call."""
    copies = func.namespace == "adamw" and argument.name == "copies"
    return _is_written(argument) and (short(func) in OVERWRITES or copies)


def _writes(func, argument, kwargs: dict) -> bool:
    if argument.name == "grads" and short(func).startswith("_fused_adam"):  # written back only where it unscales them
        return kwargs.get("grad_scale") is not None
    return _is_written(argument)


def check_dtypes(func, args: tuple) -> None:
    """Raise, as the CUDA kernels do and fake ones do not, for dtypes that do not go together."""
    name, kind = short(func), kind_of(func)
    if name in PRODUCTS:
        matrices = matrices_of(func, args)
        same = matrices if PRODUCTS[name] == 0 or func._overloadname.startswith("dtype") else args[:3]
        if len({matrix.dtype for matrix in same}) > 1:
            raise RuntimeError(f"{func}: matrices of different dtypes: {', '.join(str(m.dtype) for m in same)}")
    elif kind == "attention" and "efficient" not in name:
        tensors = args[1:4] if "backward" in name else args[:3]
        if len({t.dtype for t in tensors}) > 1 or tensors[0].dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"{func}: only fp16 and bf16: {', '.join(str(t.dtype) for t in tensors)}")
        boundaries = args[3:5] if func._schema.name == FLASH[0] else ()
        if not all(tensor.dtype == torch.int32 for tensor in tensors_in(boundaries)):
            raise RuntimeError(f"{func}: boundaries of conversations have to be int32")
    elif name.startswith("_fused_adam") or func.namespace == "adamw":
        for group in zip(*args[:4], strict=True):
            dtypes = [tensor.dtype for tensor in group]
            alike = (dtypes[:2], dtypes[2:]) if func.namespace == "adamw" else (dtypes,)
            if any(len(set(own)) > 1 for own in alike):
                raise RuntimeError(f"{func}: weights, gradients, moments: {', '.join(map(str, dtypes))}")
