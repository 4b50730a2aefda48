"""What was planned, as tables on the screen or in Markdown, as JSON, and as a picture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planning.cards import GIB, Card
from planning.measured import Measured
from planning.search import Plan, Subject
from training.memory import show_bytes
from training.plan import packs_per_step
from utils.errors import UserError
from utils.tables import counted

PARTS = ("weights", "gradients", "optimizer", "transient", "activations", "logits", "step")


def in_order(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest that fit first; then those that do not, fewest cards first."""
    return sorted(plans, key=lambda plan: (not plan.fits, plan.hours, plan.launcher.cards, plan.peak))


def speed_rows(plans: Sequence[Plan], card: Card, price: float | None) -> list[list[str]]:
    """A header, and of each plan how fast it is and what it carries."""
    priced = ["price"] * (price is not None)
    header = ["engine", "cards", f"GiB of {card.memory / GIB:.1f}", "micro-batch", "largest", "recompute"]
    rows = [[*header, "tokens/s", "hours", *priced, "GB sent a step", "between machines", "host GiB"]]
    for plan in plans:
        name, launcher = plan.launcher.layout.name, plan.launcher
        row = [name, str(launcher.cards), f"{plan.peak / GIB:.1f}"]
        if not plan.fits:
            rows.append([*row, "does not fit", *[""] * (len(rows[0]) - 4)])
            continue
        row += [f"{plan.micro_batch_tokens:,}", f"{plan.most_tokens:,}", "yes" if plan.recomputes else "no"]
        row += [f"{plan.tokens_per_second:,.0f}", f"{plan.hours:.1f}"]
        row += [] if price is None else [f"{price * plan.hours * launcher.cards:,.0f}"]
        row += [f"{plan.sent[0] / 1e9:.1f}", f"{plan.sent[1] / 1e9:.1f}", f"{sum(plan.host.values()) / GIB:.0f}"]
        rows.append(row)
    return rows


def memory_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """A header, and of each plan the GiB of a card by what they are for."""
    rows = [["engine", "cards", *PARTS, "peak"]]
    for plan in plans:
        parts = [f"{plan.parts[part] / GIB:.1f}" for part in PARTS]
        rows.append([plan.launcher.layout.name, str(plan.launcher.cards), *parts, f"{plan.peak / GIB:.1f}"])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *others))


def remarks(subject: Subject, plans: Sequence[Plan], data: str, measured: Measured | None) -> list[str]:
    """What holds for all plans, in sentences; the first says what nothing of it is."""
    first, mix, recipe = plans[0], subject.mix, subject.recipe
    tokens = int(mix.train.lengths.clip(max=recipe.max_length).sum())
    model, state = first.checkpoint
    found = [
        "every figure is an estimate, by the same functions as a run's own before it starts; what a step takes is by a "
        "roofline"
        + ("" if subject.mfu is None else f" of the network, and {subject.mfu:.0%} of the card's peak (--mfu)"),
        f"data: {data}: {len(mix.train):,} training conversations, {tokens:,} tokens an epoch at most, {first.steps:,} "
        f"steps on {counted(first.launcher.cards, 'card')}; hours are of training and evaluation, without loading and "
        "saving",
        f"disk: a checkpoint takes {show_bytes(model + state)} (model {show_bytes(model)}, what resuming needs "
        f"{show_bytes(state)}), the run up to {show_bytes(first.disk)}",
        f"host, of each machine: {', '.join(f'{what} {show_bytes(size)}' for what, size in first.host.items())} (the "
        "first line's)",
    ]
    most = max(plan.launcher.cards for plan in plans)
    if (packs := packs_per_step(recipe, most)) < most:
        what = counted(packs, "pack" if recipe.packing else "conversation")
        found.append(f"a step has {what} (global_batch_size): of {most} cards {most - packs} would compute nothing")
    if measured:
        found.append(measured.sentence())
    else:
        found.append(
            "of this card nothing has been measured: it is taken to reach the shares of its peak that an H100 did"
        )
    return found


# ---- Files ----


def as_json(subject: Subject, card: Card, plans: Sequence[Plan], data: str, commands: Callable[[Plan], str]) -> dict:
    """Everything, in bytes and seconds."""
    lengths = subject.mix.train.lengths.clip(max=subject.recipe.max_length)
    return {
        "model": subject.recipe.model_name,
        "parameters": subject.parameters,
        "card": card._asdict(),
        "data": {"from": data, "conversations": len(lengths), "tokens": int(lengths.sum())},
        "estimates": True,
        "plans": [_plan_as_json(plan, commands(plan)) for plan in plans],
    }


def _plan_as_json(plan: Plan, command: str) -> dict[str, Any]:
    found = plan._asdict() | {"engine": plan.launcher.layout.name, "layout": asdict(plan.launcher.layout)}
    found |= {
        "cards": plan.launcher.cards,
        "command": command,
        "checkpoint": dict(zip(("model", "state"), plan.checkpoint, strict=True)),
    }
    found["sent"] = dict(zip(("by_a_card", "between_machines"), plan.sent, strict=True))
    del found["launcher"]
    return found


def write_json(figures: dict, file: Path) -> None:
    try:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error.strerror}") from error


def plot(plans: Sequence[Plan], card: Card, file: Path) -> None:
    """Draw hours over the number of cards, and the memory of a card by parts at the fewest cards that each engine runs
    on (or, where none fits, at the most)."""
    from matplotlib.figure import Figure

    engines: dict[str, list[Plan]] = {}
    for plan in sorted(plans, key=lambda plan: plan.launcher.cards):
        engines.setdefault(plan.launcher.layout.name, []).append(plan)
    figure = Figure((13, 5), layout="constrained")
    hours, memory = figure.subplots(1, 2)
    for name, own in engines.items():
        if fitting := [plan for plan in own if plan.fits]:
            places = [plan.launcher.cards for plan in fitting]
            hours.plot(places, [plan.hours for plan in fitting], marker="o", label=name)
    counts = sorted({plan.launcher.cards for plan in plans})
    hours.set(xscale="log", xlabel="cards", title=f"hours of the run on {card.name} (estimates)")
    hours.set_xticks(counts, [str(count) for count in counts])
    hours.minorticks_off()
    hours.grid(alpha=0.3)
    if hours.lines:
        hours.set_ylim(bottom=0)
        hours.legend()
    chosen = [next((plan for plan in own if plan.fits), own[-1]) for own in engines.values()]
    labels = [f"{plan.launcher.layout.name}\n{plan.launcher.cards}".replace(", ", ",\n") for plan in chosen]
    base = [0.0] * len(chosen)
    for part in PARTS[:-1]:
        sizes = [plan.parts[part] / GIB for plan in chosen]
        memory.bar(labels, sizes, bottom=base, label=part)
        base = [below + size for below, size in zip(base, sizes, strict=True)]
    memory.axhline(card.memory / GIB, color="black", linestyle="--", linewidth=1)
    memory.set_title(f"GiB of a card in forward and backward (dashed: {card.name})")
    memory.tick_params(axis="x", labelsize=7)
    memory.legend(fontsize=8)
    try:
        # By the very name: without a suffix matplotlib would add one, to a folder's name as well.
        figure.savefig(file, dpi=100, format=file.suffix.removeprefix(".") or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file}: cannot be written: {error}") from error
