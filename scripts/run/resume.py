"""Going on where a run was stopped: from which checkpoint, whether it is this run's, and putting all back."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from data.mix import Mix
from recipe.keys import Recipe
from recipe.load import load_recipe
from run.best import LINKS, best_until
from run.checkpoint import Checkpoint, read_checkpoint
from run.folder import is_ours, refuse_other_run
from run.health import StepHealth
from run.model_files import config_changes
from run.progress import KEPT, Progress
from run.record_file import read_record, without_former_keys
from run.retention import list_checkpoints, list_set_aside, step_of
from run.stats import TrainingStats
from sources.source import keys_that_change
from training.adapter_files import ADAPTER_CONFIG, check_base
from training.checkpoint_files import state_file
from training.engine import Engine
from training.optimizer import set_schedule
from training.optimizer_state import load_loss_scale, load_optimizer, load_random_state, loss_scale_state
from training.plan import Position, packs_per_step, steps_left, training_rows
from training.pretrained import load_pretrained
from utils.errors import UserError
from utils.launch import num_processes, process_index, say
from utils.schemas import checked
from utils.tables import counted

FINISHED = "the run in {} is finished: nothing to do; another --output_dir starts another"


def find_checkpoint(recipe: Recipe, allow_changes: bool) -> Checkpoint | None:
    """The checkpoint that a run goes on from, None to begin; every process finds the same, and nothing is changed.

    Raises:
        UserError: output_dir holds another run, or the one asked for cannot be gone on from.
    """
    folder, asked = recipe.output_dir, recipe.resume_from_checkpoint
    own = list_checkpoints(folder)
    if asked not in ("auto", "never"):
        path = Path(asked)
        real = os.path.realpath(path)  # not Path.resolve, which raises for a link to itself
        if path.name in LINKS:
            path = Path(real)  # since it may lead elsewhere in a moment
        is_own = os.path.realpath(folder) in (os.path.realpath(path.parent), os.path.dirname(real))
        if is_own or not own:
            if not is_own and not _same_run_without_checkpoint(recipe):
                _refuse_with_what_differs(recipe)
            checkpoint = read_checkpoint(path)
            others = [other for other in own if is_own and os.path.realpath(other) != real]
            if newer := [other.name for other in others if step_of(other) > checkpoint.step]:
                raise UserError(
                    f"resume_from_checkpoint = {asked}: {folder} holds newer ones ({', '.join(newer)}): "
                    "move them away, or give another --output_dir"
                )
            return _checked(checkpoint, recipe, allow_changes)
    if asked == "never":
        _refuse_with_what_differs(recipe)
        return None
    problems = []
    for path in reversed(own):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as problem:
            say(f"passed over: {problem}")
            problems.append(problem)
            continue
        return _checked(checkpoint, recipe, allow_changes)
    if own or not _same_run_without_checkpoint(recipe):
        _refuse_with_what_differs(recipe, problems)
    return None


def _refuse_with_what_differs(recipe: Recipe, problems: Sequence[UserError] = ()) -> None:
    """As `refuse_other_run`; where the folder's record tells what is another in its recipe, the message does too."""
    try:
        refuse_other_run(recipe, problems)
    except UserError as error:
        changed = []
        with suppress(UserError):  # no record, or a damaged one
            changed = _changes_of_record(recipe.output_dir / "run.json", recipe)
        raise UserError(f"{error}; in its recipe {'; '.join(changed)}" if changed else str(error)) from None


def _same_run_without_checkpoint(recipe: Recipe) -> bool:
    """Whether output_dir holds this very run, killed before its first checkpoint: then it begins again."""
    folder = recipe.output_dir
    if (
        any(os.path.lexists(folder / name) for name in ("config.json", ADAPTER_CONFIG))
        or list_set_aside(folder)
        or not is_ours(folder / "recipe.yaml")
    ):
        return False
    try:
        return load_recipe(folder / "recipe.yaml") == recipe
    except UserError:  # of another version, with keys that are no more
        return False


