"""`benchmark.py scaling`: how this trainer's cost grows with max_length and with the conversations in a micro-batch."""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarking.contenders import Work, train_ours
from benchmarking.measuring import in_a_process
from benchmarking.train import random_conversations, save_data, shape
from utils.errors import UserError
from utils.tables import progress_bar

LENGTHS = (512, 1024, 2048, 4096, 8192)  # one conversation a micro-batch
BATCHES = (1, 2, 4, 8, 16)  # conversations of 512 tokens
SCORED_SHARE = 0.6  # about that of the Open-Assistant mix
STEPS = 3  # timed, after one to warm up


def benchmark_scaling(gpu: str | None, layers: int | None, rounds: int) -> dict[str, dict[int, list[dict]]]:
    """The figures of each round, for each length and each batch, as keys in text."""
    config = shape(gpu, layers)
    works = {("max_length", length): (length, 1) for length in LENGTHS}
    works |= {("conversations a micro-batch", batch): (512, batch) for batch in BATCHES}
    figures: dict[str, dict[int, list[dict]]] = {what: {} for what, _ in works}
    for (what, value), (length, batch) in progress_bar([*works.items()] * rounds, desc="measurements"):
        data = save_data(random_conversations([length] * batch * (STEPS + 1), config["vocab_size"], SCORED_SHARE))
        work = Work(config, data, batch, 1, length, dtype="bf16" if gpu else "fp32")
        seen = figures[what].setdefault(value, [])
        try:
            seen.append(in_a_process(train_ours, asdict(work)))
        except UserError as error:  # the GPU's memory is too small for this one, say
            print(f"{what} {value}: {error}")
    return figures


def _medians(seen: list[dict]) -> tuple[float, float]:
    """Tokens a second, and GiB."""
    tokens = median(figure["tokens"] / figure["seconds"] for figure in seen)
    return tokens, median(figure["peak_memory"] for figure in seen) / 2**30


def scaling_table(figures: dict[str, dict[int, list[dict]]]) -> str:
    """Medians over the rounds as two Markdown tables."""
    tables = []
    for what, by_value in figures.items():
        lines = [f"| {what} | tokens a second | peak memory |", "|---|---|---|"]
        for value, seen in by_value.items():
            shown = "{:,.0f} | {:.2f} GiB |".format(*_medians(seen)) if seen else "failed | |"
            lines.append(f"| {value:,} | {shown}")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def plot_scaling(figures: dict[str, dict[int, list[dict]]], file: Path) -> None:
    """Draw both tables, tokens a second and memory, over logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4), layout="constrained")
    for axis, (what, by_value) in zip(figure.subplots(1, len(figures)), figures.items(), strict=True):
        by_value = {value: seen for value, seen in by_value.items() if seen}
        tokens, memory = zip(*map(_medians, by_value.values()), strict=True)
        axis.plot(list(by_value), tokens, marker="o", color="C0")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(by_value), [f"{value:,}" for value in by_value])
        axis.set(xlabel=what, ylabel="tokens a second", ylim=(0, 1.1 * max(tokens)))
        beside = axis.twinx()
        beside.plot(list(by_value), memory, marker="s", color="C1")
        beside.set(ylim=(0, 1.1 * max(memory)))
        beside.set_ylabel("peak memory, GiB", color="C1")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
