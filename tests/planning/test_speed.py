"""The plan's time and memory against the trace of a real step on a fake GPU, and against what an H100 did."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import strategies as st
from mixes import given, make_recipe
from transformers import GPTNeoXConfig

from benchmarking.roofline import H100
from benchmarking.train import shape
from planning import cards
from planning.cards import CARDS
from planning.measured import measured_on
from planning.speed import Pace
from planning.work import Load, load_of, traffic_of, work_of
from training.flops import PEAK_FLOPS
from training.memory import estimate_memory, model_size, moment_bytes, peak_of
from training.model import without_weights
from training.state_layout import deepspeed_layout, fsdp2_layout, replicated

CARD = CARDS["h100"]
LINES = {
    "as it is, bf16": (1, {}),
    "optimizer_state_dtype: bf16": (1, {"optimizer_state_dtype": "bf16"}),
    "twice the tokens": (2, {}),
    "twice the tokens, optimizer_state_dtype: bf16": (2, {"optimizer_state_dtype": "bf16"}),
    "gradient_checkpointing": (1, {"gradient_checkpointing": True}),
    "twice the tokens, gradient_checkpointing": (2, {"gradient_checkpointing": True}),
    "fp16": (1, {"dtype": "fp16"}),
}


@functools.cache
def pace_of(size="3b", layout=None, card=CARD, mfu=None, **keys) -> Pace:
    recipe, config = make_recipe(**{"dtype": "bf16", "max_length": 4096} | keys), GPTNeoXConfig(**shape(size, None))
    model, layout = without_weights(recipe, config), layout or replicated(1)
    weights = model_size(config, sum(parameter.numel() for parameter in model.parameters()))
    work, traffic = work_of(recipe, config, model, layout, 2), traffic_of(layout, weights, 2)
    return Pace(card, work, layout, weights, traffic, 2, moment_bytes(recipe), mfu, mixed=False)


def rows(count: int, processes: int = 1, micro_batches: int = 4) -> Load:
    """Micro-batches of so many full rows, every token scored."""
    of_row = load_of(np.array([4096] * count), np.array([4095] * count), make_recipe(max_length=4096))
    return Load(*[np.full((micro_batches, processes), each) for each in of_row])


@pytest.mark.parametrize("size", ["3b", "7b"])
@pytest.mark.parametrize("line", LINES)
def test_a_step_against_its_trace(size, line):
    """benchmarks/roofline_*.json: the real step on a fake H100, by operations. Time to 5 %, memory 0 to 15 %."""
    traced = json.loads((ROOT / "benchmarks" / f"roofline_{size}.json").read_text())["settings"][line]
    count, keys = LINES[line]
    seconds = pace_of(size, **keys).step(rows(count))
    assert 4 * count * 4096 / seconds == pytest.approx(traced["tokens_per_second"], rel=0.05)
    recipe, config = make_recipe(**{"dtype": "bf16"} | keys), GPTNeoXConfig(**shape(size, None))
    parameters = sum(parameter.numel() for parameter in without_weights(recipe, config).parameters())
    dtype = torch.float16 if "dtype" in keys else torch.bfloat16
    parts = estimate_memory(recipe, config, parameters, replicated(1), dtype, (1, 4096 * count), gpu=True)
    assert 1 <= peak_of(parts) / 2**30 / traced["peak_memory_gib"] < 1.15


def test_against_what_was_measured():
    found = measured_on(CARD)
    assert (round(found.speed), round(found.mixed)) == (23478, 6945)
    assert found.planned_speed == pytest.approx(found.speed, rel=0.1)
    assert found.planned_peak == pytest.approx(found.peak, rel=0.1)
    assert "23,478 tokens a second" in found.sentence()
    assert measured_on(CARDS["l40s"]) is None


def test_micro_batches_of_mixed_lengths_take_what_the_h100_took():
    """24 micro-batches of 1,548 tokens, 60 % scored, gradient checkpointing: benchmarks/h100.json."""
    recipe = make_recipe(dtype="bf16", max_length=4096, gradient_checkpointing=True)
    lengths = np.exp(np.random.default_rng(1).normal(5.0, 1.8, 128)).clip(16, 4096).astype(int)[32:]
    seconds = 0.0
    for step in lengths.reshape(6, 4, 4):
        of_each = [load_of(own, (own * 0.6).astype(int), recipe) for own in step]
        load = Load(*[np.array(each)[:, None] for each in zip(*of_each, strict=True)])
        seconds += replace(pace_of(gradient_checkpointing=True), mixed=True).step(load)
    assert lengths.sum() == 37142
    assert lengths.sum() / seconds == pytest.approx(measured_on(CARD).mixed, rel=0.05)


def test_the_rates_are_the_rooflines():
    for share, name in ((cards.PRODUCTS, "products"), (cards.FLASH, "attention"), (cards.CUDNN, "cudnn attention")):
        assert share * CARD.flops == pytest.approx(H100[name])
    assert cards.MEMORY * CARD.bandwidth == pytest.approx(H100["bytes"])
    names = {"h100": "H100", "a100-80": "A100", "a100-40": "A100", "l40s": "L40S", "rtx4090": "RTX 4090"}
    assert {name: card.flops for name, card in CARDS.items()} == {name: PEAK_FLOPS[of] for name, of in names.items()}


def test_a_share_of_the_peak_in_place_of_the_roofline():
    """One step's model FLOPs, by hand: 6 a weight and token, without the input embedding; attention."""
    pace, load = pace_of(mfu=0.5), rows(1)
    weights = pace.size.trained - 50288 * 4096 - (16 * 13 * 4096 + 2 * 4096)  # biases and norms are no products
    flops = 6 * (weights * 4096 - 50288 * 4096) + 12 * 16 * 4096 * 4096 * 4097 / 2
    assert float(pace.computing(load).max()) == pytest.approx(flops / 0.5 / 989.4e12, rel=1e-3)


