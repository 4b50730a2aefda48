"""Before weights are loaded: whether memory and disk will do, and what looks wrong though it works."""

import math
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from data.dialogue import CHAT_TOKENS
from data.mix import Mix
from recipe.keys import Recipe
from run.model_files import check_savable
from run.progress import Progress
from run.retention import check_disk, checkpoint_bytes, steps_between_checkpoints
from training.adapters import adapter_size, check_rows
from training.collate import kept_targets
from training.deepspeed_config import deepspeed_config
from training.fsdp_config import find_sharding, sharded_layers
from training.memory import check_memory, describe_background_copies
from training.micro_batches import MicroBatch, largest_micro_batches
from training.model import check_tiny, count_parameters, tokens_to_learn, without_weights
from training.plan import steps_per_epoch, training_rows
from training.state_layout import StateLayout, layout_of_this_run
from utils.errors import UserError
from utils.launch import num_processes, say
from utils.tables import counted

# Rates of full fine-tuning over which a pretrained model of that many parameters usually loses what it knows: several
# times those of huggingface/alignment-handbook (1e-3 for SmolLM2 135M and 360M, 3e-4 for 1.7B, 2e-5 for SmolLM3 3B and
# Zephyr 7B) and InstructGPT (about 1e-5 for 1.3B and 6B). LoRA's is ten times as high: "LoRA Without Regret" (Schulman
# et al. 2025) finds that ratio for models of all sizes.
HIGHEST_RATES = ((1e9, 3e-3), (3e9, 1e-3), (math.inf, 1e-4))  # under so many parameters, the rate
LOWEST_RATE = 2e-7  # a tenth of the lowest published one known to us, Tulu 3's 2e-6 for 70B
# Four months at a step a second, and 2,500 times the seed's epochs: more likely a slip than meant.
ABSURD_STEPS, ABSURD_EPOCHS = 10_000_000, 10_000
CUT_SHARE = 0.2  # of the training conversations
LEAST_KEPT = 0.5  # of the scored tokens of a data set, when its conversations are cut


def find_engine(recipe: Recipe, dtype: torch.dtype) -> StateLayout:
    """Of the engine that the launcher and the recipe ask for, seen to agree with the recipe before any data are read.

    Raises: UserError, as `deepspeed_config` and `find_sharding`.
    """
    deepspeed, sharding = deepspeed_config(recipe, recipe.max_steps, dtype), find_sharding(recipe, dtype)
    return layout_of_this_run(deepspeed and deepspeed["zero_optimization"], sharding)


def preflight(
    recipe: Recipe,
    config: PretrainedConfig,
    tokenizer,
    mix: Mix,
    dtype: torch.dtype,
    deepspeed: dict[str, Any] | None,
    progress: Progress,
) -> tuple[MicroBatch, MicroBatch | None] | None:
    """Check memory, disk and what will be saved, and say what looks wrong, before weights are loaded.

    Args:
        deepspeed: the engine's complete config; None without it.
        progress: where the run begins.

    Returns:
        The largest micro-batches that are to come, of training and of evaluation; None when no step is left.

    Raises:
        UserError: the run cannot work.
    """
    processes, total_steps = num_processes(), progress.total_steps
    parameters, epoch_steps = count_parameters(recipe, config), steps_per_epoch(mix, recipe, processes)
    if not progress.steps_left:
        return None
    frozen = count_parameters(recipe, config, within=check_tiny(recipe, config) or [])
    check_new_tokens(recipe, config, tokenizer)
    check_savable(recipe, config, tokenizer)
    lost = check_targets(recipe, mix)
    largest = largest_micro_batches(mix, recipe, processes, progress.steps_left, progress.position)
    zero = deepspeed and deepspeed["zero_optimization"]
    adapter = adapter_size(recipe, without_weights(recipe, config), dtype) if recipe.use_peft else None
    if sharding := find_sharding(recipe, dtype):
        sharded_layers(without_weights(recipe, config), sharding)  # are there
    layout = layout_of_this_run(zero, sharding)
    taken = check_memory(recipe, config, parameters, layout, dtype, largest[0].shape, adapter, frozen)
    saved = parameters if adapter is None else adapter.weights
    checkpoint = checkpoint_bytes(recipe, saved, dtype, layout.keeps_half_weights)
    describe_background_copies(recipe, layout, *checkpoint, taken)
    merged = parameters * dtype.itemsize if recipe.merge_adapter else 0
    check_disk(recipe, *checkpoint, epoch_steps, total_steps, progress.step, merged)
    found = recipe_warnings(recipe, config, mix, parameters, epoch_steps, total_steps)
    for warning in [*lost, *vocabulary_warnings(recipe, config, tokenizer), *found]:
        say(f"warning: {warning}")
    return largest


