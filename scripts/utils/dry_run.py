"""--dry_run: check everything that can be checked without loading weights, and print the resolved recipe."""

import re
from pathlib import Path

from transformers import AutoConfig

from utils.batches import conversations_per_step
from utils.checkpoint import refuse_other_run
from utils.data_files import locate_data_file
from utils.deepspeed import fill_config, find_config
from utils.errors import UserError
from utils.launch import num_processes, process_index, say, training_dtype
from utils.model import load_config
from utils.recipe import Recipe
from utils.sources import SOURCES


def dry_run(recipe: Recipe) -> None:
    """Print the resolved recipe and what was found of all that it names.

    Raises:
        UserError: the run could not start.
    """
    dtype = training_dtype(recipe)
    if process_index() == 0:
        refuse_other_run(recipe)
    say(recipe.to_yaml())
    for name, options in recipe.datasets.chosen().items():
        hub = SOURCES[name].hub
        paths = locate_data_file(name, options.input_file_path, recipe.cache_dir, options.revision, hub)
        found = ", ".join(map(str, paths)) if paths else f"not here, would be fetched from the hub ({hub.repo})"
        say(f"{name}: {found}")
    say(f"{recipe.model_name}: {_describe_model(recipe)}")
    found = find_config(recipe)
    if found:
        fill_config(*found, recipe, total_steps=recipe.max_steps or 1, dtype=dtype)
        say(f"{found[1]}: agrees with the recipe")
    say(f"{conversations_per_step(recipe, num_processes())} conversations a step with {num_processes()} processes")


def _describe_model(recipe: Recipe) -> str:
    try:
        AutoConfig.from_pretrained(recipe.model_name, local_files_only=True)
    except (OSError, ValueError):
        if Path(recipe.model_name).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", recipe.model_name):
            raise UserError(f"model_name = {recipe.model_name}: neither a model's folder nor a hub name") from None
        return "not here, would be fetched from the hub"
    config = load_config(recipe)
    return f"{config.model_type}, {config.vocab_size:,} rows in its embedding"
