#!/usr/bin/env python3
"""Fine-tune a causal language model on a mix of conversations, as one recipe describes it.

    accelerate launch scripts/sft.py recipes/stablelm7b_oasst.yaml
    accelerate launch --config_file accelerate_configs/fsdp2.yaml scripts/sft.py recipes/stablelm7b_oasst.yaml
    python scripts/sft.py recipes/demo.yaml --output_dir try --learning_rate 1e-3 [--dry_run]

Any causal LM whose logits are its output layer's; one process, DDP, DeepSpeed ZeRO-1 to 3, FSDP2, hybrid shards; GPU or
CPU; fp32, fp16, bf16; all weights, or adapters. It prepares the data (before any process group exists), shows the first
batch, tries the largest, trains, evaluates each data set, writes checkpoints and leaves in OUTPUT_DIR: recipe.yaml,
run.json, metrics.jsonl, training.png, samples.jsonl, checkpoint-<step>/, the final model and its card.

The same command again goes on from the newest whole checkpoint. On SIGTERM, SIGINT, SIGUSR1 or SIGHUP it finishes the
step, saves and exits with status 75; where no step and no evaluation is left, it ends as if nobody had asked.
"""

from run.command_line import read_command_line
from run.stopping import EXIT_STOPPED, StopSignal
from utils.errors import UserError, one_line_errors

if __name__ == "__main__":
    # Before the heavy imports, so that --help and a misspelt key are answered at once.
    with one_line_errors():
        OPTIONS, RECIPE = read_command_line(__doc__)
    STOP = StopSignal()

import math
import time

import torch

from data.mix import prepare_mix
from publishing.model_card import write_model_card
from recipe.keys import Recipe
from run.dry_run import dry_run
from run.opening import awaited_end, open_run, recorded_end
from run.preflight import preflight
from run.report import describe_rehearsal, describe_run, out_of_memory, show_first_batch, show_replies
from run.run import Run
from training.batches import Batches, prefetched
from training.contamination import without_contamination
from training.deepspeed_config import deepspeed_config
from training.engine import Engine, prepare_engine, start_accelerator
from training.model import load_config, load_tokenizer
from utils.launch import set_up_process, training_dtype


def main(options, recipe: Recipe, stop: StopSignal) -> None:
    # ---- The run: its folder, and the checkpoint that it goes on from ----
    set_up_process()
    dtype = training_dtype(recipe.dtype)
    run = open_run(recipe, options.allow_changes)
    if run is None:  # finished already
        return

    # ---- Data. No process group exists yet, so nobody can time out waiting for the one that tokenizes ----
    config, tokenizer = load_config(recipe), load_tokenizer(recipe)
    mix = without_contamination(prepare_mix(recipe, tokenizer), recipe)

    # ---- Plan and checks, before anything large is loaded ----
    progress = run.plan(config, tokenizer, mix, dtype, options.allow_changes, options.reproduce)
    deepspeed = deepspeed_config(recipe, progress.total_steps, dtype)
    largest_batches = preflight(recipe, config, tokenizer, mix, dtype, deepspeed, progress)

    # ---- Model. Autocast and FSDP2 want fp32 weights, DeepSpeed its own dtype: it makes fp32 masters itself ----
    run.watch.start("meeting the other processes")
    accelerator = start_accelerator(recipe, dtype, deepspeed, progress.step)
    run.meet(accelerator)
    language_model = run.load_model(config, tokenizer, dtype if deepspeed else torch.float32)
    engine = prepare_engine(accelerator, language_model, recipe, progress.total_steps)
    batches = Batches(mix, recipe, accelerator.process_index, accelerator.num_processes, tokenizer.pad_token_id)
    run.attach(engine, batches, dtype)

    # ---- What will run, and what will be learnt: a wrong mask is the commonest silent mistake ----
    if accelerator.is_main_process:
        describe_run(engine, dtype, mix, recipe, progress.total_steps)
        show_first_batch(next(batches.training_steps(progress.position))[1][0], tokenizer)
    if progress.steps_left:
        seconds = rehearse(engine, batches, largest_batches, run.stats)
        run.samples.rehearse(engine)
        if accelerator.is_main_process:
            describe_rehearsal(largest_batches, seconds, batches, accelerator.device, progress.steps_left)

    # ---- The loop ----
    run.start()
    stop.defer()  # from here on there is something to save
    if progress.evaluation_due:  # a signal had cut it short
        evaluate_mix(engine, batches, run, stop)
    stopped = progress.evaluation_due  # by another signal
    steps = batches.training_steps(progress.position, 0 if stopped else progress.steps_left)
    for position, micro_batches in run.clock.waiting(prefetched(steps, accelerator.device)):
        learning_rate = engine.scheduler.get_last_lr()[0]
        with run.training():
            grad_norm, updated = train_step(engine, micro_batches, recipe, run.stats)
        run.end_step(position, learning_rate, grad_norm, updated)

        due = progress.due(recipe)
        if due.log:
            run.write_metrics()
        if due.evaluate:
            evaluate_mix(engine, batches, run, stop)
        # With every step and evaluation made, the final model is less to write than the checkpoint of a stop would be.
        stopped = stop.agreed(accelerator, run.save_failed) and not progress.is_complete
        if due.save or stopped:
            run.save(stopped)
        if stopped or progress.is_complete:  # with early_stopping_patience before the last step
            break

    # ---- The end ----
    run.end(stopped, stop.name)
    if accelerator.is_main_process and not stopped:
        write_model_card(recipe.output_dir, recipe.trust_remote_code)
    run.end_trackers()
    engine.close()
    if stopped:
        raise SystemExit(EXIT_STOPPED)
    if recipe.sample_replies and accelerator.is_main_process and not stop.name:
        show_replies(run.final_model(), tokenizer, mix, recipe)