def _checked(checkpoint: Checkpoint, recipe: Recipe, allow_changes: bool) -> Checkpoint:
    changed = changed_keys(checkpoint.state.recipe, recipe, checkpoint.state.num_processes)
    if changed and not allow_changes:
        raise UserError(
            f"{checkpoint.path} belongs to another recipe: {'; '.join(changed)}. "
            "Give another --output_dir, or go on with the changes by --allow_changes"
        )
    then = checkpoint.state.recipe
    for key in ("use_peft", "lora_r", "lora_target_modules", "use_dora") if then.use_peft or recipe.use_peft else ():
        if getattr(then, key) != getattr(recipe, key):
            raise UserError(
                f"{checkpoint.path}: what is trained is another: {key}: {getattr(then, key)} then, "
                f"{getattr(recipe, key)} now: give another --output_dir"
            )
    for change in changed:
        say(f"changed: {change}")
    return checkpoint


def changed_keys(then: Recipe, now: Recipe, num_processes: int) -> list[str]:
    """What a recipe changes of an earlier one, as far as it matters: `key: then, now`.

    Args:
        num_processes: of the earlier run.
    """
    differing = {key for key in Recipe.model_fields if getattr(then, key) != getattr(now, key)}
    changed = differing & keys_that_change("training", Recipe)
    # How a step is cut is free, but for what depends on the micro-batch: sorted by length, or averaged by it.
    by_micro_batch = now.sort_by_length or now.loss_normalization == "micro_batch"
    same_step = packs_per_step(then, num_processes) == packs_per_step(now, num_processes)
    if not same_step or (by_micro_batch and "per_device_train_batch_size" in differing):
        changed |= differing & keys_that_change("step", Recipe)
    lines = [f"{key}: {getattr(then, key)} then, {getattr(now, key)} now" for key in sorted(changed)]
    old_mix, new_mix = then.datasets.chosen(), now.datasets.chosen()
    for name in old_mix | new_mix:
        if name not in old_mix or name not in new_mix:
            lines.append(f"datasets.{name}: {'not in the mix then' if name in new_mix else 'in the mix then, not now'}")
            continue
        for key in sorted(keys_that_change("training", type(new_mix[name]))):
            old, new = getattr(old_mix[name], key, None), getattr(new_mix[name], key)
            lines += [f"datasets.{name}.{key}: {old} then, {new} now"] if old != new else []
    return lines


def is_finished(recipe: Recipe) -> bool:
    """Whether this very run has come to its end in output_dir.  Raises: UserError where its model is gone since."""
    record = recipe.output_dir / "run.json"
    if recipe.resume_from_checkpoint == "never" or not record.exists():
        return False
    if read_record(record)["status"] != "finished" or _changes_of_record(record, recipe):
        return False
    if not any(recipe.output_dir.glob("*.safetensors")):
        remedy = "without this file the same command goes on from the newest checkpoint, or begins where none is left"
        raise UserError(f"{record}: the run is finished, but its model is gone: {remedy}")
    return True


def _changes_of_record(record: Path, recipe: Recipe) -> list[str]:
    """What a recipe changes of that of the run in a run.json, as `changed_keys`."""
    run = read_record(record)
    then = checked(Recipe, without_former_keys(run["recipe"]), record, "the record of a run, for its recipe")
    return changed_keys(then, recipe, run["num_processes"])


def check_data(checkpoint: Checkpoint, mix: Mix, recipe: Recipe, allow_changes: bool) -> None:
    """See that the prepared data are what the run was trained on, and that it can have come so far in them.

    Raises:
        UserError: they are not, unless changes are allowed.
    """
    then, now = checkpoint.state.data, mix.fingerprints
    changed = [name for name in then | now if then.get(name) != now.get(name)]
    if changed:
        what = f"the data of {', '.join(changed)} are not those that {checkpoint.path} was trained on"
        if not allow_changes:
            raise UserError(f"{what}: give another --output_dir, or go on with --allow_changes")
        say(what)
    if allow_changes:
        return
    position, rows = checkpoint.position, len(training_rows(mix, recipe, checkpoint.position.epoch))
    file = f"{state_file(checkpoint.path)}: damaged"
    if position.conversations >= rows:
        raise UserError(
            f"{file}: position.conversations = {position.conversations} of an epoch of {rows}: remove this checkpoint"
        )
    used = position.epoch * rows + position.conversations
    if checkpoint.step > used:
        raise UserError(f"{file}: step = {checkpoint.step} after {used} conversations: remove this checkpoint")


