"""A process that takes itself for one with a GPU: the real code runs on CUDA tensors that have no memory behind them.

Fake tensors (torch._subclasses.FakeTensorMode) know their device, dtype and shape. What else it takes is all here:
- The autograd engine asks the CUDA build for streams, events and the number of devices. 25 lines of C++, compiled in a
  second and kept, answer that there is one device whose only stream has nothing to wait for.
- The questions of the code under trace (`torch.cuda.is_available`, the device's name, ...) are answered for an H100.
- Kernels that no build without a GPU has: the choice of SDPA's kernel, and pinned memory.

None of it can be undone: it is for a process of its own (`measuring.in_a_process`, in tests a forked one).
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import weakref
from functools import cache, partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch.cuda._utils import _get_device_index

import training.loss
import training.neox
import training.optimizer
from utils.errors import UserError

NAME, CAPABILITY, MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984  # as torch.cuda tells them
# Torch 2.11 to 2.13. The hooks are one object without fields, which the registry no longer lets go of: it is replaced
# where it lies.
SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <new>

using namespace c10;

struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
};

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
} guard;

extern "C" void pretend() {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  impl::DeviceGuardImplRegistrar(DeviceType::CUDA, &guard);
}
"""

COMPILED: weakref.WeakSet = weakref.WeakSet()  # modules that are to be compiled; here they run as they are


@cache
def pretend_gpu() -> None:
    """Give this process its GPU.  Raises: UserError without a C++ compiler, where there is no real GPU either."""
    if torch.cuda.is_available():  # fake tensors take the streams of a real device that has been used
        torch.empty(1, device="cuda")
    else:
        ctypes.CDLL(str(_library())).pretend()
    torch._subclasses.fake_tensor.init_gpu_context = lambda device: None  # which would do the former
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132)
    answers = {
        "is_available": True,
        "is_initialized": False,  # else a fake tensor asks the driver which device is current
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "max_memory_allocated": 0,
        "_lazy_init": None,
    }
    for question, answer in answers.items():
        setattr(torch.cuda, question, lambda *_, answer=answer, **__: answer)
    torch.cuda.Event = _Event
    torch.cuda.set_device = _get_device_index  # which raises, as the real one, for a device without a number
    transformers.utils.import_utils.is_fake_tensor = lambda tensor: False  # for which it leaves things out
    torch.backends.cuda.is_flash_attention_available = torch.backends.cudnn.is_available = lambda: True
    # None of them runs, as Liger's would.
    training.neox.why_no_kernels = training.optimizer.why_no_kernels = lambda device: None
    training.loss.choose_kernel = lambda device: (training.loss.with_pytorch, "PyTorch's operations")
    torch.nn.functional.scaled_dot_product_attention = _attention
    torch.Tensor.pin_memory = _pin_memory
    torch.compile, torch.nn.Module.compile = _compile, _compile
    torch.nn.Module._apply = partialmethod(_apply, torch.nn.Module._apply)


class _Event:
    """A moment of the stream, at which nothing takes time."""

    def __init__(self, **_):
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, _) -> float:
        return 0.0


def pretend_processes(count: int) -> None:
    """Make this process the first of so many, each with its GPU, whose collectives do nothing; before the accelerator
    is made, which takes the process group as it is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": 0, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "none", "MASTER_PORT": "1"})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    # What the others say is what this one says.
    torch.distributed.all_gather_object = lambda objects, own, **_: objects.__setitem__(slice(None), [own] * count)
    torch.distributed._verify_params_across_processes = lambda *_: None


def all_reduce_hook(_, bucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own all-reduce, for which the fake processes have no result."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _library() -> Path:
    """The shared library of SOURCE for this version of PyTorch; compiled where it is not there yet."""
    home = Path(torch.__file__).parent
    name = hashlib.sha256(f"{torch.__version__} {home} {SOURCE}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fake_gpu"
    library = folder / f"{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, built = Path(work, "gpu.cpp"), Path(work, "gpu.so")
        source.write_text(SOURCE)
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source), "-o", str(built)]
        command += [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UserError(f"benchmark: a fake GPU needs a C++ compiler, and there is no {compiler} (CXX)") from error
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise UserError(f"benchmark: a fake GPU: {compiler} failed: {reason}")
        os.replace(built, library)
    return library


def _compile(what=None, **options):
    """torch.compile, but that it only notes which modules are to be compiled."""
    if what is None:  # as a decorator with arguments
        return partial(_compile, **options)
    module = getattr(what, "__self__", what)
    if isinstance(module, torch.nn.Module):
        COMPILED.add(module)
        if what is module:
            module._compiled_call_impl = module._call_impl
    return what


def _apply(module: torch.nn.Module, original, function, recurse: bool = True) -> torch.nn.Module:
    """Module._apply, but that a tensor which stays as it is stays: PyTorch swaps every fake one, which weak references
    to it forbid, while a real one is given its own data."""
    if recurse and all(function(tensor) is tensor for tensor in (*module.parameters(), *module.buffers())):
        return module
    return original(module, function, recurse)


def _pin_memory(tensor: torch.Tensor, *_) -> torch.Tensor:
    copy = tensor.clone()
    copy.pinned = True  # for the trace
    return copy


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention by the kernel that an H100 takes (torch 2.13, cuda/sdp_utils.cpp): cuDNN's in half
    precision, the memory-efficient one in fp32; with the operations that PyTorch puts around them."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zeros.masked_fill(attn_mask.logical_not(), -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    saved = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    options = attn_mask, saved, dropout_p, is_causal
    if query.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, *options, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, *options, False, scale=scale)[0]
