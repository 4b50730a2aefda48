"""The fastest setting that fits, of which data, for which models: what grows with what, and the documents' tables."""

import importlib.util
import json

import numpy as np
import pytest
from conftest import ROOT
from families import family_config
from hypothesis import strategies as st
from mixes import given
from transformers import AutoConfig

from planning.cards import GIB, find_card
from planning.documents import make_tables, with_tables
from planning.launchers import launchers
from planning.mixes import KNOWN, find_mix
from planning.models import CONFIGS, find_config
from planning.search import RESERVE, Subject, make_subject, plan_run
from planning.work import work_of
from recipe.load import load_recipe
from training.model import without_weights
from training.plan import steps_per_epoch, training_rows
from training.state_layout import replicated
from utils.errors import UserError

SEED = ROOT / "recipes" / "stablelm7b_oasst.yaml"
H100 = find_card("h100")


@pytest.fixture(scope="module")
def seed() -> Subject:
    return subject_of({})


def subject_of(keys: dict[str, str], file=SEED) -> Subject:
    recipe = load_recipe(file, keys)
    return make_subject(recipe, find_config(recipe), find_mix(recipe)[0])


def zero2(subject: Subject, cards: int):
    return next(each for each in launchers(subject.recipe, cards) if each.config.endswith("/zero2.yaml"))


def test_the_documents_have_the_tables_that_plan_makes():
    """`python scripts/plan.py --write_tables` writes them anew."""
    tables, named = make_tables(), ""
    for page in (ROOT / "README.md", ROOT / "docs" / "hardware.md"):
        text = page.read_text(encoding="utf-8")
        assert with_tables(text, tables) == text, page.name
        named += text
    assert all(f"<!-- table {name} -->" in named for name in tables)


def test_the_seeds_mix_is_as_large_as_the_run_was(seed):
    """12,000 steps of 32 conversations in 3 epochs, by the model's card."""
    assert 3 * steps_per_epoch(seed.mix, seed.recipe, 4) == pytest.approx(12_000, rel=0.005)
    assert seed.steps(4) == (4 * steps_per_epoch(seed.mix, seed.recipe, 4), steps_per_epoch(seed.mix, seed.recipe, 4))


@given(st.floats(20, 200), st.floats(1.01, 2), st.sampled_from([2, 4, 8]), examples=25)
def test_more_memory_holds_no_less_and_is_no_slower(gib, times, cards):
    subject = _SEED.setdefault("seed", subject_of({}))
    small, large = (H100._replace(memory=int(size * GIB)) for size in (gib, gib * times))
    one, other = (plan_run(subject, zero2(subject, cards), card) for card in (small, large))
    assert one.fits <= other.fits
    for plan, card in ((one, small), (other, large)):
        assert plan.fits == (plan.peak + RESERVE <= card.memory)
        assert plan.fits == bool(plan.most_tokens) == bool(plan.hours)
        if plan.fits:
            assert plan.micro_batch_tokens <= plan.most_tokens
    if one.fits:
        assert other.hours <= one.hours * 1.001
        if one.recomputes == other.recomputes:
            assert one.most_tokens <= other.most_tokens


_SEED: dict[str, Subject] = {}


def test_what_changes_the_loss_stays_as_it_is():
    subject = subject_of({"loss_normalization": "micro_batch"})
    plan = plan_run(subject, zero2(subject, 8), H100)
    assert "micro_batch_tokens" not in plan.keys
    assert plan.micro_batch_tokens <= 4 * 4096
    compiled = subject_of({"torch_compile": "true", "gradient_checkpointing": "false"})
    assert not plan_run(compiled, zero2(compiled, 8), H100).recomputes


@pytest.mark.parametrize("keys", [
    {"packing": "true"},
    {"padding_free": "false"},
    {"sort_by_length": "true"},
    {"max_steps": "7"},
    {"datasets.vicuna.fraction": "0.1", "save_strategy": "no"},
    {"dtype": "fp32"},
    {"dtype": "bf16", "num_train_epochs": "0.01", "global_batch_size": "null", "eval_steps": "1"},
])  # fmt: skip
def test_recipes_of_all_kinds(keys):
    subject = subject_of({"model_name": "HuggingFaceTB/SmolLM2-135M", "max_length": "1024", **keys})
    for cards in (1, 16):
        for launcher in launchers(subject.recipe, cards):
            plan = plan_run(subject, launcher, H100)
            assert plan.fits
            assert 0 < plan.hours < 1000
            assert plan.micro_batch_tokens % 1024 == 0
            load_recipe(SEED, {**keys, "max_length": "1024", **plan.keys})