def check_config(checkpoint: Checkpoint, config: PretrainedConfig, recipe: Recipe, allow_changes: bool) -> None:
    """See that the checkpoint's model has the config with which the run trains it.

    Args:
        config: the run's own, as `config_of_run` makes it.

    Raises:
        UserError: its config.json says something else, unless changes are allowed.
    """
    with checkpoint.model_folder() as folder:
        if recipe.use_peft and checkpoint.state.recipe.use_peft:
            check_base(folder, recipe.model_name, str(checkpoint.path))
            return
        who = str(checkpoint.path)
        then = load_pretrained(AutoConfig, str(folder), who, trust_remote_code=recipe.trust_remote_code)
    changed = config_changes(then, config)
    if changed and not allow_changes:
        raise UserError(
            f"{checkpoint.path}/config.json is not that of model_name = {recipe.model_name}: {'; '.join(changed[:5])}: "
            "give another --output_dir, or go on with the model as it is now by --allow_changes"
        )
    for change in changed:
        say(f"changed: config.json: {change}")


def starting_point(checkpoint: Checkpoint | None, mix: Mix, recipe: Recipe) -> Progress:
    """Where the run begins or goes on, and where it ends.

    The best evaluation by another metric than the checkpoint's the first process alone has, by its metrics.jsonl.
    """
    plan = {"epoch_conversations": len(training_rows(mix, recipe, 0)), "held_out": len(mix.validation) > 0}
    plan["patience"] = recipe.early_stopping_patience
    stood = {"step": 0, "position": Position()}
    if checkpoint:
        stood = {name: getattr(checkpoint.state, name) for name in KEPT} | {"position": checkpoint.position}
        metric = recipe.early_stopping_metric
        stood["best"] = checkpoint.best(metric)
        if stood["best"] is None and process_index() == 0:
            last = checkpoint.step - 1 if checkpoint.state.evaluation_due else checkpoint.step
            stood["best"] = best_until(recipe.output_dir / "metrics.jsonl", metric, last)
        if checkpoint.position.conversations >= len(training_rows(mix, recipe, checkpoint.position.epoch)):
            stood["position"] = Position(checkpoint.position.epoch + 1)  # of a mix that was made smaller
    end = recipe.max_steps or stood["step"] + steps_left(mix, recipe, num_processes(), stood["position"])
    return Progress(total_steps=end, **plan, **stood)


def run_state(recipe: Recipe, mix: Mix, engine: Engine, progress: Progress, health: StepHealth) -> dict[str, Any]:
    """Where a run stands after a step, for `state.json`."""
    return {
        **progress.state_dict(),
        "num_processes": engine.accelerator.num_processes,
        "recipe": recipe.values(),
        "data": mix.fingerprints,
        "health": health.state_dict(),
        "loss_scale": loss_scale_state(engine.accelerator),
    }


def restore(checkpoint: Checkpoint, recipe: Recipe, engine: Engine, stats: TrainingStats, health: StepHealth) -> None:
    """Put everything but the model's weights, which are loaded from the checkpoint, where it was after that step."""
    state, accelerator = checkpoint.state, engine.accelerator
    processes, before = accelerator.num_processes, state.num_processes
    health.load_state_dict(state.health.model_dump())
    updates = checkpoint.step - health.skipped
    with checkpoint.model_folder() as folder:
        files = checkpoint.optimizer_files
        load_optimizer(files, folder, accelerator, engine.language_model, engine.optimizer, updates)
    if engine.half_weights:
        engine.half_weights.refresh()  # another engine's state brings fp32 weights that are not the model's file's
    load_loss_scale(accelerator, state.loss_scale.model_dump(by_alias=True))
    set_schedule(engine.scheduler, updates)
    say(f"going on from {checkpoint.path}, after step {checkpoint.step:,}")
    if processes == before:
        own = checkpoint.processes[accelerator.process_index]
        stats.load_state_dict([own.stats.model_dump(exclude_none=True)])
        load_random_state(own.random.model_dump(exclude_none=True))
        return
    everyone = [process.stats.model_dump(exclude_none=True) for process in checkpoint.processes]
    stats.load_state_dict(everyone, with_sums=accelerator.is_main_process)
    then, now = packs_per_step(state.recipe, before), packs_per_step(recipe, processes)
    what = counted(now, "pack" if recipe.packing else "conversation")
    steps = (
        f"{what} in a step, as before"
        if now == then
        else f"{what} in a step where there were {then} (global_batch_size keeps their number)"
    )
    say(f"written by {counted(before, 'process')}, {processes} now: {steps}; random states begin anew")
