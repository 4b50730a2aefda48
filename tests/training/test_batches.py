"""Which example goes where: properties that hold for any mix, any number of processes and any batch."""

import itertools
import math
import random
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from mixes import (
    PAD,
    STRIDE,
    given,
    lengths_of_mixes,
    make_mix,
    make_recipe,
    mixes_and_recipes,
    pieces_of,
    processes_of_runs,
    rows_of,
    seeds,
)

from data.mix import Mix
from recipe.keys import Recipe
from training.batches import Batches, deal, prefetched
from training.collate import Batch
from training.plan import (
    Position,
    accumulation_steps,
    describe_cut,
    describe_packing,
    describe_step,
    epoch_plan,
    packs_per_step,
    steps_left,
    steps_per_epoch,
    training_rows,
)

CPU = torch.device("cpu")


def steps_from(mix: Mix, recipe: Recipe, start: Position, process: int, processes: int) -> list[tuple[Position, list]]:
    """The steps of one process from a position to the end of its epoch."""
    steps = []
    for after, micro_batches in Batches(mix, recipe, process, processes, PAD).training_steps(start):
        steps.append((after, micro_batches))
        if after.epoch != start.epoch:
            return steps


def epoch_of(mix: Mix, recipe: Recipe, epoch: int, processes: int) -> list[list[list[Batch]]]:
    """All micro-batches of an epoch: [process][step][micro-batch]."""
    return [
        [batches for _, batches in steps_from(mix, recipe, Position(epoch), process, processes)]
        for process in range(processes)
    ]


# ---- an epoch ----


@given(mixes_and_recipes(), processes_of_runs, st.integers(0, 3))
def test_every_kept_example_once_and_the_same_number_of_micro_batches_everywhere(mix_and_recipe, processes, epoch):
    mix, recipe = mix_and_recipe
    kept = training_rows(mix, recipe, epoch)
    dealt = epoch_of(mix, recipe, epoch, processes)
    used = [row for steps in dealt for step in steps for batch in step for row in rows_of(batch)]
    assert sorted(used) == sorted(kept)
    assert len(set(used)) == len(used)

    pack_of = packs_by_row(mix, recipe, epoch)
    expected_steps = steps_per_epoch(mix, recipe, processes, epoch)
    assert [len(steps) for steps in dealt] == [expected_steps] * processes
    for number, step in enumerate(zip(*dealt, strict=True), 1):
        assert len({len(batches) for batches in step}) == 1
        packs = [{pack_of[row] for row in rows_of(batch)} for batches in step for batch in batches]
        sizes = [len(own) for own in packs]
        assert sum(sizes) == len(set.union(*packs))  # no pack is cut in two
        if recipe.micro_batch_tokens is None:
            assert max(sizes) <= recipe.per_device_train_batch_size
        else:
            assert max(batch.input_ids.numel() for batches in step for batch in batches) <= recipe.micro_batch_tokens
        assert len(step[0]) <= accumulation_steps(recipe, processes)
        assert sum(sizes) == packs_per_step(recipe, processes) or number == expected_steps
        # Nobody stands idle in a round unless there is nothing left: a whole round is never empty.
        assert all(any(len(b.lengths) for b in together) for together in zip(*step, strict=True))


def packs_by_row(mix: Mix, recipe: Recipe, epoch: int) -> dict[int, int]:
    """The pack of each kept row; that no pack is over max_length is checked on the way."""
    plan, pack_of = epoch_plan(mix, recipe, epoch), {}
    for pack in range(len(plan)):
        rows = plan.of_packs(pack, pack + 1)
        assert len(rows) == 1 or np.minimum(mix.train.lengths[rows], recipe.max_length).sum() <= recipe.max_length
        assert len(rows) == 1 or recipe.packing
        pack_of |= dict.fromkeys(rows.tolist(), pack)
    return pack_of


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
    assert sorted(in_step) == sorted(Batches(mix, recipe, 0, processes, PAD).step_rows(start))

    # Two and a half epochs in all, the rest of them on another number of processes: steps of another size. Under
    # packing no two epochs need be equally long where `fraction` is drawn.
    now = data.draw(processes_of_runs)
    rest, *later = (
        len(steps_from(mix, recipe, at, 0, now)) for at in (start, Position(epoch + 1), Position(epoch + 2))
    )
    longer = recipe.model_copy(update={"num_train_epochs": epoch + 2.5})
    assert steps_left(mix, longer, now, start) == rest + later[0] + math.ceil(later[1] / 2)
    over = recipe.model_copy(update={"num_train_epochs": float(epoch)})
    assert steps_left(mix, over, now, Position(epoch)) == 0


