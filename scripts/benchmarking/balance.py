"""`benchmark.py balance`: how evenly a recipe's steps are cut over processes, by conversations and by tokens.

From the plan alone, where tokens stand for time; or by the clock, on the processes that a launcher has started.
"""

import time

import numpy as np

from recipe.keys import Recipe

PROCESSES = (1, 2, 4, 8)
STEPS = 12  # by the clock, after one to warm up


def benchmark_balance(recipe: Recipe) -> dict[int, dict[str, dict]]:
    """Of the first epoch, for each number of processes, the figures of both cuts of the same steps.

    By tokens with the recipe's micro_batch_tokens; where it has none, with what its largest micro-batch may have.
    """
    from data.mix import prepare_mix
    from training.model import load_tokenizer
    from training.plan import epoch_plan, packs_per_step

    mix, limit = prepare_mix(recipe, load_tokenizer(recipe)), limit_of(recipe)
    tokens, figures = epoch_plan(mix, recipe, 0).tokens(mix, recipe), {}
    for processes in PROCESSES:
        per_step = packs_per_step(recipe, processes)
        steps = [tokens[first : first + per_step] for first in range(0, len(tokens), per_step)]
        figures[processes] = figures_of(steps, recipe, processes, limit)
    return figures


def limit_of(recipe: Recipe) -> int:
    """The recipe's micro_batch_tokens, or what its micro-batches by conversations may have."""
    return recipe.micro_batch_tokens or recipe.per_device_train_batch_size * recipe.max_length


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


def measure_balance(recipe: Recipe) -> list[dict[str, dict]]:
    """Of each of the recipe's first steps the figures of both cuts, on the processes that run this.

    The step itself is sft.py's, with the small model of `benchmark.py train` at a rate of 0, so that both cuts have the
    same weights. They take turns at each step, in turn first: what else the machine does falls on both.
    """
    import torch
    from accelerate.utils import gather_object
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    import sft
    from benchmarking.train import SMALL
    from data.mix import prepare_mix
    from run.stats import Clock, TrainingStats
    from training.batches import Batches
    from training.engine import prepare_engine, start_accelerator
    from training.model import load_tokenizer, ready_for_training
    from training.plan import Position
    from utils.launch import set_up_process

    set_up_process()
    recipe = recipe.model_copy(update={"dtype": "fp32", "learning_rate": 0.0})
    tokenizer = load_tokenizer(recipe)
    mix, limit = prepare_mix(recipe, tokenizer), limit_of(recipe)
    accelerator = start_accelerator(recipe, torch.float32, deepspeed=None)
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL), dtype=torch.float32)
    engine = prepare_engine(accelerator, ready_for_training(model, recipe), recipe, total_steps=1)
    stats = TrainingStats(mix, accelerator.device, Clock())
    steps = {}
    for name, most in (("by conversations", None), (f"by {limit:,} tokens", limit)):
        cut = recipe.model_copy(update={"micro_batch_tokens": most})
        place = accelerator.process_index, accelerator.num_processes
        steps[name] = Batches(mix, cut, *place, tokenizer.pad_token_id).training_steps(Position(), STEPS + 1)
    figures = []
    for number, (_, *cuts) in enumerate(zip(range(STEPS + 1), *steps.values(), strict=False)):
        made = dict.fromkeys(steps)
        for name, (_, micro_batches) in [*zip(steps, cuts, strict=True)][:: 1 - 2 * (number % 2)]:
            accelerator.wait_for_everyone()
            began, worked = time.perf_counter(), time.process_time()
            sft.train_step(engine, micro_batches, recipe, stats)
            work = gather_object([time.process_time() - worked])  # waits for the slowest
            seconds, loss = time.perf_counter() - began, stats.step_loss(accelerator)
            made[name] = {"seconds": seconds, "work": work, "micro_batches": len(micro_batches), "loss": loss}
            stats.end_step()
        figures.append(made)
    engine.close()
    return figures[1:]


def measured_table(figures: list[dict[str, dict]]) -> str:
    """As a Markdown table; the ratio is of each step, then their median."""
    processes = len(next(iter(figures[0].values()))["work"])
    lines = [
        f"| cut, on {processes} processes | seconds a step | micro-batches | CPU seconds: the slowest, all | idle |",
        "|---|---|---|---|---|",
    ]
    by_name = {name: [step[name] for step in figures] for name in figures[0]}
    for name, seen in by_name.items():
        slowest, mean = (np.mean([of(figure["work"]) for figure in seen]) for of in (max, np.mean))
        seconds, count = np.mean([figure["seconds"] for figure in seen]), np.mean([f["micro_batches"] for f in seen])
        work = f"{slowest:.2f}, {processes * mean:.2f} | {1 - mean / slowest:.1%} |"
        lines.append(f"| {name} | {seconds:.2f} | {count:.1f} | {work}")
    before, after = by_name.values()
    ratios = np.sort([b["seconds"] / a["seconds"] for a, b in zip(before, after, strict=True)])
    off = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(before, after, strict=True))
    spread = f"{np.median(ratios):.2f} of the time (median of {len(ratios)} steps, {ratios[0]:.2f} to {ratios[-1]:.2f})"
    return "\n".join([*lines, "", f"By tokens a step takes {spread}; its loss is the same to {off:.1g}."])
