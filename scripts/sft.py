#!/usr/bin/env python3
"""Fine-tune a causal language model on a mix of conversations, as one recipe describes it.

    accelerate launch scripts/sft.py recipes/stablelm7b_oasst.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml scripts/sft.py recipes/stablelm7b_oasst.yaml
    python scripts/sft.py recipes/demo.yaml --output_dir try --learning_rate 1e-3 [--dry_run]

Any causal LM whose logits are its output layer's; one process, DDP, or DeepSpeed ZeRO-1 and 2; GPU or CPU; fp32, fp16,
bf16. It prepares the data (before any process group exists), shows the first batch, tries the largest, trains,
evaluates each data set, writes checkpoints and leaves in OUTPUT_DIR: recipe.yaml, run.json, metrics.jsonl,
training.png, checkpoint-<step>/, the final model and its card.

The same command again goes on from the newest whole checkpoint. On SIGTERM, SIGINT or SIGUSR1 it finishes the step,
saves and exits with status 75.
"""

import os
import sys

from utils.errors import UserError, one_line_errors
from utils.recipe import CommandLine, Recipe, recipe_from_command_line
from utils.stopping import EXIT_STOPPED, StopSignal

if __name__ == "__main__":
    # Before the heavy imports, so that --help and a misspelt key are answered at once.
    with one_line_errors():
        COMMAND = recipe_from_command_line(__doc__, sys.argv[1:])
    STOP = StopSignal()
    # CPU threads that wait for each other soon go to sleep: by default they spin, which made the demo 5 to 10 times
    # slower where cores were shared; sleeping at once costs a third where they are not. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import itertools
import math
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from utils.batches import (
    accumulation_steps,
    prefetched,
    step_rows,
    steps_left,
    training_rows,
    training_steps,
    validation_batches,
)
from utils.checkpoint import save_checkpoint, save_final_model
from utils.collate import collate
from utils.contamination import without_contamination
from utils.deepspeed import deepspeed_plugin
from utils.dry_run import dry_run
from utils.flops import ModelFlops, peak_flops
from utils.health import StepHealth, one_line_at_minimum_scale
from utils.launch import (
    check_processes,
    has_gpu,
    num_processes,
    process_group_options,
    process_index,
    say,
    set_up_process,
    training_dtype,
)
from utils.loss import ScoredLoss
from utils.metrics import load_metric
from utils.mix import Mix, prepare_mix
from utils.model import load_config, load_model, load_tokenizer
from utils.model_card import write_model_card
from utils.optimizer import make_optimizer
from utils.output_dir import claim_output_dir, wait_for_other_run
from utils.preflight import preflight
from utils.record_file import read_record, update_status, write_record
from utils.report import describe_rehearsal, describe_run, end_report, show_first_batch, show_replies
from utils.resume import check_data, find_checkpoint, is_finished, restore, run_state, starting_point
from utils.run_record import differences, start_record
from utils.tracking import Clock, RunLog, TrainingStats
from utils.trainer_state import allocate_moments, load_loss_scale, loss_scale, loss_scale_state