def _first(mix: Mix, recipe: Recipe, start: Position, process: int, processes: int) -> list[Batch]:
    return next(Batches(mix, recipe, process, processes, PAD).training_steps(start))[1]


@given(lengths_of_mixes, seeds, st.integers(1, 30), st.integers(1, 6), processes_of_runs, st.booleans())
def test_a_global_batch_is_the_same_on_any_number_of_processes(lengths, seed, size, micro_batch, processes, packing):
    mix = make_mix(lengths)
    keys = {"rng_seed": seed, "global_batch_size": size, "per_device_train_batch_size": micro_batch}
    recipe = make_recipe(len(lengths), packing=packing, max_length=45, **keys)
    assert packs_per_step(recipe, processes) == size
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


@given(lengths_of_mixes, seeds, st.integers(1, 12), st.integers(0, 2), st.booleans(), st.data())
def test_a_step_holds_the_same_examples_and_windows_however_it_is_cut(lengths, seed, product, epoch, packing, data):
    mix, found = make_mix(lengths), []
    for _ in range(2):
        processes, micro_batch, accumulation = data.draw(st.sampled_from(factors(product)))
        recipe = make_recipe(
            len(lengths),
            rng_seed=seed,
            max_length=10,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            packing=packing,
        )
        found.append(pieces_by_step(mix, recipe, epoch, processes))
    assert found[0] == found[1]


@given(mixes_and_recipes(), st.integers(0, 3))
def test_the_layout_of_a_batch_moves_no_example(mix_and_recipe, epoch):
    """Padded or not, a micro-batch by number holds the same pieces in the same order."""
    mix, recipe = mix_and_recipe
    by_number = {"packing": False, "micro_batch_tokens": None}
    layouts = [recipe.model_copy(update=by_number | {"padding_free": free}) for free in (False, True)]
    padded, free = (epoch_of(mix, layout, epoch, 2) for layout in layouts)
    for ours, theirs in zip(itertools.chain(*padded), itertools.chain(*free), strict=True):
        assert [list(pieces_of(b).items()) for b in ours] == [list(pieces_of(b).items()) for b in theirs]


@given(lengths_of_mixes, seeds, st.sampled_from([(1, 6), (2, 3), (3, 2)]))
def test_sorted_steps_do_not_depend_on_the_processes_either(lengths, seed, cut):
    """With the same micro-batch: under sort_by_length that is what is shuffled."""
    mix, (processes, accumulation) = make_mix(lengths), cut
    keys = {"rng_seed": seed, "per_device_train_batch_size": 3, "sort_by_length": True}
    alone = make_recipe(len(lengths), gradient_accumulation_steps=6, **keys)
    together = make_recipe(len(lengths), gradient_accumulation_steps=accumulation, **keys)
    assert pieces_by_step(mix, alone, 0, 1) == pieces_by_step(mix, together, 0, processes)


