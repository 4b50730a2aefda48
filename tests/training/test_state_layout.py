"""What engines keep of a run's state: by the papers' sums, against real processes, and that more of them need less."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run_script
from families import family_config
from hypothesis import strategies as st
from mixes import given, make_recipe
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from training.fsdp_config import Sharding
from training.memory import background_copies, estimate_memory, peak_of
from training.model import check_tiny, count_parameters, without_weights
from training.state_layout import (
    ModelSize,
    deepspeed_layout,
    device_state,
    fsdp2_layout,
    host_state,
    layout_of_this_run,
    replicated,
)

SIZES = {  # 16.9 and 0.9 million weights
    name: GPTNeoXConfig(
        vocab_size=rows,
        hidden_size=hidden,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=False,
    )
    for name, rows, hidden in (("large", 8192, 384), ("small", 1024, 96))
}
KEYS = {"padding_free": True, "max_length": 512, "warmup_steps": 0, "gradient_accumulation_steps": 2}
TOKENS = 128
ZERO2, ZERO3 = (
    json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())["zero_optimization"] for name in ("zero2", "zero3")
)
# How a test starts an engine (tests/conftest.py), and its layout: a line for each engine.
ENGINES = {
    "python": replicated(1),
    "ddp2": replicated(2),
    "zero2x2": deepspeed_layout(ZERO2, 2),
    "zero3x2": deepspeed_layout(ZERO3, 2),
    "fsdp2x2": fsdp2_layout(2),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("launch", ENGINES)
def test_estimate_against_the_processes_of_an_engine(launch, tmp_path):
    """Two steps by the real engine, of two micro-batches, in fp32: what a larger model takes more, within 20 %.

    With a small one beside it, since an engine loads libraries as it starts, of 10 (DDP) to 60 MiB (ZeRO-3).
    """
    layout, measured, estimated = ENGINES[launch], {}, {}
    for size, config in SIZES.items():
        arguments = tmp_path / f"{size}.json", size
        run_script(*arguments, launch=launch, script="tests/training/memory_worker.py", output_dir=tmp_path)
        found = json.loads(arguments[0].read_text())
        assert found["processes"] == layout.processes
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        parts = estimate_memory(make_recipe(**KEYS), config, count, layout, torch.float32, (1, TOKENS), gpu=False)
        measured[size], estimated[size] = found["measured"], peak_of(parts)
    more = [sizes["large"] - sizes["small"] for sizes in (estimated, measured)]
    assert more[0] == pytest.approx(more[1], rel=0.2)


# ---- By the sums of the papers ----

SIZE = ModelSize(trained=7_000_000_000, frozen_bytes=0, layer=400_000_000, ends=600_000_000, hidden=6000)


@pytest.mark.parametrize(
    ("layout", "bytes_a_weight"),
    [
        (replicated(1), 4 + 2 + 4 + 8),
        (deepspeed_layout({"stage": 1}, 64), 2 + 2 + 12 / 64),
        (deepspeed_layout({"stage": 2}, 64), 2 + (2 + 12) / 64),
        (deepspeed_layout({"stage": 3, "overlap_comm": False}, 64), (2 + 2 + 12) / 64),
        (fsdp2_layout(64), (4 + 4 + 8) / 64),
        (fsdp2_layout(64, replicas=8), (4 + 4 + 8) / 8),
    ],
)
def test_weights_gradients_and_optimizer(layout, bytes_a_weight):
    """ZeRO paper, figure 1; beside them DeepSpeed's bucket of 5e8 gradients."""
    parts = device_state(layout, SIZE, element=2, moments=8, gpu=True)
    bucket = 10**9 if layout.is_deepspeed else 0
    resident = parts["weights"] + parts["gradients"] + parts["optimizer"] - bucket
    assert resident == pytest.approx(bytes_a_weight * SIZE.trained, rel=1e-6)