def main(command: CommandLine, stop: StopSignal) -> None:
    recipe = command.recipe
    if is_finished(recipe):
        say(f"the run in {recipe.output_dir} is finished: nothing to do; another --output_dir starts another")
        return

    # Data first: no process group exists yet, so nobody can time out waiting for the one that tokenizes.
    set_up_process()
    dtype = training_dtype(recipe)
    if process_index() == 0:
        wait_for_other_run(recipe)
    checkpoint = find_checkpoint(recipe, command.allow_changes)  # None for a run from its beginning
    if process_index() == 0:
        claim_output_dir(recipe, checkpoint)
    accuracy = load_metric("token_accuracy")
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe)
    mix = prepare_mix(recipe, tokenizer)
    if recipe.drop_contaminated:
        mix = without_contamination(mix, recipe.cache_dir)
    if checkpoint:
        check_data(checkpoint, mix, command.allow_changes)
    if process_index() == 0:
        record, path = start_record(recipe, mix, num_processes(), dtype), recipe.output_dir / "run.json"
        earlier = command.reproduced or (path if checkpoint and path.exists() else None)
        for line in differences(read_record(earlier), record) if earlier else []:
            say(f"differs from {earlier}: {line}")
        write_record(record, path)
    step, position = starting_point(checkpoint, mix, recipe)
    total_steps = recipe.max_steps or step + steps_left(mix, recipe, num_processes(), position)
    plugin = deepspeed_plugin(recipe, total_steps, dtype)
    largest = preflight(command, config, mix, dtype, plugin, total_steps, step, position)

    # The accelerator: one process, DDP, or the DeepSpeed engine, on GPUs or (over gloo) on CPUs.
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")
    accelerator = Accelerator(
        mixed_precision=half,
        gradient_accumulation_steps=accumulation_steps(recipe, num_processes()) if plugin else 1,  # the engine asks
        cpu=not has_gpu() and plugin is None,
        deepspeed_plugin=plugin,
        kwargs_handlers=process_group_options(deepspeed=plugin is not None),
    )
    check_processes(accelerator, step)
    main_process = accelerator.is_main_process
    set_seed(recipe.rng_seed)

    # Autocast wants fp32 weights; the engine wants them in the dtype it trains in, and keeps fp32 masters itself.
    weights = checkpoint.path if checkpoint else None
    language_model = load_model(recipe, config, tokenizer, dtype if plugin else torch.float32, weights)
    flops = ModelFlops(language_model)
    model = ScoredLoss(language_model).train()
    optimizer, scheduler = make_optimizer(model, recipe, total_steps, deepspeed=plugin is not None)
    if plugin:
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)

    # Before the first step, what will run and what will be learnt: a wrong mask is the commonest silent mistake.
    shard = accelerator.process_index, accelerator.num_processes, tokenizer.pad_token_id
    if main_process:
        describe_run(accelerator, model, dtype, mix, recipe, total_steps)
        show_first_batch(next(training_steps(mix, recipe, *shard, position))[1][0], tokenizer)

    clock = Clock()
    stats = TrainingStats(mix, accelerator.device, clock, flops, peak_flops(accelerator.device, dtype))
    health = StepHealth(recipe.max_bad_steps, recipe.output_dir / "bad_steps.jsonl" if main_process else None)
    results, evaluation_due, wandb_id = {}, False, None  # results: of the last evaluation
    if step < total_steps:
        seconds = rehearse(accelerator, model, optimizer, scheduler, mix, recipe, shard[-1], largest, stats)
        if main_process:
            describe_rehearsal(largest, seconds, mix, recipe, accelerator, total_steps - step)
    if checkpoint:
        restore(checkpoint, recipe, accelerator, language_model, optimizer, scheduler, stats, health)
        results, evaluation_due, wandb_id = (checkpoint.state[key] for key in ("results", "evaluation_due", "wandb_id"))
    log = RunLog(recipe, total_steps, main_process, step, wandb_id)

    def evaluate_now() -> bool:
        """Evaluate and write it down; False when a signal cut it short."""
        nonlocal results
        log.progress.set_description("evaluating")
        with clock.spend("evaluation"):
            found = evaluate_mix(accelerator, model, mix, recipe, shard, accuracy, stop)
        log.progress.set_description("training")
        if found is not None:
            results = found
            log.write({**where(), **results})
            log.show_evaluation(step, results)
        return found is not None

    def where() -> dict[str, float]:
        return {"step": step, "epoch": round(position.epoch + position.conversations / epoch_conversations, 4)}

    epoch_conversations = len(training_rows(mix, recipe, 0))
    stop.defer()  # from here on there is something to save
    stopped = evaluation_due and not evaluate_now()
    to_do = 0 if stopped else max(0, total_steps - step)
    steps = prefetched(itertools.islice(training_steps(mix, recipe, *shard, position), to_do), accelerator.device)
    for after, micro_batches in clock.waiting(steps):
        step += 1
        learning_rate = scheduler.get_last_lr()[0]
        with clock.spend("training"), one_line_at_minimum_scale():
            grad_norm, updated = train_step(accelerator, model, optimizer, scheduler, micro_batches, recipe, stats)
        if updated:
            stats.end_step()
            health.good_step(grad_norm)
        else:
            loss = stats.step_loss(accelerator)
            overflow = dtype == torch.float16 and math.isfinite(loss)  # which the loss scaler answers by itself
            stats.end_step(counts=overflow)
            if overflow:
                health.overflow(loss_scale(accelerator))
            else:
                health.bad_step(step, loss, grad_norm, mix, step_rows(mix, recipe, accelerator.num_processes, position))
        position = after
        log.progress.update()

        if step == 1 or step % recipe.logging_steps == 0 or step == total_steps:
            metrics = stats.close(accelerator)
            metrics |= {"learning_rate": learning_rate, "grad_norm": grad_norm}
            log.write({**where(), **metrics, **health.metrics(metrics.get("loss"), loss_scale(accelerator))})
        evaluate_here = len(mix.validation) and (step % recipe.eval_steps == 0 or step == total_steps)
        evaluation_due = bool(evaluate_here) and (stop.agreed(accelerator) or not evaluate_now())
        stopped = evaluation_due or stop.agreed(accelerator)
        save_here = {"epoch": position.conversations == 0, "steps": step % recipe.save_steps == 0, "no": False}
        if save_here[recipe.save_strategy] or stopped:
            state = run_state(recipe, mix, accelerator, step, position, health)
            state |= {"results": results, "evaluation_due": evaluation_due, "wandb_id": log.wandb_id}
            with clock.spend("saving"):
                save_checkpoint(accelerator, language_model, tokenizer, optimizer, recipe, state, stats)
        if stopped:
            break

    log.close()
    if main_process:
        if not stopped:
            with clock.spend("saving"):
                save_final_model(language_model, tokenizer, recipe.output_dir)
            write_model_card(recipe, tokenizer, results, total_steps, stats.tokens)
        report = end_report(recipe, step, total_steps, stats, health)
        update_status(recipe.output_dir / "run.json", "interrupted" if stopped else "finished", report=report)
    accelerator.wait_for_everyone()
    # DDP goes before its process group: the other way round it may wait for ever in gloo's destructor, which joins a
    # thread that waits for the interpreter (torch 2.13).
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()
    if stopped:
        raise SystemExit(EXIT_STOPPED)
    if recipe.sample_replies and main_process:
        show_replies(language_model, tokenizer, mix, recipe)


