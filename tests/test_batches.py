"""Which example goes where: properties that hold for any mix, any number of processes and any batch."""

import itertools
import math
import random

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import strategies as st
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from utils.batches import (
    Position,
    accumulation_steps,
    collate,
    conversations_per_step,
    cut,
    deal,
    step_rows,
    steps_left,
    steps_per_epoch,
    training_rows,
    training_steps,
    validation_batches,
)
from utils.loss import ScoredLoss
from utils.mix import SCHEMA, Mix, Split
from utils.recipe import Datasets, Recipe

NAMES = list(Datasets.model_fields)
PAD = 2**30  # no token of these mixes
STRIDE = 1000  # token p of row r is r * STRIDE + p: a batch tells by itself which piece of which example it holds


def given(*strategies):
    """hypothesis.given without its deadline: the machine may be shared."""
    return lambda test: hypothesis.settings(max_examples=60, deadline=None)(hypothesis.given(*strategies)(test))


def make_split(lengths: list[list[int]], seed: int = 0, scored_share: float = 0.4) -> Split:
    """A split in memory; `lengths` are those of each data set's examples."""
    rng = np.random.default_rng(seed)
    numbers, tables = itertools.count(), []
    for own in lengths:
        examples = [(next(numbers) * STRIDE + np.arange(n), rng.random(n) < scored_share) for n in own]
        for _, scored in examples:
            scored[:1] = False  # as `encode` leaves it: nothing predicts the first token
        columns = {
            "messages": [[] for _ in examples],
            "input_ids": [ids for ids, _ in examples],
            "scored": [scored for _, scored in examples],
            "length": [len(ids) for ids, _ in examples],
            "targets": [int(scored.sum()) for _, scored in examples],
        }
        tables.append(pa.table(columns, schema=SCHEMA))
    columns = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in ("length", "targets")}
    dataset = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    position = np.concatenate([np.arange(len(table)) for table in tables])
    return Split(dataset, position, columns["length"], columns["targets"], tables)


def make_mix(lengths: list[list[int]], **kwargs) -> Mix:
    split = make_split(lengths, **kwargs)
    return Mix(NAMES[: len(lengths)], split, split)


def make_recipe(datasets: int = 1, options: list[dict] | None = None, **keys) -> Recipe:
    chosen = [{name: own} for name, own in zip(NAMES, options or [{}] * datasets, strict=False)]
    keys = {"gradient_accumulation_steps": 1, "rng_seed": 1, **keys}
    return Recipe.model_validate({"model_name": "none", "output_dir": "out", "datasets": chosen, **keys})