def train_step(engine: Engine, micro_batches, recipe: Recipe, stats, rehearsal=False) -> tuple[float, bool]:
    """One optimizer step over this process's micro-batches; a rehearsal does all of it but the update of the weights.

    The loss is the mean over all scored tokens of the step, however it is cut into micro-batches and processes; or,
    under `loss_normalization: micro_batch`, the original's mean over micro-batches of their means. Where tokens have
    weights, each loss is multiplied by its own, and the mean divided by the mean of the weights, made in the same way.
    A micro-batch or a process without a scored token adds exactly nothing.

    Args:
        micro_batches: this process's, a list of `Batch` on the CPU.
        stats: the run's `TrainingStats`, to which the losses, tokens and times are added.

    Returns:
        The gradient norm before clipping, and whether the weights were updated: not where the norm is no finite number.
    """
    accelerator, model, optimizer = engine.accelerator, engine.model, engine.optimizer
    by_tokens = recipe.loss_normalization == "tokens"
    # What a micro-batch's sum of losses is divided by, before the step's is divided by the weight of all its tokens.
    divisors = [1 if by_tokens else max(1, len(batch.targets)) for batch in micro_batches]
    step_weight = sum(batch.total_weight / divisor for batch, divisor in zip(micro_batches, divisors, strict=True))
    step_weight = torch.tensor(step_weight, dtype=torch.double).to(accelerator.device, non_blocking=True)
    step_weight = accelerator.reduce(step_weight).float()
    step_weight += step_weight == 0  # of a step that teaches nothing

    for number, (batch, divisor) in enumerate(zip(micro_batches, divisors, strict=True), 1):
        batch = batch.to(accelerator.device)
        with engine.micro_batch(last=number == len(micro_batches)):
            with stats.pace.spend("forward"):
                total, losses, _ = model(batch)
            loss = total / divisor / step_weight
            # A loss that is no finite number makes NaN of every gradient, on every process: the norm tells all of it.
            finite = math.nan if rehearsal else 1 + 0 * loss.detach()
            # DDP and DeepSpeed average over processes and DeepSpeed divides by the accumulation steps: undo both.
            scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
            with stats.pace.spend("backward"):
                accelerator.backward(loss * finite * scale)
        stats.add(batch, losses, loss)

    norm = engine.clip_next_step(recipe.max_grad_norm)
    optimizer.step()  # left out where the norm is no finite number; nothing is left to do under DeepSpeed
    optimizer.zero_grad()
    grad_norm = float(norm)  # the one time that a step waits for the device, when all of it is on its way
    updated = math.isfinite(grad_norm) and not accelerator.optimizer_step_was_skipped
    if updated:
        engine.scheduler.step()
    return grad_norm, updated


def rehearse(engine: Engine, batches: Batches, largest_batches, stats) -> float:
    """Run the plan's largest micro-batches, so that memory runs out now and not six hours in; nothing is changed.

    Args:
        largest_batches: the `MicroBatch` of training and the one of evaluation that `preflight` has found, or None.
        stats: as in `train_step`; nothing of the rehearsal counts in them.

    Returns: the seconds of a training micro-batch.
    Raises: UserError where the GPU's memory is too small.
    """
    train, held_out = largest_batches
    # Twice where gradients accumulate: the second time they are in memory while it runs.
    count = min(2, batches.accumulated)
    batch = batches.of(train)
    try:
        with engine.rehearsal():
            started = time.perf_counter()
            train_step(engine, [batch] * count, batches.recipe, stats, rehearsal=True)
            seconds = (time.perf_counter() - started) / count
        if held_out:
            engine.model.eval()
            with torch.no_grad():
                engine.model(batches.of(held_out).to(engine.accelerator.device))
            engine.model.train()
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(largest_batches, batches.recipe)) from error
    stats.end_step(counts=False)
    return seconds


@torch.no_grad()
def evaluate_mix(engine: Engine, batches: Batches, run: Run, stop: StopSignal) -> None:
    """Write down loss and token accuracy of each data set and of all, over every scored token of the validation split.

    The loss is the cross-entropy alone, and no token has a weight: runs that are trained in other ways are compared.
    Sums are added over the processes and divided once, so that the result depends neither on their number nor on the
    batch size. Cut short by a signal, it is still due at the next start.
    """
    accelerator, model, names = engine.accelerator, engine.model, batches.mix.names
    model.eval()
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=accelerator.device)  # loss, right, scored tokens
    with run.evaluating():
        for index in range(len(names)):
            for batch in run.watch.each(batches.validation(index), "evaluating"):
                if stop.agreed(accelerator):
                    return
                batch = batch.to(accelerator.device)
                _, losses, predictions = model(batch)
                right = predictions == batch.targets
                sums[index] += torch.stack([losses.double().sum(), right.sum(), losses.new_tensor(len(losses))])
    model.train()

    sums = accelerator.reduce(sums).cpu()
    results = {}
    for name, (loss, right, scored) in zip([*names, None], [*sums, sums.sum(0)], strict=True):
        if scored:
            prefix = f"eval_{name}" if name else "eval"
            results |= {f"{prefix}_loss": float(loss / scored), f"{prefix}_accuracy": float(right / scored)}
    run.write_evaluation(results)


if __name__ == "__main__":
    with awaited_end(), one_line_errors(), recorded_end():
        dry_run(RECIPE, OPTIONS.allow_changes) if OPTIONS.dry_run else main(OPTIONS, RECIPE, STOP)
