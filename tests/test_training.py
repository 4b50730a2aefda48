"""sft.py against an independent loop: plain PyTorch, one conversation at a time, full logits, no Accelerate.

Adam hides a wrongly scaled gradient from the loss, so gradient norms and final weights are compared too.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_LENGTH = 64
LEARNING_RATE, WARMUP, MAX_NORM = 1e-2, 4, 1.0
# A key's bias has no gradient where it is not rotated (softmax cancels it), only rounding noise of about 1e-9, which
# Adam would blow up to full steps with the usual epsilon.
EPSILON = 1e-5

DOLLY = [
    ("What colour is a potato?", "A potato is brown."),
    ("Where do I find a goldfish, and what would it do there all day long?", "In a pond. It swims."),
    ("Name three towns.", "Rome, Paris, Oslo, and if you ask for a fourth one, London too."),
    # Over max_length before the reply begins: no token of it is scored, alone in a micro-batch or on a process.
    ("Say nothing. " * 60, "Nothing."),
]
ALPACA = [
    ("reverse the items", "", "items[::-1]"),
    ("add up", "1, 2, 3", "sum([1, 2, 3])\nprint(6)"),
    ("print hello in Python, in one line", "", "print('hello')"),
    ("take the last of names", "names = [1, 2]", "names[-1]"),
]


@pytest.fixture
def recipe(tmp_path, tiny_model):
    """Eight training conversations of two sources, none held out."""
    dolly, alpaca = tmp_path / "dolly.jsonl", tmp_path / "alpaca.json"
    rows = [{"instruction": question, "context": "", "response": answer} for question, answer in DOLLY]
    dolly.write_text("\n".join(map(json.dumps, rows)))
    alpaca.write_text(json.dumps([dict(zip(("instruction", "input", "output"), row, strict=True)) for row in ALPACA]))
    path = tmp_path / "recipe.yaml"
    values = {
        "model_name": str(tiny_model),
        "datasets": [
            {"dolly15k": {"input_file_path": str(dolly), "val_split": 0}},
            {"code_alpaca": {"input_file_path": str(alpaca), "val_split": 0}},
        ],
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "unused"),
        "dtype": "fp32",
        "max_length": MAX_LENGTH,
        "random_offset_probability": 0,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP,
        "max_grad_norm": MAX_NORM,
        "adam_epsilon": EPSILON,
        "weight_decay": 0.1,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "log_wandb": False,
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def conversations(tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, targets) of the eight, by joining strings: the scaffold's tokens are parsed out of the text."""
    pairs = DOLLY + [(f"{task}\n{given}" if given else task, reply) for task, given, reply in ALPACA]
    examples = []
    for question, answer in pairs:
        prompt = tokenizer(f"<|prompter|>{question}<|endoftext|><|assistant|>")["input_ids"]
        reply = tokenizer(f"{answer}<|endoftext|>")["input_ids"]
        ids = (prompt + reply)[:MAX_LENGTH]
        targets = ([-100] * len(prompt) + reply)[:MAX_LENGTH]
        examples.append((torch.tensor(ids), torch.tensor(targets)))
    return examples


