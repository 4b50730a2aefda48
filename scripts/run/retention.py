"""Which checkpoints are kept, and the disk that they take."""

import math
import re
import shutil
from collections import deque
from pathlib import Path

import torch

from recipe.keys import Recipe
from training.memory import moment_bytes, show_bytes
from utils.errors import UserError
from utils.files import remove_tree
from utils.launch import say

NUMBERED = re.compile(r"checkpoint-\d+")
SET_ASIDE = ".set-aside"  # how the name of a checkpoint ends that was passed over


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-<number> folders of a run, and links of such a name, by number; `read_checkpoint` says whether the
    number is that of its step."""
    found = [path for path in folder.glob("checkpoint-*") if NUMBERED.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def list_set_aside(folder: Path) -> list[Path]:
    """The checkpoints of a run that were passed over, and may be all that is left of it."""
    return sorted(folder.glob(f"*{SET_ASIDE}"))


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint's name tells; 0 for a folder of another name."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def keep_limits(recipe: Recipe) -> tuple[float, float]:
    """How many checkpoints are kept, and how many of the newest with what resuming needs."""
    most = recipe.save_total_limit or math.inf
    return most, min(most, recipe.keep_trainer_state or math.inf)


def prune(recipe: Recipe, newest: Path, spared: Path | None = None) -> None:
    """Remove the oldest checkpoints but for a spared one, and the trainer_state of the older ones; never the newest,
    which was verified, nor what has a number that no run writes (checkpoint-0009)."""
    written = [path for path in list_checkpoints(recipe.output_dir) if path.name == f"checkpoint-{step_of(path)}"]
    checkpoints = [newest, *(path for path in reversed(written) if path != newest)]
    most, most_states = keep_limits(recipe)
    for age, path in reversed([*enumerate(checkpoints)]):
        if age >= most and path != spared:
            remove_folder(path)
        elif age >= most_states and (path / "trainer_state").exists():
            remove_folder(path / "trainer_state")


def remove_folder(folder: Path) -> None:
    """Remove a folder, which first gets a hidden name: half of one is not to pass for a whole one. Of a link only
    itself: what it leads to is somebody else's."""
    hidden = folder.with_name(f".{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    remove_tree(folder.rename(hidden))


def checkpoint_bytes(recipe: Recipe, num_parameters: int, dtype: torch.dtype, in_half: bool) -> tuple[int, int]:
    """Bytes of a checkpoint: its model, and its trainer_state (Adam's moments, and the fp32 weights if the model has
    none: training/optimizer_state.py; 0 under save_only_model). Of adapters, `num_parameters` are theirs."""
    half = in_half and dtype != torch.float32
    state = 0 if recipe.save_only_model else 4 * half + moment_bytes(recipe)
    return num_parameters * (2 if half else 4), num_parameters * state


def disk_peak(recipe: Recipe, model: int, state: int, epoch_steps: int, total_steps: int, start_step: int = 0) -> int:
    """Bytes that the checkpoints to come and the final model will take at most, beyond what is used now.

    Under keep_best as if each evaluation were the best, and then one of long ago. Those that are in output_dir already
    count as room when save_total_limit or keep_trainer_state removes them.

    Args:
        model, state: bytes of a checkpoint's model and of its trainer_state.
        start_step: of the checkpoint that the run goes on from.
    """
    models, states = deque(), deque()
    for path in list_checkpoints(recipe.output_dir):
        states.append(_folder_bytes(path / "trainer_state"))
        models.append(_folder_bytes(path) - states[-1])
    every = steps_between_checkpoints(recipe, epoch_steps)
    most, most_states = keep_limits(recipe)
    used = peak = 0
    saves = int(total_steps // every - start_step // every)
    if recipe.keep_best:
        saves += total_steps // recipe.eval_steps - start_step // recipe.eval_steps + 1  # and one at the end
        most += 1
    # After these, each does what the one before it did: a run of two billion steps has as many.
    settling = len(models) + sum(int(limit) for limit in (most, most_states) if limit < math.inf)
    for _ in range(min(saves, settling)):
        models.append(model)
        states.append(state)
        used += model + state
        peak = max(peak, used)  # the oldest go when the new one is whole, so there is one more for a moment
        while len(models) > most:
            used -= models.popleft()
        while len(states) > most_states:
            used -= states.popleft()
    if saves > settling:
        stays = model * (most == math.inf) + state * (most_states == math.inf)
        used += (saves - settling) * stays
        peak = max(peak, used - stays + model + state)
    return max(peak, used + model)


def check_disk(
    recipe: Recipe,
    model: int,
    state: int,
    epoch_steps: int,
    total_steps: int,
    start_step: int = 0,
    merged: int = 0,
) -> None:
    """Print the size of a checkpoint, and the room that the run will need beside what is free.

    Args:
        model, state: bytes of a checkpoint's model and of its trainer_state.
        start_step: of the checkpoint that the run goes on from.
        merged: bytes of a final model with merged adapters.

    Raises:
        UserError: the disk of output_dir has less.
    """
    peak = disk_peak(recipe, model, state, epoch_steps, total_steps, start_step) + merged
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


def steps_between_checkpoints(recipe: Recipe, epoch_steps: int) -> float:
    """Optimizer steps; infinity where none is written."""
    return {"epoch": epoch_steps, "steps": recipe.save_steps, "no": math.inf}[recipe.save_strategy]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
