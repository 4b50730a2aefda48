"""The loss at scored positions against the plain one over all logits, and the accuracy metric against a plain count."""

import evaluate
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from utils import loss as loss_module
from utils.loss import ScoredLoss

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
MODELS = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, tie_word_embeddings=False)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # losses far from log(vocabulary), so that a mistake shows
    return model


@pytest.fixture
def batch():
    """Four padded rows: some targets, all targets, none, and one alone; label 0 among them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([17, 9, 12, 5])
    input_ids = torch.randint(0, VOCABULARY, (4, 17), generator=generator)
    attention_mask = (torch.arange(17) < lengths[:, None]).long()
    scored = (torch.rand(4, 17, generator=generator) < 0.5) & attention_mask.bool()
    scored[1], scored[2], scored[3] = attention_mask[1].bool(), False, False
    scored[:, 0], scored[3, 4] = False, True
    input_ids[1, 3:6] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.where(scored, input_ids, -100),
    }


def full_losses(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the likeliest token at each target, from all logits at once."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return losses[targets != -100], logits.argmax(-1)[targets != -100]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 10_000])
def test_losses_and_gradients_equal_the_full_computation(model, batch, rows, checkpointing, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", rows * 4 * VOCABULARY)
    model.train()
    expected, _ = full_losses(model, batch)
    weights = torch.linspace(0.5, 2, len(expected))  # so that losses in another order do not pass
    (expected * weights).sum().backward()
    expected_gradients = gradients(model)

    if checkpointing:
        model.activation_checkpointing_enable()
    losses, predictions = ScoredLoss(model).train()(**batch)
    assert predictions is None
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    (losses * weights).sum().backward()
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        assert expected_gradients[name].abs().max() > 0, name
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rows", [3, 10_000])
def test_evaluation_gives_the_same_losses_and_the_likeliest_tokens(model, batch, rows, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", rows * 4 * VOCABULARY)
    with torch.no_grad():
        expected, likeliest = full_losses(model.eval(), batch)
        losses, predictions = ScoredLoss(model).eval()(**batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(predictions, likeliest)


def test_never_more_logits_than_the_budget(model, batch, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", 4 * 4 * VOCABULARY)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    losses, _ = ScoredLoss(model).train()(**batch)
    losses.sum().backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * len(losses)  # once forward, once again in the backward pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_targets_has_gradients_of_zeros(model, batch, checkpointing):
    if checkpointing:
        model.activation_checkpointing_enable()
    losses, _ = ScoredLoss(model).train()(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert losses.shape == (0,)
    losses.sum().backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    with torch.no_grad():
        losses, predictions = ScoredLoss(model).eval()(**batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert losses.shape == predictions.shape == (0,)


def test_padding_and_the_other_rows_change_nothing(model, batch):
    with torch.no_grad():
        together, _ = ScoredLoss(model).eval()(**batch)
        lengths = batch["attention_mask"].sum(1).tolist()
        alone = [
            ScoredLoss(model).eval()(**{name: tensor[i : i + 1, :length] for name, tensor in batch.items()})[0]
            for i, length in enumerate(lengths)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


# ---- the metric ----


@pytest.fixture
def metric():
    return evaluate.load(str(ROOT / "scripts" / "metrics" / "token_accuracy"), keep_in_memory=True)


def test_accuracy_counts_every_target_also_label_zero(metric):
    predictions = torch.tensor([0, 5, 0, 7, 3, 0, 50_000])
    references = torch.tensor([0, 5, 1, 7, 0, 0, 50_000])
    for part in (slice(0, 3), slice(3, 3), slice(3, 7)):
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert len(metric) == 7
    assert metric.compute() == {"accuracy": 5 / 7, "correct": 5, "total": 7}


def test_accuracy_starts_anew_after_compute(metric):
    metric.add_batch(predictions=torch.tensor([1]), references=torch.tensor([1]))
    assert metric.compute()["total"] == 1
    assert len(metric) == 0
    metric.add_batch(predictions=torch.tensor([2, 2]), references=torch.tensor([1, 2]))
    assert metric.compute() == {"accuracy": 0.5, "correct": 1, "total": 2}


def test_accuracy_of_the_model_equals_a_plain_count(metric, model, batch):
    with torch.no_grad():
        _, likeliest = full_losses(model.eval(), batch)
        _, predictions = ScoredLoss(model).eval()(**batch)
    targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    metric.add_batch(predictions=predictions, references=targets)
    plain = sum(int(guess == target) for guess, target in zip(likeliest, targets, strict=True))
    counts = metric.compute()
    assert (counts["correct"], counts["total"]) == (plain, len(targets))
    assert (targets == 0).any()


def test_accuracy_of_nothing(metric):
    metric.add_batch(predictions=torch.tensor([], dtype=torch.long), references=torch.tensor([], dtype=torch.long))
    assert len(metric) == 0