def independent_run(
    tiny_model,
    steps: list[list[int]],
    loss_normalization: str,
    half: torch.dtype | None = None,
    weights: list[float] | None = None,
):
    """Train on the given conversations of each step; returns losses, gradient norms, rates and the model.

    Args:
        half: of PyTorch's autocast; None for fp32 throughout.
        weights: of the conversations.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for layer in model.gpt_neox.layers:
        layer.mlp.act = torch.nn.GELU(approximate="tanh")  # fuse_gelu
    examples = conversations(AutoTokenizer.from_pretrained(tiny_model))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=EPSILON,
        weight_decay=0.1,
    )
    losses, norms, rates = [], [], []
    for step, chosen in enumerate(steps):
        last = step - 1
        if last < 0:
            rate = 0.0
        elif last < WARMUP:
            rate = LEARNING_RATE * math.log(last + 1) / math.log(WARMUP)
        else:
            rate = LEARNING_RATE * (len(steps) - last) / (len(steps) - WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums, counts, weighed = [], [], []
        for index in chosen:
            ids, targets = examples[index]
            with torch.autocast("cpu", half, enabled=half is not None):
                logits = model(ids[None]).logits[0, :-1]
            sums.append(F.cross_entropy(logits.float(), targets[1:], reduction="sum"))
            counts.append(int((targets[1:] != -100).sum()))
            weighed.append(weights[index] if weights else 1)
        if loss_normalization == "tokens":
            loss = sum(weight * total for weight, total in zip(weighed, sums, strict=True))
            loss = loss / (sum(weight * count for weight, count in zip(weighed, counts, strict=True)) or 1)
        else:  # one conversation is one micro-batch; one without a target does not count
            taught = [each for each in zip(weighed, sums, counts, strict=True) if each[2]]
            loss = sum(weight * total / count for weight, total, count in taught) / sum(each[0] for each in taught)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        losses.append(loss.item())
        rates.append(rate)
    return losses, norms, rates, model


def assert_equal_runs(run, expected) -> None:
    losses, norms, rates, model = expected
    assert run.curve("loss") == pytest.approx(losses, rel=1e-4)
    assert run.curve("grad_norm") == pytest.approx(norms, rel=1e-4)
    assert run.curve("learning_rate") == pytest.approx(rates, rel=1e-6, abs=1e-12)
    trained = AutoModelForCausalLM.from_pretrained(run.output_dir, dtype=torch.float32)
    for (name, ours), theirs in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# normalization, launch, conversations a micro-batch, micro-batches a step: eight conversations a step in all.
CUTS = [
    ("tokens", "python", 4, 2),
    ("tokens", "ddp2", 2, 2),
    ("tokens", "fsdp2x2", 2, 2),
    ("tokens", "hsdp2x2", 1, 2),
    ("tokens", "zero2x2", 2, 2),
    ("tokens", "zero3x2", 2, 2),
    ("micro_batch", "python", 1, 8),
    ("micro_batch", "zero2x2", 1, 4),
    ("micro_batch", "zero3x2", 1, 4),
]
# Those with weights: of these records, times that of the second data set.
WEIGHTED = {("tokens", "ddp2"), ("micro_batch", "zero2x2")}
WEIGHTS, OF_ALPACA = [1, 0.25, 3, 1, 2, 2, 0.5, 1], 1.5


@pytest.mark.parametrize(("normalization", "launch", "micro_batch", "accumulation"), CUTS)
def test_twelve_steps_equal_an_independent_loop(
    run_sft, recipe, tiny_model, normalization, launch, micro_batch, accumulation
):
    weighted, weights = (normalization, launch) in WEIGHTED, None
    if weighted:
        give_weights(yaml.safe_load(recipe.read_text())["datasets"])
        weights = [weight * (1 if place < 4 else OF_ALPACA) for place, weight in enumerate(WEIGHTS)]
    options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    options |= {"loss_normalization": normalization, "num_train_epochs": 12}
    options |= {"datasets.code_alpaca.weight": OF_ALPACA} if weighted else {}
    run = run_sft(recipe, *[text for key, value in options.items() for text in (f"--{key}", value)], launch=launch)
    assert_equal_runs(run, independent_run(tiny_model, [list(range(8))] * 12, normalization, weights=weights))


def give_weights(datasets: list[dict]) -> None:
    """To the records of both files."""
    (dolly, alpaca) = (Path(options["input_file_path"]) for entry in datasets for options in entry.values())
    rows = [json.loads(line) | {"weight": WEIGHTS[place]} for place, line in enumerate(dolly.read_text().splitlines())]
    dolly.write_text("\n".join(map(json.dumps, rows)))
    rows = [row | {"weight": WEIGHTS[4 + place]} for place, row in enumerate(json.loads(alpaca.read_text()))]
    alpaca.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("launch", "micro_batch", "accumulation"),
    [("python", 1, 6), ("zero2x2", 1, 3), ("zero3x2", 1, 3), ("ddp2", 3, 1)],
)
def test_the_last_window_of_an_epoch_makes_a_correct_step(
    run_sft, recipe, tiny_model, launch, micro_batch, accumulation
):
    """Seven conversations in steps of six: the second step of each epoch holds one, and one process has nothing."""
    from data.mix import prepare_mix
    from recipe.load import load_recipe
    from training.model import load_tokenizer
    from training.plan import training_rows

    options = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    options |= {"num_train_epochs": 3, "datasets.code_alpaca.size": 3}
    overrides = {key: str(value) for key, value in options.items()}
    run = run_sft(recipe, *[text for key, value in overrides.items() for text in (f"--{key}", value)], launch=launch)

    loaded = load_recipe(recipe, overrides)
    mix = prepare_mix(loaded, load_tokenizer(loaded))
    epochs = [training_rows(mix, loaded, epoch).tolist() for epoch in range(3)]
    steps = [part for rows in epochs for part in (rows[:6], rows[6:])]
    assert [len(part) for part in steps] == [6, 1] * 3
    assert_equal_runs(run, independent_run(tiny_model, steps, "tokens"))


@pytest.mark.parametrize(
    ("launch", "padding_free"),
    [("python", True), ("python", False), ("ddp2", True), ("zero2x2", True), ("zero3x2", True)],
)
def test_steps_cut_by_tokens_equal_an_independent_loop(run_sft, recipe, tiny_model, launch, padding_free):
    """Steps of six and of two conversations, whose micro-batches are not all as many."""
    from data.mix import prepare_mix
    from recipe.load import load_recipe
    from training.micro_batches import rows_of_step
    from training.model import load_tokenizer
    from training.plan import epoch_plan

    options = {"global_batch_size": 6, "micro_batch_tokens": 64, "num_train_epochs": 5}
    options |= {"padding_free": padding_free}
    overrides = {key: str(value) for key, value in options.items()}
    run = run_sft(recipe, *[text for key, value in overrides.items() for text in (f"--{key}", value)], launch=launch)

    loaded, steps, micro_batches = load_recipe(recipe, overrides), [], []
    mix = prepare_mix(loaded, load_tokenizer(loaded))
    for plan in (epoch_plan(mix, loaded, epoch) for epoch in range(5)):
        processes, tokens = 1 if launch == "python" else 2, plan.tokens(mix, loaded)
        for first in (0, 6):
            steps.append(plan.of_packs(first, first + 6).tolist())
            micro_batches.append(math.ceil(len(rows_of_step(plan, tokens, first, loaded, processes)) / processes))
    assert len(set(micro_batches)) > 1
    assert_equal_runs(run, independent_run(tiny_model, steps, "tokens"))


@pytest.fixture(scope="module")
def of_autocast_and_exact(tiny_model):
    """Losses and gradient norms of twenty steps by a plain loop: in bf16 by PyTorch's autocast, and in fp32."""
    steps = [list(range(8))] * 20
    return [independent_run(tiny_model, steps, "tokens", half)[:2] for half in (torch.bfloat16, None)]


