"""The loss at scored positions against the plain one over all logits, on one process and under DDP and ZeRO on two; and
the accuracy metric against a plain count."""

import json

import evaluate
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script
from mixes import scored_loss
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

import training.attention  # noqa: F401  which registers sdpa_by_conversation
from training import loss as loss_module
from training.collate import Batch

VOCABULARY = 104  # no other tensor is as wide
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
    "phi_bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),  # its output layer has a bias
}


def make_model(name: str):
    torch.manual_seed(0)
    model = MODELS[name]()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)  # losses far from log(vocabulary), so that a mistake shows
        if head.bias is not None:
            head.bias.normal_()
    return model.train()


@pytest.fixture(params=MODELS)
def model(request):
    return make_model(request.param)


def make_labels(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels of four padded rows: some targets, all, none, and one; label 0 among them.

    labels[i] is input_ids[i] where that is a target, else -100.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([17, 9, 12, 5])
    input_ids = torch.randint(0, VOCABULARY, (4, 17), generator=generator)
    attention_mask = (torch.arange(17) < lengths[:, None]).long()
    is_target = (torch.rand(4, 17, generator=generator) < 0.5) & attention_mask.bool()
    is_target[1], is_target[2], is_target[3] = attention_mask[1].bool(), False, False
    is_target[:, 0], is_target[3, 4] = False, True
    input_ids[1, 3:6] = 0
    return input_ids, attention_mask, torch.where(is_target, input_ids, -100)


def make_batch(input_ids, attention_mask, labels, weighted: bool = False) -> Batch:
    """The same as a batch of padded rows, of which each has another weight: 0, 1, 4, 9."""
    places = (labels.flatten() != -100).nonzero()[:, 0]
    targets = labels.flatten()[places]
    lengths = tuple(attention_mask.sum(1).tolist())
    weights = (places // labels.shape[1]).float() ** 2 if weighted else None
    return Batch(input_ids, places - 1, targets, targets * 0, lengths, attention_mask=attention_mask, weights=weights)


def weighted_sum(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    weights = [1.0] * len(losses) if batch.weights is None else batch.weights.tolist()
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


TERMS = {"label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.fixture
def labelled():
    return make_labels()


@pytest.fixture
def batch(labelled):
    return make_batch(*labelled)


def empty_batch(padding_free: bool) -> Batch:
    """What a process gets that has no conversation."""
    none = torch.empty(0, dtype=torch.int64)
    ids = torch.ones(1, 2, dtype=torch.int64)
    if padding_free:
        boundaries = torch.tensor([0, 2], dtype=torch.int32)
        return Batch(ids, none, none, none, (), position_ids=torch.arange(2)[None], boundaries=boundaries)
    return Batch(ids, none, none, none, (), attention_mask=torch.zeros_like(ids))


def full_losses(model, labelled, label_smoothing=0.0, z_loss=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the likeliest token at each target, from all logits at once."""
    input_ids, attention_mask, labels = labelled
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", ignore_index=-100, label_smoothing=label_smoothing
    )
    losses = losses + z_loss * torch.logsumexp(logits, -1) ** 2
    return losses[targets != -100], logits.argmax(-1)[targets != -100]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def differences(found: dict, expected: dict) -> dict[str, float]:
    """Of each gradient, the norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    return {name: float((found[name] - each).float().norm() / each.float().norm()) for name, each in expected.items()}


class LogitsSeen(TorchDispatchMode):
    """Counts the rows of logits that exist at a time, and how many are made by a product with the output layer."""

    def __init__(self):
        super().__init__()
        self.largest = self.made = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.ndim > 1 and output.shape[-1] == VOCABULARY:
            rows = output.numel() // VOCABULARY
            if not operator.is_view:  # the output layer's weight has this shape too, seen the other way round
                self.largest = max(self.largest, rows)
            if operator.name() in ("aten::mm", "aten::addmm", "aten::bmm"):
                self.made += rows
        return output


# ---- against the full computation ----


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 10_000])
def test_losses_and_gradients_equal_the_full_computation(model, labelled, rows, checkpointing, weighted, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", rows * 4 * VOCABULARY)
    batch, keys = make_batch(*labelled, weighted=weighted), TERMS if weighted else {}
    expected, _ = full_losses(model, labelled, **keys)
    expected_total = weighted_sum(expected, batch)
    (expected_total * 0.3).backward()
    expected_gradients = gradients(model)

    if checkpointing:
        model.activation_checkpointing_enable()
    total, losses, predictions = scored_loss(model, **keys)(batch)
    assert predictions is None
    assert (losses.dtype, total.dtype, total.shape) == (torch.float32, torch.float32, ())
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=0)
    (total * 0.3).backward()
    assert max(differences(gradients(model), expected_gradients).values()) < 3e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", ["bf16", "fp16", "autocast bf16"])
def test_half_precision_is_as_exact_as_the_full_computation_in_it(model, labelled, how, weighted, monkeypatch):
    """Both against fp32, from the same weights: rounding is no worse for the chunks."""
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", 5 * 4 * VOCABULARY)
    batch, keys = make_batch(*labelled, weighted=weighted), TERMS if weighted else {}
    dtype = torch.float16 if how == "fp16" else torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    losses, _ = full_losses(model, labelled, **keys)
    weighted_sum(losses, batch).backward()
    exact, exact_losses = gradients(model), losses.detach()

    if how != "autocast bf16":
        model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast bf16"):
        losses, _ = full_losses(model, labelled, **keys)
        weighted_sum(losses, batch).backward()
        plain, plain_losses = gradients(model), losses.detach()
        with LogitsSeen() as seen:
            total, losses, _ = scored_loss(model, **keys)(batch)
            total.backward()
    found = gradients(model)
    assert seen.made == len(losses) * (2 if how == "fp16" else 1)  # fp16 makes them again, after the loss scale
    assert losses.dtype == torch.float32
    assert all(found[name].dtype == parameter.dtype for name, parameter in model.named_parameters())
    assert (losses - exact_losses).norm() <= 1.5 * (plain_losses - exact_losses).norm()
    of_plain, of_ours = differences(plain, exact), differences(found, exact)
    for name, difference in of_ours.items():
        assert difference <= 1.5 * of_plain[name], name  # measured: 1.16 at most


def test_small_gradients_of_fp16_are_kept_by_the_loss_scale(labelled, batch):
    """A loss over 10^5 tokens has gradients that fp16 has no numbers for, until they are scaled."""
    model, exact = make_model("gpt_neox").half(), make_model("gpt_neox")
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        theirs.data = ours.data.float()
    (full_losses(exact, labelled)[0].sum() / 1e5).backward()
    (scored_loss(model)(batch)[0] / 1e5 * 2**16).backward()
    scaled = {name: gradient.float() / 2**16 for name, gradient in gradients(model).items()}
    assert max(differences(scaled, gradients(exact)).values()) < 1e-2


def test_an_output_layer_of_another_kind(labelled, batch, monkeypatch):
    """Such as one with an adapter: what its forward does is what counts."""
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", 5 * 4 * VOCABULARY)

    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight
            self.adapter = torch.nn.Linear(32, VOCABULARY, bias=False)

        def forward(self, hidden):
            return self.inner(hidden) + self.adapter(hidden)

    model = make_model("gpt_neox")
    model.set_output_embeddings(Adapted(model.get_output_embeddings()))
    expected, _ = full_losses(model, labelled)
    expected.sum().backward()
    expected_gradients = gradients(model)
    total, losses, _ = scored_loss(model)(batch)
    total.backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)
    assert max(differences(gradients(model), expected_gradients).values()) < 3e-6


@pytest.mark.parametrize("rows", [3, 10_000])
def test_evaluation_gives_the_same_losses_and_the_likeliest_tokens(model, labelled, rows, monkeypatch):
    """The cross-entropy alone, whatever is trained on."""
    batch = make_batch(*labelled, weighted=True)
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", rows * 4 * VOCABULARY)
    with torch.no_grad():
        expected, likeliest = full_losses(model.eval(), labelled)
        total, losses, predictions = scored_loss(model, **TERMS, neftune_noise_alpha=5).eval()(batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=0)
    assert torch.equal(predictions, likeliest)


# ---- memory, and what the backward pass may be given ----


@pytest.mark.parametrize("training", [True, False])
def test_never_more_logits_than_the_budget(model, batch, training, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_BUDGET", 4 * 4 * VOCABULARY)
    with LogitsSeen() as seen:
        total, losses, _ = scored_loss(model).train(training)(batch)
        if training:
            total.backward()
    assert seen.largest == 4
    assert seen.made == len(losses) == len(batch.targets) > 4  # once: not again in the backward pass


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_without_targets_has_gradients_of_zeros(model, checkpointing, padding_free):
    if padding_free:
        model.set_attn_implementation("sdpa_by_conversation")
    if checkpointing:
        model.activation_checkpointing_enable()
    total, losses, _ = scored_loss(model)(empty_batch(padding_free))
    assert (losses.shape, total.item()) == ((0,), 0)
    total.backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    with torch.no_grad():
        total, losses, predictions = scored_loss(model).eval()(empty_batch(padding_free))
    assert (losses.shape, predictions.shape, total.item()) == ((0,), (0,), 0)


def test_a_factor_that_is_no_number_reaches_every_gradient(model, batch):
    """So a step is known to be bad by its gradient norm alone."""
    total, _, _ = scored_loss(model)(batch)
    (total * float("nan")).backward()
    assert all(gradient.isnan().any() for gradient in gradients(model).values())


def test_a_second_backward_pass_is_refused(model, batch):
    """The first one changes what the forward pass has kept."""
    total, _, _ = scored_loss(model)(batch)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_padding_and_the_other_rows_change_nothing(model, labelled, batch):
    with torch.no_grad():
        together = scored_loss(model).eval()(batch)[1]
        lengths = labelled[1].sum(1).tolist()
        alone = [
            scored_loss(model).eval()(make_batch(*(tensor[i : i + 1, :length] for tensor in labelled)))[1]
            for i, length in enumerate(lengths)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


# ---- two processes ----

ENGINES = ("ddp", "zero2", "zero3")


@pytest.fixture(scope="module")
def under_engines(tmp_path_factory):
    """What tests/training/loss_worker.py found, by "<engine> <model>"."""
    path = tmp_path_factory.mktemp("engines") / "found.json"
    run_script(path, script="tests/training/loss_worker.py", launch="ddp2", output_dir=path.parent)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
def test_right_under_ddp_and_the_deepspeed_engine(under_engines, engine, name):
    """Three micro-batches on two processes, one process having nothing in the second round; ZeRO-3 reads the output
    layer's weight outside of that layer's forward. With weights and other terms on all but Phi. Measured: all
    within 1e-6."""
    found = under_engines[f"{engine} {name}"]
    assert found["total"] == pytest.approx(found["expected_total"], rel=1e-5)
    assert max(found["gradients"].values()) < 1e-5, found["gradients"]
    # After a step of plain gradient descent, so by the weights that the engine itself goes on with.
    assert found["evaluated"] == pytest.approx(found["expected_evaluated"], rel=1e-5)
    assert found["evaluated"] < found["total"]


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


def test_accuracy_of_the_model_equals_a_plain_count(metric, model, labelled, batch):
    with torch.no_grad():
        _, likeliest = full_losses(model.eval(), labelled)
        _, _, predictions = scored_loss(model).eval()(batch)
    targets = labelled[2][:, 1:][labelled[2][:, 1:] != -100]
    metric.add_batch(predictions=predictions, references=targets)
    plain = sum(int(guess == target) for guess, target in zip(likeliest, targets, strict=True))
    counts = metric.compute()
    assert (counts["correct"], counts["total"]) == (plain, len(targets))
    assert (targets == 0).any()


def test_accuracy_of_nothing(metric):
    metric.add_batch(predictions=torch.tensor([], dtype=torch.long), references=torch.tensor([], dtype=torch.long))
    assert len(metric) == 0
