#!/usr/bin/env python3
"""Fine-tune a causal language model on a mix of conversations, as one recipe describes it.

    accelerate launch scripts/sft.py recipes/stablelm7b_oasst.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml scripts/sft.py recipes/stablelm7b_oasst.yaml
    python scripts/sft.py recipes/demo.yaml --output_dir try --learning_rate 1e-3 [--dry_run]

Any causal LM whose logits are its output layer's; one process, DDP, or DeepSpeed ZeRO-1 and 2; GPU or CPU; fp32, fp16,
bf16. It prepares the data (before any process group exists), shows the first batch, trains, evaluates each data set,
writes checkpoints and leaves in OUTPUT_DIR: recipe.yaml, metrics.jsonl, training.png, checkpoint-<step>/, the final
model and its card.
Not yet: going on from a checkpoint.
"""

import os
import sys

from utils.errors import UserError, one_line_errors
from utils.recipe import Recipe, recipe_from_command_line

if __name__ == "__main__":
    # Before the heavy imports, so that --help and a misspelt key are answered at once.
    with one_line_errors():
        COMMAND = recipe_from_command_line(__doc__, sys.argv[1:])
    # CPU threads that wait for each other soon go to sleep: by default they spin, which made the demo 5 to 10 times
    # slower where cores were shared; sleeping at once costs a third where they are not. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import itertools
import math
from contextlib import nullcontext
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from utils.batches import steps_per_epoch, training_steps, validation_batches
from utils.checkpoint import claim_output_dir, save_checkpoint, save_model, write_model_card
from utils.contamination import without_contamination
from utils.deepspeed import deepspeed_plugin
from utils.dry_run import dry_run
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
from utils.mix import Mix, prepare_mix
from utils.model import load_config, load_model, load_tokenizer
from utils.optimizer import make_optimizer
from utils.report import describe_run, show_first_batch, show_replies
from utils.tracking import RunLog, TrainingStats

TOKEN_ACCURACY = str(Path(__file__).parent / "metrics" / "token_accuracy")


def main(recipe: Recipe) -> None:
    # Data first: no process group exists yet, so nobody can time out waiting for the one that tokenizes.
    set_up_process()
    dtype = training_dtype(recipe)
    if process_index() == 0:
        claim_output_dir(recipe)
    accuracy = load_metric()
    config = load_config(recipe)
    tokenizer = load_tokenizer(recipe)
    mix = prepare_mix(recipe, tokenizer)
    if recipe.drop_contaminated:
        mix = without_contamination(mix, recipe.cache_dir)
    epoch_steps = steps_per_epoch(mix, recipe, num_processes())
    total_steps = recipe.max_steps or math.ceil(recipe.num_train_epochs * epoch_steps)

    # The accelerator: one process, DDP, or the DeepSpeed engine, on GPUs or (over gloo) on CPUs.
    plugin = deepspeed_plugin(recipe, total_steps, dtype)
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")
    accelerator = Accelerator(
        mixed_precision=half,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps if plugin else 1,  # the engine has to know it
        cpu=not has_gpu() and plugin is None,
        deepspeed_plugin=plugin,
        kwargs_handlers=process_group_options(deepspeed=plugin is not None),
    )
    check_processes(accelerator)
    set_seed(recipe.rng_seed)

    # Autocast wants fp32 weights; the engine wants them in the dtype it trains in, and keeps fp32 masters itself.
    language_model = load_model(recipe, config, tokenizer, dtype if plugin else torch.float32)
    model = ScoredLoss(language_model)
    optimizer, scheduler = make_optimizer(model, recipe, total_steps, deepspeed=plugin is not None)
    if plugin:
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)

    # Before the first step, what will run and what will be learnt: a wrong mask is the commonest silent mistake.
    shard = accelerator.process_index, accelerator.num_processes, tokenizer.pad_token_id
    if accelerator.is_main_process:
        describe_run(accelerator, model, dtype, mix, recipe, epoch_steps, total_steps)
        show_first_batch(next(training_steps(mix, recipe, 0, *shard))[0], tokenizer)
    log = RunLog(recipe, total_steps, accelerator.is_main_process)
    stats = TrainingStats(mix, accelerator.device)

    save_every = {"epoch": epoch_steps, "steps": recipe.save_steps, "no": math.inf}[recipe.save_strategy]
    results: dict[str, float] = {}
    epochs = (training_steps(mix, recipe, epoch, *shard) for epoch in itertools.count())
    steps = itertools.islice(itertools.chain.from_iterable(epochs), total_steps)
    model.train()
    for step, micro_batches in enumerate(steps, 1):
        learning_rate = scheduler.get_last_lr()[0]
        grad_norm = train_step(accelerator, model, optimizer, scheduler, micro_batches, recipe, stats)
        where = {"step": step, "epoch": round(step / epoch_steps, 4)}
        log.progress.update()
        if step == 1 or step % recipe.logging_steps == 0 or step == total_steps:
            metrics = stats.close(accelerator, step)
            log.write({**where, **metrics, "learning_rate": learning_rate, "grad_norm": grad_norm})
        with stats.paused():
            if len(mix.validation) and (step % recipe.eval_steps == 0 or step == total_steps):
                log.progress.set_description("evaluating")
                results = evaluate_mix(accelerator, model, mix, recipe, shard, accuracy)
                log.progress.set_description("training")
                log.write({**where, **results})
                log.show_evaluation(step, results)
            if step % save_every == 0:
                save_checkpoint(accelerator, language_model, tokenizer, recipe, step)

    log.close()
    if accelerator.is_main_process:
        save_model(language_model, tokenizer, recipe.output_dir)
        write_model_card(recipe, tokenizer, results, total_steps, stats.tokens)
        say(f"\nthe model is in {recipe.output_dir}, with its card, metrics.jsonl and training.png")
    accelerator.wait_for_everyone()
    # DDP goes before its process group: the other way round it may wait for ever in gloo's destructor, which joins a
    # thread that waits for the interpreter (torch 2.13).
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()
    if recipe.sample_replies and accelerator.is_main_process:
        show_replies(language_model, tokenizer, mix, recipe)


