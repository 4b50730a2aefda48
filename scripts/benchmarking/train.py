"""`benchmark.py train`: what the contenders of benchmarking/contenders.py have to do, and their figures in a table."""

import atexit
import os
import tempfile
from dataclasses import asdict
from statistics import median

import numpy as np
import torch

from benchmarking.contenders import Work, train_bare, train_ours, train_trl
from benchmarking.measuring import in_a_process
from recipe.keys import Recipe
from training.memory import show_bytes
from utils.errors import UserError

# The vocabulary of StableLM with the chat tokens (50,288 rows).
NEOX = {
    "vocab_size": 50288,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024} | NEOX
STABLELM = {
    "3b": {"num_hidden_layers": 16, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16384} | NEOX,
    "7b": {"num_hidden_layers": 16, "hidden_size": 6144, "num_attention_heads": 48, "intermediate_size": 24576} | NEOX,
}


def shape(gpu: str | None, layers: int | None) -> dict:
    """The config of a StableLM, or of the small model for a CPU, with so many layers."""
    config = STABLELM[gpu] if gpu else SMALL
    return config | ({"num_hidden_layers": layers} if layers else {})


def check_fits(gpu: str, layers: int | None) -> None:
    """UserError where a StableLM of so many layers is too large for this GPU, with how many would fit."""
    config = shape(gpu, layers)
    hidden, memory = config["hidden_size"], torch.cuda.get_device_properties(0).total_memory

    def need(layers: int) -> int:
        """Bytes: 12 h^2 + 13 h weights a layer and two embeddings, 18 each in fp32 with Adam and bf16 copies; and a
        tenth for activations."""
        return int(1.1 * 18 * (layers * (12 * hidden**2 + 13 * hidden) + 2 * config["vocab_size"] * hidden))

    if need(config["num_hidden_layers"]) > memory:
        fit = max((count for count in range(config["num_hidden_layers"]) if need(count) <= memory), default=0)
        remedy = f"give --layers {fit}" if fit else "not one layer fits"
        raise UserError(
            f"command line: --gpu {gpu}: {show_bytes(need(config['num_hidden_layers']))} for weights, gradients, Adam "
            f"and activations, the GPU has {show_bytes(memory)}: {remedy}"
        )


