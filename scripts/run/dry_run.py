"""--dry_run: check everything that can be checked without loading weights, and print the resolved recipe."""

import os

from data.files import may_be_on_hub, source_files
from data.reading import TRAIN, VALIDATION, Reading
from recipe.keys import Recipe
from run.best import check_metric
from run.folder import check_own_names
from run.model_files import check_savable
from run.preflight import check_new_tokens, vocabulary_warnings
from run.resume import find_checkpoint, is_finished
from run.samples import check_prompts, load_prompts, room_for_reply
from sources.registry import find_source
from training.deepspeed_config import fill_config, find_config
from training.fsdp_config import find_sharding, sharded_layers
from training.model import check_tiny, check_weights, count_parameters, load_config, load_tokenizer, without_weights
from training.plan import describe_step
from training.weight_files import model_folder, weights_are_here
from utils.errors import UserError
from utils.launch import num_processes, process_index, say, set_up_process, training_dtype


def dry_run(recipe: Recipe, allow_changes: bool) -> None:
    """Print the resolved recipe and what was found of all that it names; UserError when the run could not start."""
    set_up_process()
    dtype = training_dtype(recipe.dtype)
    held_out = set(recipe.datasets.chosen())
    check_metric(recipe, held_out)
    prompts = check_prompts(recipe)
    if process_index() == 0 and not is_finished(recipe):
        checkpoint = find_checkpoint(recipe, allow_changes)
        if checkpoint:
            say(f"would go on from {checkpoint.path}")
        # What claim_output_dir would run into, found without writing.
        folder = recipe.output_dir
        check_own_names(recipe)
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK):
            raise UserError(
                f"output_dir = {folder}: cannot write there: {nearest} is not a folder that can be written to"
            )
    say(f"{recipe.to_yaml()}\n# ---- what was found of it ----")  # which comes last, and is seen
    for name, options in recipe.datasets.chosen().items():
        hub, paths = find_source(name, options).hub, source_files(name, recipe, download=False)
        if not paths and not may_be_on_hub(options.input_file_path, hub):
            source_files(name, recipe)  # says where it looked
        if not paths:
            say(f"{name}: not here, would be fetched from {f'the hub ({hub.repo})' if hub.repo else 'its URL'}")
            continue
        source = Reading(name, options, paths, recipe.rng_seed)
        for _ in source:  # only counted
            pass
        codes = source.split()
        held_out -= set() if (codes == VALIDATION).any() else {name}
        say(
            f"{name}: {', '.join(map(str, paths))}: {(codes == TRAIN).sum():,} training and "
            f"{(codes == VALIDATION).sum():,} validation conversations ({source.losses()})"
        )
    check_metric(recipe, held_out)
    say(f"{recipe.model_name}: {describe_model(recipe)}")
    if prompts:
        say(f"{recipe.sample_prompts}: {len(prompts):,} prompts, for replies of up to {room_for_reply(recipe)} tokens")
    if found := find_config(recipe):
        fill_config(*found, recipe, total_steps=recipe.max_steps, dtype=dtype)
        say(f"{found[1]}: agrees with the recipe")
    if sharding := find_sharding(recipe, dtype):
        if model_folder(recipe.model_name):
            sharded_layers(without_weights(recipe, load_config(recipe)), sharding)  # are there
        say(f"the accelerate config: {sharding}: agrees with the recipe")
    processes = "process" if num_processes() == 1 else "processes"
    say(f"{describe_step(recipe, num_processes())} with {num_processes()} {processes}")
    say("nothing wrong was found; what was not here to look at is said above")


def describe_model(recipe: Recipe) -> str:
    """What the model is, after all checks of a run that need no weights in memory, and what was not here to look at.

    Not whether it fits into memory: a dry run may be made where the run is not, on a laptop or a login node.
    """
    folder = model_folder(recipe.model_name)
    if folder is None:
        return "not here, would be fetched from the hub"
    own, unseen = os.path.isdir(recipe.model_name), []
    config = load_config(recipe)
    parameters = count_parameters(recipe, config)
    if check_tiny(recipe, config) is None:
        unseen.append("whether its kind can be trained, since no tiny model of it can be made")
    if own or (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(recipe)
        check_new_tokens(recipe, config, tokenizer)
        check_savable(recipe, config, tokenizer, fetch=False)
        load_prompts(recipe, tokenizer)
        for warning in vocabulary_warnings(recipe, config, tokenizer):
            say(f"warning: {warning}")
    else:
        unseen.append("its tokenizer, which would be fetched from the hub")
    if not recipe.from_scratch and (own or weights_are_here(folder)):
        check_weights(recipe, config)
    elif not recipe.from_scratch:
        unseen.append("its weights, which would be fetched from the hub")
    rows = config.get_text_config().vocab_size
    described = f"{config.model_type}, {parameters:,} parameters, {rows:,} rows in its embedding"
    return "; not looked at: ".join([described, *[", ".join(unseen)] * bool(unseen)])
