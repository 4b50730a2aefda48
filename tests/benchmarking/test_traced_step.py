"""The real training step on a fake GPU: every path runs through, computes in its dtype with its kernels, and never
waits for the device within the accumulation window; what does not belong there is noticed."""

from collections import Counter

import pytest
import rehearsal
import torch
from rehearsal import rehearse

VARLEN, CUDNN = "torch_attn._varlen_attn.default", "_scaled_dot_product_cudnn_attention.default"
EFFICIENT, FLASH_ATTN = (
    "_scaled_dot_product_efficient_attention.default",
    "flash_attn._flash_attn_varlen_forward.default",
)
# transformers asks whether there is padding, or more than one conversation in a row, before it makes a mask.
MASKS = {"may_wait": ("masking_utils.py",)}
PADDED = {"padding_free": False} | MASKS
# Of each path what is given to it, and its attention kernel.
PACKAGE = {"put": (rehearsal.flash_attn,), "attn_implementation": "flash_attention_2"} | MASKS
TERMS = {"label_smoothing": 0.1, "z_loss": 1e-4, "neftune_noise_alpha": 5}
PATHS = {
    "bf16": ({}, VARLEN),
    "fp16": ({"dtype": "fp16"}, VARLEN),
    "fp32": ({"dtype": "fp32"}, EFFICIENT),
    "ddp": ({"processes": 2}, VARLEN),
    "ddp, fp16, checkpointing": ({"processes": 2, "dtype": "fp16", "gradient_checkpointing": True}, VARLEN),
    "checkpointing": ({"gradient_checkpointing": True}, VARLEN),
    "checkpointing, sdpa": ({"gradient_checkpointing": True, "attn_implementation": "sdpa"}, CUDNN),
    "compiled": ({"torch_compile": True}, VARLEN),
    "moments in bf16": ({"optimizer_state_dtype": "bf16"}, VARLEN),
    "moments in bf16 without kernels": ({"optimizer_state_dtype": "bf16", "put": (rehearsal.no_kernels,)}, VARLEN),
    "sdpa": ({"attn_implementation": "sdpa"}, CUDNN),
    "padded": (PADDED, CUDNN),
    "padded, fp32": (PADDED | {"dtype": "fp32"}, EFFICIENT),
    "flash-attn": (PACKAGE, FLASH_ATTN),
    "flash-attn, checkpointing": (PACKAGE | {"gradient_checkpointing": True}, FLASH_ATTN),
    "Liger's loss": ({"put": (rehearsal.liger,)}, VARLEN),
    "mean of micro-batches": ({"loss_normalization": "micro_batch"}, VARLEN),
    "weights and other terms": ({"put": (rehearsal.weights,), **TERMS}, VARLEN),
    "weights and other terms, padded": (PADDED | {"put": (rehearsal.weights, rehearsal.liger), **TERMS}, CUDNN),
    "llama": ({"model_type": "llama"}, VARLEN),
    "mistral": ({"model_type": "mistral"}, VARLEN),
    "no clipping": ({"max_grad_norm": 0.0}, VARLEN),
    "an empty micro-batch": ({"lengths": [[9, 4], []]}, VARLEN),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_runs_through(path):
    keys, kernel = PATHS[path]
    if "processes" in keys and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("DDP of a CUDA build asks a driver that is not there")
    step = rehearse(**keys)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(keys.get("dtype"), torch.bfloat16)
    assert {each.dtype for each in step.operations if each.kind in ("product", "attention")} == {dtype}
    questions = 0 if "may_wait" not in keys else 1 if kernel == FLASH_ATTN else 2  # of each of the two micro-batches
    assert len(step.waits) == 2 * questions
    kernels = Counter(each.name for each in step.operations if each.kind == "attention" and not each.backward)
    assert kernels.keys() == {kernel}
    names = Counter(each.name for each in step.operations)
    # For weights with decay and without, and of those with decay the ones that have copies.
    own, theirs = names["adamw.update.default"], names["_fused_adamw_.default"]
    kernels_of_ours = 0 if "without kernels" in path else 2 if dtype == torch.float32 else 3
    assert (own, theirs) == (kernels_of_ours, 0)
    assert names["_amp_foreach_non_finite_check_and_unscale_.default"] == (dtype == torch.float16)
    assert sum(each.layer is not None for each in step.operations) > 0 or "torch_compile" not in keys
    if path == "Liger's loss":
        assert names["liger.cross_entropy.default"] == 2
        assert not names["log_softmax.int_out"]


def test_checkpointing_keeps_the_attention():
    def count(**keys) -> int:
        return sum(each.kind == "attention" for each in rehearse(**keys).operations)

    assert count(gradient_checkpointing=True) == count() == 4  # forward and backward, in 2 micro-batches


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        (PADDED | {"put": (rehearsal.flash_attn,)}, r"nonzero.* in transformers/modeling_flash_attention_utils.py"),
        ({"model_type": "stablelm"}, r"nonzero.* in training/attention.py"),
    ],
)
def test_where_the_host_waits_as_yet(keys, place):
    """Padded batches under flash-attn: transformers finds the padding in every layer. StableLM-2, which does not pass
    the boundaries on: training/attention.py finds them once a micro-batch."""
    with pytest.raises(RuntimeError, match=f"HostSync: aten.{place}"):
        rehearse(**keys)


MUTATIONS = {
    "item": "HostSync: aten._local_scalar_dense.default within the accumulation window",
    "printed": "HostSync: aten._to_copy.default within the accumulation window",
    "branch": "HostSync: aten._local_scalar_dense.default within the accumulation window",
    "boolean_mask": "HostSync: aten.*the size of its result is a value on the device",
    "pageable": "HostSync: aten._to_copy.default to the GPU from memory that is not pinned",
    "new_on_device": "HostSync: aten._to_copy.default to the GPU without non_blocking",
    "synchronized": "HostSync: torch.cuda.synchronize",
    "device_without_number": "Expected a torch.device with a specified index or an integer, but got:cuda",
    "not_prefetched": "HostSync: aten._to_copy.default to the GPU from memory that is not pinned",
    "on_cpu_device": r"index_add\(\): .* expected to be in the same device, but got \(self\) cpu",
    "cpu_tensor": "(same device, but found at least|found) two (different )?devices,? cuda:0(,| and) cpu",
    "mixed_dtypes": "matrices of different dtypes: torch.bfloat16, torch.float32",
    "half_moments": "weights, gradients, moments: torch.float32, torch.float32, torch.bfloat16, torch.float32",
    "fp32_attention": "only fp16 and bf16: torch.float32, torch.float32, torch.float32",
    "long_boundaries": "boundaries of conversations have to be int32",
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_does_not_belong_into_a_step_is_noticed(mutation):
    with pytest.raises(RuntimeError, match=MUTATIONS[mutation]):
        rehearse(put=(getattr(rehearsal, mutation),))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU needs no compiler")
def test_without_a_compiler():
    with pytest.raises(RuntimeError, match="UserError: benchmark: a fake GPU needs a C\\+\\+ compiler"):
        rehearse(put=(rehearsal.no_compiler,))