def rows_of(batch: dict[str, torch.Tensor]) -> list[int]:
    """The examples of a batch, read off its tokens."""
    return [int(ids[0]) // STRIDE for ids in batch["input_ids"][: len(batch["lengths"])]]


def pieces_of(batch: dict[str, torch.Tensor]) -> dict[int, list[int]]:
    """The same with the tokens of each."""
    return {
        int(ids[0]) // STRIDE: ids[:length].tolist()
        for ids, length in zip(batch["input_ids"], batch["lengths"], strict=False)
    }


def steps_from(mix: Mix, recipe: Recipe, start: Position, process: int, processes: int) -> list[tuple[Position, list]]:
    """The steps of one process from a position to the end of its epoch."""
    steps = []
    for after, micro_batches in training_steps(mix, recipe, process, processes, PAD, start):
        steps.append((after, micro_batches))
        if after.epoch != start.epoch:
            return steps


def epoch_of(mix: Mix, recipe: Recipe, epoch: int, processes: int) -> list[list[list[dict]]]:
    """All micro-batches of an epoch: [process][step][micro-batch]."""
    return [
        [batches for _, batches in steps_from(mix, recipe, Position(epoch), process, processes)]
        for process in range(processes)
    ]


lengths_of_mixes = st.lists(st.lists(st.integers(2, 40), max_size=25), min_size=1, max_size=4).filter(any)
seeds = st.integers(0, 2**32 - 1)
processes_of_runs = st.integers(1, 5)


@st.composite
def mixes_and_recipes(draw) -> tuple[Mix, Recipe]:
    lengths = draw(lengths_of_mixes)
    option = st.one_of(
        st.just({}),
        st.builds(lambda share: {"fraction": share}, st.floats(0.01, 1)),
        st.builds(lambda size: {"size": size}, st.integers(1, 30)),
    )
    recipe = make_recipe(
        options=[draw(option) for _ in lengths],
        rng_seed=draw(seeds),
        per_device_train_batch_size=draw(st.integers(1, 5)),
        per_device_eval_batch_size=draw(st.integers(1, 5)),
        gradient_accumulation_steps=draw(st.integers(1, 4)),
        global_batch_size=draw(st.none() | st.integers(1, 30)),
        max_length=draw(st.integers(2, 45)),
        random_offset_probability=draw(st.sampled_from([0, 0.5, 1])),
        sort_by_length=draw(st.booleans()),
    )
    return make_mix(lengths, seed=draw(st.integers(0, 99))), recipe


# ---- an epoch ----


@given(mixes_and_recipes(), processes_of_runs, st.integers(0, 3))
def test_every_kept_example_once_and_the_same_number_of_micro_batches_everywhere(mix_and_recipe, processes, epoch):
    mix, recipe = mix_and_recipe
    kept = training_rows(mix, recipe, epoch)
    dealt = epoch_of(mix, recipe, epoch, processes)
    used = [row for steps in dealt for step in steps for batch in step for row in rows_of(batch)]
    assert sorted(used) == sorted(kept)
    assert len(set(used)) == len(used)

    expected_steps = steps_per_epoch(mix, recipe, processes)
    assert [len(steps) for steps in dealt] == [expected_steps] * processes
    for number, step in enumerate(zip(*dealt, strict=True), 1):
        assert len({len(batches) for batches in step}) == 1
        sizes = [len(batch["lengths"]) for batches in step for batch in batches]
        assert max(sizes) <= recipe.per_device_train_batch_size
        assert len(step[0]) <= accumulation_steps(recipe, processes)
        assert sum(sizes) == conversations_per_step(recipe, processes) or number == expected_steps
        # Nobody stands idle in a round unless there is nothing left: a whole round is never empty.
        assert all(any(len(b["lengths"]) for b in together) for together in zip(*step, strict=True))


@given(mixes_and_recipes(), processes_of_runs, st.integers(0, 2), st.data())
def test_any_step_can_be_started_from(mix_and_recipe, processes, epoch, data):
    """From the position after a step on, a run sees what it would have seen, and knows how many steps are left."""
    mix, recipe = mix_and_recipe
    process = data.draw(st.integers(0, processes - 1))
    whole = steps_from(mix, recipe, Position(epoch), process, processes)
    before = data.draw(st.integers(0, len(whole) - 1))
    start = whole[before - 1][0] if before else Position(epoch)
    rest = steps_from(mix, recipe, start, process, processes)
    assert [after for after, _ in rest] == [after for after, _ in whole[before:]]
    for (_, ours), (_, theirs) in zip(rest, whole[before:], strict=True):
        assert [pieces_of(batch) for batch in ours] == [pieces_of(batch) for batch in theirs]
    in_step = [
        row
        for each in range(processes)
        for batch in _first(mix, recipe, start, each, processes)
        for row in rows_of(batch)
    ]
    assert sorted(in_step) == sorted(step_rows(mix, recipe, processes, start))

    per_epoch, epochs = steps_per_epoch(mix, recipe, processes), epoch + 1.5
    longer = recipe.model_copy(update={"num_train_epochs": epochs})
    assert steps_left(mix, longer, processes, start) == math.ceil(epochs * per_epoch) - epoch * per_epoch - before


def _first(mix: Mix, recipe: Recipe, start: Position, process: int, processes: int) -> list[dict]:
    return next(training_steps(mix, recipe, process, processes, PAD, start))[1]


@given(lengths_of_mixes, seeds, st.integers(1, 30), st.integers(1, 6), processes_of_runs)
def test_a_global_batch_is_the_same_on_any_number_of_processes(lengths, seed, global_batch, micro_batch, processes):
    mix = make_mix(lengths)
    keys = {"rng_seed": seed, "global_batch_size": global_batch, "per_device_train_batch_size": micro_batch}
    recipe = make_recipe(len(lengths), **keys)
    assert conversations_per_step(recipe, processes) == global_batch
    assert pieces_by_step(mix, recipe, 0, processes) == pieces_by_step(mix, recipe, 0, 1)


def factors(product: int) -> list[tuple[int, int, int]]:
    """Every (processes, micro-batch, accumulation) of a product, with at most 5 processes."""
    divisors = [n for n in range(1, product + 1) if product % n == 0]
    return [(p, m, product // p // m) for p in divisors for m in divisors if p <= 5 and (product // p) % m == 0]


def pieces_by_step(mix: Mix, recipe: Recipe, epoch: int, processes: int) -> list[dict[int, list[int]]]:
    steps = []
    for step in zip(*epoch_of(mix, recipe, epoch, processes), strict=True):
        steps.append({row: ids for batches in step for batch in batches for row, ids in pieces_of(batch).items()})
    return steps


@given(lengths_of_mixes, seeds, st.integers(1, 12), st.integers(0, 2), st.data())
def test_a_step_holds_the_same_examples_and_windows_however_it_is_cut(lengths, seed, product, epoch, data):
    mix, found = make_mix(lengths), []
    for _ in range(2):
        processes, micro_batch, accumulation = data.draw(st.sampled_from(factors(product)))
        recipe = make_recipe(
            len(lengths),
            rng_seed=seed,
            max_length=10,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
        )
        found.append(pieces_by_step(mix, recipe, epoch, processes))
    assert found[0] == found[1]


@given(lengths_of_mixes, seeds, st.sampled_from([(1, 6), (2, 3), (3, 2)]))
def test_sorted_steps_do_not_depend_on_the_processes_either(lengths, seed, cut):
    """With the same micro-batch: under sort_by_length that is what is shuffled."""
    mix, (processes, accumulation) = make_mix(lengths), cut
    keys = {"rng_seed": seed, "per_device_train_batch_size": 3, "sort_by_length": True}
    alone = make_recipe(len(lengths), gradient_accumulation_steps=6, **keys)
    together = make_recipe(len(lengths), gradient_accumulation_steps=accumulation, **keys)
    assert pieces_by_step(mix, alone, 0, 1) == pieces_by_step(mix, together, 0, processes)


@given(seeds, seeds, st.integers(0, 50), st.integers(0, 50), st.booleans())
def test_order_is_a_pure_function_of_seed_and_epoch(seed, other_seed, epoch, other_epoch, sort):
    mix = make_mix([[7] * 40, [9] * 30])
    recipe = make_recipe(2, rng_seed=seed, sort_by_length=sort)
    order = training_rows(mix, recipe, epoch)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert training_rows(mix, recipe, epoch).tolist() == order.tolist()
    other = training_rows(mix, make_recipe(2, rng_seed=other_seed, sort_by_length=sort), other_epoch)
    assert (other.tolist() == order.tolist()) == ((seed, epoch) == (other_seed, other_epoch))


def test_order_mixes_the_data_sets():
    order = training_rows(make_mix([[5] * 50, [5] * 50]), make_recipe(2), 0)
    assert 15 < (order[:50] < 50).sum() < 35


# ---- fraction and size ----


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.001, 1), st.integers(1, 80), seeds, st.integers(0, 9))
def test_fraction_and_size_are_exact(first, second, fraction, size, seed, epoch):
    mix = make_mix([[3] * first, [3] * second, [3]])
    recipe = make_recipe(options=[{"fraction": fraction}, {"size": size}, {}], rng_seed=seed)
    counts = np.bincount(mix.train.dataset[training_rows(mix, recipe, epoch)], minlength=3)
    assert counts[0] == (max(1, round(first * fraction)) if first else 0)
    assert counts[1] == min(size, second)
    assert counts[2] == 1


def test_fraction_and_size_are_drawn_anew_each_epoch():
    mix = make_mix([[3] * 40, [3] * 40])
    recipe = make_recipe(options=[{"fraction": 0.5}, {"size": 10}])
    epochs = [set(training_rows(mix, recipe, epoch).tolist()) for epoch in range(20)]
    for dataset in range(2):
        subsets = [frozenset(row for row in rows if mix.train.dataset[row] == dataset) for rows in epochs]
        assert len(set(subsets)) == len(subsets)
        assert len(set.union(*map(set, subsets))) == 40  # in time each row is used


def test_a_tiny_fraction_leaves_something_to_train_on():
    recipe = make_recipe(options=[{"fraction": 0.001}])
    assert steps_per_epoch(make_mix([[3] * 5]), recipe, 1) == 1


# ---- sort_by_length ----


@given(lengths_of_mixes, seeds, st.integers(1, 6), st.integers(0, 3))
def test_sorted_micro_batches_hold_similar_lengths_and_lose_nothing(lengths, seed, size, epoch):
    mix = make_mix(lengths)
    keys = {"rng_seed": seed, "per_device_train_batch_size": size}
    order = training_rows(mix, make_recipe(len(lengths), sort_by_length=True, **keys), epoch)
    assert sorted(order) == sorted(training_rows(mix, make_recipe(len(lengths), **keys), epoch))
    batches = [mix.train.lengths[order[i : i + size]] for i in range(0, len(order), size)]
    # Laid in a row by length, the batches do not overlap: each is a stretch of the sorted lengths.
    batches.sort(key=lambda batch: (batch.min(), batch.max()))
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(batches))


