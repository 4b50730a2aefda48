"""A run's first and last moment: its folder is made ours, and run.json says how this start ended."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from recipe.keys import Recipe
from run.best import check_metric
from run.folder import claim_output_dir, lock_output_dir, wait_for_other_run
from run.preflight import find_engine
from run.resume import FINISHED, find_checkpoint, is_finished
from run.run import Run
from run.samples import check_prompts
from run.starts import end_start
from utils.errors import UserError, reason
from utils.launch import process_index, say, training_dtype

_OPENED: list[Run] = []  # of this process, at most one


def open_run(recipe: Recipe, allow_changes: bool) -> Run | None:
    """Find the checkpoint that a run goes on from, and make its folder ours, before anything heavy. Every process.

    Returns: None where it is finished, with a line that says so.

    Raises:
        UserError: the folder holds another run, or another process is at it; as `find_engine`, `check_metric` and
            `check_prompts`.
    """
    if is_finished(recipe):
        say(FINISHED.format(recipe.output_dir))
        return None
    find_engine(recipe, training_dtype(recipe.dtype, announce=False))
    check_metric(recipe, recipe.datasets.chosen())
    check_prompts(recipe)
    recipe_file = recipe.output_dir / "recipe.yaml"
    if process_index() == 0:
        wait_for_other_run(recipe)
    was_there = os.path.lexists(recipe_file)
    checkpoint, lock = find_checkpoint(recipe, allow_changes), None
    if process_index() == 0:
        lock = lock_output_dir(recipe)
        if os.path.lexists(recipe_file) and not was_there:  # of a start that was a moment before this one
            checkpoint = find_checkpoint(recipe, allow_changes)
        claim_output_dir(recipe, checkpoint)
    _OPENED.append(Run(recipe, checkpoint, lock))
    return _OPENED[-1]


@contextmanager
def awaited_end() -> Iterator[None]:
    """Around what says why a start ended (`one_line_errors`), so that nobody waits for that until what is still written
    behind it is: minutes."""
    _OPENED.clear()
    try:
        yield
    finally:
        for run in _OPENED:
            run.close()


@contextmanager
def recorded_end() -> Iterator[None]:
    """Around all of a start: where it ends by an error, or before its first step, run.json says so."""
    try:
        yield
    except (Exception, SystemExit) as error:
        status, why = "failed", str(error) if isinstance(error, UserError) else reason(error)
        if isinstance(error, SystemExit):
            status, why = "interrupted", "a signal before the first step"
        for run in _OPENED:
            if process_index() and isinstance(error, SystemExit):
                # It leaves it to the first to say why: from then on a SIGTERM, also the user's, ends it at once
                # (`let_the_first_speak`), and with it a checkpoint of which it still writes its part.
                run.close()
            if not run.runs_in_record:
                continue
            run.failure = why
            with suppress(UserError):  # a disk that is full, of which the first error speaks
                end_start(run.record, status, why, run.progress.step)
        raise