def test_padding_costs_what_a_run_pads(seed):
    """Conversations of like length are padded together; and what is padding is no token of tokens_per_second."""
    padded = subject_of({"padding_free": "false"})
    one, other = (plan_run(subject, zero2(subject, 8), H100) for subject in (seed, padded))
    assert one.evaluation_hours < other.evaluation_hours < 1.05 * one.evaluation_hours
    tokens = np.minimum(seed.mix.train.lengths[training_rows(seed.mix, seed.recipe, 0)], 4096).sum()
    for plan in (one, other):
        all_of_it = plan.tokens_per_second * 3600 * plan.training_hours
        assert all_of_it == pytest.approx(tokens * seed.recipe.num_train_epochs, rel=1e-3)


def test_hours_are_those_of_steps_and_evaluations(seed):
    launcher = zero2(seed, 8)
    whole, without = (plan_run(subject, launcher, H100) for subject in (seed, subject_of({"eval_steps": "1000000"})))
    assert without.hours < 0.95 * whole.hours  # every 100 steps 11,870 conversations are evaluated
    tokens = seed.tokens.sum() * seed.recipe.num_train_epochs
    assert without.training_hours == pytest.approx(tokens / without.tokens_per_second / 3600, rel=1e-3)


@pytest.mark.parametrize(("eval_steps", "evaluations"), [(8, 1), (4, 2), (3, 3), (100, 1)])
def test_a_run_is_evaluated_every_so_many_steps_and_at_its_end(eval_steps, evaluations):
    small = {"model_name": "HuggingFaceTB/SmolLM2-135M", "max_steps": "8"}
    plan, once = (
        plan_run(subject, zero2(subject, 8), H100)
        for subject in (subject_of(small | {"eval_steps": str(each)}) for each in (eval_steps, 8))
    )
    assert plan.evaluation_hours == pytest.approx(evaluations * once.evaluation_hours)


@pytest.mark.parametrize(
    ("name", "share"), [("Mixtral", 2 / 4), ("Qwen3-MoE", 2 / 4), ("DeepSeek-V3", 2 / 4), ("Gemma 3, multimodal", 0)]
)
def test_only_what_a_token_meets_is_computed(tmp_path, name, share):
    """Of a mixture so many of its experts, of which all are read; of a model with a tower for images none of that."""
    family_config(name).save_pretrained(tmp_path)
    subject = subject_of({"model_name": str(tmp_path), "max_length": "64", "fuse_gelu": "false"})
    work = work_of(subject.recipe, subject.config, subject.model, replicated(1), 2)
    parameters = dict(subject.model.named_parameters())
    experts = {key: each.numel() for key, each in parameters.items() if "experts." in key and each.ndim == 3}
    tower = [key for key in parameters if "vision" in key or "multi_modal" in key]
    assert bool(experts) == bool(share)
    assert subject.frozen == sum(parameters[key].numel() for key in tower)
    others = sum(
        each.numel()
        for key, each in parameters.items()
        if each.ndim == 2
        and key not in tower
        and not key.endswith(("embed_tokens.weight", "head.weight", ".gate.weight"))
    )  # (a router is no layer, and nothing beside its experts)
    assert work.per_token == 6 * (others + share * sum(experts.values()))
    assert work.weight_bytes >= 2 * 3 * sum(experts.values())


