"""Going on where a run was stopped: from which checkpoint, whether it is this run's, what has to be cleared away."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from utils.batches import Position, conversations_per_step
from utils.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, remove_leftovers
from utils.errors import UserError
from utils.health import StepHealth
from utils.launch import say
from utils.mix import Mix
from utils.optimizer import set_schedule
from utils.recipe import Recipe
from utils.record_file import read_record
from utils.tracking import TrainingStats
from utils.trainer_state import load_loss_scale, load_optimizer, load_random_state, loss_scale_state

# The first line of OUTPUT_DIR/recipe.yaml, by which it is known from a file of the user's.
RECIPE_HEADER = "# The resolved recipe of this run: `sft.py THIS_FILE --output_dir NEW` repeats it.\n"
# Keys that change neither what is learnt nor when: where things lie, what is written, how the work is cut up.
FREE_KEYS = {
    *("output_dir", "log_dir", "cache_dir", "log_wandb", "wandb_project", "sample_replies", "logging_steps"),
    *("eval_steps", "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit"),
    *("keep_trainer_state", "save_only_model", "resume_from_checkpoint", "max_bad_steps", "deepspeed_config"),
    *("gradient_checkpointing", "use_flash_attention", "trust_remote_code"),
}
BATCH_KEYS = {"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"}
# Of a data set: where its files are. What is in them is compared by the fingerprint of what was prepared.
PLACE_KEYS = {"input_file_path", "revision", "hub_name", "files"}


def find_checkpoint(recipe: Recipe, allow_changes: bool) -> Checkpoint | None:
    """The checkpoint that a run goes on from, None to begin; every process finds the same, and nothing is changed.

    Raises:
        UserError: output_dir holds another run, or the one asked for cannot be gone on from.
    """
    folder, asked = recipe.output_dir, recipe.resume_from_checkpoint
    own = list_checkpoints(folder)
    if asked not in ("auto", "never"):
        path = Path(asked)
        is_own = path.resolve().parent == folder.resolve()
        newer = [other.name for other in own if is_own and _step_of(other) > _step_of(path)]
        if newer:
            raise UserError(
                f"resume_from_checkpoint = {asked}: {folder} holds newer ones ({', '.join(newer)}): "
                "move them away, or give another --output_dir"
            )
        if is_own or not own:
            if not is_own and not _same_run_without_checkpoint(recipe):
                refuse_other_run(recipe)
            return _checked(read_checkpoint(path), recipe, allow_changes)
    if asked == "never":
        refuse_other_run(recipe)
        return None
    for path in reversed(own):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as problem:
            say(f"passed over: {problem}")
            continue
        return _checked(checkpoint, recipe, allow_changes)
    if own or not _same_run_without_checkpoint(recipe):
        refuse_other_run(recipe)
    return None


def _step_of(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _same_run_without_checkpoint(recipe: Recipe) -> bool:
    """Whether output_dir holds this very run, killed before its first checkpoint: then it begins again."""
    folder = recipe.output_dir
    if os.path.lexists(folder / "config.json") or not is_ours(folder / "recipe.yaml"):
        return False
    return (folder / "recipe.yaml").read_text(encoding="utf-8") == RECIPE_HEADER + recipe.to_yaml()


def _checked(checkpoint: Checkpoint, recipe: Recipe, allow_changes: bool) -> Checkpoint:
    state = checkpoint.state
    changed = changed_keys(recipe_of(state["recipe"]), recipe, state["num_processes"])
    if changed and not allow_changes:
        raise UserError(
            f"{checkpoint.path} belongs to another recipe: {'; '.join(changed)}. "
            "Give another --output_dir, or go on with the changes by --allow_changes"
        )
    for change in changed:
        say(f"changed: {change}")
    return checkpoint


def changed_keys(then: Recipe, now: Recipe, num_processes: int) -> list[str]:
    """What a recipe changes of an earlier one, as far as it matters: `key: then, now`.

    Args:
        num_processes: of the earlier run.
    """
    changed = {key for key in Recipe.model_fields if getattr(then, key) != getattr(now, key)} - FREE_KEYS - {"datasets"}
    # How a step is cut is free, but for what depends on the micro-batch: sorted by length, or averaged by it.
    by_micro_batch = now.sort_by_length or now.loss_normalization == "micro_batch"
    same_step = conversations_per_step(then, num_processes) == conversations_per_step(now, num_processes)
    if same_step and not (by_micro_batch and "per_device_train_batch_size" in changed):
        changed -= BATCH_KEYS
    lines = [f"{key}: {getattr(then, key)} then, {getattr(now, key)} now" for key in sorted(changed)]
    old_mix, new_mix = (
        {
            f"datasets.{name}.{key}": value
            for name, options in recipe.datasets.chosen().items()
            for key, value in options.model_dump(exclude=PLACE_KEYS).items()
        }
        for recipe in (then, now)
    )
    for key in old_mix | new_mix:
        old, new = old_mix.get(key, "not in the mix"), new_mix.get(key, "not in the mix")
        lines += [f"{key}: {old} then, {new} now"] if old != new else []
    return lines


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe that a run has written down, without keys that are no more."""
    return Recipe.model_validate({key: value for key, value in values.items() if key in Recipe.model_fields})


