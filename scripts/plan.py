#!/usr/bin/env python3
"""Plan a run before its cards are paid for: what fits, how fast it is, what it costs, and the command that starts it.

    python scripts/plan.py recipes/stablelm7b_oasst.yaml
    python scripts/plan.py RECIPE [--gpu h100] [--gpus 1,2,4,8,16] [--price PER_HOUR] [--mfu SHARE] [--tokens N]
        [--plot FILE.png] [--json FILE] [--key value ...]

On any machine, without a GPU, weights or a network. For every accelerate config of the collection and every number of
cards: the memory of each card by parts, whether it fits, the largest micro-batch that does, tokens a second, hours of
training and of evaluation, money of both, what travels between cards and machines in a step, host memory and disk. The
fastest is on top, with its command.

Of the recipe only what changes nothing that is learnt is set anew: `micro_batch_tokens` and `gradient_checkpointing`.
The data's lengths are those of the prepared data where data and tokenizer are here; of the seed's data sets they are
known; for others give --tokens. Memory is estimated by the functions that a run checks itself with. All is an
estimate: * marks what was measured as well. docs/hardware.md has the tables, and where the rates come from.

GPUs: h100, a100-80, a100-40, l40s, rtx4090 (in machines of eight), or NAME:GiB:TFLOPS:GBS for another, with its memory,
its dense half-precision TFLOP/s and the GB/s of its memory.
"""

import argparse
from pathlib import Path

from planning.cards import find_card
from recipe.command_line import parse_with_recipe, recipe_parser
from recipe.keys import Recipe
from recipe.load import load_recipe
from utils.command_line import positive
from utils.errors import UserError, one_line_errors

MOST_CARDS = 4096
MOST_TOKENS = 10**10  # of an epoch: 15 million conversations, which are planned in half a minute


def read_command_line() -> tuple[argparse.Namespace, Recipe | None, str, dict[str, str]]:
    parser = recipe_parser(__doc__)
    parser.add_argument("--gpu", type=find_card, default="h100", metavar="NAME", help="(h100)")
    parser.add_argument(
        "--gpus", type=counts, default=[1, 2, 4, 8, 16], metavar="N,N", help="numbers of cards (1 to 16)"
    )
    parser.add_argument("--price", type=number, metavar="PRICE", help="of a card and hour, in any money")
    parser.add_argument(
        "--mfu", type=number, metavar="SHARE", help="of the card's peak that forward and backward reach"
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="of an epoch, in place of the recipe's data")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--write_tables", action="store_true", help="write the tables of README.md and docs/hardware.md anew"
    )
    options, file, overrides = parse_with_recipe(parser)
    if options.mfu and options.mfu > 1:
        raise UserError(f"command line: --mfu {options.mfu:g}: a share, of at most 1")
    if options.tokens and options.tokens > MOST_TOKENS:
        raise UserError(f"command line: --tokens {options.tokens}: at most {MOST_TOKENS:,} of an epoch are planned")
    if options.write_tables:
        if file or overrides:
            raise UserError("command line: --write_tables is of the recipes that ship, and takes no other")
        return options, None, "", {}
    return options, load_recipe(file, overrides, for_a_run=True), file, overrides


def counts(text: str) -> list[int]:
    """Numbers of cards with commas between them, as argparse's `type`."""
    found = sorted({positive(number.strip()) for number in text.split(",")})
    if found[-1] > MOST_CARDS:
        raise argparse.ArgumentTypeError(f"{found[-1]} cards are more than {MOST_CARDS:,}")
    return found


def number(text: str) -> float:
    """A number over 0, as argparse's `type`; none that makes a sum of money or time infinite."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 1e-6 <= found <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is no number over 0, of up to a billion")
    return found


# Read before torch is loaded, so that a typing mistake is answered at once.
if __name__ == "__main__":
    with one_line_errors():
        OPTIONS, RECIPE, RECIPE_FILE, OVERRIDES = read_command_line()

from planning.documents import write_tables
from planning.launchers import launchers
from planning.measured import measured_on
from planning.mixes import find_mix
from planning.models import find_config
from planning.report import (
    figures_of,
    in_order,
    memory_rows,
    plot,
    remarks,
    speed_rows,
    subject_as_json,
    worth,
    write_json,
)
from planning.search import make_subject, plan_run
from utils.tables import make_console, make_table, show_table


def main(options: argparse.Namespace, recipe: Recipe, recipe_file: str, overrides: dict[str, str]) -> None:
    card, config = options.gpu, find_config(recipe)
    mix, data = find_mix(recipe, options.tokens)
    subject = make_subject(recipe, config, mix, options.mfu)
    plans = [plan_run(subject, each, card) for cards in options.gpus for each in launchers(recipe, cards)]
    if not plans:
        raise UserError(f"command line: --gpus {','.join(map(str, options.gpus))}: no engine trains this recipe so")
    plans = in_order(plans)
    figures = [figures_of(plan, options.price) for plan in plans]
    model = f"{recipe.model_name}, {subject.parameters:,} weights, on {card.name}"
    for title, rows in (
        (f"{model} ({worth(plans)})", speed_rows(figures, card, options.price)),
        (f"GiB of a card ({worth(plans)})", memory_rows(figures)),
    ):
        table = make_table(title, *rows[0], names=2)
        for row in rows[1:]:
            table.add_row(*row)
        show_table(table)
    measured = measured_on(card)
    for remark in remarks(subject, plans, data, measured):
        make_console().print(f"- {remark}")

    def command(plan) -> str:
        return plan.launcher.command(recipe_file, overrides | plan.keys)

    if options.json:
        of_each = [own | {"command": command(plan)} for own, plan in zip(figures, plans, strict=True)]
        write_json(subject_as_json(subject, card, options.price, data, measured) | {"plans": of_each}, options.json)
    if options.plot:
        plot(plans, card, options.plot)
    if not plans[0].fits:
        print("it fits on none of these: take more cards (--gpus), larger ones, or adapters (use_peft)")
        return
    cheapest = min((plan for plan in plans if plan.fits), key=lambda plan: plan.hours * plan.launcher.cards)
    named = {"the fastest": plans[0]} | ({"the fewest hours of cards": cheapest} if cheapest is not plans[0] else {})
    for what, plan in named.items():
        each = ", on each machine with its RANK and the first one's ADDRESS" if plan.launcher.machines > 1 else ""
        print(f"{what}, from the collection's folder{each}:\n{command(plan)}")


if __name__ == "__main__":
    with one_line_errors():
        if OPTIONS.write_tables:
            write_tables()
        else:
            main(OPTIONS, RECIPE, RECIPE_FILE, OVERRIDES)
