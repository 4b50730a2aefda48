"""What was planned, as tables on the screen or in Markdown, as JSON, and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from planning.cards import GIB, Card
from planning.measured import Measured
from planning.search import Plan, Subject
from training.memory import show_bytes
from training.plan import packs_per_step
from utils.errors import UserError
from utils.tables import counted

RUN = ("tokens_per_second", "training_hours", "evaluation_hours", "hours")
MEASURED = "*"  # behind an engine: a `Plan.measured`
PARTS = ("weights", "gradients", "optimizer", "transient", "activations", "logits", "step")


def in_order(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest that fit first; then those that do not, fewest cards first."""
    return sorted(plans, key=lambda plan: (not plan.fits, plan.hours, plan.launcher.cards, plan.peak))


def figures_of(plan: Plan, price: float | None) -> dict[str, Any]:
    """Everything of a plan, in bytes, seconds, hours and the money that `price` of a card and hour is in; None where
    there is no price, and what a run takes that does not fit."""
    found = plan._asdict()
    launcher, run = found.pop("launcher"), {name: getattr(plan, name) for name in RUN}
    run["price"] = None if price is None else price * plan.hours * launcher.cards
    return {
        "engine": launcher.layout.name,
        "cards": launcher.cards,
        **found,
        **(run if plan.fits else dict.fromkeys(run)),
        "sent": dict(zip(("by_a_card", "between_machines"), plan.sent, strict=True)),
        "checkpoint": dict(zip(("model", "state"), plan.checkpoint, strict=True)),
        "layout": asdict(launcher.layout),
    }


def speed_rows(figures: Sequence[dict[str, Any]], card: Card, price: float | None = None) -> list[list[str]]:
    """A header, and of each plan, by `figures_of`, how fast it is and what it carries."""
    priced = ["price"] * (price is not None)
    header = ["engine", "cards", f"GiB of {amount(card.memory / GIB)}", "micro-batch", "largest", "recompute", "steps"]
    header += ["tokens/s", "training hours", "evaluation hours", "hours in all", *priced]
    rows = [[*header, "GB sent a step", "between machines", "host GiB", "disk GiB"]]
    for own in figures:
        row = [*_names(own), amount(own["peak"] / GIB), f"{own['micro_batch_tokens']:,}"]
        row += [f"{own['most_tokens']:,}" if own["fits"] else "does not fit", "yes" if own["recomputes"] else "no"]
        row += [f"{own['steps']:,}"]
        row += ["" if own[name] is None else amount(own[name]) for name in (*RUN, *priced)]
        row += [amount(sent / 1e9) for sent in own["sent"].values()]
        rows.append([*row, amount(sum(own["host"].values()) / GIB), amount(own["disk"] / GIB)])
    return rows


def worth(plans: Sequence[Plan]) -> str:
    """Of the figures of a table."""
    measured = any(plan.measured for plan in plans)
    return "estimates; " + (f"{MEASURED} was measured, see below" if measured else "none was measured")


def memory_rows(figures: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A header, and of each plan the GiB of a card by what they are for."""
    rows = [["engine", "cards", *PARTS, "peak"]]
    for own in figures:
        sizes = [*(own["parts"][part] for part in PARTS), own["peak"]]
        rows.append([*_names(own), *(amount(size / GIB) for size in sizes)])
    return rows


def _names(figures: dict[str, Any]) -> list[str]:
    return [figures["engine"] + MEASURED * figures["measured"], str(figures["cards"])]


def amount(value: float) -> str:
    """A number of hours, GiB, money: to a tenth, of less than 1 to two digits."""
    if value >= 1:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return np.format_float_positional(value, 2, fractional=False, trim="-")


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
        f"data: {data}: {counted(len(mix.train), 'conversation to train on')}, {tokens:,} tokens an epoch at most, and "
        f"{len(mix.validation):,} to evaluate on; {counted(first.steps, 'step')} on "
        f"{counted(first.launcher.cards, 'card')}; hours are without loading and saving",
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


def subject_as_json(
    subject: Subject, card: Card, price: float | None, data: str, measured: Measured | None
) -> dict[str, Any]:
    """What holds for all plans, in bytes and seconds."""
    lengths = subject.mix.train.lengths.clip(max=subject.recipe.max_length)
    return {
        "model": subject.recipe.model_name,
        "parameters": subject.parameters,
        "card": card._asdict(),
        "price_of_a_card_and_hour": price,
        "data": {
            "from": data,
            "conversations": len(lengths),
            "tokens": int(lengths.sum()),
            "validation_conversations": len(subject.mix.validation),
        },
        "estimates": True,
        "measured": measured and measured._asdict(),
    }


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
