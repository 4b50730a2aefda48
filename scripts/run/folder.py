"""The output folder: whose it is, and making it ready for a run."""

import fcntl
import os
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from recipe.keys import Recipe
from run.best import LINKS, is_others, link_checkpoints
from run.checkpoint import Checkpoint
from run.lines import lines_up_to
from run.retention import SET_ASIDE, list_checkpoints, list_set_aside, step_of
from run.samples import SAMPLES
from training.adapter_files import ADAPTER_CONFIG, ADAPTER_FILES
from utils.errors import UserError
from utils.files import UNFINISHED, read_text, remove_tree, write_whole
from utils.launch import say

# The first line of OUTPUT_DIR/recipe.yaml, by which it is known from a file of the user's.
RECIPE_HEADER = "# The resolved recipe of this run: `sft.py THIS_FILE --output_dir NEW` repeats it.\n"
# What a run writes into its folder, first of all what tells that a folder holds a run.
TELLTALE_FILES = (
    *("metrics.jsonl", "training.png", "config.json", "model.safetensors", "tokenizer.json", "README.md"),
    *(ADAPTER_CONFIG, SAMPLES),
)
OWN_FILES = (
    *TELLTALE_FILES,
    *("recipe.yaml", "run.json", "bad_steps.jsonl", "generation_config.json", "tokenizer_config.json"),
    *ADAPTER_FILES,
)
PATIENCE = 20.0  # seconds to wait for the processes of the start before this one, which may still be saving


def refuse_other_run(recipe: Recipe, problems: Sequence[UserError] = ()) -> None:
    """Keep a run from writing over another, or over files that are no run's: UserError where output_dir holds such.

    Args:
        problems: of its checkpoints, why none of them can be gone on from; the newest's first.
    """
    folder = recipe.output_dir
    # os.path, since Path.exists raises for a name too long to be one.
    held = [name for name in TELLTALE_FILES if os.path.lexists(folder / name)]
    if os.path.lexists(folder / "recipe.yaml") and not is_ours(folder / "recipe.yaml"):
        held.append("recipe.yaml")
    held += [path.name for path in [*list_checkpoints(folder), *list_set_aside(folder)]]
    if held:
        why = f"; none of its checkpoints can be gone on from: {problems[0]}" if problems else ""
        raise UserError(
            f"output_dir = {folder}: holds another run ({', '.join(held)}); "
            f"give another --output_dir, or remove it{why}"
        )


def check_own_names(recipe: Recipe) -> None:
    """See that nothing stands where a run going on in output_dir will write, or it would find out after its training.

    Raises: UserError where one of its files' names is a folder's or a pipe's, or that of log_dir.
    """
    folder, first = recipe.output_dir, Path(recipe.log_dir).parts[:1]
    for name in OWN_FILES:
        if os.path.exists(folder / name) and not os.path.isfile(folder / name):
            raise UserError(
                f"output_dir = {folder}: {name} is no file there, and the run has to write one: move it away"
            )
    for name in LINKS:
        if is_others(folder / name):  # as what copies a run may make of one
            say(f"{folder / name} is no link of this run's, and stays as it is: remove it to have one")
    taken = first and (first[0] in (*OWN_FILES, *LINKS) or re.match(r"\.?checkpoint-|\.final|\.lock", first[0]))
    if keeps_logs(recipe) and taken:
        raise UserError(f"log_dir = {recipe.log_dir}: the run has something else of that name: give another")


def keeps_logs(recipe: Recipe) -> bool:
    """Whether a tracker writes into log_dir."""
    return recipe.log_wandb or "tensorboard" in recipe.log_with


def is_ours(recipe_file: Path) -> bool:
    """Whether this is the recipe.yaml that a run wrote."""
    try:
        return read_text(recipe_file).startswith(RECIPE_HEADER)
    except UserError:
        return False


def wait_for_other_run(recipe: Recipe) -> None:
    """Lock a folder to go on in, so that its last checkpoint is there; on the first process. UserError if in use."""
    if is_ours(recipe.output_dir / "recipe.yaml"):
        lock_output_dir(recipe)


def lock_output_dir(recipe: Recipe) -> int:
    """Make the output folder, and make it ours for as long as this process lives; the first process.

    Returns: the descriptor of the file that is locked, open from now on, for `check_still_ours`.
    Raises: UserError when it cannot be written, or another process is at it.
    """
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
        return _lock(recipe.output_dir / ".lock")
    except OSError as error:
        raise UserError(f"output_dir = {recipe.output_dir}: cannot write there: {error.strerror}") from error


