"""A training step on a fake GPU, in a process of its own: the paths that a run can take, and what may be put into them.

Of flash-attn and of Liger, which no machine without a GPU has, stand-ins take the place: operators of the same name
with the shapes, dtypes and devices of the real ones. The code around them is the real one.
"""

import os
import sys
import tempfile
from types import ModuleType, SimpleNamespace

import torch
from forking import call_forked

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Those of issue 13, so that a better measurement moves no test.
RATES = {"products": 680e12, "products in fp32": 50e12, "attention": 252e12, "cudnn attention": 470e12, "bytes": 2.7e12}
LENGTHS = [[9, 1, 4], [30, 2]]  # of the conversations of each micro-batch


def rehearse(lengths=LENGTHS, model_type="gpt_neox", processes=1, put=(), size=None, may_wait=(), **keys):
    """The operations, the figures and the FLOPs of the model for a traced step.

    Args:
        put: what is put into the process beforehand, of the functions of this module.
        size: `3b` or `7b` in place of a tiny model.
        may_wait: files in which the host may wait for the device.
        keys: of the recipe.
    """
    return call_forked(_rehearse, lengths, model_type, processes, put, size, may_wait, keys)


def _rehearse(lengths, model_type, processes, put, size, may_wait, keys):
    from benchmarking.roofline import figures
    from benchmarking.traced_step import trace_step
    from benchmarking.train import shape

    for change in put:
        change()
    config = shape(size, None) if size else SIZES | {"model_type": model_type, "num_key_value_heads": 2}
    keys = {"use_flash_attention": True, "per_device_train_batch_size": max(map(len, lengths))} | keys
    step = trace_step(config, lengths, keys | {"gradient_accumulation_steps": len(lengths)}, processes, may_wait)
    return SimpleNamespace(
        operations=step.trace.operations,
        waits=step.trace.waits,
        figures=figures(step, RATES),
        model_flops=step.model_flops,
    )


def products_in_fp32():
    """The operations of a product, and of one that is added, whose result is fp32 of matrices in bf16."""
    return call_forked(_products_in_fp32)


def _products_in_fp32():
    from benchmarking.fake_gpu import pretend_gpu
    from benchmarking.trace import Trace

    pretend_gpu()
    with Trace() as trace:
        total = torch.zeros(8, 4, device="cuda")
        left, right = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((8, 16), (16, 4)))
        trace.begin(None, micro_batches=1)
        trace.in_window = True
        assert torch.mm(left, right, out_dtype=torch.float32).dtype == torch.float32
        assert torch.addmm(total, left, right, out_dtype=torch.float32).dtype == torch.float32
        assert torch.addmm(total, left, right, out_dtype=torch.float32, out=total) is total
    return trace.operations


# ---- Stand-ins for kernels that are not there ----


def flash_attn() -> None:
    """The package flash-attn, as transformers looks for it and calls it."""
    from transformers.utils import import_utils

    @torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts_q: torch.Tensor, starts_k: torch.Tensor, longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    @torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=())
    def backward(
        dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    @forward.register_fake
    def _(q, k, v, starts_q, starts_k, longest):
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert q.ndim == 3
        return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)

    @backward.register_fake
    def _(dout, q, k, v, out, lse):
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def set_up(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)

    forward.register_autograd(
        lambda ctx, d, _: (*backward(d, *ctx.saved_tensors), None, None, None), setup_context=set_up
    )

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, **_):
        assert causal
        return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)[0]

    def dense(q, k, v, causal=False, **_):
        raise NotImplementedError("flash_attn_func, without the boundaries of conversations")

    def unpad(*_):
        raise NotImplementedError("padded batches")

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func, package.flash_attn_varlen_func, package.flash_attn_with_kvcache = dense, varlen, None
    padding.pad_input = padding.unpad_input = unpad
    sys.modules |= {"flash_attn": package, "flash_attn.bert_padding": padding}

    def available(name, return_version=False, original=import_utils._is_package_available):
        if name != "flash_attn":
            return original(name, return_version)
        return (True, "2.8.0") if return_version else (True,)

    import_utils._is_package_available = available
    import_utils._package_distribution_mapping = lambda: {"flash_attn": ["flash-attn"]}
    import_utils.is_torch_cuda_available = lambda: True
    import_utils.is_flash_attn_2_available.cache_clear()