def is_finished(recipe: Recipe) -> bool:
    """Whether this very run has come to its end in output_dir."""
    record = recipe.output_dir / "run.json"
    if recipe.resume_from_checkpoint == "never" or not record.exists():
        return False
    run = read_record(record)
    return run["status"] == "finished" and not changed_keys(recipe_of(run["recipe"]), recipe, run["num_processes"])


def check_data(checkpoint: Checkpoint, mix: Mix, allow_changes: bool) -> None:
    """See that the prepared data are what the run was trained on.

    Raises:
        UserError: they are not, unless changes are allowed.
    """
    then, now = checkpoint.state["data"], data_fingerprints(mix)
    changed = [name for name in then | now if then.get(name) != now.get(name)]
    if not changed:
        return
    what = f"the data of {', '.join(changed)} are not those that {checkpoint.path} was trained on"
    if not allow_changes:
        raise UserError(f"{what}: give another --output_dir, or go on with --allow_changes")
    say(what)


def run_state(
    recipe: Recipe, mix: Mix, accelerator: Accelerator, step: int, position: Position, health: StepHealth
) -> dict[str, Any]:
    """Where a run stands after a step, for `state.json`."""
    return {
        "step": step,
        "position": asdict(position),
        "num_processes": accelerator.num_processes,
        "recipe": recipe.values(),
        "data": data_fingerprints(mix),
        "health": health.state_dict(),
        "loss_scale": loss_scale_state(accelerator),
    }


def restore(
    checkpoint: Checkpoint,
    recipe: Recipe,
    accelerator: Accelerator,
    model: PreTrainedModel,
    optimizer,
    scheduler,
    stats: TrainingStats,
    health: StepHealth,
) -> None:
    """Put everything but the model's weights, which are loaded from the checkpoint, where it was after that step."""
    state, processes = checkpoint.state, accelerator.num_processes
    health.load_state_dict(state["health"])
    updates = checkpoint.step - health.skipped
    load_optimizer(checkpoint.path / "trainer_state", accelerator, model, optimizer, updates)
    load_loss_scale(accelerator, state["loss_scale"])
    set_schedule(scheduler, updates)
    say(f"going on from {checkpoint.path}, after step {checkpoint.step:,}")
    if processes == state["num_processes"]:
        own = checkpoint.process_state(accelerator.process_index)
        stats.load_state_dict([own["stats"]])
        load_random_state(own["random"])
        return
    everyone = [checkpoint.process_state(process)["stats"] for process in range(state["num_processes"])]
    stats.load_state_dict(everyone, with_sums=accelerator.is_main_process)
    before = conversations_per_step(recipe_of(state["recipe"]), state["num_processes"])
    now = conversations_per_step(recipe, processes)
    steps = (
        f"{now} conversations in a step, as before"
        if now == before
        else f"{now} conversations in a step where there were {before} (global_batch_size keeps their number)"
    )
    say(f"written by {state['num_processes']} process(es), {processes} now: {steps}; random states begin anew")