def test_under_stage_2_a_micro_batchs_gradients_come_beside_their_sum():
    """Measured: 8 MiB over the estimate without accumulation, and 37 with it, of a shard of 32."""
    for stage, more in ((1, 0), (2, SIZE.trained // 4 * 2), (3, 0)):
        once, several = (
            device_state(deepspeed_layout({"stage": stage}, 4), SIZE, 2, 8, True, accumulates)["transient"]
            for accumulates in (False, True)
        )
        assert several - once == more


def test_what_is_offloaded_is_on_the_host_and_not_on_the_device():
    on_host = {"device": "cpu"}
    zero2 = deepspeed_layout({"stage": 2, "offload_optimizer": on_host}, 4)
    zero3 = deepspeed_layout({"stage": 3, "offload_optimizer": on_host, "offload_param": on_host}, 4)
    shard = SIZE.trained // 4
    assert host_state(zero2, SIZE, 2, 8) == {"optimizer": 16 * shard}
    assert host_state(zero3, SIZE, 2, 8) == {"optimizer": 18 * shard, "weights": 2 * shard}
    assert host_state(fsdp2_layout(4, offload=True), SIZE, 2, 8) == {"optimizer": 16 * shard}
    assert device_state(zero3, SIZE, 2, 8, gpu=True)["weights"] == 0
    for layout in (zero2, zero3, fsdp2_layout(4, offload=True)):
        there = device_state(layout, SIZE, 2, 8, gpu=True)
        assert there["optimizer"] == there["step"] == 0
        assert device_state(layout, SIZE, 2, 8, gpu=False)["optimizer"] > 0  # in the same memory anyway
    for layout in (replicated(4), deepspeed_layout({"stage": 3}, 4), fsdp2_layout(4)):
        assert host_state(layout, SIZE, 2, 8) == {}


def test_a_checkpoint_in_flight():
    """Each process holds its fragments; the model as it is saved is on the first, or cut where the engine cuts it."""
    for layout, local, expected in (
        (replicated(8), 8, 14 + 80),
        (deepspeed_layout({"stage": 2}, 16), 8, 14 + 40),
        (deepspeed_layout({"stage": 3}, 16), 8, 7 + 40),
        (fsdp2_layout(16, replicas=2), 8, 14 + 80),
    ):
        assert background_copies(make_recipe(), layout, 14, 80, local) == expected


LAYOUTS = {
    "zero1": lambda processes: deepspeed_layout({"stage": 1}, processes),
    "zero2": lambda processes: deepspeed_layout({"stage": 2}, processes),
    "zero3": lambda processes: deepspeed_layout({"stage": 3}, processes),
    "fsdp2": fsdp2_layout,
}


@given(
    st.sampled_from([*LAYOUTS]),
    st.integers(1, 512),
    st.integers(1, 512),
    st.integers(10**6, 10**11),
    st.sampled_from([2, 4]),
)
def test_more_processes_need_no_more_of_each_device(engine, one, other, weights, element):
    size = ModelSize(weights, 0, weights // 40, weights // 10, 1024)
    few, many = (device_state(LAYOUTS[engine](count), size, element, 8, gpu=True) for count in sorted((one, other)))
    assert all(many[part] <= few[part] for part in few)
    assert all(isinstance(each, int) and each >= 0 for each in few.values())


@given(st.integers(1, 64), st.integers(10**6, 10**11))
def test_each_stage_needs_no_more_of_weights_gradients_and_optimizer(processes, weights):
    size = ModelSize(weights, 0, weights // 40, weights // 10, 1024)
    options = {"reduce_bucket_size": 10**6, "overlap_comm": False}
    sums = []
    for stage in (1, 2, 3):
        parts = device_state(deepspeed_layout(options | {"stage": stage}, processes), size, 2, 8, gpu=True)
        sums.append(parts["weights"] + parts["gradients"] + parts["optimizer"])
    assert sums == sorted(sums, reverse=True)


def test_the_engine_of_this_run(monkeypatch):
    assert layout_of_this_run(None, None) == replicated(1)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert layout_of_this_run(None, None) == replicated(8)
    assert layout_of_this_run({"stage": 2}, None) == deepspeed_layout({"stage": 2}, 8)
    assert layout_of_this_run(None, Sharding(1, True, False)) == fsdp2_layout(8)
    hybrid = layout_of_this_run(None, Sharding(2, False, True))
    assert hybrid == fsdp2_layout(8, replicas=2, reshard=False, offload=True)
    assert (hybrid.shards, hybrid.processes) == (4, 8)


@pytest.mark.parametrize("layout", [replicated(1), deepspeed_layout(ZERO2, 2)])
def test_what_no_text_reaches_is_held_and_not_trained(layout):
    """The tower for images of a Gemma 3, which a run of text takes out of training."""
    config, recipe = family_config("Gemma 3, multimodal"), make_recipe(padding_free=False, max_length=64)
    left_out = check_tiny(recipe, config)
    model = without_weights(recipe, config)
    tower = [
        own.numel() for name, own in model.named_parameters() if not name.startswith(("model.language", "lm_head"))
    ]
    count = count_parameters(recipe, config)
    assert left_out == ["model.multi_modal_projector", "model.vision_tower"]
    assert count_parameters(recipe, config, within=left_out) == sum(tower) > 0
    assert count_parameters(recipe, config, within=[]) == 0
    whole, text = (
        estimate_memory(recipe, config, count, layout, torch.float32, (1, 8), gpu=False, frozen=frozen)
        for frozen in (0, sum(tower))
    )
    assert text["weights"] == whole["weights"] == 4 * count
    for part, each in (("gradients", 4), ("optimizer", 8)) if layout == replicated(1) else (("optimizer", 6),):
        assert whole[part] - text[part] == pytest.approx(each * sum(tower), abs=12)


def test_names():
    names = [each.name for each in (replicated(1), replicated(2), fsdp2_layout(4), fsdp2_layout(4, replicas=2))]
    assert names == ["one process", "DDP", "FSDP2", "HSDP"]
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert deepspeed_layout(offloaded, 4).name == "ZeRO-2, offload"
    assert replace(deepspeed_layout(offloaded, 4), optimizer_on_host=False).name == "ZeRO-2"
