"""Each family of models: what becomes of it is what docs/models.md says, and it trains as plain transformers has it."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import ROOT
from families import FAMILIES, PAGE, VOCABULARY, family_config, try_family
from mixes import make_mix
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.dialogue import prepare_tokenizer
from run.model_files import save_model
from run.stats import Clock, TrainingStats
from sft import train_step
from training.collate import Batch, collate
from training.engine import prepare_engine
from training.family import freeze_unreached
from training.flops import ModelFlops
from training.memory import estimate_memory
from training.state_layout import replicated

DEMO = ROOT / "recipes" / "demo_data" / "model"
MIX = make_mix([[23, 9, 14, 5]])


@pytest.fixture(scope="module")
def tokenizer():
    return prepare_tokenizer(AutoTokenizer.from_pretrained(DEMO))


def four_conversations(recipe) -> Batch:
    batch = collate(MIX.train, MIX.train.position, recipe, 0, None)
    return replace(batch, input_ids=batch.input_ids % VOCABULARY, targets=batch.targets % VOCABULARY)


def plain_loss(model, batch: Batch) -> torch.Tensor:
    """The sum over all targets, one conversation after the other, by transformers' own forward pass."""
    total = torch.zeros(())
    for ids, is_target in batch.conversations():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, torch.where(is_target[1:], ids[1:], -100), reduction="sum")
    return total


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_documents_say(tmp_path, tokenizer, name):
    outcome = try_family(name, tokenizer, tmp_path / "base")
    assert outcome.row(name) in PAGE.read_text(encoding="utf-8").splitlines(), outcome.row(name)
    if outcome.trains == "refused":
        return
    recipe, model = outcome.recipe, outcome.model.train()
    batch = four_conversations(recipe)
    plain = plain_loss(model, batch)
    plain.backward()
    expected = gradients(model)
    norm = torch.nn.utils.get_total_norm(expected.values())

    engine = prepare_engine(Accelerator(cpu=True), model, recipe, total_steps=9)
    total, losses, _ = engine.model(batch)
    assert len(losses) == len(batch.targets) == int(MIX.train.targets.sum())
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=0)
    total.backward()
    found = gradients(model)  # of every trained parameter, as DDP wants them
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5 * norm, key

    flops = ModelFlops(model)
    stats = TrainingStats(MIX, engine.accelerator.device, Clock(), flops, 1e12)
    for _ in range(3):  # the first two run at rate 0
        grad_norm, updated = train_step(engine, [batch], recipe, stats)
        assert updated
    assert grad_norm == pytest.approx(float(norm) / len(losses), rel=1e-4)
    assert flops.of(batch) > 0
    estimate_memory(recipe, model.config, 1, replicated(1), torch.float32, tuple(batch.input_ids.shape), gpu=False)

    save_model(model, tokenizer, tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        trained = engine.model.eval()(batch)[0]
        torch.testing.assert_close(plain_loss(again, batch), trained, rtol=1e-5, atol=0)
    assert abs(trained - plain) > 1e-3 * plain


def test_the_documents_name_no_other_family():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if "| `" in line]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*FAMILIES]


# ---- several processes ----


def folder_of(name: str, folder, **changes):
    """A base model's folder of a family: config and the demo's tokenizer; weights are drawn."""
    config = family_config(name)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    config.save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


SHORT_RUN = {
    **{"max_length": 48, "max_steps": 3, "warmup_steps": 0, "logging_steps": 1, "sample_replies": 0},
    **{"save_steps": 2, "global_batch_size": 4, "per_device_train_batch_size": 1, "eval_steps": 9},
    "adam_epsilon": 1e-6,  # else rounding moves what has hardly a gradient by the whole rate,
}


@pytest.mark.parametrize(
    "name", ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "Phi-3.5-MoE", "OLMoE", "DeepSeek-V3", "GPT-OSS"]
)
def test_experts_that_see_no_token_have_a_gradient(name):
    """Of zeros, which DDP and ZeRO add to those of the other processes."""
    config = family_config(name)
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if hasattr(config, key):
            setattr(config, key, 64)
    model = AutoModelForCausalLM.from_config(config).train()
    assert freeze_unreached(model, name) == []
    model(input_ids=torch.arange(3)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any((parameter.grad == 0).all(dim=-1).any() for parameter in model.parameters() if parameter.ndim == 3)


@pytest.mark.parametrize(
    ("name", "changes", "engines"),
    [
        ("Gemma 3, multimodal", {}, ("ddp2", "zero2x2")),  # a tower for images, which no text reaches
        pytest.param("Mixtral", {"num_local_experts": 64}, ("python", "ddp2"), marks=pytest.mark.soak),
    ],
)
def test_processes_train_as_one_does(tmp_path, run_sft, name, changes, engines):
    """Parameters without a gradient ended DDP: "Expected to have finished reduction in the prior iteration"."""
    model = folder_of(name, tmp_path / "base", **changes)
    options = [text for key, value in SHORT_RUN.items() for text in (f"--{key}", value)]
    options += ["--model_name", model, "--cache_dir", tmp_path / "cache"]
    curves, weights = [], []
    for engine in engines:
        run = run_sft("recipes/demo.yaml", *options, launch=engine, output_dir=tmp_path / engine)
        assert (
            "not trained, since no text reaches them: model.multi_modal_projector, model.vision_tower" in run.stdout
        ) == (name == "Gemma 3, multimodal")
        curves.append(run.curve("loss"))
        weights.append(load_file(run.output_dir / "model.safetensors"))
    for curve, others in zip(curves[1:], weights[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-5)
        assert all((others[key] - weight).abs().max() < 1e-4 for key, weight in weights[0].items())