def load_metric() -> evaluate.Metric:
    """The token accuracy, from this collection's own folder: loaded now, not after the first steps of a long run."""
    try:
        return evaluate.load(TOKEN_ACCURACY, keep_in_memory=True)
    except OSError as error:
        raise UserError(
            f"evaluate cannot keep its modules (set HF_HOME to a folder that can be written): {error}"
        ) from error


def train_step(accelerator, model, optimizer, scheduler, micro_batches, recipe: Recipe, stats) -> float:
    """One optimizer step over this process's micro-batches; returns the gradient norm before clipping.

    The loss is the mean over all scored tokens of the step, however it is cut into micro-batches and processes; or,
    under `loss_normalization: micro_batch`, the original's mean over micro-batches of their means. Either way a
    micro-batch or a process without a scored token adds exactly nothing.
    """
    counts = [
        sum(len(batch["dataset"]) for batch in micro_batches),
        sum(len(batch["dataset"]) > 0 for batch in micro_batches),
    ]
    scored_tokens, scored_batches = accelerator.reduce(torch.tensor(counts, device=accelerator.device)).clamp(min=1)

    for number, batch in enumerate(micro_batches, 1):
        batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        # Gradients travel between processes once, at the last micro-batch. Accelerate's DeepSpeed wrapper reads this
        # too, and closes the accumulation window there, full or not: its `backward` also makes the optimizer's step.
        accelerator.sync_gradients = number == len(micro_batches)
        with nullcontext() if accelerator.sync_gradients else accelerator.no_sync(model):
            losses, _ = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
            if recipe.loss_normalization == "tokens":
                loss = losses.sum() / scored_tokens
            else:
                loss = losses.sum() / max(1, len(losses)) / scored_batches
            # DDP and DeepSpeed average over processes and DeepSpeed divides by the accumulation steps: undo both.
            accelerator.backward(loss * accelerator.num_processes * accelerator.gradient_accumulation_steps)
        stats.add(batch, losses, loss)

    grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm or math.inf)
    optimizer.step()  # nothing is left to do here, nor at zero_grad, under DeepSpeed
    if accelerator.optimizer_step_was_skipped:  # fp16 found an overflow and lowers its scale instead
        stats.skipped_steps += 1
    else:
        scheduler.step()
    optimizer.zero_grad()
    return float(grad_norm)


@torch.no_grad()
def evaluate_mix(accelerator, model, mix: Mix, recipe: Recipe, shard, accuracy) -> dict[str, float]:
    """Loss and accuracy of each data set and of all, over every scored token of the validation split.

    Sums are added over the processes and divided once, so that the result depends neither on their number nor on the
    batch size.
    """
    model.eval()
    sums = torch.zeros(len(mix.names), 3, dtype=torch.float64)  # loss, right predictions, scored tokens
    for index in range(len(mix.names)):
        for batch in validation_batches(mix, recipe, index, *shard):
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            losses, predictions = model(batch["input_ids"], batch["attention_mask"], batch["labels"])
            targets = batch["labels"][:, 1:]
            accuracy.add_batch(predictions=predictions.cpu(), references=targets[targets != -100].cpu())
            sums[index, 0] += losses.double().sum().cpu()
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
        dry_run(COMMAND.recipe) if COMMAND.dry_run else main(COMMAND.recipe)
