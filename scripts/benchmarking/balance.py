"""`benchmark.py balance`: how evenly a recipe's steps are cut over processes, by conversations and by tokens.

From the plan alone: no model, no clock. Tokens stand for time.
"""

import numpy as np

from recipe.keys import Recipe

PROCESSES = (1, 2, 4, 8)


def benchmark_balance(recipe: Recipe) -> dict[int, dict[str, dict]]:
    """Of the first epoch, for each number of processes, the figures of both cuts of the same steps.

    By tokens with the recipe's micro_batch_tokens; where it has none, with what its largest micro-batch may have.
    """
    from data.mix import prepare_mix
    from training.model import load_tokenizer
    from training.plan import epoch_plan, packs_per_step

    mix = prepare_mix(recipe, load_tokenizer(recipe))
    limit = recipe.micro_batch_tokens or recipe.per_device_train_batch_size * recipe.max_length
    tokens, figures = epoch_plan(mix, recipe, 0).tokens(mix, recipe), {}
    for processes in PROCESSES:
        per_step = packs_per_step(recipe, processes)
        steps = [tokens[first : first + per_step] for first in range(0, len(tokens), per_step)]
        figures[processes] = figures_of(steps, recipe, processes, limit)
    return figures


def figures_of(steps: list[np.ndarray], recipe: Recipe, processes: int, limit: int) -> dict[str, dict]:
    """Of steps, the tokens of their packs (int64), cut by conversations and by at most `limit` tokens."""
    from training.micro_batches import micro_batch_numbers, shapes

    figures = {}
    for name, most in (("by conversations", None), (f"by {limit:,} tokens", limit)):
        cut, sizes = recipe.model_copy(update={"micro_batch_tokens": most}), []  # tokens of a step: [rounds, processes]
        for step in steps:
            numbers = micro_batch_numbers(step, recipe.per_device_train_batch_size, cut, processes)
            made = shapes(step, numbers, recipe.padding_free).prod(0)
            sizes.append(np.append(made, np.zeros(-len(made) % processes, dtype=np.int64)).reshape(-1, processes))
        work = sum(size.sum() for size in sizes) / processes
        figures[name] = {
            "micro_batches": float(np.mean([len(size) for size in sizes])),
            "tokens": float(np.concatenate(sizes).mean()),
            "largest": int(max(size.max() for size in sizes)),
            # Of the processes' time: the slowest decides in each step (DDP), or in each micro-batch (ZeRO-2).
            "idle": float(1 - work / sum(size.sum(0).max() for size in sizes)),
            "idle_by_micro_batch": float(1 - work / sum(size.max(1).sum() for size in sizes)),
        }
    # Even if all else could be divided at will: a conversation cannot.
    least = sum(max(step.max(), step.sum() / processes) for step in steps)
    figures["at the least"] = {"idle": float(1 - sum(step.sum() for step in steps) / processes / least)}
    return figures


def balance_table(figures: dict[int, dict[str, dict]]) -> str:
    """As a Markdown table."""
    lines = [
        "| processes | cut | micro-batches a step | tokens in one: mean, largest | idle, DDP | idle, ZeRO-2 |",
        "|---|---|---|---|---|---|",
    ]
    for processes, cuts in figures.items():
        for name, figure in cuts.items():
            count, of_one, by_micro_batch = "", "", ""
            if "tokens" in figure:
                count, of_one = f"{figure['micro_batches']:.1f}", f"{figure['tokens']:,.0f}, {figure['largest']:,}"
                by_micro_batch = f"{figure['idle_by_micro_batch']:.1%}"
            idle = f"{figure['idle']:.1%} | {by_micro_batch} |"
            lines.append(f"| {processes} | {name} | {count} | {of_one} | {idle}")
    return "\n".join(lines)