def data_fingerprints(mix: Mix) -> dict[str, str]:
    """Of each data set, the fingerprint of its tokens, scored positions and split."""
    return {name: report["fingerprint"] for name, report in mix.reports.items()}


def refuse_other_run(recipe: Recipe) -> None:
    """Keep a run from writing over another, or over files that are not a run's.

    Raises:
        UserError: output_dir holds metrics, a checkpoint, a model or a README.
    """
    folder = recipe.output_dir
    names = ("metrics.jsonl", "training.png", "config.json", "model.safetensors", "tokenizer.json", "README.md")
    # os.path, since Path.exists raises for a name too long to be one.
    held = [name for name in names if os.path.lexists(folder / name)]
    if os.path.lexists(folder / "recipe.yaml") and not is_ours(folder / "recipe.yaml"):
        held.append("recipe.yaml")
    held += [path.name for path in list_checkpoints(folder)]
    if held:
        raise UserError(
            f"output_dir = {folder}: holds another run ({', '.join(held)}); give another --output_dir, or remove it"
        )


def is_ours(recipe_file: Path) -> bool:
    """Whether this is the recipe.yaml that a run wrote."""
    try:
        return recipe_file.read_text(encoding="utf-8").startswith(RECIPE_HEADER)
    except (OSError, UnicodeDecodeError):
        return False


def claim_output_dir(recipe: Recipe, checkpoint: Checkpoint | None) -> None:
    """Make the output folder, clear away what a killed run left, and write the resolved recipe; the first process.

    metrics.jsonl and bad_steps.jsonl keep their lines up to the checkpoint's step, also those of another folder's run.

    Raises:
        UserError: it cannot be written.
    """
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in remove_leftovers(folder):
            say(f"removed {name}, which an interrupted run had not finished")
        for path in list_checkpoints(folder) if checkpoint else []:
            if checkpoint.path.parent == folder and _step_of(path) > checkpoint.step:
                aside = path.with_name(f"{path.name}.set-aside")
                shutil.rmtree(aside, ignore_errors=True)  # of the same step, of the time before
                path.rename(aside)
                say(f"{path} was passed over, and is now {aside.name}")
        _replace(folder / "recipe.yaml", RECIPE_HEADER + recipe.to_yaml())
        for file in (folder / "metrics.jsonl", folder / "bad_steps.jsonl"):
            source = file if checkpoint is None or file.exists() else checkpoint.path.parent / file.name
            if source.exists():
                # Not splitlines: what bad_steps.jsonl quotes may hold U+2028. A full disk may have cut a character.
                lines = source.read_text(encoding="utf-8", errors="replace").split("\n") if checkpoint else []
                _replace(file, "".join(f"{line}\n" for line in lines if _is_before(line, checkpoint)))
    except OSError as error:
        raise UserError(f"output_dir = {folder}: cannot write there: {error.strerror}") from error


def _is_before(line: str, checkpoint: Checkpoint) -> bool:
    """Whether a line was written before a checkpoint, which may have left the evaluation of its step to do."""
    try:
        metrics = json.loads(line)
    except ValueError:  # the last line of a run that was killed while writing it
        return False
    due = checkpoint.state["evaluation_due"] and metrics["step"] == checkpoint.step and "eval_loss" in metrics
    return metrics["step"] <= checkpoint.step and not due


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there whole, the old or the new."""
    work = path.with_name(f".{path.name}")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)