@given(seeds, seeds, st.integers(0, 50), st.integers(0, 50), st.sampled_from(["sort_by_length", "packing", "fraction"]))
def test_order_is_a_pure_function_of_seed_and_epoch(seed, other_seed, epoch, other_epoch, key):
    mix, keys = make_mix([[7] * 40, [9] * 30]), {key: True} if key != "fraction" else {"options": [{key: 0.5}] * 2}
    recipe = make_recipe(2, rng_seed=seed, max_length=30, **keys)
    plan = epoch_plan(mix, recipe, epoch)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = epoch_plan(mix, recipe, epoch)
    assert again.rows.tolist() == plan.rows.tolist()
    assert again.bounds.tolist() == plan.bounds.tolist()
    other = training_rows(mix, make_recipe(2, rng_seed=other_seed, max_length=30, **keys), other_epoch)
    assert (other.tolist() == plan.rows.tolist()) == ((seed, epoch) == (other_seed, other_epoch))


def test_order_mixes_the_data_sets():
    order = training_rows(make_mix([[5] * 50, [5] * 50]), make_recipe(2), 0)
    assert 15 < (order[:50] < 50).sum() < 35


# ---- packing ----


def test_packs_are_shuffled_and_mix_the_data_sets():
    mix = make_mix([[100] * 60, [30] * 60])
    recipe = make_recipe(2, packing=True, max_length=100)
    plans = [epoch_plan(mix, recipe, epoch) for epoch in range(2)]
    for plan in plans:
        assert len(plan) == 60 + 20
        long = np.array([mix.train.dataset[plan.of_packs(pack, pack + 1)][0] == 0 for pack in range(80)])
        assert 22 < long[:40].sum() < 38  # best fit decreasing has the 60 long ones first
    # What shares a pack is drawn anew too.
    together = [{frozenset(plan.of_packs(pack, pack + 1).tolist()) for pack in range(80)} for plan in plans]
    assert len(together[0] & together[1]) <= 62


def test_under_packing_epochs_may_differ_in_length_where_a_fraction_is_drawn():
    mix = make_mix([[2] * 15 + [40] * 15])
    recipe = make_recipe(options=[{"fraction": 0.5}], packing=True, max_length=40, per_device_train_batch_size=2)
    steps = [steps_per_epoch(mix, recipe, 1, epoch) for epoch in range(20)]
    assert len(set(steps)) > 1
    assert [len(steps_from(mix, recipe, Position(epoch), 0, 1)) for epoch in range(20)] == steps
    assert steps_left(mix, recipe.model_copy(update={"num_train_epochs": 20.0}), 1, Position()) == sum(steps)
    assert steps_left(mix, recipe.model_copy(update={"num_train_epochs": 20.0}), 1, Position(7)) == sum(steps[7:])


def test_packing_says_how_the_epoch_changes():
    mix = make_mix([[50] * 8, [25] * 16])
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 100}
    recipe = make_recipe(2, packing=True, **keys)
    assert describe_packing(mix, recipe, 1) == (
        "packing: 24 conversations in 8 packs, 3.0 in each, 100.0% full: 2 steps an epoch in place of 6"
    )
    assert describe_step(recipe, 1) == "4 packs of up to 100 tokens a step"
    assert describe_step(make_recipe(2, **keys), 2) == "8 conversations a step"
    assert describe_cut(recipe, 1) == "1 process x 2 packs x 2 accumulated"


# ---- prefetching ----


def counted(made: list[int], count: int, fail_at: int | None = None):
    """Steps whose number is noted as they are made."""
    for number in range(count):
        if number == fail_at:
            raise OSError("the disk is gone")
        made.append(number)
        yield Position(0, number), []


def wait_until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that in a minute")


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetched_steps_are_the_same_steps():
    mix, recipe = make_mix([[5, 9, 3, 12] * 5]), make_recipe(per_device_train_batch_size=3)
    plain = list(itertools.islice(Batches(mix, recipe, 0, 1, PAD).training_steps(Position()), 10))
    steps = prefetched(itertools.islice(Batches(mix, recipe, 0, 1, PAD).training_steps(Position()), 10), CPU)
    for (after, batches), (expected_after, expected) in zip(steps, plain, strict=True):
        assert after == expected_after
        assert [pieces_of(batch) for batch in batches] == [pieces_of(batch) for batch in expected]
    assert list(prefetched(iter([]), CPU)) == []
    assert prefetch_threads() == []


