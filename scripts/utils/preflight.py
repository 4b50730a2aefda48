"""Before weights are loaded: the plan's largest micro-batches, the room for its checkpoints, and what looks wrong.

utils/memory.py has the estimate of memory.
"""

import math
import re
import shutil
from collections import deque
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import DeepSpeedPlugin
from transformers import PretrainedConfig

from utils.batches import Position, epoch_plan, packs_per_step, steps_per_epoch, training_rows
from utils.checkpoint import list_checkpoints
from utils.errors import UserError
from utils.launch import num_processes, say
from utils.memory import check_memory, show_bytes
from utils.mix import Mix, Split
from utils.model import count_parameters
from utils.recipe import CommandLine, Recipe

# Rates of full fine-tuning over which a pretrained model of that many parameters usually loses what it knows: several
# times those of huggingface/alignment-handbook (1e-3 for SmolLM2 135M and 360M, 3e-4 for 1.7B, 2e-5 for SmolLM3 3B and
# Zephyr 7B) and InstructGPT (about 1e-5 for 1.3B and 6B). LoRA's usual 2e-4 is over it from 3 billion on.
HIGHEST_RATES = ((1e9, 3e-3), (3e9, 1e-3), (math.inf, 1e-4))  # under so many parameters, the rate
LOWEST_RATE = 2e-7  # a tenth of the lowest published one known to us, Tulu 3's 2e-6 for 70B
CUT_SHARE = 0.2  # of the training conversations
# Comments of a recipe such as `# 4 GPUs x 4 x 2 = 32 conversations a step`.
BATCH_COMMENT = re.compile(r"(\d[\d,]*) conversations (?:a|per) step")