def check_still_ours(recipe: Recipe, lock: int) -> None:
    """See that the output folder is the one that was locked, with this run's recipe in it; the first process.

    By the file that is locked, since a file system may give a folder that nobody holds open another number.
    Raises: UserError where it was deleted, moved, emptied or replaced: what came into a new one would lack its past.
    """
    folder = recipe.output_dir
    try:
        ours = os.path.samestat(os.fstat(lock), os.stat(folder / ".lock")) and os.path.lexists(folder / "recipe.yaml")
    except OSError:
        ours = False
    if not ours:
        raise UserError(
            f"output_dir = {folder}: no longer the folder that this run began in: deleted, moved, emptied or replaced "
            "meanwhile: stopped"
        )


def claim_output_dir(recipe: Recipe, checkpoint: Checkpoint | None) -> None:
    """Clear away what a killed run left, and write the resolved recipe; the first process, under its lock.

    metrics.jsonl, bad_steps.jsonl and samples.jsonl keep their lines up to the checkpoint's step, also those of another
    folder's run.
    Raises: UserError when it cannot be written.
    """
    folder = recipe.output_dir
    lock_output_dir(recipe)
    check_own_names(recipe)
    if keeps_logs(recipe):
        try:
            (folder / recipe.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"log_dir = {recipe.log_dir}: cannot write in {folder}: {error.strerror}") from error
    try:
        for name in remove_leftovers(folder):
            say(f"removed {name}, which an interrupted run had not finished")
        for path in _passed_over(folder, checkpoint) if checkpoint else []:
            aside = path.with_name(f"{path.name}{SET_ASIDE}")
            if os.path.lexists(aside):  # of the same number, of the time before
                remove_tree(aside)
            path.rename(aside)
            say(f"{path} was passed over, and is now {aside.name}")
        write_whole(folder / "recipe.yaml", RECIPE_HEADER + recipe.to_yaml())
        for file in (folder / "metrics.jsonl", folder / "bad_steps.jsonl", folder / SAMPLES):
            source = file if checkpoint is None or file.exists() else checkpoint.path.parent / file.name
            if source.exists():
                kept = lines_up_to(source, checkpoint.step, checkpoint.state.evaluation_due) if checkpoint else ""
                write_whole(file, kept)
        link_checkpoints(recipe, checkpoint.best(recipe.early_stopping_metric) if checkpoint else None)
    except OSError as error:
        raise UserError(f"output_dir = {folder}: cannot write there: {error.strerror}") from error


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what a killed run had half written or half removed; returns the names."""
    leftovers = [*folder.glob(".checkpoint-*"), *folder.glob(".final"), *folder.glob("checkpoint-*/.trainer_state")]
    for path in leftovers:
        remove_tree(path)
    files = [*folder.glob(f".*{UNFINISHED}")]
    for path in files:
        path.unlink()
    return [path.relative_to(folder).as_posix() for path in leftovers + files]


def _passed_over(folder: Path, checkpoint: Checkpoint) -> list[Path]:
    """A run's checkpoints of later numbers than the one in use, and of its number in other digits (checkpoint-0009).

    Never the one in use itself, under whatever name; a link to it, which is no more than a name, may be among them.
    """
    used = checkpoint.path.resolve()
    if folder.resolve() not in (checkpoint.path.parent.resolve(), used.parent):
        return []
    own_name = f"checkpoint-{checkpoint.step}"
    others = [path for path in list_checkpoints(folder) if path.name not in (own_name, checkpoint.path.name)]
    others = [path for path in others if path.is_symlink() or path.resolve() != used]
    return [path for path in others if step_of(path) >= checkpoint.step]


@cache
def _say_unlocked(folder: Path, why: str) -> None:
    say(f"warning: output_dir = {folder}: its file system has no locks ({why}): nothing keeps a second run out of it")


def _lock(path: Path) -> int:
    """Lock a file until this process ends, and return it open: two runs would each remove the other's checkpoints.

    A POSIX lock, which the system gives back when the process dies, and which NFS knows.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would give the lock back
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() > until:
                raise UserError(f"output_dir = {path.parent}: another process is training there") from error
        except OSError as error:  # a file system without locks, as NFS is where no lockd runs
            _say_unlocked(path.parent, error.strerror)
            return handle
        time.sleep(0.2)