def train_step(
    accelerator, model, optimizer, scheduler, micro_batches, recipe: Recipe, stats: TrainingStats, rehearsal=False
) -> tuple[float, bool]:
    """One optimizer step over this process's micro-batches; a rehearsal does all of it but the update of the weights.

    The loss is the mean over all scored tokens of the step, however it is cut into micro-batches and processes; or,
    under `loss_normalization: micro_batch`, the original's mean over micro-batches of their means. Either way a
    micro-batch or a process without a scored token adds exactly nothing.

    Returns:
        The gradient norm before clipping, and whether the weights were updated: not where the norm is no finite number.
    """
    counts = torch.tensor([[len(batch.targets), len(batch.targets) > 0] for batch in micro_batches]).sum(0)
    scored_tokens, scored_batches = accelerator.reduce(counts.to(accelerator.device, non_blocking=True)).clamp(min=1)

    for number, batch in enumerate(micro_batches, 1):
        batch = batch.to(accelerator.device)
        # Gradients travel between processes once, at the last micro-batch. Accelerate's DeepSpeed wrapper reads this
        # too, and closes the accumulation window there, full or not: its `backward` also makes the optimizer's step.
        accelerator.sync_gradients = number == len(micro_batches)
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            total, losses, _ = model(batch)
            if recipe.loss_normalization == "tokens":
                loss = total / scored_tokens
            else:
                loss = total / max(1, len(losses)) / scored_batches
            # A loss that is no finite number makes NaN of every gradient, on every process: the norm tells all of it.
            finite = math.nan if rehearsal else 1 + 0 * loss.detach()
            # DDP and DeepSpeed average over processes and DeepSpeed divides by the accumulation steps: undo both.
            accelerator.backward(loss * finite * accelerator.num_processes * accelerator.gradient_accumulation_steps)
        stats.add(batch, losses, loss)

    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm or math.inf))
    if math.isfinite(grad_norm) or accelerator.scaler:  # the scaler has to see an overflow; it leaves the step out
        optimizer.step()  # nothing is left to do here, nor at zero_grad, under DeepSpeed
    updated = math.isfinite(grad_norm) and not accelerator.optimizer_step_was_skipped
    if updated:
        scheduler.step()
    optimizer.zero_grad()
    return grad_norm, updated


