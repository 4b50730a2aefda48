"""A batch against what was put into it, for each layout: its pieces, their places, what is scored; windows."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from mixes import LAYOUTS, PAD, STRIDE, given, make_recipe, make_split, mixes_and_recipes, scored_loss
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from training.attention import sdpa_by_conversation
from training.collate import Batch, collate, cut, window_start

# ---- windows ----


@given(mixes_and_recipes(), st.integers(0, 5))
def test_windows(mix_and_recipe, epoch):
    mix, recipe = mix_and_recipe
    for row in range(len(mix.train)):
        whole, scored = mix.train.tokens(row)
        ids, window_scored = cut(mix.train, row, recipe, epoch)
        assert len(ids) == len(window_scored) == min(len(whole), recipe.max_length)
        start = int(ids[0]) - row * STRIDE
        assert start == window_start(scored, row, recipe, epoch)
        assert ids.tolist() == whole[start : start + len(ids)].tolist()
        assert not window_scored[0]
        assert window_scored[1:].tolist() == scored[start + 1 : start + len(ids)].tolist()
        assert mix.train.tokens(row)[1].tolist() == scored.tolist()  # the mix itself stays as it is
        if recipe.random_offset_probability == 0:
            assert start == 0
        if recipe.random_offset_probability == 1 and scored[1:].any():
            assert window_scored.any()


def test_windows_are_drawn_anew_each_epoch_and_with_the_recipes_probability():
    split = make_split([[500] * 200])
    starts = {}
    for probability in (0, 0.8, 1):
        recipe = make_recipe(max_length=10, random_offset_probability=probability)
        starts[probability] = [int(cut(split, row, recipe, 0)[0][0]) % STRIDE for row in range(200)]
    assert set(starts[0]) == {0}
    assert np.mean(np.array(starts[0.8]) > 0) == pytest.approx(0.8, abs=0.1)
    assert np.mean(np.array(starts[1]) > 0) > 0.95
    assert np.mean(starts[1]) == pytest.approx(245, abs=40)  # over the whole of 0 .. 490
    assert max(starts[1]) <= 490
    recipe = make_recipe(max_length=10, random_offset_probability=1)
    assert [int(cut(split, row, recipe, 1)[0][0]) % STRIDE for row in range(200)] != starts[1]


def test_both_ends_of_a_conversation_can_be_in_a_window():
    split = make_split([[12] * 300], scored_share=1)
    recipe = make_recipe(max_length=10, random_offset_probability=1)
    assert {int(cut(split, row, recipe, 0)[0][0]) % STRIDE for row in range(300)} == {0, 1, 2}


def test_a_random_window_holds_one_of_few_targets():
    """And not as its first token, which nothing predicts."""
    split = make_split([[40] * 300], scored_share=0.03)
    recipe = make_recipe(max_length=3, random_offset_probability=1)
    for row in np.flatnonzero(split.targets):
        assert cut(split, row, recipe, 0)[1].any()


# ---- batches ----


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@given(mixes_and_recipes(), st.integers(0, 3) | st.none(), st.data())
def test_the_parts_of_a_batch_agree(mix_and_recipe, epoch, data):
    """Put together token by token."""
    mix, recipe = mix_and_recipe
    rows = np.array(data.draw(st.lists(st.integers(0, len(mix.train) - 1), min_size=1, max_size=6, unique=True)))
    batch = collate(mix.train, rows, recipe, PAD, epoch)
    pieces = [cut(mix.train, row, recipe, epoch) for row in rows]
    assert batch.lengths == tuple(len(ids) for ids, _ in pieces)
    longest = max(batch.lengths)

    ids, positions, mask, scored, targets, dataset = [], [], [], [], [], []
    for row, (own_ids, own_scored) in zip(rows, pieces, strict=True):
        start, length = len(ids), len(own_ids)
        filled = length if recipe.padding_free else longest
        ids += own_ids.tolist() + [PAD] * (filled - length)
        positions += range(filled)
        mask += [1] * length + [0] * (filled - length)
        for place in range(1, length):
            if own_scored[place]:
                scored.append(start + place - 1)  # where the target is predicted
                targets.append(own_ids[place])
                dataset.append(mix.train.dataset[row])
    assert batch.input_ids.flatten().tolist() == ids
    assert (batch.scored.tolist(), batch.targets.tolist(), batch.dataset.tolist()) == (scored, targets, dataset)
    if recipe.padding_free:
        assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(batch.lengths))
        assert batch.position_ids.flatten().tolist() == positions
        assert batch.boundaries.tolist() == np.cumsum([0, *batch.lengths]).tolist()
        assert batch.boundaries.dtype == torch.int32
        assert batch.attention_mask is None
    else:
        assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), longest)
        assert batch.attention_mask.flatten().tolist() == mask
        assert batch.position_ids is batch.boundaries is None
    assert {tensor.dtype for name, tensor in tensors_of(batch).items() if name != "boundaries"} == {torch.int64}

    seen = list(batch.conversations())
    for (own_ids, own_scored), (expected_ids, expected_scored) in zip(seen, pieces, strict=True):
        assert own_ids.tolist() == expected_ids.tolist()
        assert own_scored.tolist() == expected_scored.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_model_is_called_with(layout):
    """By the names that flash-attn's kernels and training/attention.py are given it."""
    batch = collate(make_split([[5, 3, 4]]), np.arange(3), make_recipe(**LAYOUTS[layout]), PAD, epoch=0)
    inputs = batch.model_inputs()
    if layout == "padded":
        assert inputs.keys() == {"input_ids", "attention_mask"}
        return
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 5, 8, 12]
    assert (inputs["max_length_q"], inputs["max_length_k"]) == (5, 5)
    assert inputs["conversation_lengths"].tolist() == [5, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_a_device_all_of_it_goes(layout):
    batch = collate(make_split([[5, 3, 4]]), np.arange(3), make_recipe(**LAYOUTS[layout]), PAD, epoch=0)
    moved = batch.to(torch.device("meta"))
    assert tensors_of(moved).keys() == tensors_of(batch).keys()
    assert {tensor.device.type for tensor in tensors_of(moved).values()} == {"meta"}
    assert moved.lengths == batch.lengths


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_micro_batch_has_no_target_and_a_gradient_of_zeros(layout):
    batch = collate(make_split([[5, 6]]), np.empty(0, dtype=np.int64), make_recipe(**LAYOUTS[layout]), 0, epoch=0)
    shapes = {"input_ids": (1, 2), "scored": (0,), "targets": (0,), "dataset": (0,)}
    shapes |= {"attention_mask": (1, 2)} if layout == "padded" else {"position_ids": (1, 2), "boundaries": (2,)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors_of(batch).items()} == shapes
    assert batch.lengths == ()
    assert list(batch.conversations()) == []
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    implementation = "sdpa" if layout == "padded" else sdpa_by_conversation.__name__
    model = scored_loss(GPTNeoXForCausalLM._from_config(config, attn_implementation=implementation)).train()
    total, losses, _ = model(batch)
    assert losses.shape == (0,)
    assert total == 0
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
