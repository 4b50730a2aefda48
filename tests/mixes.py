"""Mixes and recipes made up for tests, whose batches tell by themselves which piece of which example they hold."""

import itertools

import hypothesis
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from data.mix import Mix, Split
from data.prepared import SCHEMA
from recipe.dataset_keys import Datasets
from recipe.keys import Recipe
from run.progress import Progress
from training.collate import Batch
from training.loss import ScoredLoss

NAMES = list(Datasets.model_fields)
PAD = 2**30  # no token of these mixes
STRIDE = 1000  # token p of row r is r * STRIDE + p
# How a batch is laid out, as the recipe's keys say it.
LAYOUTS = {
    "padding-free": {"padding_free": True},
    "padded": {"padding_free": False},
    "packed": {"padding_free": True, "packing": True},
}


def given(*strategies, examples: int = 60):
    """hypothesis.given of so many examples."""
    return lambda test: hypothesis.settings(max_examples=examples)(hypothesis.given(*strategies)(test))


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


def make_mix(lengths: list[list[int]], weighted: bool = False, **kwargs) -> Mix:
    split = make_split(lengths, **kwargs)
    if weighted:  # from a hundredth to a hundredfold
        split.weights = 10 ** np.random.default_rng(len(split)).uniform(-2, 2, len(split))
    return Mix(NAMES[: len(lengths)], split, split)


def make_recipe(datasets: int = 1, options: list[dict] | None = None, **keys) -> Recipe:
    chosen = [{name: own} for name, own in zip(NAMES, options or [{}] * datasets, strict=False)]
    keys = {"gradient_accumulation_steps": 1, "rng_seed": 1, **keys}
    return Recipe.model_validate({"model_name": "none", "output_dir": "out", "datasets": chosen, **keys})


def rows_of(batch: Batch) -> list[int]:
    """The examples of a batch, read off its tokens."""
    return [int(ids[0]) // STRIDE for ids, _ in batch.conversations()]


def pieces_of(batch: Batch) -> dict[int, list[int]]:
    """The same with the tokens of each."""
    return {int(ids[0]) // STRIDE: ids.tolist() for ids, _ in batch.conversations()}


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
    layout, max_length = draw(st.sampled_from(list(LAYOUTS))), draw(st.integers(2, 45))
    recipe = make_recipe(
        options=[draw(option) for _ in lengths],
        rng_seed=draw(seeds),
        per_device_train_batch_size=draw(st.integers(1, 5)),
        per_device_eval_batch_size=draw(st.integers(1, 5)),
        gradient_accumulation_steps=draw(st.integers(1, 4)),
        global_batch_size=draw(st.none() | st.integers(1, 30)),
        max_length=max_length,
        micro_batch_tokens=draw(st.none() | st.integers(max_length, 4 * max_length)),
        random_offset_probability=draw(st.sampled_from([0, 0.5, 1])),
        sort_by_length=layout != "packed" and draw(st.booleans()),
        **LAYOUTS[layout],
    )
    return make_mix(lengths, seed=draw(st.integers(0, 99))), recipe


def scored_loss(model, **keys) -> ScoredLoss:
    """The loss of a model, as a recipe with these keys has it."""
    return ScoredLoss(model, make_recipe(**keys))


def make_progress(total_steps: int, **stood) -> Progress:
    """Where a run of so many steps stands."""
    return Progress(**{"total_steps": total_steps, "epoch_conversations": 10, "held_out": True} | stood)
