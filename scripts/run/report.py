"""What a run says on the screen before its first step and after its last: the plan, the first batch, a few replies."""

import shlex

import numpy as np
import torch
from transformers import PreTrainedModel

from data.dialogue import ASSISTANT, render_scored
from data.mix import Mix
from recipe.keys import Recipe
from run.best import best_and_last
from run.health import StepHealth
from run.lines import best_point
from run.progress import Progress
from run.retention import list_checkpoints
from run.samples import greedy_replies, room_for_reply
from run.stats import TrainingStats
from training.batches import Batches
from training.collate import Batch, kept_targets
from training.engine import Engine
from training.fragments import full_shape
from training.fsdp_config import sharding_of
from training.loss_shares import loss_shares
from training.micro_batches import MicroBatch
from training.optimizer import shortest_warmup
from training.plan import (
    accumulation_steps,
    describe_cut,
    describe_packing,
    describe_step,
    epoch_plan,
    packs_per_step,
    steps_per_epoch,
    training_rows,
)
from training.state_layout import layout_of_this_run
from utils.tables import counted

SHOWN_CHARACTERS = 1200  # of each conversation of the first batch


def describe_run(engine: Engine, dtype: torch.dtype, mix: Mix, recipe: Recipe, total_steps: int) -> None:
    """Print what is about to run: the mix, the batch in all its factors, the steps and the learning rate's curve."""
    accelerator = engine.accelerator
    plugin = accelerator.state.deepspeed_plugin
    layout = layout_of_this_run(plugin and plugin.deepspeed_config["zero_optimization"], sharding_of(accelerator))
    rows = training_rows(mix, recipe, 0)
    kept = kept_targets(mix.train, recipe, epoch=0)
    of_loss = loss_shares(mix, recipe, kept, accelerator.num_processes)
    print(f"\n{'data set':<32}{'train':>10}{'validation':>12}{'tokens':>14}{'scored':>9}{'of the loss':>13}")
    for index, name in enumerate(mix.names):
        own = rows[mix.train.dataset[rows] == index]
        tokens, scored = np.minimum(mix.train.lengths[own], recipe.max_length).sum(), kept[own].sum()
        held_out = (mix.validation.dataset == index).sum()
        shares = f"{scored / max(1, tokens):>9.0%}{of_loss[index]:>13.1%}"
        print(f"{name:<32}{len(own):>10,}{held_out:>12,}{tokens:>14,}{shares}")
    over = (mix.train.lengths[rows] > recipe.max_length).sum()
    if over:
        print(f"cut in each epoch: {counted(over, f'conversation longer than max_length {recipe.max_length:,}')}")

    parameters = sum(full_shape(parameter).numel() for parameter in engine.model.parameters())
    processes, note = accelerator.num_processes, ""
    moments = "Adam's moments in bf16, " if recipe.optimizer_state_dtype == "bf16" else ""
    accumulated, given = accumulation_steps(recipe, processes), "gradient_accumulation_steps" in recipe.model_fields_set
    if recipe.global_batch_size is not None and given and accumulated != recipe.gradient_accumulation_steps:
        note = f" (by global_batch_size; gradient_accumulation_steps = {recipe.gradient_accumulation_steps} yields)"
    if recipe.packing:
        print(describe_packing(mix, recipe, processes))
    print(
        f"{parameters:,} parameters, {str(dtype).removeprefix('torch.')}, {moments}"
        f"{layout}, {accelerator.device.type}\n"
        f"{describe_cut(recipe, processes)} = {describe_step(recipe, processes)}{note}\n"
        f"{counted(steps_per_epoch(mix, recipe, processes), 'step')} an epoch, {total_steps:,} in all; the rate rises "
        f"to {recipe.learning_rate:g} in {counted(shortest_warmup(recipe.warmup_steps), 'step')}, then falls to 0",
        flush=True,
    )


def describe_rehearsal(
    largest: tuple[MicroBatch, MicroBatch | None], seconds: float, batches: Batches, device: torch.device, steps: int
) -> None:
    """Print what `preflight`'s micro-batches took, `seconds` for training, and about how long the `steps` left take."""
    mix, recipe = batches.mix, batches.recipe
    train, held_out = largest
    shapes = [f"training {train.describe()}"] + ([f"evaluation {held_out.describe()}"] if held_out else [])
    memory = ""
    if device.type == "cuda":
        memory = f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on this GPU"
    plan = epoch_plan(mix, recipe, 0)
    tokens = np.minimum(mix.train.lengths[plan.rows], recipe.max_length).sum() / len(plan)
    tokens *= packs_per_step(recipe, batches.num_processes) / batches.num_processes * steps
    hours = seconds * tokens / train.tokens / 3600
    took = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    some = f"; an estimate, of the first {train.of_epochs:,} epochs" if train.of_epochs else ""
    print(f"the largest micro-batches run ({', '.join(shapes)}{some}){memory}; training will take very roughly {took}")