def test_sorted_micro_batches_are_shuffled_and_ties_are_too():
    mix = make_mix([list(range(2, 42)) * 2])
    recipe = make_recipe(1, sort_by_length=True, per_device_train_batch_size=4)
    epochs = [training_rows(mix, recipe, epoch).reshape(-1, 4) for epoch in range(2)]
    for order in epochs:
        shortest = mix.train.lengths[order].min(axis=1)
        assert shortest.tolist() != sorted(shortest)
    assert {frozenset(batch) for batch in epochs[0].tolist()} == {frozenset(batch) for batch in epochs[1].tolist()}
    assert epochs[0].tolist() != epochs[1].tolist()


# ---- windows ----


@given(mixes_and_recipes(), st.integers(0, 5))
def test_windows(mix_and_recipe, epoch):
    mix, recipe = mix_and_recipe
    for row in range(len(mix.train)):
        whole, scored = mix.train.tokens(row)
        ids, window_scored = cut(mix.train, row, recipe, epoch)
        assert len(ids) == len(window_scored) == min(len(whole), recipe.max_length)
        start = int(ids[0]) - row * STRIDE
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


# ---- validation ----


@given(mixes_and_recipes(), processes_of_runs)
def test_validation_uses_every_example_once_and_is_never_offset(mix_and_recipe, processes):
    mix, recipe = mix_and_recipe
    for dataset in range(len(mix.names)):
        dealt = [list(validation_batches(mix, recipe, dataset, p, processes, PAD)) for p in range(processes)]
        assert len({len(batches) for batches in dealt}) == 1
        used = [row for batches in dealt for batch in batches for row in rows_of(batch)]
        assert sorted(used) == np.flatnonzero(mix.validation.dataset == dataset).tolist()
        for batch in itertools.chain(*dealt):
            assert all(ids[0] % STRIDE == 0 for ids in batch["input_ids"][: len(batch["lengths"])])
            assert len(batch["lengths"]) <= recipe.per_device_eval_batch_size
        longest_first = [batch["input_ids"].shape[1] for batch in dealt[0] if len(batch["lengths"])]
        assert longest_first == sorted(longest_first, reverse=True)