def liger() -> None:
    """Liger's kernel for the cross-entropy, which writes the gradient over the logits."""
    from benchmarking.fake_gpu import pretend_gpu
    from training import loss

    pretend_gpu()  # which takes PyTorch's loss

    @torch.library.custom_op("liger::cross_entropy", mutates_args=("logits",))
    def kernel(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    @kernel.register_fake
    def _(logits, targets):
        assert logits.is_contiguous()
        assert targets.dtype == torch.int64
        return logits.new_empty(len(logits), dtype=torch.float32)

    module = ModuleType("liger_kernel.ops.backends._triton.cross_entropy")
    module.cross_entropy_loss_and_grad_triton = lambda logits, targets, *_: (kernel(logits, targets), None)
    sys.modules[module.__name__] = module
    loss.choose_kernel = lambda _: (loss.with_liger, "Liger's")


def no_kernels() -> None:
    """A machine on which Triton's do not run."""
    from benchmarking.fake_gpu import pretend_gpu
    from training import neox, optimizer

    pretend_gpu()  # which has them
    neox.why_no_kernels = optimizer.why_no_kernels = lambda device: "no compiler"


# ---- What must not be in a step ----


def _in_loss(change):
    """Let `change(total, losses, batch)` make the loss of each forward pass."""
    from training.loss import ScoredLoss

    original = ScoredLoss.forward

    def forward(self, batch):
        total, losses, predictions = original(self, batch)
        return change(total, losses, batch), losses, predictions

    ScoredLoss.forward = forward


def item() -> None:
    _in_loss(lambda total, losses, batch: total + 0 * losses.sum().item())


def printed() -> None:
    _in_loss(lambda total, losses, batch: print(total.detach().cpu()) or total)


def branch() -> None:
    _in_loss(lambda total, losses, batch: total if losses.mean() > 0 else -total)


def weights() -> None:
    """Of the conversations in the loss."""
    import numpy as np

    from benchmarking import traced_step

    def weighted(conversations):
        split = split_in_memory(conversations)
        split.weights = np.arange(1.0, len(split) + 1)
        return split

    split_in_memory, traced_step.split_in_memory = traced_step.split_in_memory, weighted


def boolean_mask() -> None:
    _in_loss(lambda total, losses, batch: total + losses[losses > 0].sum())


def cpu_tensor() -> None:
    _in_loss(lambda total, losses, batch: total + (losses * torch.ones(len(losses))).sum())


def pageable() -> None:
    _in_loss(lambda total, losses, batch: total + torch.ones(3).to(losses.device, non_blocking=True).sum())


def new_on_device() -> None:
    _in_loss(lambda total, losses, batch: total * torch.tensor(2.0, device=losses.device))


def synchronized() -> None:
    _in_loss(lambda total, losses, batch: torch.cuda.synchronize() or total)


def device_without_number() -> None:
    _in_loss(lambda total, losses, batch: torch.cuda.set_device(torch.device("cuda")) or total)


def not_prefetched() -> None:
    from benchmarking import traced_step

    traced_step.prefetched = lambda steps, device: steps


def mixed_dtypes() -> None:
    """Where autocast does not make them alike."""

    def change(total, losses, batch):
        with torch.autocast("cuda", enabled=False):
            return total + (losses[None].bfloat16() @ losses[:, None]).sum()

    _in_loss(change)


def half_moments() -> None:
    from training import engine

    original = engine.allocate_moments

    def allocate(accelerator, optimizer):
        original(accelerator, optimizer)
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].bfloat16()

    engine.allocate_moments = allocate


def long_boundaries() -> None:
    from training import collate

    original = collate.Batch.model_inputs
    collate.Batch.model_inputs = lambda self: {
        name: value.long() if name.startswith("cu_") else value for name, value in original(self).items()
    }


def fp32_attention() -> None:
    from training import attention

    original = attention.varlen_attn
    attention.varlen_attn = lambda q, k, v, *rest, **keys: original(q.float(), k.float(), v.float(), *rest, **keys)


def no_compiler() -> None:
    os.environ |= {"CXX": "no-such-compiler", "XDG_CACHE_HOME": tempfile.mkdtemp()}


def on_cpu_device() -> None:
    """Statistics that are summed on the host."""
    from run.stats import TrainingStats

    original = TrainingStats.__init__
    TrainingStats.__init__ = lambda self, mix, device, *rest: original(self, mix, torch.device("cpu"), *rest)