def out_of_memory(largest: tuple[MicroBatch, MicroBatch | None], recipe: Recipe) -> str:
    """What to do where the memory is too small for `preflight`'s micro-batches."""
    shapes = " or ".join(each.describe() for each in largest if each)
    smaller = "per_device_train_batch_size (global_batch_size keeps the step as it is) or per_device_eval_batch_size"
    if recipe.micro_batch_tokens is not None:
        smaller = "micro_batch_tokens (max_length at the least; the step stays as it is)"
    return (
        f"the GPU's memory is too small for the run's largest micro-batches ({shapes}): give a smaller {smaller}, "
        "gradient_checkpointing: true, or a smaller max_length"
    )


def show_first_batch(batch: Batch, tokenizer) -> None:
    """Print the conversations of a batch as the model sees them, the scored part marked."""
    print("\nthe first batch, what is learnt between [[ and ]]:")
    for ids, scored in batch.conversations():
        text = render_scored(tokenizer, ids, scored)
        cut = f" ... ({len(text):,} characters)" if len(text) > SHOWN_CHARACTERS else ""
        print(f"--- {len(ids):,} tokens, {int(scored.sum()):,} scored\n{text[:SHOWN_CHARACTERS]}{cut}", flush=True)


def end_report(recipe: Recipe, progress: Progress, stats: TrainingStats, health: StepHealth) -> dict:
    """Print what a run has come to, over all its starts, and return it for run.json."""
    step, total_steps = progress.step, progress.total_steps
    best = best_point(recipe.output_dir / "metrics.jsonl", "eval_loss")
    report = {
        "steps": step,
        "tokens": stats.tokens,
        "seconds": {what: round(seconds, 1) for what, seconds in stats.clock.seconds.items()},
        "skipped_steps": health.skipped,
        "bad_steps": health.bad,
        "best_eval_loss": best and {"step": best[0], "loss": best[1]},
        "ended_early": progress.ends_early,
    }
    total = sum(stats.clock.seconds.values())
    shares = ", ".join(f"{what} {seconds / max(1e-9, total):.0%}" for what, seconds in stats.clock.seconds.items())
    print(f"\n{step:,} of {total_steps:,} steps, {stats.tokens:,} tokens, {total:,.0f} s ({shares})")
    if health.skipped:
        print(f"{health.skipped:,} steps left out, {health.bad:,} of them for a loss or gradient that was no number")
    if best:
        print(f"best validation loss {best[1]:.4f}, after step {best[0]:,}")
    if progress.ends_early:
        reached, since = progress.best, counted(progress.best.evaluations_since, "evaluation")
        if reached.value is None:
            which = f"without a finite {reached.metric}"
        else:
            which = f"since the best {reached.metric}, {reached.value:.4f} after step {reached.step:,}"
        print(f"ended early: {since} {which} (early_stopping_patience)")
    kept = ", ".join(path.name for path in list_checkpoints(recipe.output_dir)) or "none"
    what = "the model, its card, " if progress.is_complete else "start the same command again to go on; "
    linked = [f"{name} is {path.name}" for name, path in best_and_last(recipe, progress.best).items() if path]
    print(f"in {recipe.output_dir}: {what}metrics.jsonl, training.png, run.json; checkpoints: {kept}", flush=True)
    if linked:
        print(f"    {', '.join(linked)}", flush=True)
    if progress.is_complete:
        print(f"to talk to it: python scripts/chat.py {shlex.quote(str(recipe.output_dir))}", flush=True)
    return report


def show_replies(model: PreTrainedModel, tokenizer, mix: Mix, recipe: Recipe) -> None:
    """Print greedy replies to held-out prompts of each data set, and the share that ended by itself."""
    room = room_for_reply(recipe)
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    names, prompts = [], []
    for index, name in enumerate(mix.names):
        for row in (mix.validation.dataset == index).nonzero()[0][: recipe.sample_replies]:
            ids = mix.validation.tokens(row)[0]
            prompt = ids[: (ids == assistant).nonzero()[0][-1] + 1]
            names.append(name)
            prompts.append(prompt[room - recipe.max_length :].tolist())  # a longer one loses its start
    replies = greedy_replies(model, tokenizer, prompts, room, recipe.per_device_eval_batch_size)
    print("\nreplies to held-out prompts:")
    for name, prompt, reply in zip(names, prompts, replies, strict=True):
        end = tokenizer.eos_token if reply.ended else ""
        print(f"--- {name}\n{tokenizer.decode(prompt)}[[{reply.text}{end}]]", flush=True)
    ended = sum(reply.ended for reply in replies)
    print(f"\n{ended} of {len(replies)} replies ended by themselves ({ended / max(1, len(replies)):.0%})", flush=True)
