"""The trace of a training step on a fake GPU: every operation that the real code starts, and the memory that is held.

CUDA tensors are fake, CPU tensors are real, as far as they do not meet. So devices, dtypes and shapes are checked by
the real code and by PyTorch's rules for each operation, and what would need a value from the device stands out: between
the forward pass of the first micro-batch and the backward pass of the last it raises `HostSync`; elsewhere the host
gets 0.
"""

import traceback
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarking.fake_gpu import COMPILED
from benchmarking.operations import (
    Access,
    Operation,
    check_dtypes,
    flops_of,
    kind_of,
    matrices_of,
    moved,
    short,
    tensors_in,
)
from benchmarking.parts import is_cast, of_weights, part_of, role_of
from training.loss import ScoredLoss

BLOCK = 512  # bytes, to a multiple of which PyTorch's allocator rounds


class HostSync(RuntimeError):
    """The host would wait for the device, where it must not; `place` is the line that asks for it."""

    def __init__(self, what: str):
        own = Path(torch.__file__).parent, Path(__file__).parent
        frames = [f for f in traceback.extract_stack() if not any(home in Path(f.filename).parents for home in own)]
        # A thread of autograd's has none.
        self.place = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else "a backward"
        super().__init__(f"{what}, in {self.place}")


class Trace(TorchDispatchMode):
    """Run what is inside on a fake GPU, and write down the operations of the step.

    Attributes:
        operations: of the step, in order, from `begin` on.
        in_window: whether a micro-batch has begun and the last one has not ended.
        events: (bytes that were allocated, or freed, if negative; the storage's number), in order, from the first on.
        born: the part of the step that each storage was made in, by number; None before it.
        waits: the places in the window where the host did wait, as it may there.
    """

    def __init__(self, may_wait: tuple[str, ...] = ()):
        """`may_wait` are files, such as `masking_utils.py`, in which the host may read a 0 of the device."""
        super().__init__()
        self.may_wait, self.waits = may_wait, []
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.operations: list[Operation] = []
        self.events: list[tuple[int, int]] = []
        self.born: dict[int, str | None] = {}
        self.running = self.in_window = self.in_optimizer = False
        self.micro_batches_left = 0
        self.lengths: tuple[int, ...] = ()  # of the micro-batch at work
        # What the modules at work are for, and the compiled layer that they belong to; the innermost last.
        self.scopes: list[tuple[str, int | None]] = []
        self.scope_of_node: dict[int, tuple[str, int | None]] = {}
        self.head: torch.nn.Module | None = None
        self._storages: dict[int, tuple[weakref.ref, int]] = {}  # by address: the live one, and its number

    # ---- What the step says of itself ----

    def begin(self, head: torch.nn.Module, micro_batches: int) -> None:
        """The step begins, of so many micro-batches; `head` is the model's output layer."""
        self.running, self.head, self.micro_batches_left = True, head, micro_batches

    @property
    def phase(self) -> str:
        """Of the step: `before` its first micro-batch, their `window`, what comes `after`, the `optimizer`."""
        if self.in_optimizer:
            return "optimizer"
        return "window" if self.in_window else "before" if self.micro_batches_left else "after"

    def end_micro_batch(self) -> None:
        """The backward pass of a micro-batch is over."""
        self.micro_batches_left -= 1
        self.in_window = self.micro_batches_left > 0

    def __enter__(self):
        self._stack = ExitStack()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") comes by here
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        self._stack.enter_context(patch.object(torch.cuda, "synchronize", self._synchronize))
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
            register_optimizer_step_pre_hook(lambda *_: setattr(self, "in_optimizer", True)),
            register_optimizer_step_post_hook(lambda *_: setattr(self, "in_optimizer", False)),
        ):
            self._stack.callback(handle.remove)
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._stack.close()

    def _synchronize(self, *_) -> None:
        if self.in_window:
            raise HostSync("torch.cuda.synchronize() within the accumulation window")

    def _enter_module(self, module: torch.nn.Module, args: tuple) -> None:
        _, layer = self.scopes[-1] if self.scopes else ("other", None)
        if isinstance(module, ScoredLoss) and self.running:
            self.in_window, self.lengths = True, args[0].lengths
        role = "head" if module is self.head else role_of(module)
        self.scopes.append((role, id(module) if module in COMPILED else layer))

    def _leave_module(self, *_) -> None:
        self.scopes.pop()

    # ---- Every operation ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not on_gpu and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            return func(*args, **kwargs)
        host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)]
        if self._reaches_host(func, kwargs, leaves, host):
            return self._on_the_host(func, args, kwargs)
        self._check_transfer(func, args, kwargs, host)
        args, kwargs = tree_map_only(
            torch.Tensor, lambda t: t if isinstance(t, FakeTensor) else self.fake.from_tensor(t), (args, kwargs)
        )
        check_dtypes(func, args)
        try:
            out = self._run(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostSync(f"{func}: the size of its result is a value on the device") from error
        self._record(func, args, kwargs, out)
        return out

    def _run(self, func, args: tuple, kwargs: dict):
        if short(func) in ("mm", "addmm") and func._overloadname.startswith("dtype"):  # torch 2.11 has no shapes for it
            left, right = matrices_of(func, args)
            shape, dtype = (left.shape[0], right.shape[1]), kwargs.get("out_dtype", args[-1])
            with self.fake:
                return kwargs.get("out", torch.empty(shape, dtype=dtype, device=left.device))
        with self.fake:
            return func(*args, **kwargs)

    def _reaches_host(self, func, kwargs: dict, leaves: list, host: list[torch.Tensor]) -> bool:
        if short(func) == "copy_" and host:
            return host[0] is leaves[0]
        if short(func) == "_to_copy":
            return not host and kwargs.get("device") is not None and kwargs["device"].type == "cpu"
        return short(func) in ("_local_scalar_dense", "equal", "is_nonzero")

    def _on_the_host(self, func, args: tuple, kwargs: dict) -> Any:
        """What the host gets of the device."""
        if self.in_window:
            wait = HostSync(f"{func} within the accumulation window")
            if not any(f"/{file}:" in wait.place for file in self.may_wait):
                raise wait
            self.waits.append(wait.place)
        if short(func) == "_local_scalar_dense":
            return torch.zeros((), dtype=args[0].dtype).item()
        if short(func) == "copy_":
            return args[0].zero_()
        if short(func) == "_to_copy":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return False

    def _check_transfer(self, func, args: tuple, kwargs: dict, host: list[torch.Tensor]) -> None:
        """Raise where a CPU tensor goes to the GPU within the window and the host would wait for it to be there."""
        if not (self.in_window and host):
            return
        copies = short(func) in ("_to_copy", "copy_")
        waits = not (kwargs.get("non_blocking") or (short(func) == "copy_" and len(args) > 2 and args[2]))
        if copies and (waits or not all(getattr(tensor, "pinned", False) for tensor in host)):
            how = "without non_blocking" if waits else "from memory that is not pinned"
            raise HostSync(f"{func} to the GPU {how}, within the accumulation window")

    # ---- What is written down ----

    def _record(self, func, args: tuple, kwargs: dict, out) -> None:
        scope = self._scope(func, args, out)
        part = part_of(func, args, out, scope[0], self.phase) if self.running else None
        reads, writes = moved(func, args, kwargs, out) if self.running else ((), ())
        for tensor in tensors_in(out):
            self.number(tensor, part)
        if not reads and not writes:
            return
        backward = torch._C._current_graph_task_id() != -1
        self.operations.append(
            Operation(
                str(func).removeprefix("aten."),
                part,
                kind_of(func),
                next((tensor.dtype for tensor in tensors_in(matrices_of(func, args) or args)), None),
                flops_of(func, args, kwargs, out, self.lengths),
                self._accesses(reads),
                self._accesses(writes),
                scope[1],
                backward,
            )
        )

    def _accesses(self, tensors: list[tuple[torch.Tensor, int]]) -> tuple[Access, ...]:
        return tuple(
            Access(self.number(t, None), (t.storage_offset(), t.shape, t.stride()), size)
            for t, size in tensors
            if t.device.type == "cuda"
        )

    def number(self, tensor: torch.Tensor, part: str | None) -> int:
        """Of the tensor's storage, which is new where it has none yet."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known and known[0]() is storage:
            return known[1]
        number, size = len(self.born), -(-storage.nbytes() // BLOCK) * BLOCK if tensor.device.type == "cuda" else 0
        self.born[number] = part
        self.events.append((size, number))
        freed = weakref.ref(storage, lambda _: self.events.append((-size, number)))
        self._storages[storage._cdata] = freed, number
        return number

    def _scope(self, func, args: tuple, out) -> tuple[str, int | None]:
        """What the operation at work is for: by the module that it is in, or in a backward pass by the forward
        operation whose gradient it is."""
        node = torch._C._current_autograd_node()
        if self.scopes:  # also of a layer that is computed again
            scope = self.scopes[-1]
            if scope[0] != "head" and is_cast(func, args, out) and of_weights(args):
                scope = "weight casts", scope[1]
        else:
            scope = self.scope_of_node.get(node._sequence_nr() if node else -1, ("other", None))
        if torch._C._current_graph_task_id() == -1:  # its own node has been made just before
            self.scope_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, scope)
        return scope
