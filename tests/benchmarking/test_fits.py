"""`benchmark.py --gpu`: what does not fit is refused, with what does, before anything is made or loaded."""

import re
import sys
from types import SimpleNamespace

import benchmark
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from benchmarking import contenders, measuring
from benchmarking import scaling as scaling_module
from benchmarking import train as train_module
from benchmarking.fake_gpu import MEMORY
from benchmarking.train import check_fits, shape
from recipe.keys import Recipe
from training.memory import check_memory
from training.state_layout import replicated
from utils.errors import UserError


def refused(gpu: str, layers: int | None, memory: float) -> str | None:
    """Why a GPU of so many bytes is too small; None where it is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(memory)))
        try:
            check_fits(gpu, layers)
        except UserError as error:
            return str(error)
    return None


def parameters(gpu: str, layers: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape(gpu, layers)))
    return sum(parameter.numel() for parameter in model.parameters())


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.sampled_from(["3b", "7b"]), st.floats(24e9, 160e9))
def test_what_is_offered_fits_and_one_layer_more_does_not(gpu, memory):
    line = refused(gpu, None, memory)
    if line is None:
        return
    layers = int(re.search(r": give --layers (\d+)$", line)[1])
    assert 1 <= layers < 16
    assert refused(gpu, layers, memory) is None
    assert refused(gpu, layers + 1, memory) is not None
    # 12 bytes a parameter for fp32 weights and Adam, 4 of the gradient, 2 of the copies in half precision.
    assert 18 * parameters(gpu, layers) < memory < 1.2 * 18 * parameters(gpu, layers + 1)


@pytest.mark.parametrize(("gpu", "memory", "fits"), [("7b", 80e9, 7), ("7b", 141e9, 14), ("3b", 80e9, None)])
def test_stablelm_on_the_gpus_that_there_are(gpu, memory, fits):
    """The 7B has 7.87 billion parameters, 126 GB at 16 bytes: not even an H200 of 141 GB trains it whole."""
    line = refused(gpu, None, memory)
    if fits is None:
        assert line is None
    else:
        assert line.startswith(f"command line: --gpu {gpu}: ")
        assert line.endswith(f": give --layers {fits}")
        assert "\n" not in line


@pytest.mark.parametrize(("moments", "fits"), [("fp32", False), ("bf16", True)])
def test_two_rows_of_the_3b_fit_beside_moments_in_bf16(moments, fits, monkeypatch, capsys):
    """2 x 4,096 tokens without gradient checkpointing on an H100 of 79.6 GiB. By the trace of the step they take 66 GiB
    of tensors, and 79 beside moments in fp32 (benchmarks/roofline_3b.json); the estimate is over both."""
    keys = {"model_name": "none", "output_dir": "x", "datasets": ["vicuna"], "optimizer_state_dtype": moments}
    config = GPTNeoXConfig(**shape("3b", None))
    monkeypatch.setattr("training.memory.has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=MEMORY))
    recipe = Recipe.model_validate(keys | {"use_flash_attention": True})
    check_memory(recipe, config, parameters("3b", 16), replicated(1), torch.bfloat16, (1, 8192))
    said = capsys.readouterr().out
    assert ("optimizer 13.5 GiB" in said) == fits
    assert ("memory will run out: give gradient_checkpointing: true, or optimizer_state_dtype: bf16" in said) != fits


@pytest.mark.parametrize(("moments", "gib", "remedy"), [
    ("fp32", 60, ": optimizer_state_dtype: bf16 would make it fit; or 2 such GPUs and deepspeed_config: .*json would"),
    ("fp32", 40, ": 2 such GPUs and deepspeed_config: ds_configs/zero2.json would hold it$"),
    ("bf16", 40, ": 2 such GPUs and deepspeed_config: .*json with optimizer_state_dtype: fp32 would hold it$"),
])  # fmt: skip
def test_the_remedy_for_a_gpu_too_small_is_none_that_is_refused(moments, gib, remedy, monkeypatch):
    keys = {"model_name": "none", "output_dir": "x", "datasets": ["vicuna"], "optimizer_state_dtype": moments}
    monkeypatch.setattr("training.memory.has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    recipe = Recipe.model_validate(keys | {"gradient_checkpointing": True})
    config = GPTNeoXConfig(**shape("3b", None))
    with pytest.raises(UserError, match=remedy):
        check_memory(recipe, config, parameters("3b", 16), replicated(1), torch.bfloat16, (1, 512))


def test_a_gpu_on_which_no_layer_fits():
    assert refused("7b", None, 12e9).endswith(": not one layer fits")


@pytest.mark.parametrize("what", ["train", "scaling"])
def test_it_is_said_before_anything_is_made(what, monkeypatch):
    def too_late(*_, **__):
        raise AssertionError("something was made")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(80e9)))
    for module in (measuring, train_module, scaling_module):
        monkeypatch.setattr(module, "in_a_process", too_late)
    monkeypatch.setattr(train_module, "random_conversations", too_late)
    monkeypatch.setattr(contenders, "AutoModelForCausalLM", too_late)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", what, "--gpu", "7b"])
    with pytest.raises(UserError, match=r"--gpu 7b: .* give --layers 7$"):
        benchmark.main()
