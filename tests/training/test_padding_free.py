"""Padded, padding-free and packed batches train alike: the same loss and gradients, whichever way the conversations of
a step are cut into micro-batches and dealt to processes; and no conversation sees another."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import run_script
from hypothesis import strategies as st
from interruption import SCRIPT, metrics, run_here, small_recipe
from mixes import LAYOUTS, PAD, given, make_mix, make_recipe, scored_loss
from safetensors.torch import load_file
from test_attention import GPT2_SIZES, MODELS, VOCABULARY, end_to_end, make_model

from data.mix import Mix
from recipe.keys import Recipe
from run.retention import list_checkpoints
from run.stats import Clock, TrainingStats
from sft import train_step
from training.batches import Batches
from training.collate import Batch, cut
from training.engine import Engine
from training.plan import Position, training_rows

IMPLEMENTATION = {"padded": "sdpa", "padding-free": "sdpa_by_conversation", "packed": "sdpa_by_conversation"}


# ---- the same step in every layout ----


class NoSchedule:
    """Of the learning rate, which has no part in a gradient."""

    def step(self) -> None:
        pass


def step_of_all(model, mix: Mix, recipe: Recipe, processes: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients by which `sft.train_step` makes one step of all conversations of an epoch.

    The micro-batches of all processes are given to this one: processes add their gradients up, as micro-batches do.
    """
    accelerator = Accelerator(cpu=True)
    keys = {name: getattr(recipe, name) for name in ("label_smoothing", "z_loss", "neftune_noise_alpha")}
    dealt = [
        next(Batches(mix, recipe, process, processes, PAD).training_steps(Position())) for process in range(processes)
    ]
    assert all(after == Position(1) for after, _ in dealt)
    micro_batches = [
        replace(batch, input_ids=batch.input_ids % VOCABULARY, targets=batch.targets % VOCABULARY)
        for _, batches in dealt
        for batch in batches
    ]
    stats = TrainingStats(mix, accelerator.device, Clock())
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True))
    found = {}

    def keep(*_) -> None:
        found.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    optimizer.optimizer.register_step_pre_hook(keep)
    grad_norm, updated = train_step(
        Engine(accelerator, scored_loss(model, **keys).train(), model, model, optimizer, NoSchedule()),
        micro_batches,
        recipe,
        stats,
    )
    assert updated
    assert grad_norm == pytest.approx(float(torch.nn.utils.get_total_norm(found.values())), rel=1e-5)
    stats.end_step()
    return stats.close(accelerator)["loss"], found