def test_experts_by_the_names_of_another_family(seed):
    """Each expert more that a token meets is computed."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "moe_num_experts": 8}
    found = []
    for count in (1, 2, 8):
        config = AutoConfig.for_model("aria_text", **sizes, moe_topk=count)
        model = without_weights(seed.recipe, config)
        found.append(work_of(seed.recipe, config, model, replicated(1), 2).per_token)
    stacked = sum(each.numel() for each in model.parameters() if each.ndim == 3)
    assert stacked > 0
    assert [each - found[0] for each in found] == [0, 6 * stacked / 8, 6 * stacked * 7 / 8]


# ---- Data and models ----


def test_what_is_known_is_the_recipes_where_it_speaks_of_it():
    recipe = load_recipe(SEED, {"datasets.vicuna.fraction": "0.25"})
    mix, where = find_mix(recipe)
    assert "estimate" in where
    rows = training_rows(mix, recipe, 0)
    vicuna = mix.names.index("vicuna")
    assert (mix.train.dataset[rows] == vicuna).sum() == round(0.25 * 0.95 * KNOWN["vicuna"][0])
    assert (mix.validation.dataset == vicuna).sum() == 800


@given(st.integers(1, 10**8), examples=20)
def test_as_many_tokens_as_were_given(tokens):
    recipe = load_recipe(SEED, {"datasets.vicuna.fraction": "0.25"})
    mix, _ = find_mix(recipe, tokens)
    lengths = np.minimum(mix.train.lengths, recipe.max_length)
    assert len(training_rows(mix, recipe, 0)) == len(lengths)
    assert lengths.sum() == pytest.approx(tokens, rel=0.05, abs=1000)


def test_data_that_are_nowhere():
    recipe = load_recipe(SEED, {"datasets": "[mine: {source: messages, input_file_path: gone.jsonl}]"})
    with pytest.raises(UserError, match=r"^data set mine: .* give --tokens N"):
        find_mix(recipe)
    assert find_mix(recipe, 10**6)[0].names


def test_a_misspelt_split_is_said_not_taken_for_data_that_are_nowhere(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    for place, said in ((tmp_path, "has no split 'trian'"), (tmp_path / "train.jsonl", "split trian: .* is a file")):
        mix = f"[mine: {{source: messages, input_file_path: {place}, split: trian}}]"
        with pytest.raises(UserError, match=rf"^data set mine: .*{said}"):
            find_mix(load_recipe(SEED, {"datasets": mix}))


def test_data_that_are_here():
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    mix, where = find_mix(recipe)
    assert where == "the recipe's data, prepared"
    subject = make_subject(recipe, find_config(recipe), mix)
    plan = plan_run(subject, next(launchers(recipe, 1)), find_card("rtx4090"))
    assert plan.fits
    assert plan.steps == recipe.num_train_epochs * steps_per_epoch(mix, recipe, 1)


def neox(layers: int, hidden: int, rows: int) -> int:
    """Weights: of a layer 12 h^2 of matrices and 13 h of biases and norms; a last norm; two embeddings."""
    return layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden + 2 * rows * hidden


@pytest.mark.parametrize(("name", "parameters"), [
    ("stabilityai/stablelm-base-alpha-3b", neox(16, 4096, 50688)),
    ("stabilityai/stablelm-base-alpha-7b", neox(16, 6144, 50432)),
    ("HuggingFaceTB/SmolLM2-135M", 134_515_008),  # by its safetensors on the hub
])  # fmt: skip
def test_the_models_of_the_recipes_are_known(name, parameters):
    recipe = load_recipe(SEED, {"model_name": name})
    model = without_weights(recipe, AutoConfig.for_model(**CONFIGS[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_model_that_is_nowhere():
    with pytest.raises(UserError, match=r"^model_name = some/model: .*`hf download some/model config.json`"):
        find_config(load_recipe(SEED, {"model_name": "some/model"}))
    with pytest.raises(UserError, match=r"max_length = 5000: .* has 4096 positions"):
        find_config(load_recipe(SEED, {"max_length": "5000"}))


@pytest.mark.parametrize(
    ("config", "keys", "problem"),
    [
        ({"model_type": "mamba", "num_hidden_layers": 2}, {}, "it has states in place of attention"),
        ({"model_type": "llama", "num_hidden_layers": 0}, {}, "its config.json has no num_hidden_layers, or 0"),
        (None, {"use_peft": "true"}, "fuse_gelu = true: .* has exact GELU"),  # one that is known, and not here
    ],
)
def test_what_a_run_refuses_is_not_planned(tmp_path, config, keys, problem):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        keys = {"model_name": str(tmp_path), "max_length": "512", "fuse_gelu": "false"}
    with pytest.raises(UserError, match=problem):
        subject_of(keys)


@pytest.mark.parametrize("here", [False, True])
def test_a_plan_of_adapters_needs_none_of_their_packages(tiny_model, monkeypatch, here):
    found = importlib.util.find_spec
    gone = ("peft", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else found(name, *rest))
    recipe = load_recipe(ROOT / "recipes/stablelm7b_oasst_qlora.yaml", {"model_name": str(tiny_model)} if here else {})
    recipe = recipe.model_copy(update={"max_length": 256})
    subject = make_subject(recipe, find_config(recipe), find_mix(recipe)[0])
    assert plan_run(subject, next(launchers(recipe, 1)), find_card("h100")).fits


def test_a_plan_is_made_with_the_attention_that_the_recipe_asks_for():
    """Also with one that cannot run here. SDPA is given a mask where batches are padded, flash-attn is not."""
    peaks = {}
    for attention in ("sdpa", "flash_attention_2"):
        keys = {"attn_implementation": attention, "padding_free": "false", "micro_batch_tokens": "null"}
        recipe = load_recipe(ROOT / "recipes/stablelm3b_oasst.yaml", keys)
        subject = make_subject(recipe, find_config(recipe), find_mix(recipe)[0])
        peaks[attention] = plan_run(subject, next(launchers(recipe, 1)), find_card("h100")).parts["activations"]
    assert peaks["sdpa"] > peaks["flash_attention_2"]
