"""The tables of README.md and docs/hardware.md, which `plan.py --write_tables` makes and a test compares."""

import re
from pathlib import Path

from planning.cards import GIB, Card, find_card
from planning.launchers import ROOT, launchers
from planning.mixes import find_mix
from planning.models import find_config
from planning.report import MEASURED, figures_of, in_order, markdown, memory_rows, plot, speed_rows
from planning.search import Plan, Subject, make_subject, plan_run
from recipe.load import load_recipe

COUNTS = (1, 2, 4, 8)
GPUS = {"24 GB": "rtx4090", "48 GB": "l40s", "80 GB": "h100"}
MODELS = {"3B": "stabilityai/stablelm-base-alpha-3b", "7B": "stabilityai/stablelm-base-alpha-7b"}
# Of each kind of training and model its recipe; the adapters' name the 7B, and take the 3B as --model_name.
KINDS = {
    ("3B", "full"): "stablelm3b_oasst",
    ("3B", "LoRA"): "stablelm7b_oasst_lora",
    ("3B", "QLoRA"): "stablelm7b_oasst_qlora",
    ("7B", "full"): "stablelm7b_oasst",
    ("7B", "LoRA"): "stablelm7b_oasst_lora",
    ("7B", "QLoRA"): "stablelm7b_oasst_qlora",
}
SEED, SEED_COUNTS, PICTURE = "stablelm7b_oasst", (1, 2, 4, 8, 16), "docs/plan_7b_h100.png"


def write_tables() -> None:
    """Write the tables into their documents, between the comments that name them, and draw the picture."""
    tables = make_tables()
    for name in ("README.md", "docs/hardware.md"):
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
        print(f"written: {name}")
    plot(_seed_plans(), find_card("h100"), ROOT / PICTURE)
    print(f"drawn: {PICTURE}")


def with_tables(text: str, tables: dict[str, str]) -> str:
    """A document with the table of each name between `<!-- table NAME -->` and `<!-- end -->`."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def make_tables() -> dict[str, str]:
    """By name: `which`, the fewest cards of each size for each kind of training; `cards`, the same for every number of
    them; `seed` and `seed_memory`, the seed's recipe on H100s."""
    plans = {kind: {gpu: _fastest(kind, find_card(GPUS[gpu])) for gpu in GPUS} for kind in KINDS}
    cards = [["StableLM", "cards", *GPUS]]
    which = [["StableLM", *(f"cards of {gpu}" for gpu in GPUS)]]
    for model in MODELS:
        own = {kind[1]: by_gpu for kind, by_gpu in plans.items() if kind[0] == model}
        which.append([model, *("; ".join(f"{how} {_fewest(own[how][gpu])}" for how in own) for gpu in GPUS)])
    for kind, by_gpu in plans.items():
        for count in COUNTS:
            cells = [_in_short(own[count], " {gib:.0f} GiB, {tokens:,}") for own in by_gpu.values()]
            cards.append([" ".join(kind), str(count), *cells])
    seed = [figures_of(plan, price=None) for plan in _seed_plans()]
    return {
        "which": markdown(which),
        "cards": markdown(cards),
        "seed": markdown(speed_rows(seed, find_card("h100"))),
        "seed_memory": markdown(memory_rows(seed)),
    }


def _fastest(kind: tuple[str, str], card: Card) -> dict[int, Plan | None]:
    """By the number of cards; None where nothing fits on so many."""
    subject = _subject(KINDS[kind], {"model_name": MODELS[kind[0]]})
    found: dict[int, Plan | None] = {}
    for count in COUNTS:
        plans = in_order([plan_run(subject, launcher, card) for launcher in launchers(subject.recipe, count)])
        found[count] = plans[0] if plans and plans[0].fits else None
    return found


def _fewest(plans: dict[int, Plan | None]) -> str:
    """The fewest cards; and where these take the host's memory, the fewest that do not."""
    fitting = [plan for plan in plans.values() if plan]
    alone = [plan for plan in fitting if not plan.launcher.layout.optimizer_on_host]
    named = [own[0] for own in (fitting, alone) if own]
    return ", ".join(dict.fromkeys(f"{plan.launcher.cards} x {_in_short(plan, '')}" for plan in named)) or "more than 8"


def _in_short(plan: Plan | None, rest: str) -> str:
    if plan is None:
        return "-"
    name = Path(plan.launcher.config).stem
    return f"`{name}`{MEASURED * plan.measured}" + rest.format(gib=plan.peak / GIB, tokens=plan.micro_batch_tokens)


def _seed_plans() -> list[Plan]:
    subject, card = _subject(SEED, {}), find_card("h100")
    plans = [plan_run(subject, each, card) for count in SEED_COUNTS for each in launchers(subject.recipe, count)]
    return in_order(plans)


def _subject(name: str, keys: dict[str, str]) -> Subject:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", keys)
    return make_subject(recipe, find_config(recipe), find_mix(recipe)[0])