class MicroBatch(NamedTuple):
    """A micro-batch of the plan.

    Attributes:
        rows: int64 [conversations], of the training or the validation split; `collate.collate` makes the batch of them.
        epoch: as `collate` takes it; None for validation.
        shape: of the tensor that it becomes: (1, tokens), or where it is padded (conversations, the longest).
    """

    rows: np.ndarray
    epoch: int | None
    shape: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Padding included."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """For a message."""
        each = "" if self.shape[0] == 1 else f" of {self.shape[1]:,} each, padded"
        return f"{len(self.rows)} conversation{'s' * (len(self.rows) > 1)}, {self.tokens:,} tokens{each}"


def preflight(
    command: CommandLine,
    config: PretrainedConfig,
    mix: Mix,
    dtype: torch.dtype,
    plugin: DeepSpeedPlugin | None,
    total_steps: int,
    step: int,
    position: Position,
) -> tuple[MicroBatch, MicroBatch | None] | None:
    """Check memory and disk, and say what looks wrong, before weights are loaded.

    Args:
        step, position: where the run begins.

    Returns:
        The largest micro-batches that are to come, of training and of evaluation; None when no step is left.

    Raises:
        UserError: the run cannot work.
    """
    recipe, processes = command.recipe, num_processes()
    parameters, epoch_steps = count_parameters(recipe, config), steps_per_epoch(mix, recipe, processes)
    if step >= total_steps:
        return None
    largest = largest_micro_batches(mix, recipe, processes, total_steps - step, position)
    zero = plugin.deepspeed_config["zero_optimization"] if plugin else None
    check_memory(recipe, config, parameters, zero, dtype, largest[0].shape)
    check_disk(recipe, parameters, dtype, plugin is not None, epoch_steps, total_steps, step)
    found = recipe_warnings(recipe, config, mix, parameters, processes, epoch_steps, total_steps, command.recipe_file)
    for warning in found:
        say(f"warning: {warning}")
    return largest


def largest_micro_batches(
    mix: Mix, recipe: Recipe, num_processes: int, steps: int, start: Position
) -> tuple[MicroBatch, MicroBatch | None]:
    """The training and the evaluation micro-batch that will need the most memory; None where nothing is held out.

    That is the one with the most tokens, padding included, after cutting to max_length; of several, the one with the
    most scored tokens. A cut conversation counts as scored all over, up to its targets, since its window is random.

    Args:
        steps: optimizer steps from `start` to the end of the run, at least 1.
    """
    per_step, position = packs_per_step(recipe, num_processes), start
    size, found = recipe.per_device_train_batch_size, []
    while steps > 0:
        plan = epoch_plan(mix, recipe, position.epoch)
        packs = np.arange(len(plan))[plan.first_pack(position) :][: steps * per_step]
        steps -= math.ceil(len(packs) / per_step)
        # A step starts a micro-batch of its own.
        first = plan.bounds[packs[(packs - packs[0]) % per_step % size == 0]]
        rows = plan.of_packs(packs[0], packs[-1] + 1)
        found.append(_largest(mix.train, rows, first - first[0], recipe, position.epoch))
        position = Position(position.epoch + 1)
    held_out = []
    for dataset in np.unique(mix.validation.dataset):
        rows = np.flatnonzero(mix.validation.dataset == dataset)
        rows = rows[np.argsort(-mix.validation.lengths[rows], kind="stable")]  # as validation_batches has them
        first = np.arange(0, len(rows), recipe.per_device_eval_batch_size)
        held_out.append(_largest(mix.validation, rows, first, recipe, None))
    return max(found, key=itemgetter(0))[1], max(held_out, key=itemgetter(0))[1] if held_out else None


def _largest(
    split: Split, rows: np.ndarray, first: np.ndarray, recipe: Recipe, epoch: int | None
) -> tuple[tuple[int, int], MicroBatch]:
    """Of the micro-batches of `rows` that start at `first` (int64) the largest, after its padded and scored tokens."""
    lengths = np.minimum(split.lengths[rows], recipe.max_length)
    sizes = np.diff(first, append=len(rows))
    if recipe.padding_free:
        shapes = np.stack([np.ones_like(sizes), np.add.reduceat(lengths, first)])
    else:
        shapes = np.stack([sizes, np.maximum.reduceat(lengths, first)])
    scored = np.add.reduceat(np.minimum(split.targets[rows], lengths - 1), first)
    best = np.lexsort((scored, shapes.prod(0)))[-1]
    batch = MicroBatch(rows[first[best] : first[best] + sizes[best]], epoch, tuple(shapes[:, best].tolist()))
    return (batch.tokens, int(scored[best])), batch


def checkpoint_bytes(num_parameters: int, dtype: torch.dtype, deepspeed: bool) -> tuple[int, int]:
    """Bytes of a checkpoint: its model, and its trainer_state (Adam's moments, and the fp32 weights if the model has
    none: utils/trainer_state.py)."""
    half = deepspeed and dtype != torch.float32
    return num_parameters * (2 if half else 4), num_parameters * (12 if half else 8)


def disk_peak(recipe: Recipe, model: int, state: int, epoch_steps: int, total_steps: int, start_step: int = 0) -> int:
    """Bytes that the checkpoints to come and the final model will take at most, beyond what is used now.

    Those that are in output_dir already count as room when save_total_limit or keep_trainer_state removes them.

    Args:
        model, state: bytes of a checkpoint's model and of its trainer_state.
        start_step: of the checkpoint that the run goes on from.
    """
    models, states = deque(), deque()
    for path in list_checkpoints(recipe.output_dir):
        states.append(_folder_bytes(path / "trainer_state"))
        models.append(_folder_bytes(path) - states[-1])
    every = _steps_between_checkpoints(recipe, epoch_steps)
    most = recipe.save_total_limit or math.inf
    most_states = min(most, recipe.keep_trainer_state or math.inf)
    used = peak = 0
    for _ in range(int(total_steps // every - start_step // every)):
        models.append(model)
        states.append(state)
        used += model + state
        peak = max(peak, used)  # the oldest go when the new one is whole, so there is one more for a moment
        while len(models) > most:
            used -= models.popleft()
        while len(states) > most_states:
            used -= states.popleft()
    return max(peak, used + model)


def check_disk(
    recipe: Recipe,
    num_parameters: int,
    dtype: torch.dtype,
    deepspeed: bool,
    epoch_steps: int,
    total_steps: int,
    start_step: int = 0,
) -> None:
    """Print the size of a checkpoint, and the room that the run will need beside what is free.

    Args:
        start_step: of the checkpoint that the run goes on from.

    Raises:
        UserError: the disk of output_dir has less.
    """
    model, state = checkpoint_bytes(num_parameters, dtype, deepspeed)
    state = 0 if recipe.save_only_model else state
    peak = disk_peak(recipe, model, state, epoch_steps, total_steps, start_step)
    folder = next(path for path in (recipe.output_dir, *recipe.output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    parts = f" (model {show_bytes(model)}, what resuming needs {show_bytes(state)})" if state else ""
    say(
        f"disk: a checkpoint takes {show_bytes(model + state)}{parts}; the run needs up to {show_bytes(peak)} of the "
        f"{show_bytes(free)} that are free at {folder}"
    )
    if peak > free:
        keys = ("save_steps", "save_total_limit", "keep_trainer_state", "save_only_model")
        values = ", ".join(f"{key} = {str(getattr(recipe, key)).lower()}" for key in keys)
        raise UserError(
            f"output_dir = {recipe.output_dir}: checkpoints of {show_bytes(model + state)} and the final model take "
            f"{show_bytes(peak)}, {show_bytes(free)} are free: keep less ({values}), or take another disk"
        )


def _steps_between_checkpoints(recipe: Recipe, epoch_steps: int) -> float:
    return {"epoch": epoch_steps, "steps": recipe.save_steps, "no": math.inf}[recipe.save_strategy]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def recipe_warnings(
    recipe: Recipe,
    config: PretrainedConfig,
    mix: Mix,
    num_parameters: int,
    num_processes: int,
    epoch_steps: int,
    total_steps: int,
    recipe_file: Path | None,
) -> list[str]:
    """What looks wrong though it works, each as a line with the remedy.

    Args:
        recipe_file: as the user wrote it, for its comments.
    """
    found = []
    if recipe.warmup_steps >= total_steps:
        found.append(f"warmup_steps = {recipe.warmup_steps}: as long as the run ({total_steps:,} steps): give fewer")
    every = _steps_between_checkpoints(recipe, epoch_steps)
    if recipe.save_strategy == "no":
        found.append("save_strategy = no: nothing to go on from after a crash: give steps or epoch")
    elif every > total_steps:
        found.append(
            f"the first checkpoint would come at step {every:,}, the run ends at {total_steps:,}: "
            "give save_strategy: steps and a smaller save_steps"
        )
    if recipe.save_only_model and recipe.save_strategy != "no":
        found.append("save_only_model = true: nothing to go on from after a crash: give keep_trainer_state: 1 instead")
    if not len(mix.validation):
        found.append("nothing is held out, so that nothing shows overfitting: give a data set a val_split")
    elif recipe.eval_steps > total_steps:
        found.append(
            f"eval_steps = {recipe.eval_steps}: the run has {total_steps:,} steps and is evaluated only at its end: "
            "give fewer"
        )
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
    if not recipe.from_scratch and not LOWEST_RATE <= recipe.learning_rate <= highest:
        found.append(
            f"learning_rate = {recipe.learning_rate:g}: pretrained models of this size ({num_parameters / 1e9:.2g} "
            f"billion parameters) are fine-tuned at {LOWEST_RATE:g} to {highest:g}: check it"
        )
    per_step, named = packs_per_step(recipe, num_processes), _named_in_comments(recipe_file)
    if recipe.global_batch_size is None and named and per_step not in named and not recipe.packing:
        found.append(
            f"{num_processes} process(es) x {recipe.per_device_train_batch_size} x "
            f"{recipe.gradient_accumulation_steps} = {per_step} conversations a step, but {recipe_file} speaks of "
            f"{named[0]}: give global_batch_size: {named[0]}"
        )
    if recipe.dtype == "fp16" and not recipe.from_scratch and config.dtype == torch.bfloat16:
        found.append("dtype = fp16: the model's weights are bf16, whose range fp16 lacks: give dtype: bf16")
    return found


def _named_in_comments(recipe_file: Path | None) -> list[int]:
    """The conversations a step that a recipe's comments speak of."""
    lines = recipe_file.read_text(encoding="utf-8").splitlines() if recipe_file else []
    comments = " ".join(line.partition("#")[2].strip() for line in lines)  # a sentence may go on in the next line
    return [int(number.replace(",", "")) for number in BATCH_COMMENT.findall(comments)]