def rehearse(accelerator, model, optimizer, scheduler, mix: Mix, recipe: Recipe, pad_token_id, largest, stats) -> float:
    """Run the plan's largest micro-batches, so that memory runs out now and not six hours in; nothing is changed.

    Returns the seconds of a training micro-batch. Raises UserError where the GPU's memory is too small.
    """
    train, held_out = largest
    scale = loss_scale_state(accelerator)
    allocate_moments(accelerator, optimizer)
    # Twice where gradients accumulate: the second time they are in memory while it runs.
    count = min(2, accumulation_steps(recipe, accelerator.num_processes))
    batch = collate(mix.train, train.rows, recipe, pad_token_id, train.epoch)
    if not len(batch.targets):  # cut before the first reply; only a loss can make NaN of the gradients
        zero = torch.tensor([0])
        batch = replace(batch, scored=zero, targets=zero, dataset=zero)
    started = time.perf_counter()
    try:
        train_step(accelerator, model, optimizer, scheduler, [batch] * count, recipe, stats, rehearsal=True)
        seconds = (time.perf_counter() - started) / count
        if held_out:
            batch = collate(mix.validation, held_out.rows, recipe, pad_token_id, epoch=None)
            model.eval()
            with torch.no_grad():
                model(batch.to(accelerator.device))
            model.train()
    except torch.OutOfMemoryError as error:
        shapes = " or ".join(each.describe() for each in largest if each)
        raise UserError(
            f"the GPU's memory is too small for the run's largest micro-batches ({shapes}): give a smaller "
            "per_device_train_batch_size (global_batch_size keeps the step as it is) or per_device_eval_batch_size, "
            "gradient_checkpointing: true, or a smaller max_length"
        ) from error
    stats.end_step(counts=False)
    load_loss_scale(accelerator, scale)
    return seconds


@torch.no_grad()
def evaluate_mix(
    accelerator, model, mix: Mix, recipe: Recipe, shard, accuracy, stop: StopSignal
) -> dict[str, float] | None:
    """Loss and accuracy of each data set and of all, over every scored token of the validation split.

    Sums are added over the processes and divided once, so that the result depends neither on their number nor on the
    batch size. None when a signal asked to stop meanwhile.
    """
    model.eval()
    sums = torch.zeros(len(mix.names), 3, dtype=torch.float64)  # loss, right predictions, scored tokens
    for index in range(len(mix.names)):
        for batch in validation_batches(mix, recipe, index, *shard):
            _, losses, predictions = model(batch.to(accelerator.device))
            accuracy.add_batch(predictions=predictions.cpu(), references=batch.targets)
            sums[index, 0] += losses.double().sum().cpu()
            if stop.agreed(accelerator):
                return None
        counts = accuracy.compute() if len(accuracy) else {"correct": 0, "total": 0}
        sums[index, 1:] += torch.tensor([counts["correct"], counts["total"]])
    model.train()

    sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    results = {}
    for name, (loss, correct, total) in zip([*mix.names, None], [*sums, sums.sum(0)], strict=True):
        if total:
            prefix = f"eval_{name}" if name else "eval"
            results |= {f"{prefix}_loss": float(loss / total), f"{prefix}_accuracy": float(correct / total)}
    return results


if __name__ == "__main__":
    with one_line_errors():
        dry_run(COMMAND) if COMMAND.dry_run else main(COMMAND, STOP)
