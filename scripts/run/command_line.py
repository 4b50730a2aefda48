"""What sft.py is called with. Only light imports, so that --help and a misspelt key are answered at once."""

import argparse
from pathlib import Path

from recipe.command_line import parse_with_recipe, recipe_parser
from recipe.keys import Recipe
from recipe.load import load_recipe
from run.record_file import recorded_recipe
from utils.errors import UserError, one_line_errors


def read_command_line(usage: str, arguments: list[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    """The options of sft.py's own, and the recipe: of a file, or under --reproduce of an earlier run's record.

    Args:
        arguments: None takes those that Python was started with.

    Raises:
        UserError: whatever is wrong with them.
    """
    parser = recipe_parser(usage)
    parser.add_argument("--dry_run", action="store_true", help="only check what can be checked without loading weights")
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="go on from a checkpoint although the recipe or the data were changed since",
    )
    parser.add_argument(
        "--reproduce",
        type=Path,
        metavar="OUTPUT_DIR/run.json",
        help="in place of a recipe: repeat the run that wrote it, in OUTPUT_DIR-reproduced",
    )
    options, recipe_file, overrides = parse_with_recipe(parser, arguments)
    if options.reproduce is not None and recipe_file is not None:
        raise UserError(f"command line: --reproduce {options.reproduce} brings its recipe: leave out {recipe_file}")
    if options.reproduce is not None:
        return options, recorded_recipe(options.reproduce, overrides)
    return options, load_recipe(recipe_file, overrides, for_a_run=True)


if __name__ == "__main__":
    # For recipes/launch.slurm: `python -m run.command_line RECIPE ...` says where sft.py with these arguments writes.
    with one_line_errors():
        print(read_command_line("")[1].output_dir)