def recipe_work(recipe: Recipe, conversations: int) -> dict[str, Work]:
    """The first conversations of a recipe's first epoch on the small model."""
    from data.mix import prepare_mix
    from training.collate import cut
    from training.model import load_tokenizer
    from training.plan import training_rows

    mix = prepare_mix(recipe, load_tokenizer(recipe))
    rows = training_rows(mix, recipe, 0)[:conversations]
    rows = rows[: len(rows) // 8 * 8]  # whole steps of 4 x 2
    if len(rows) < 16:
        raise UserError("benchmark: two steps are 16 conversations, of which the first warms up: give more")
    data = save_data([cut(mix.train, row, recipe, epoch=0) for row in rows])
    return {f"{len(rows)} conversations of {recipe.output_dir.name}": Work(SMALL, data, 4, 2, recipe.max_length)}


def gpu_works(name: str, layers: int | None) -> dict[str, Work]:
    """A StableLM shape in bf16: rows of 4,096 tokens, all scored; and conversations as long as the mix's.

    The latter under gradient checkpointing: else 4 of them padded to 4,096 tokens do not fit beside a 3B on 80 GB.
    """
    config = shape(name, layers)
    title = f"StableLM {name.upper()} shape, {config['num_hidden_layers']} layers, bf16"
    rows = random_conversations([4096] * 32, config["vocab_size"], 1.0)
    # Lengths of the Open-Assistant mix: median about 150 tokens, a tenth over 1,500 (scripts/prepare_data.py).
    lengths = np.exp(np.random.default_rng(1).normal(5.0, 1.8, 128)).clip(16, 4096).astype(int).tolist()
    mixed = random_conversations(lengths, config["vocab_size"], 0.6)
    return {
        f"{title}, 4,096 tokens a row": Work(config, save_data(rows), 1, 4, 4096, 2, "bf16"),
        f"{title}, conversations of mixed lengths": Work(config, save_data(mixed), 4, 4, 4096, 2, "bf16", True),
    }


def save_data(conversations: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """Write conversations as `Work.data` has them to a temporary file, and return its name."""
    ids, scored = (np.concatenate(parts) for parts in zip(*conversations, strict=True))
    with tempfile.NamedTemporaryFile(suffix=".npz", delete=False) as file:
        atexit.register(os.unlink, file.name)
    np.savez(file.name, lengths=[len(own) for own, _ in conversations], input_ids=ids.astype(np.int32), scored=scored)
    return file.name


def random_conversations(lengths: list[int], vocabulary: int, scored_share: float) -> list:
    """Random tokens; the last part of each conversation, of that share, is scored."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, vocabulary, length), np.arange(length) >= max(1, round(length * (1 - scored_share))))
        for length in lengths
    ]


CONTENDERS = {
    "this collection": (train_ours,),
    "TRL, padded": (train_trl, False),
    "TRL, padding-free": (train_trl, True),
    "a bare loop, padded, all logits": (train_bare,),
}


def benchmark_train(work: Work, rounds: int) -> dict[str, list[dict]]:
    """The figures of each contender in every round; they take turns."""
    figures: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, (measure, *arguments) in CONTENDERS.items():
            try:
                figures[name].append(in_a_process(measure, asdict(work), *arguments))
            except UserError as error:
                figures[name].append({"failed": str(error)})
            print(f"{name}: {describe(figures[name][-1])}", flush=True)
    return figures


def describe(figure: dict) -> str:
    """One measurement in a line."""
    if "failed" in figure:
        return figure["failed"]
    conversations, tokens = (figure[what] / figure["seconds"] for what in ("conversations", "tokens"))
    return (
        f"{conversations:.2f} conversations, {tokens:,.0f} tokens a second, {figure['peak_memory'] / 2**30:.2f} GiB, "
        f"first loss {figure['losses'][0]:.6f}"
    )


def train_table(figures: dict[str, list[dict]]) -> str:
    """Medians over the rounds as a Markdown table; ratios are of each round, then their median."""
    lines = [
        "| trainer | conversations a second (range) | real tokens a second | peak memory | MFU | losses apart by |",
        "|---|---|---|---|---|---|",
    ]
    ours, ratios = figures["this collection"], [""]
    ours_ran = not any("failed" in figure for figure in ours)
    for name, seen in figures.items():
        if failed := [figure["failed"] for figure in seen if "failed" in figure]:
            lines.append(f"| {name} | {failed[0]} | | | | |")
            continue
        rates = [figure["conversations"] / figure["seconds"] for figure in seen]
        tokens = median(figure["tokens"] / figure["seconds"] for figure in seen)
        memory = median(figure["peak_memory"] for figure in seen) / 2**30
        mfu = apart = ""
        if ours_ran:
            if peak := ours[0]["peak_flops"]:
                mfu = f"{median(ours[0]['flops'] / figure['seconds'] / peak for figure in seen):.1%}"
            off = max(abs(a - b) / b for a, b in zip(seen[0]["losses"], ours[0]["losses"], strict=True))
            apart = f"{off:.1g}"
        spread = f"{median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        lines.append(f"| {name} | {spread} | {tokens:,.0f} | {memory:.2f} GiB | {mfu} | {apart} |")
        if ours_ran and seen is not ours:
            faster = median(b["seconds"] / a["seconds"] for a, b in zip(ours, seen, strict=True))
            less = median(a["peak_memory"] / b["peak_memory"] for a, b in zip(ours, seen, strict=True))
            ratios.append(f"{faster:.1f} times {name}, with {less:.0%} of its peak memory.\n")
    lines += ratios
    for name, (first, *_) in figures.items():
        if "settings" in first:
            lines.append(f"- {name}: {', '.join(f'{key} {value}' for key, value in first['settings'].items())}")
    return "\n".join(lines)