def check_new_tokens(recipe: Recipe, config: PretrainedConfig, tokenizer) -> None:
    """Refuse adapters that cannot learn the rows of the chat tokens, in the words of `load_model`, without weights."""
    if recipe.use_peft:
        check_rows(recipe, without_weights(recipe, config), tokens_to_learn(recipe, tokenizer))


def check_targets(recipe: Recipe, mix: Mix) -> list[str]:
    """What cutting to max_length leaves of the targets, where that is little: a line for each data set and split.

    Raises: UserError when nothing is left to learn.
    """
    rows, found = training_rows(mix, recipe, 0), []
    splits = {"training": (mix.train.select(rows), kept_targets(mix.train, recipe, 0)[rows])}
    splits["validation"] = mix.validation, kept_targets(mix.validation, recipe, None)
    remedy = "give a larger max_length" + (
        "" if recipe.random_offset_probability else ", or a random_offset_probability"
    )
    for what, (split, kept) in splits.items():
        if what == "training" and not kept.any():
            raise UserError(
                f"max_length = {recipe.max_length}: cut to it, no conversation has a token to learn left: {remedy}"
            )
        for index, name in enumerate(mix.names):
            own = split.dataset == index
            if own.any() and kept[own].sum() < LEAST_KEPT * split.targets[own].sum():
                left = (
                    f"{kept[own].sum():,} of the {split.targets[own].sum():,} scored tokens of its {what} conversations"
                )
                found.append(f"max_length = {recipe.max_length}: cut to it, {name} keeps {left}: {remedy}")
    return found


def vocabulary_warnings(recipe: Recipe, config: PretrainedConfig, tokenizer) -> list[str]:
    """A line where the tokenizer's own ids, without those that the chat format adds, go beyond the embedding."""
    rows = config.get_text_config().vocab_size
    beyond = [token for token, own in tokenizer.get_vocab().items() if own >= rows and token not in CHAT_TOKENS]
    if recipe.from_scratch or not beyond:
        return []
    return [
        f"model_name = {recipe.model_name}: {len(beyond):,} tokens of its tokenizer ({min(beyond)!r} is one) are "
        f"beyond the {rows:,} rows of its embedding and begin as the mean of all others: is it the model's own?"
    ]


