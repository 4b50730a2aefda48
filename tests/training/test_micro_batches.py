"""Micro-batches by tokens: how even they are, against what is possible and against the cut by number."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from mixes import LAYOUTS, given, make_mix, make_recipe, processes_of_runs, seeds

from run.report import out_of_memory
from training.deepspeed_config import fill_config
from training.micro_batches import MicroBatch, grouped, micro_batch_numbers, rows_of_step
from training.plan import accumulation_steps, best_fit_decreasing, describe_cut, epoch_plan, packs_per_step
from utils.errors import UserError

LONGEST = 4096
layouts = st.sampled_from(["padding-free", "padded"])


def long_tailed(seed: int, count: int) -> np.ndarray:
    """Lengths as the mix's: half of them under 150 tokens, a tenth over 1,500 (benchmarking/train.py)."""
    return np.exp(np.random.default_rng(seed).normal(5.0, 1.8, count)).clip(16, LONGEST).astype(np.int64)


def sizes(tokens: np.ndarray, numbers: np.ndarray, processes: int, padded: bool = False) -> np.ndarray:
    """Tokens of each micro-batch, padding included: int64 [rounds, processes]."""
    made = np.zeros(math.ceil((numbers.max() + 1) / processes) * processes, dtype=np.int64)
    for number in np.unique(numbers):
        own = tokens[numbers == number]
        made[number] = len(own) * own.max() if padded else own.sum()
    return made.reshape(-1, processes)


def cut(tokens: np.ndarray, processes: int, limit: int | None, layout: str = "padding-free", size: int = 4):
    recipe = make_recipe(max_length=LONGEST, micro_batch_tokens=limit, **LAYOUTS[layout])
    return sizes(tokens, micro_batch_numbers(tokens, size, recipe, processes), processes, layout == "padded")


@given(seeds, st.integers(1, 8), st.integers(1, 5), st.integers(4, 12), layouts)
def test_more_even_than_by_number(seed, processes, fitting, each, layout):
    """The process with the most has no more than by number, and no process has more micro-batches.

    Padded they may have more padding between them: there it is a rule of thumb, and only the bound is asked for.
    """
    tokens = long_tailed(seed, each * processes)
    by_tokens = cut(tokens, processes, fitting * LONGEST, layout)
    by_number = cut(tokens, processes, None, layout, size=fitting)
    assert by_tokens.max() <= fitting * LONGEST
    assert len(by_tokens) <= len(by_number)
    if layout == "padding-free":
        assert by_tokens.sum(0).max() <= by_number.sum(0).max()
    # ZeRO-2 waits in each round: a process's largest come first, as everyone's.
    assert (np.diff(by_tokens, axis=0) <= 0).all()


def every_cut(tokens: np.ndarray, padded: bool) -> list[np.ndarray]:
    """The sizes that micro-batches have, for each way to make some of these conversations."""
    ways = [[0]]  # of each conversation a micro-batch that is there, or a new one
    for _ in tokens[1:]:
        ways = [[*way, number] for way in ways for number in range(max(way) + 2)]
    return [sizes(tokens, np.array(way), 1, padded)[:, 0] for way in ways]


few = st.lists(st.integers(1, 40), min_size=1, max_size=7).map(np.array)


@given(few, st.integers(1, 4))
def test_the_process_with_the_most_has_at_most_a_third_more_than_it_must(tokens, processes):
    found = cut(tokens, processes, LONGEST)
    least = min(own.max() for own in every_cut(tokens, padded=False) if len(own) <= processes)
    assert len(found) == 1
    assert least <= found.max() <= 4 / 3 * least


@given(few, st.integers(1, 3), st.integers(40, 90))
def test_padded_micro_batches_are_the_fewest_and_then_the_smallest_that_there_can_be(tokens, processes, limit):
    recipe = make_recipe(max_length=40, micro_batch_tokens=limit, padding_free=False)
    found = sizes(tokens, micro_batch_numbers(tokens, 1, recipe, processes), processes, padded=True)
    ways = every_cut(tokens, padded=True)
    fewest = math.ceil(min(len(own) for own in ways if own.max() <= limit) / processes)
    assert len(found) == fewest
    assert found.max() == min(own.max() for own in ways if len(own) <= fewest * processes)


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_hardly_ever_more_micro_batches_than_by_best_fit(processes):
    rounds = fewest = 0
    for seed in range(300):
        tokens = long_tailed(seed, 32)
        rounds += len(cut(tokens, processes, LONGEST))
        fewest += math.ceil((best_fit_decreasing(tokens, LONGEST).max() + 1) / processes)
    assert rounds <= 1.01 * fewest