@pytest.mark.parametrize("keys", [{}, {"use_peft": True}, {"dtype": "fp16"}], ids=str)
def test_an_evaluation_is_a_forward_pass(keys):
    """By hand: 2 FLOPs a matrix's weight and token, however many of them are trained; attention's two products."""
    pace, load = pace_of(mfu=0.5, **keys), rows(1)
    weights = pace.size.trained - 2 * 50288 * 4096 - (16 * 13 * 4096 + 2 * 4096)
    tokens = 4 * 4096  # in micro-batches of one row
    flops = 2 * (weights * tokens + 50288 * 4096 * 4 * 4095) + 4 * 16 * 4096 * 4 * 4096 * 4097 / 2
    adapter = 1.007 if keys.get("use_peft") else 1  # which has weights of its own
    assert pace.evaluating(load) == pytest.approx(adapter * flops / 0.5 / 989.4e12, rel=0.01)


# ---- What travels ----

WEIGHTS = pace_of().size.trained
ENDS = 2 * 50288 * 4096 / WEIGHTS  # embedding and output layer, which FSDP2 gathers for both passes at once
AS_IN_THE_PAPER = {"use_multi_rank_bucket_allreduce": False}  # which DeepSpeed is not by default


@pytest.mark.parametrize(
    ("layout", "micro_batch", "step", "replicas"),
    [
        (replicated(1), 0, 0, 0),
        (replicated(4), 0, 0, 2 * 0.75 * 4),
        (deepspeed_layout({"stage": 1}, 4), 0, 0.75 * (2 * 2 + 2), 0),
        (deepspeed_layout({"stage": 2}, 4), 0.75 * 2 * 2, 0.75 * 2, 0),
        (deepspeed_layout(AS_IN_THE_PAPER | {"stage": 1}, 4), 0, 0.75 * (2 + 2), 0),
        (deepspeed_layout(AS_IN_THE_PAPER | {"stage": 2}, 4), 0.75 * 2, 0.75 * 2, 0),
        (deepspeed_layout(AS_IN_THE_PAPER | {"stage": 2, "reduce_scatter": False}, 4), 0.75 * 2 * 2, 0.75 * 2, 0),
        (deepspeed_layout({"stage": 3}, 4), 0.75 * (2 + 2 + 2), 0, 0),
        (fsdp2_layout(4), 0.75 * (2 + 2 - 2 * ENDS + 4), 0, 0),
        (fsdp2_layout(4, reshard=False), 0.75 * 4, 0.75 * 2, 0),
        (fsdp2_layout(8, replicas=2), 0.75 * (2 + 2 - 2 * ENDS + 4), 0, 2 * 0.5 * 4 / 4),
    ],
)
def test_bytes_that_a_card_sends(layout, micro_batch, step, replicas):
    """Of each weight, in bf16."""
    traffic = traffic_of(layout, pace_of().size, 2)
    assert [traffic.micro_batch, traffic.step, traffic.replicas] == pytest.approx(
        [each * WEIGHTS for each in (micro_batch, step, replicas)]
    )


@given(st.sampled_from(["flops", "bandwidth", "link", "network"]), st.sampled_from(
    [replicated(16), deepspeed_layout({"stage": 2}, 16), deepspeed_layout({"stage": 3}, 16), fsdp2_layout(16),
     fsdp2_layout(16, replicas=2)]
), examples=20)  # fmt: skip
def test_a_better_card_is_no_slower(what, layout):
    better = CARD._replace(**{what: 2 * getattr(CARD, what)})
    load = rows(1, processes=16)
    assert pace_of(layout=layout, card=better).step(load) <= pace_of(layout=layout).step(load)


@pytest.mark.parametrize("stage", [0, 2])
def test_the_slowest_process_decides(stage):
    """Once a step under DDP, at every micro-batch under ZeRO-2."""
    layout = deepspeed_layout({"stage": stage}, 2) if stage else replicated(2)
    load, pace = rows(1, processes=2), pace_of(layout=layout)
    even = pace.step(load)
    tokens = load.tokens.copy()
    tokens[0, 0], tokens[1, 1] = 8192, 8192  # the first process is late in one micro-batch, the second in the other
    late = pace.step(load._replace(tokens=tokens))
    assert late > even
    tokens[1] = tokens[1, ::-1]  # now the first in both
    both = pace.step(load._replace(tokens=tokens))
    assert both == pytest.approx(late) if stage else both > late
