"""metrics.jsonl says which process the others wait for, and for how much of the time."""

import pytest
from conftest import run_script
from interruption import OF_SEVERAL, run_here, small_recipe


@pytest.mark.parametrize(("launch", "slow"), [("ddp2", 1), pytest.param("zero2x2", 0, marks=pytest.mark.soak)])
def test_a_slow_process_is_named(tmp_path, tiny_model, launch, slow):
    """Its forward passes take 0.3 s longer, twice in a step, which the other spends in the collective."""
    keys = {"max_steps": 4, "logging_steps": 2, "eval_steps": 100, "save_strategy": "no"}
    zero2 = ["--deepspeed_config", "ds_configs/zero2.json"] if launch == "zero2x2" else []
    recipe, output = small_recipe(tmp_path, tiny_model, **keys), tmp_path / "output"
    arguments = [slow, 0.3, recipe, *zero2, "--output_dir", output]
    run = run_script(*arguments, output_dir=output, launch=launch, script="tests/slow_process.py")
    assert len(run.curve("slowest_process")) == 3
    assert set(run.curve("slowest_process")) == {slow}
    shares = map(run.curve, ("slowest_share", "collective_wait_share", "backward_share"))
    for share, waited, backward in zip(*shares, strict=True):
        assert 0.6 < share < 1
        assert 0.2 < waited <= backward < 1


def test_a_process_alone_waits_for_nobody(tmp_path, tiny_model):
    recipe = small_recipe(tmp_path, tiny_model, max_steps=2, save_strategy="no")
    run = run_here(recipe, output_dir=tmp_path / "output")
    assert all(OF_SEVERAL.isdisjoint(line) for line in run.metrics())
