"""Weights in the loss against the mean written out in fp64, however a step is cut; and the share of each data set."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from mixes import LAYOUTS, PAD, given, make_mix, make_recipe, make_split, rows_of
from test_attention import VOCABULARY, make_model
from test_padding_free import IMPLEMENTATION, cuts, lengths_of_mixes, step_of_all

from data.mix import Mix
from recipe.keys import Recipe
from training.batches import Batches
from training.collate import collate, cut, kept_targets
from training.loss_shares import loss_shares
from training.plan import Position


@pytest.fixture(scope="module")
def model():
    return make_model("gpt_neox", "sdpa").train()


@pytest.fixture(scope="module")
def exact_model():
    return make_model("gpt_neox", "eager").train().double()


def written_out(model, mix: Mix, recipe: Recipe, processes: int) -> tuple[float, dict[str, torch.Tensor], np.ndarray]:
    """The loss of a step of all conversations and its gradients, from one conversation and all its logits at a time;
    and what the tokens of each data set count in it."""
    model.zero_grad()
    split, above, below = mix.train, torch.zeros(()).double(), np.zeros(len(mix.names))
    for process in range(processes):
        _, batches = next(Batches(mix, recipe, process, processes, PAD).training_steps(Position()))
        for rows in map(rows_of, batches):
            examples = [cut(split, row, recipe, 0) for row in rows]
            targets = max(1, sum(int(scored.sum()) for _, scored in examples))
            for row, (ids, scored) in zip(rows, examples, strict=True):
                ids, places = torch.tensor(ids).long() % VOCABULARY, torch.tensor(scored).nonzero()[:, 0]
                factor = split.weights[row] / (targets if recipe.loss_normalization == "micro_batch" else 1)
                logits = model(ids[None]).logits[0, places - 1]
                log_z = logits.exp().sum(-1).log()
                log_shares, smoothing = logits - log_z[:, None], recipe.label_smoothing
                losses = -(1 - smoothing) * log_shares[torch.arange(len(places)), ids[places]]
                losses = losses - smoothing * log_shares.mean(-1) + recipe.z_loss * log_z**2
                above = above + factor * losses.sum()
                below[split.dataset[row]] += factor * len(places)
    loss = above / (below.sum() or 1)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}, below


@given(
    lengths_of_mixes,
    st.integers(0, 999),
    st.integers(6, 26),
    cuts,
    st.sampled_from(["tokens", "micro_batch"]),
    st.sampled_from([{}, {"label_smoothing": 0.2}, {"z_loss": 0.05}, {"label_smoothing": 0.1, "z_loss": 1e-3}]),
    examples=8,
)
def test_a_step_is_the_weighted_mean(model, exact_model, lengths, seed, max_length, cuts, normalization, terms):
    """Cut into micro-batches, processes and packs, in fp32: to 1e-6 of the gradient's norm (measured in 750 steps, at
    most: 6.3e-7, and 2e-7 of the loss)."""
    mix = make_mix(lengths, weighted=True, seed=seed)
    for layout, (size, processes) in cuts.items():
        recipe = make_recipe(
            len(lengths),
            **LAYOUTS[layout],
            **terms,
            max_length=max_length,
            rng_seed=seed,
            max_grad_norm=0,
            dtype="fp32",
            loss_normalization=normalization,
            per_device_train_batch_size=size,
            global_batch_size=sum(map(len, lengths)),
        )
        loss, gradients, counted = written_out(exact_model, mix, recipe, processes)
        model.set_attn_implementation(IMPLEMENTATION[layout])
        found_loss, found = step_of_all(model, mix, recipe, processes)
        assert found_loss == pytest.approx(loss, rel=1e-6)
        norm = torch.nn.utils.get_total_norm(gradients.values())
        off = torch.nn.utils.get_total_norm([found[name] - gradient for name, gradient in gradients.items()])
        assert off <= 1e-6 * norm
        shares = loss_shares(mix, recipe, kept_targets(mix.train, recipe, 0), processes)
        assert shares == pytest.approx(counted / (counted.sum() or 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_ratio_of_weights_counts_however_large_they_are(layout):
    mix, recipe, rows = make_mix([[9, 8, 7]], weighted=True), make_recipe(**LAYOUTS[layout]), np.arange(3)
    expected = collate(mix.train, rows, recipe, PAD, 0)
    assert expected.weights.max() <= 1
    for factor in (1e-90, 1e90):
        split = replace(mix.train, weights=mix.train.weights * factor)
        torch.testing.assert_close(collate(split, rows, recipe, PAD, 0).weights, expected.weights)
    counts = [int(cut(mix.train, row, recipe, 0)[1].sum()) for row in rows]
    of_rows = mix.train.weights[rows] / mix.train.weights.max()
    assert expected.total_weight == pytest.approx((of_rows * counts).sum())
    assert expected.weights.tolist() == pytest.approx(np.repeat(of_rows, counts).tolist())
    assert collate(mix.train, rows[:0], recipe, PAD, 0).total_weight == 0


def test_without_weights_a_batch_has_none():
    batch = collate(make_split([[9, 8]]), np.arange(2), make_recipe(), PAD, 0)
    assert batch.weights is None
    assert batch.total_weight == len(batch.targets)


@pytest.mark.parametrize("normalization", ["tokens", "micro_batch"])
def test_what_has_no_weight_teaches_nothing(model, normalization):
    """A step of it changes nothing, and beside others it is as if it were not there."""
    keys = {"max_grad_norm": 0, "dtype": "fp32", "loss_normalization": normalization}
    mix = make_mix([[9, 9], [8, 7]], seed=3)
    mix.train.weights = np.array([1.0, 1.0, 0.0, 0.0])
    alone = make_mix([[9, 9]], seed=3)
    model.set_attn_implementation("sdpa_by_conversation")
    recipe = make_recipe(2, global_batch_size=4, per_device_train_batch_size=1, **keys)
    loss, gradients = step_of_all(model, mix, recipe, 2)
    of_alone = make_recipe(1, global_batch_size=2, per_device_train_batch_size=1, **keys)
    expected_loss, expected = step_of_all(model, alone, of_alone, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)
    assert loss_shares(mix, recipe, kept_targets(mix.train, recipe, 0), 2).tolist() == [1, 0]

    mix.train = replace(mix.train, weights=np.zeros(4))
    loss, gradients = step_of_all(model, mix, recipe, 2)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
