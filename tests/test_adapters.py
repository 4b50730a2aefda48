"""sft.py with LoRA against an independent loop: PyTorch, with W + scale * B A and the learnt rows by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from adapters import BASES, write_base
from safetensors.torch import load_file
from test_training import EPSILON, LEARNING_RATE, MAX_NORM, WARMUP, conversations, recipe  # noqa: F401, a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

RANK, ALPHA = 4, 12
NEW = [*range(1024, 1029)]  # the rows of the five chat tokens
LINEAR = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LORA = {"use_peft": True, "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(tmp_path_factory.mktemp("base") / "model", kind) for kind in BASES}


def options(**keys) -> list[str]:
    return [str(text) for key, value in keys.items() for text in (f"--{key}", value)]


def by_hand(base, initial: dict[str, torch.Tensor], tokenizer_folder, steps: int, scale: float):
    """Train on the eight conversations in each step; returns losses, gradient norms and the adapter.

    Args:
        initial: the adapter as a file has it, from which the loop begins.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    if model.get_input_embeddings().num_embeddings < NEW[-1] + 1:
        model.resize_token_embeddings(NEW[-1] + 1)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    adapter = {name: tensor.clone().requires_grad_() for name, tensor in initial.items()}
    prefix = "base_model.model."

    def adapted() -> dict[str, torch.Tensor]:
        own = dict(weights)
        for layer in range(2):
            for linear in LINEAR:
                name = f"gpt_neox.layers.{layer}.{linear}"
                a, b = (adapter[f"{prefix}{name}.lora_{which}.weight"] for which in "AB")
                own[f"{name}.weight"] = weights[f"{name}.weight"] + scale * b @ a
        for name in ["gpt_neox.embed_in"] + ["lm_head"] * (not tied):
            rows = adapter[f"{prefix}{name}.token_adapter.trainable_tokens_delta"]
            own[f"{name}.weight"] = weights[f"{name}.weight"].index_copy(0, torch.tensor(NEW), rows)
        if tied:
            own["lm_head.weight"] = own["gpt_neox.embed_in.weight"]
        return own

    examples = conversations(AutoTokenizer.from_pretrained(tokenizer_folder))
    optimizer = torch.optim.AdamW(adapter.values(), betas=(0.9, 0.95), eps=EPSILON, weight_decay=0.1)
    losses, norms = [], []
    for step in range(steps):
        last = step - 1
        rate = 0.0 if last < 0 else LEARNING_RATE * math.log(last + 1) / math.log(WARMUP)
        rate = rate if last < WARMUP else LEARNING_RATE * (steps - last) / (steps - WARMUP)
        optimizer.param_groups[0]["lr"] = rate
        total, count = 0.0, 0
        for ids, targets in examples:
            logits = torch.func.functional_call(model, adapted(), (ids[None],), {"use_cache": False}).logits[0, :-1]
            total = total + F.cross_entropy(logits, targets[1:], reduction="sum")
            count += int((targets[1:] != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(adapter.values(), MAX_NORM)))
        optimizer.step()
        losses.append((total / count).item())
    return losses, norms, {name: tensor.detach() for name, tensor in adapter.items()}


RUNS = [(kind, "python", 4) for kind in BASES] + [("with spare rows", launch, 2) for launch in ("ddp2", "zero2x2")]


@pytest.mark.parametrize(("kind", "launch", "accumulation"), RUNS)
def test_twelve_steps_equal_matrices_written_out(run_sft, recipe, bases, kind, launch, accumulation):  # noqa: F811
    base = bases[kind]
    keys = LORA | {"model_name": base, "num_train_epochs": 12, "per_device_train_batch_size": 2}
    keys |= {"gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 1}
    run = run_sft(recipe, *options(**keys, save_total_limit="null"), launch=launch)
    initial = load_file(run.output_dir / "checkpoint-1" / "adapter_model.safetensors")  # its step was at rate 0
    assert all(not tensor.any() for name, tensor in initial.items() if "lora_B" in name)
    losses, norms, adapter = by_hand(base, initial, run.output_dir, 12, ALPHA / RANK)
    assert run.curve("loss") == pytest.approx(losses, rel=1e-4)
    assert run.curve("grad_norm") == pytest.approx(norms, rel=1e-4)
    trained = load_file(run.output_dir / "adapter_model.safetensors")
    assert trained.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(
            trained[name], tensor, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert not torch.equal(tensor, initial[name])