def test_prefetched_steps_are_made_two_ahead_and_no_more():
    made = []
    steps = prefetched(counted(made, 10), CPU)
    for taken in range(1, 9):
        next(steps)
        wait_until(lambda taken=taken: len(made) == taken + 2)  # while nobody asks for them
        time.sleep(0.01)
        assert len(made) == taken + 2
    steps.close()


def test_what_goes_wrong_while_prefetching_comes_out_at_its_step():
    made, seen = [], []
    steps = prefetched(counted(made, 10, fail_at=4), CPU)
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(steps)
    assert seen == [(Position(0, number), []) for number in range(4)]
    assert made == [0, 1, 2, 3]
    wait_until(lambda: not prefetch_threads())


def test_prefetching_stops_when_the_run_does():
    made = []
    steps = prefetched(counted(made, 10**9), CPU)
    next(steps)
    assert len(prefetch_threads()) == 1
    steps.close()
    assert prefetch_threads() == []
    assert len(made) == 3


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_the_thread_takes_the_gpu_of_its_process(device, monkeypatch):
    """By its number, though Accelerate names a process's only GPU without one; PyTorch's own check refuses that."""
    taken, pinned_by = [], []

    def pin_memory(batch):
        pinned_by.append(threading.current_thread())
        return batch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch._C,
        "_cuda_setDevice",
        lambda number: taken.append((number, threading.current_thread())),
        raising=False,  # which only PyTorch for CUDA has
    )
    monkeypatch.setattr(Batch, "pin_memory", pin_memory)
    mix, recipe = make_mix([[5, 9, 3]]), make_recipe()
    steps = Batches(mix, recipe, 0, 1, PAD).training_steps(Position(), 2)
    assert len(list(prefetched(steps, torch.device(device)))) == 2
    ((number, thread),) = taken
    assert number == 3
    assert thread is not threading.main_thread()
    assert {*pinned_by} == {thread}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_prefetched_batches_are_pinned():
    mix, recipe = make_mix([[5, 9, 3]]), make_recipe()
    _, (batch, *_) = next(prefetched(Batches(mix, recipe, 0, 1, PAD).training_steps(Position()), torch.device("cuda")))
    assert batch.input_ids.is_pinned()
    assert batch.scored.is_pinned()


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


# ---- validation ----


@given(mixes_and_recipes(), processes_of_runs)
def test_validation_uses_every_example_once_and_is_never_offset(mix_and_recipe, processes):
    mix, recipe = mix_and_recipe
    for dataset in range(len(mix.names)):
        dealt = [list(Batches(mix, recipe, p, processes, PAD).validation(dataset)) for p in range(processes)]
        assert len({len(batches) for batches in dealt}) == 1
        used = [row for batches in dealt for batch in batches for row in rows_of(batch)]
        assert sorted(used) == np.flatnonzero(mix.validation.dataset == dataset).tolist()
        for batch in itertools.chain(*dealt):
            assert all(ids[0] % STRIDE == 0 for ids, _ in batch.conversations())
            if recipe.micro_batch_tokens is None:
                assert len(batch.lengths) <= recipe.per_device_eval_batch_size  # conversations, under packing too
            else:
                assert batch.input_ids.numel() <= recipe.micro_batch_tokens
        for own in dealt:
            largest_first = [batch.input_ids.numel() for batch in own if batch.lengths]
            if recipe.micro_batch_tokens is None:
                largest_first = [max(batch.lengths) for batch in own if batch.lengths]
            assert largest_first == sorted(largest_first, reverse=True)


@given(st.integers(0, 40), processes_of_runs)
def test_deal(count, processes):
    chunks = [np.array([number]) for number in range(count)]
    dealt = [deal(chunks, process, processes) for process in range(processes)]
    assert {len(own) for own in dealt} == {math.ceil(count / processes)}
    assert sorted(np.concatenate([np.empty(0), *itertools.chain(*dealt)])) == list(range(count))