PATHS = [
    ("python", {"gradient_accumulation_steps": 4}),
    ("python", {"gradient_accumulation_steps": 4, "padding_free": False, "gradient_checkpointing": False}),
    ("ddp2", {"gradient_accumulation_steps": 2}),
]


@pytest.mark.parametrize(("launch", "keys"), PATHS)
def test_twenty_steps_in_bf16_equal_plain_autocast(run_sft, recipe, of_autocast_and_exact, launch, keys):
    """Casts are made at other times, products added in another order: losses within bf16's rounding, 4e-3 (measured:
    5e-4, as far as autocast's are from fp32), norms within four times that (5e-3)."""
    options = {"dtype": "bf16", "num_train_epochs": 20, "per_device_train_batch_size": 2} | keys
    run = run_sft(recipe, *[text for key, value in options.items() for text in (f"--{key}", value)], launch=launch)
    (losses, norms), (exact, _) = of_autocast_and_exact
    assert run.curve("loss") == pytest.approx(losses, rel=2e-3)
    assert run.curve("grad_norm") == pytest.approx(norms, rel=1.5e-2)

    def off(curve: list[float]) -> float:
        return max(abs(mine - own) / own for mine, own in zip(curve, exact, strict=True))

    assert 1e-4 < off(run.curve("loss")) < 2 * off(losses)  # so it was in half precision, and as exact as that is


def test_each_data_set_has_its_own_loss(run_sft, recipe):
    run = run_sft(
        *(recipe, "--num_train_epochs", 2, "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1),
        *("--datasets.dolly15k.weight", 3),
    )
    of_loss = [line.split()[-1] for line in run.stdout.splitlines() if line.startswith(("dolly15k ", "code_alpaca "))]
    assert of_loss == [f"{run.curve(f'share_{name}')[0]:.1%}" for name in ("dolly15k", "code_alpaca")]
    for line in run.metrics():
        parts = [(line[f"loss_{name}"], line[f"share_{name}"]) for name in ("dolly15k", "code_alpaca")]
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert sum(loss * share for loss, share in parts) == pytest.approx(line["loss"], rel=1e-5)