def one_by_one(model, mix: Mix, recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    """The same from plain forward passes over one conversation at a time, and all of its logits."""
    total, count = torch.zeros(()), 0.0
    for row in training_rows(mix, recipe, 0):
        ids, scored = (torch.tensor(array) for array in cut(mix.train, row, recipe, 0))
        ids, weight = ids.long() % VOCABULARY, 1.0 if mix.train.weights is None else float(mix.train.weights[row])
        targets = torch.where(scored, ids, -100)
        total = total + weight * F.cross_entropy(model(ids[None]).logits[0, :-1], targets[1:], reduction="sum")
        count += weight * int(scored.sum())
    loss = total / (count or 1)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2"])
def model(request):
    """GPT-2 for its learnt positions: rotary embeddings would not tell if all began elsewhere."""
    own = {"gpt2": {**GPT2_SIZES, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}}.get(request.param, {})
    return make_model(request.param, "sdpa", **own).train()


# Conversations (or packs) of a micro-batch, and processes.
cuts = st.fixed_dictionaries({layout: st.tuples(st.integers(1, 7), st.integers(1, 4)) for layout in LAYOUTS})
lengths_of_mixes = st.lists(st.lists(st.integers(2, 24), max_size=8), min_size=1, max_size=3).filter(any)


@given(lengths_of_mixes, st.integers(0, 999), st.integers(6, 26), cuts, st.booleans(), examples=25)
def test_every_layout_makes_the_same_step(model, lengths, seed, max_length, cuts, weighted):
    """In fp32, to 1e-5 of each gradient's norm (measured: 2.4e-6 at most, and 3e-7 of the loss, in 800 examples).

    Conversations over max_length are cut at random, alike in all."""
    keys = {"max_length": max_length, "rng_seed": seed, "max_grad_norm": 0, "dtype": "fp32"}
    mix = make_mix(lengths, weighted, seed=seed)
    model.set_attn_implementation("eager")
    loss, gradients = one_by_one(model, mix, make_recipe(len(lengths), **keys))
    norm = torch.nn.utils.get_total_norm(gradients.values())
    for layout, (size, processes) in cuts.items():
        micro_batch = {"per_device_train_batch_size": size, "global_batch_size": sum(map(len, lengths))}
        recipe = make_recipe(len(lengths), **keys, **LAYOUTS[layout], **micro_batch)
        model.set_attn_implementation(IMPLEMENTATION[layout])
        found_loss, found = step_of_all(model, mix, recipe, processes)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            # What cancels in exact arithmetic, as of a key's bias, is rounding noise of the whole.
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * norm, (layout, name)


# ---- no conversation sees another ----


def losses_by_conversation(model, batch: Batch) -> list[torch.Tensor]:
    """float32 [scored tokens] of each conversation."""
    losses = scored_loss(model)(batch)[1]
    return list(losses.split([length - 1 for length in batch.lengths]))


@pytest.fixture(scope="module", params=MODELS)
def padding_free_model(request):
    return make_model(request.param, "sdpa_by_conversation")


@pytest.mark.parametrize("training", [True, False])
@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.data(), examples=40)
def test_a_changed_conversation_leaves_the_others_as_they_are(padding_free_model, training, lengths, data):
    """Bit for bit where the shapes are the same; to rounding where it has become longer."""
    model = padding_free_model.train(training)
    batch = end_to_end(tuple(lengths))
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    start, end = batch.boundaries[chosen : chosen + 2].tolist()
    ids = batch.input_ids.clone()
    ids[0, start:end] = (ids[0, start:end] + 17) % VOCABULARY
    changed = replace(batch, input_ids=ids, targets=ids[0, batch.scored + 1])
    before, after = losses_by_conversation(model, batch), losses_by_conversation(model, changed)
    assert not lengths[chosen] > 1 or not torch.equal(before[chosen], after[chosen])
    for place in set(range(len(lengths))) - {chosen}:
        assert torch.equal(before[place], after[place])

    grown = [*lengths[:chosen], lengths[chosen] + 5, *lengths[chosen + 1 :]]
    longer = end_to_end(tuple(grown), seed=1)
    ids = longer.input_ids.clone()
    for place, own in enumerate(batch.input_ids[0].split(lengths)):
        if place != chosen:
            ids[0, longer.boundaries[place] : longer.boundaries[place + 1]] = own
    longer = replace(longer, input_ids=ids, targets=ids[0, longer.scored + 1])
    for place, losses in enumerate(losses_by_conversation(model, longer)):
        if place != chosen:
            torch.testing.assert_close(losses, before[place], rtol=1e-5, atol=1e-5)


# ---- through the script ----


def test_the_demo_learns_the_same_without_padding(tmp_path):
    options = {"max_steps": 6, "logging_steps": 1, "eval_steps": 3, "sample_replies": 0, "save_strategy": "no"}
    options |= {"datasets.grade_school_math_instructions.max_val_set": 8, "cache_dir": tmp_path / "cache"}
    options |= {"warmup_steps": 2, "max_length": 48}  # which cuts some
    arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
    runs = []
    for padding_free in ("true", "false"):
        folder = tmp_path / padding_free
        run = run_here("recipes/demo.yaml", *arguments, "--padding_free", padding_free, output_dir=folder)
        assert run.returncode == 0, run.stderr
        assert ("attention: sdpa_by_conversation" in run.stdout) == (padding_free == "true")
        runs.append(metrics(folder))
    assert [line["step"] for line in runs[0] if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert any("eval_loss" in line for line in runs[0])
    for line, padded in zip(*runs, strict=True):
        assert line == pytest.approx(padded, rel=1e-5)


@pytest.mark.timeout(900)
def test_a_packed_run_under_zero_goes_on_where_it_stopped(tmp_path, tiny_model):
    """Two processes of ZeRO-2; the second hears the signal in the middle of an epoch."""
    recipe = small_recipe(
        tmp_path, tiny_model, packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=2, eval_steps=9
    )

    def run(folder: str, code: int = 0, **moment):
        output = tmp_path / folder
        arguments = (json.dumps(moment), recipe, "--output_dir", output)
        run = run_script(*arguments, launch="zero2x2", output_dir=output, script=SCRIPT, check=False)
        assert run.returncode == code, f"{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
        return run

    whole = run("whole")
    assert "packing: 38 conversations in " in whole.stdout
    stopped = run("output", code=1, steps=4, process=1, by="SIGTERM")  # the launcher turns 75 into 1
    assert "start the same command again" in stopped.stdout
    assert [path.name for path in list_checkpoints(tmp_path / "output")] == ["checkpoint-4"]
    run("output")
    assert metrics(tmp_path / "output") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "output")[-1]["epoch"] == 2
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("output", "whole"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