@given(st.integers(0, 40), processes_of_runs)
def test_deal(count, processes):
    chunks = [np.array([number]) for number in range(count)]
    dealt = [deal(chunks, process, processes) for process in range(processes)]
    assert {len(own) for own in dealt} == {math.ceil(count / processes)}
    assert sorted(np.concatenate([np.empty(0), *itertools.chain(*dealt)])) == list(range(count))


# ---- collate ----


@given(mixes_and_recipes(), st.integers(0, 3), st.data())
def test_the_parts_of_a_batch_agree(mix_and_recipe, epoch, data):
    mix, recipe = mix_and_recipe
    rows = np.array(data.draw(st.lists(st.integers(0, len(mix.train) - 1), min_size=1, max_size=6, unique=True)))
    batch = collate(mix.train, rows, recipe, PAD, epoch)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    lengths = batch["lengths"].tolist()
    assert lengths == [min(length, recipe.max_length) for length in mix.train.lengths[rows]]
    shape = (len(rows), max(lengths))
    assert {tuple(batch[name].shape) for name in ("input_ids", "attention_mask", "labels")} == {shape}
    assert rows_of(batch) == rows.tolist()
    for ids, mask, labels, length in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], lengths, strict=True
    ):
        assert mask.tolist() == [1] * length + [0] * (shape[1] - length)
        assert (ids[length:] == PAD).all()
        assert (ids[:length] != PAD).all()
        assert (labels[length:] == -100).all()
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert labels[0] == -100
    # One data set a target, in the order in which the loss has them.
    sources = torch.from_numpy(mix.train.dataset[rows])[:, None].expand(shape)
    assert batch["dataset"].tolist() == sources[:, 1:][batch["labels"][:, 1:] != -100].tolist()


def test_an_empty_micro_batch_has_no_target_and_a_gradient_of_zeros():
    split = make_split([[5, 6]])
    batch = collate(split, np.empty(0, dtype=np.int64), make_recipe(), 0, epoch=0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (1, 2),
        "attention_mask": (1, 2),
        "labels": (1, 2),
        "dataset": (0,),
        "lengths": (0,),
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert (batch["labels"] == -100).all()
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = ScoredLoss(GPTNeoXForCausalLM(config)).train()
    losses, _ = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
    assert losses.shape == (0,)
    losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad == 0).all(), name
