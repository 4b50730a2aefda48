"""A file system that offers no locks, or a folder that not all see, is one line and no hang."""

import re

import pytest
from conftest import run_script
from interruption import small_recipe

SCRIPT = "tests/without_locks.py"


@pytest.mark.parametrize("why", ["ENOLCK", "ENOSYS", pytest.param("EOPNOTSUPP", marks=pytest.mark.soak)])
def test_data_are_not_prepared_where_two_could_write_them(tmp_path, tiny_model, why):
    recipe, output = small_recipe(tmp_path, tiny_model, max_steps=2), tmp_path / "output"
    run = run_script(why, recipe, "--output_dir", output, output_dir=output, script=SCRIPT, check=False)
    assert run.returncode == 2
    (error,) = run.errors
    assert re.fullmatch(
        rf"error: {tmp_path}/cache/prepared/.*\.lock: .*: give a cache_dir on another file system", error
    )


def test_a_run_goes_on_without_locks_and_says_so(tmp_path, tiny_model):
    """Once its data are prepared; by two processes, which both see what the first one writes."""
    recipe, output = small_recipe(tmp_path, tiny_model, max_steps=2), tmp_path / "output"
    run_script(recipe, "--max_steps", 1, "--output_dir", tmp_path / "first", output_dir=tmp_path / "first")
    run = run_script("ENOLCK", recipe, "--output_dir", output, output_dir=output, script=SCRIPT, launch="ddp2")
    warnings = re.findall("^warning: output_dir.*", run.stdout, flags=re.MULTILINE)
    no_locks = "its file system has no locks (No locks available): nothing keeps a second run out of it"
    assert warnings == [f"warning: output_dir = {output}: {no_locks}"]
    assert not list(output.glob(".seen-*"))