def schedule_warnings(recipe: Recipe, total_steps: int, epoch_steps: int | None, held_out: bool) -> list[str]:
    """What looks wrong in what comes at which step, each as a line with the remedy.

    Args:
        epoch_steps: None where they are not known yet.
        held_out: whether there is something to evaluate on.
    """
    found, every = [], steps_between_checkpoints(recipe, epoch_steps or math.nan)
    if recipe.warmup_steps >= total_steps:
        found.append(f"warmup_steps = {recipe.warmup_steps}: as long as the run ({total_steps:,} steps): give fewer")
    if total_steps <= 2:
        found.append(
            f"the run has {counted(total_steps, 'step')}, and the first two run at rate 0: no weight will change"
        )
    if total_steps > ABSURD_STEPS or (epoch_steps and total_steps > ABSURD_EPOCHS * epoch_steps):
        epochs = f", {total_steps / epoch_steps:,.0f} epochs" if epoch_steps else ""
        found.append(
            f"the run has {total_steps:,} steps{epochs}: at a step a second {total_steps / 86_400:,.0f} days, in which "
            "the learning rate hardly falls: is that what num_train_epochs or max_steps is to say?"
        )
    if recipe.keep_best:  # which saves after the first evaluation
        every = min(every, recipe.eval_steps)
    if recipe.save_strategy == "no" and not recipe.keep_best:
        found.append("save_strategy = no: nothing to go on from after a crash: give steps or epoch")
    elif every > total_steps:
        found.append(
            f"the first checkpoint would come at step {every:,}, the run ends at {total_steps:,}: "
            "give save_strategy: steps and a smaller save_steps"
        )
    if recipe.save_only_model and (recipe.save_strategy != "no" or recipe.keep_best):
        found.append("save_only_model = true: nothing to go on from after a crash: give keep_trainer_state: 1 instead")
    if held_out and recipe.eval_steps > total_steps:
        found.append(
            f"eval_steps = {recipe.eval_steps}: the run has {total_steps:,} steps and is evaluated only at its end: "
            "give fewer"
        )
    elif held_out and not recipe.keep_best and every <= total_steps and not _meet(int(every), recipe, total_steps):
        saves = "save_strategy = epoch" if recipe.save_strategy == "epoch" else f"save_steps = {every:,}"
        found.append(
            f"{saves}, eval_steps = {recipe.eval_steps:,}: no checkpoint will be of a step that is evaluated, so that "
            "OUTPUT_DIR/best will be missing: make one a multiple of the other, or give keep_best: true"
        )
    patience, before_the_end = recipe.early_stopping_patience, (total_steps - 1) // recipe.eval_steps
    if patience and before_the_end <= patience:  # the first evaluation is the best so far
        found.append(
            f"early_stopping_patience = {patience}: cannot end the run early, which has "
            f"{counted(before_the_end, 'evaluation')} before its end: give less, or a smaller eval_steps"
        )
    return found


def _meet(every: int, recipe: Recipe, total_steps: int) -> bool:
    """Whether a step has an evaluation, which the last step has anyway, and a checkpoint, one `every` so many steps."""
    return math.lcm(every, recipe.eval_steps) <= total_steps or total_steps % every == 0


def recipe_warnings(
    recipe: Recipe,
    config: PretrainedConfig,
    mix: Mix,
    num_parameters: int,
    epoch_steps: int,
    total_steps: int,
) -> list[str]:
    """What looks wrong though it works, each as a line with the remedy."""
    found = schedule_warnings(recipe, total_steps, epoch_steps, held_out=len(mix.validation) > 0)
    if not len(mix.validation):
        found.append("nothing is held out, so that nothing shows overfitting: give a data set a val_split")
    lengths = mix.train.lengths[training_rows(mix, recipe, 0)]
    cut = (lengths > recipe.max_length).mean()
    if cut > CUT_SHARE:
        lost = np.maximum(lengths - recipe.max_length, 0).sum() / lengths.sum()
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        remedy = "that is all of the model's positions" if positions == recipe.max_length else "give more"
        found.append(
            f"max_length = {recipe.max_length}: {cut:.0%} of the training conversations are cut, {lost:.0%} of their "
            f"tokens left out in each epoch: {remedy}"
        )
    highest = next(rate for parameters, rate in HIGHEST_RATES if num_parameters < parameters)
    highest *= 10 if recipe.use_peft else 1
    if not recipe.from_scratch and not LOWEST_RATE <= recipe.learning_rate <= highest:
        found.append(
            f"learning_rate = {recipe.learning_rate:g}: pretrained models of this size ({num_parameters / 1e9:.2g} "
            f"billion parameters) are fine-tuned at {LOWEST_RATE:g} to {highest:g}: check it"
        )
    for name, options in recipe.datasets.chosen().items():
        if not options.weight:
            found.append(
                f"datasets.{name}.weight = 0: its conversations take their time in every step and teach nothing: leave "
                "it out, or to evaluate on it alone, give it size: 1"
            )
    if recipe.dtype == "fp16" and not recipe.from_scratch and config.dtype == torch.bfloat16:
        found.append("dtype = fp16: the model's weights are bf16, whose range fp16 lacks: give dtype: bf16")
    return found
