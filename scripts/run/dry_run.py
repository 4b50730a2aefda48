"""--dry_run: check everything that can be checked without loading weights, and print the resolved recipe."""

import io
import os
from contextlib import redirect_stdout

from huggingface_hub import constants

from data.downloads import check_scheme, is_url
from data.files import may_be_on_hub, source_files
from data.reading import TRAIN, VALIDATION, Reading
from recipe.keys import Recipe
from run.best import check_metric
from run.checkpoint import Checkpoint
from run.folder import check_own_names
from run.model_files import check_savable, config_of_run
from run.preflight import check_new_tokens, find_engine, schedule_warnings, vocabulary_warnings
from run.resume import FINISHED, check_config, find_checkpoint, is_finished
from run.samples import check_prompts, load_prompts, room_for_reply
from sources.registry import find_source
from training.adapter_files import require_packages
from training.fsdp_config import find_sharding, sharded_layers
from training.model import check_tiny, check_weights, count_parameters, load_config, load_tokenizer, without_weights
from training.plan import describe_step, foretold_steps
from training.weight_files import model_folder, weights_are_here
from utils.errors import UserError
from utils.launch import num_processes, process_index, say, set_up_process, training_dtype


def dry_run(recipe: Recipe, allow_changes: bool) -> None:
    """Print the resolved recipe, and what was found of all that it names, or that a start would do nothing.

    Raises: UserError when the run could not start; before anything is printed.
    """
    set_up_process()
    found = io.StringIO()
    with redirect_stdout(found):
        if is_finished(recipe):
            say(FINISHED.format(recipe.output_dir))
        else:
            _look(recipe, allow_changes)
    # What was found comes last, and is seen.
    say(f"{recipe.to_yaml()}\n# ---- what was found of it ----\n{found.getvalue().rstrip()}")


def _look(recipe: Recipe, allow_changes: bool) -> None:
    """What takes no time first, then the data, then the model."""
    dtype = training_dtype(recipe.dtype)
    layout = find_engine(recipe, dtype)
    if recipe.use_peft:  # load_config looks too, but only of a model that is here
        require_packages(recipe.load_in_4bit)
    held_out = set(recipe.datasets.chosen())
    check_metric(recipe, held_out)
    prompts, checkpoint = check_prompts(recipe), None
    if process_index() == 0:
        checkpoint = find_checkpoint(recipe, allow_changes)
        if checkpoint:
            say(f"would go on from {checkpoint.path}")
        _check_folder(recipe)
    rows: dict[str, int] | None = {}
    for name, options in recipe.datasets.chosen().items():
        hub, paths = find_source(name, options).hub, source_files(name, recipe, download=False)
        if not paths and not may_be_on_hub(options.input_file_path, hub):
            source_files(name, recipe)  # says where it looked
        if not paths:
            given = options.input_file_path
            for url in filter(is_url, given if isinstance(given, list) else [given]):
                check_scheme(url)
            rows = None
            say(f"{name}: not here, would be fetched from {f'the hub ({hub.repo})' if hub.repo else 'its URL'}")
            continue
        source = Reading(name, options, paths, recipe.rng_seed)
        for _ in source:  # only counted
            pass
        codes = source.split()
        held_out -= set() if (codes == VALIDATION).any() else {name}
        if rows is not None:
            rows[name] = int((codes == TRAIN).sum())
        say(
            f"{name}: {', '.join(map(str, paths))}: {(codes == TRAIN).sum():,} training and "
            f"{(codes == VALIDATION).sum():,} validation conversations ({source.losses()})"
        )
    check_metric(recipe, held_out)
    say(f"{recipe.model_name}: {describe_model(recipe)}")
    if checkpoint:
        _check_model_of(checkpoint, recipe, allow_changes)
    if prompts:
        say(f"{recipe.sample_prompts}: {len(prompts):,} prompts, for replies of up to {room_for_reply(recipe)} tokens")
    if (sharding := find_sharding(recipe, dtype)) and model_folder(recipe.model_name):
        sharded_layers(without_weights(recipe, load_config(recipe)), sharding)  # are there
    say(f"{layout}: {describe_step(recipe, num_processes())}")
    for warning in _schedule(recipe, rows, bool(held_out)):
        say(f"warning: {warning}")
    if constants.HF_HUB_OFFLINE and (rows is None or not (tokenizer_is_here(recipe) and model_is_here(recipe))):
        say("warning: HF_HUB_OFFLINE is set, by which a start here would fetch nothing, and end")
    say("nothing wrong was found; what was not here to look at is said above")


def _check_folder(recipe: Recipe) -> None:
    """What claim_output_dir would run into, found without writing."""
    folder = recipe.output_dir
    check_own_names(recipe)
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
        raise UserError(f"output_dir = {folder}: cannot write there: {nearest} is not a folder that can be written to")


def _check_model_of(checkpoint: Checkpoint, recipe: Recipe, allow_changes: bool) -> None:
    """As `check_config`, where the model's config and tokenizer are here."""
    if tokenizer_is_here(recipe):
        config = config_of_run(recipe, load_config(recipe), load_tokenizer(recipe))
        check_config(checkpoint, config, recipe, allow_changes)


def _schedule(recipe: Recipe, rows: dict[str, int] | None, held_out: bool) -> list[str]:
    """As `schedule_warnings`, as far as the steps are known.

    Args:
        rows: of each data set's training split; None where one is not here.
    """
    known = rows is not None and not recipe.packing and not recipe.drop_contaminated
    epoch_steps, total_steps = foretold_steps(recipe, rows, num_processes()) if known else (None, recipe.max_steps)
    return schedule_warnings(recipe, total_steps, epoch_steps, held_out) if total_steps else []


def tokenizer_is_here(recipe: Recipe) -> bool:
    """Whether a start would fetch nothing of the model's tokenizer."""
    folder = model_folder(recipe.model_name)
    return os.path.isdir(recipe.model_name) or (folder is not None and (folder / "tokenizer.json").exists())


def model_is_here(recipe: Recipe) -> bool:
    """Whether it would fetch neither config nor weights, as far as it wants these."""
    folder = model_folder(recipe.model_name)
    return folder is not None and (recipe.from_scratch or os.path.isdir(recipe.model_name) or weights_are_here(folder))


def describe_model(recipe: Recipe) -> str:
    """What the model is, after all checks of a run that need no weights in memory, and what was not here to look at.

    Not whether it fits into memory: a dry run may be made where the run is not, on a laptop or a login node.
    """
    if model_folder(recipe.model_name) is None:
        return "not here, would be fetched from the hub"
    unseen = []
    config = load_config(recipe)
    parameters = count_parameters(recipe, config)
    if check_tiny(recipe, config) is None:
        unseen.append("whether its kind can be trained, since no tiny model of it can be made")
    if tokenizer_is_here(recipe):
        tokenizer = load_tokenizer(recipe)
        check_new_tokens(recipe, config, tokenizer)
        check_savable(recipe, config, tokenizer, fetch=False)
        load_prompts(recipe, tokenizer)
        for warning in vocabulary_warnings(recipe, config, tokenizer):
            say(f"warning: {warning}")
    else:
        unseen.append("its tokenizer, which would be fetched from the hub")
    if not model_is_here(recipe):
        unseen.append("its weights, which would be fetched from the hub")
    elif not recipe.from_scratch:
        check_weights(recipe, config)
    rows = config.get_text_config().vocab_size
    described = f"{config.model_type}, {parameters:,} parameters, {rows:,} rows in its embedding"
    return "; not looked at: ".join([described, *[", ".join(unseen)] * bool(unseen)])