def test_even_by_hand():
    """Two processes, 100 tokens in a micro-batch."""
    recipe = make_recipe(max_length=100, micro_batch_tokens=100)
    tokens = np.array([30, 90, 20, 60, 60, 40])
    # 90 to the first, 60 and 60 to the second, 40 to the first; 30 and 20 to the one with the fewest, 120 and then 130.
    numbers = micro_batch_numbers(tokens, 1, recipe, 2)
    assert numbers.tolist() == [1, 0, 2, 1, 3, 2]
    assert sizes(tokens, numbers, 2).tolist() == [[90, 90], [60, 60]]
    assert [own.tolist() for own in grouped(np.arange(10, 16), numbers)] == [[11], [10, 13], [12, 15], [14]]


def test_padded_ones_by_hand():
    """As many as fit to the last token, padding counted; of each two the larger to the process with less so far."""
    recipe = make_recipe(max_length=100, micro_batch_tokens=100, padding_free=False)
    assert micro_batch_numbers(np.array([60, 100, 55, 90]), 1, recipe, 2).tolist() == [3, 0, 2, 1]
    assert micro_batch_numbers(np.array([50, 30]), 1, recipe, 1).tolist() == [0, 0]
    assert micro_batch_numbers(np.array([51, 30]), 1, recipe, 1).tolist() == [0, 1]


def test_full_to_the_last_token():
    recipe = make_recipe(max_length=100, micro_batch_tokens=100)
    assert micro_batch_numbers(np.array([60, 40]), 1, recipe, 1).tolist() == [0, 0]
    assert micro_batch_numbers(np.array([60, 41]), 1, recipe, 1).tolist() == [0, 1]
    # 200 tokens that two micro-batches do not take: 60 and 41 are one too many.
    for tokens, full in (([61, 60, 40, 39], [100, 100]), ([61, 60, 41, 38], [60, 61, 79])):
        assert sorted(np.bincount(micro_batch_numbers(np.array(tokens), 1, recipe, 1), tokens)) == full


@given(seeds, processes_of_runs, layouts)
def test_the_same_whenever_it_is_asked(seed, processes, layout):
    tokens = long_tailed(seed, 32)
    recipe = make_recipe(max_length=LONGEST, micro_batch_tokens=LONGEST, **LAYOUTS[layout])
    np.random.seed(1)
    first = micro_batch_numbers(tokens, 4, recipe, processes).tolist()
    np.random.seed(2)
    assert micro_batch_numbers(tokens.copy(), 4, recipe, processes).tolist() == first


def test_rows_of_a_step_are_those_of_its_packs():
    mix = make_mix([[30, 90, 20, 60, 60, 40, 10]])
    recipe = make_recipe(max_length=100, micro_batch_tokens=100, global_batch_size=4, packing=True)
    plan = epoch_plan(mix, recipe, 0)
    tokens = plan.tokens(mix, recipe)
    assert tokens.tolist() == [mix.train.lengths[plan.of_packs(p, p + 1)].sum() for p in range(len(plan))]
    for first in range(0, len(plan), 4):
        rows = rows_of_step(plan, tokens, first, recipe, 2)
        assert sorted(itertools.chain(*rows)) == sorted(plan.of_packs(first, first + 4))
        assert all(mix.train.lengths[own].sum() <= 100 for own in rows)


def test_none_to_group():
    assert grouped(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)) == []


# ---- what else is told of them ----


def test_in_words():
    recipe = make_recipe(max_length=1000, micro_batch_tokens=2500, global_batch_size=32)
    assert describe_cut(recipe, 4) == "4 processes x up to 2,500 tokens x up to 4 accumulated"
    assert packs_per_step(recipe, 4) == 32


def test_the_engine_is_told_the_most_micro_batches():
    recipe = make_recipe(max_length=1000, micro_batch_tokens=2500, global_batch_size=32)
    config = fill_config({"zero_optimization": {"stage": 2}}, "a file", recipe, 10, torch.float32)
    assert config["gradient_accumulation_steps"] == accumulation_steps(recipe, 1) == 16
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["train_batch_size"] == 32
    fixed = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}
    with pytest.raises(UserError, match=r"= 4 contradicts the recipe: the most micro-batches a step = 16; write .auto"):
        fill_config(fixed, "a file", recipe, 10, torch.float32)


def test_what_helps_where_memory_is_too_small():
    largest = (MicroBatch(np.arange(3), 0, (1, 2400)), None)
    assert "give a smaller per_device_train_batch_size (glob" in out_of_memory(largest, make_recipe())
    by_tokens = out_of_memory(largest, make_recipe(max_length=1000, micro_batch_tokens=2500))
    assert "3 conversations, 2,400 tokens" in by_tokens
    assert "give a smaller micro_batch_tokens" in by_tokens
    assert "batch_size" not in by_tokens
