"""The FLOPs of a batch against hand-made figures, and against PyTorch's own counter on real models."""

import pytest
import torch
from mixes import scored_loss
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from training.collate import Batch
from training.flops import ModelFlops, peak_flops

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
MODELS = {
    "GPT-NeoX": GPTNeoXConfig(**SIZES, intermediate_size=128, tie_word_embeddings=False),
    "Llama, tied, with grouped heads of another size": LlamaConfig(
        **SIZES, intermediate_size=80, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True
    ),
    "GPT-2, whose matrices are no Linear": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4),
}


def make_batch(lengths: tuple[int, ...], targets: int) -> Batch:
    """Conversations padded, each scored at its first positions, `targets` in all."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    scored = mask[:, 1:].flatten().nonzero().squeeze(1)[:targets]
    return Batch(ids, scored, ids.flatten()[scored], torch.zeros_like(scored), lengths, attention_mask=mask)


def on_meta(config) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stablelm(hidden_size: int, heads: int, rows: int) -> GPTNeoXConfig:
    """StableLM-base-alpha: 16 layers, untied embeddings."""
    return GPTNeoXConfig(
        vocab_size=rows,
        hidden_size=hidden_size,
        num_hidden_layers=16,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize(
    ("config", "parameters", "gflop"),
    [
        (stablelm(4096, 32, rows=50_688), 3_637_321_728, 22.18),
        (stablelm(4096, 32, rows=50_288), 3_634_044_928, 22.17),
        (stablelm(6144, 48, rows=50_288), 7_866_986_496, 47.76),
    ],
    ids=["3B", "3B with our rows", "7B with our rows"],
)
def test_stablelm_by_the_token(config, parameters, gflop):
    """4096 tokens, each scored, that attend causally: 12 h^2 a layer and h a row in matrices, 6 FLOPs each; attention
    12 h a layer for each of (4096 + 1) / 2 pairs a token."""
    model = on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    every = torch.empty(4096, dtype=torch.int64)
    batch = Batch(torch.empty(1, 4096), every, every, every, (4096,))
    hidden = config.hidden_size
    by_hand = 6 * (16 * 12 * hidden**2 + config.vocab_size * hidden) + 12 * 16 * hidden * 4097 / 2
    assert ModelFlops(model).of(batch) / 4096 == pytest.approx(by_hand)
    assert by_hand / 1e9 == pytest.approx(gflop, abs=0.005)


def added_product(total, left, right, out_shape) -> int:
    """FLOPs of total += left @ right, by their shapes."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_against_pytorchs_counter(config):
    """Conversation by conversation with eager attention, which multiplies all pairs, the future's too.

    Its table lacks the product that adds in place, by which the output layer's gradient is summed (torch 2.13).
    """
    lengths, targets = (40, 7, 23), (39, 0, 5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    loss_model = scored_loss(model).train()
    counted = 0
    for length, own in zip(lengths, targets, strict=True):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})
        with counter:
            loss_model(make_batch((length,), own))[0].backward()
        counted += counter.get_total_flops()
    flops = ModelFlops(model)
    future = sum(length * (length - 1) / 2 for length in lengths)
    assert counted == flops.of(make_batch(lengths, sum(targets))) + flops.per_pair * future


def test_only_what_has_to_be_computed_counts():
    flops = ModelFlops(on_meta(MODELS["GPT-NeoX"]))
    one, other, both = make_batch((30,), 8), make_batch((10,), 3), make_batch((30, 10), 11)
    assert flops.of(both) == flops.of(one) + flops.of(other)  # no padding, no pair across conversations
    assert flops.of(make_batch((30,), 0)) == flops.of(one) - 8 * 6 * 96 * 32
    nothing = torch.empty(0, dtype=torch.int64)
    assert flops.of(Batch(torch.zeros(1, 2, dtype=torch.int64), nothing, nothing, nothing, ())) == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        # Slower or faster than those whose names theirs begin with.
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GB200", None),
        ("NVIDIA T4", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
