"""Every engine goes on where any other has stopped, in fp32 and in bf16, whatever names the model's file has.

A walk of 43 starts, of one step each, makes every change between plain, DDP, ZeRO-1, 2 and 3, FSDP2 and hybrid shards,
there and back. At each change the fp32 weights and moments that the next engine has are, bit for bit, those that the
one before it left, and what computes is those weights, rounded. Then every loss is compared with that of a plain run
that nobody stopped: in fp32 to the order of additions, in bf16 to what is rounded in one engine and not in the other.

The normal run makes three short walks (40 seconds on two cores); `make soak` all six whole ones (6 minutes).
"""

import itertools
import json
import shutil

import pytest
import torch
from conftest import ROOT, run_script
from interruption import metrics, run_here, small_recipe
from mutations import reseal
from safetensors.torch import load_file, save_file
from switching import KINDS, observed, read_state
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ENGINES = ("plain", "ddp2", "zero1x2", "zero2x2", "zero3x2", "fsdp2x2", "hsdp2x2")
PLAIN, DDP, ZERO1, ZERO2, ZERO3, FSDP2, HSDP = ENGINES  # hybrid shards on 4 processes, the others but plain on 2
PAIRS = itertools.combinations(ENGINES, 2)
WHOLE = [*itertools.chain(*PAIRS), PLAIN]  # there and back between each two
SHORT = {"gpt_neox": [PLAIN, ZERO3, FSDP2, DDP, HSDP, PLAIN], "mixture": [DDP, FSDP2, ZERO2, ZERO3, ZERO1]}
# Of a loss: measured 8e-8 in fp32, 2e-4 in bf16 (whose own eps is 8e-3).
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


@pytest.fixture(autouse=True)
def _no_accelerator_yet():
    """Of an earlier test of this process, in another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def write_model(kind: str, folder) -> None:
    demo = ROOT / "recipes" / "demo_data" / "model"
    neox = AutoConfig.from_pretrained(demo, **SIZES)
    sizes = SIZES | {"vocab_size": neox.vocab_size, "num_key_value_heads": 1, "max_position_embeddings": 128}
    config = {
        "gpt_neox": lambda: neox,
        "llama": lambda: LlamaConfig(**sizes),
        "mixture": lambda: MixtralConfig(**sizes, num_local_experts=4),
    }[kind]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo).save_pretrained(folder)


class Walk:
    """One run, of which each start may take another engine."""

    def __init__(self, folder, kind: str, dtype: str, steps: int):
        write_model(kind, folder / "model")
        (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        keys = {"dtype": dtype, "global_batch_size": 4, "logging_steps": 1, "eval_steps": 1000, "sample_replies": 0}
        keys |= {"save_steps": 1000, "max_steps": steps, "num_train_epochs": 1, "learning_rate": 3e-3}
        self.recipe, self.folder, self.dtype = small_recipe(folder, folder / "model", **keys), folder, dtype

    def start(self, engine: str, output, *keys, status: int = 0, **moment):
        """Have an engine go on, to its end, of this `status`, or until an `interruption.interrupted` of that moment."""
        for told in ("restored", "saved"):
            shutil.rmtree(output / told, ignore_errors=True)
        if engine == PLAIN:
            with observed():
                run = run_here(self.recipe, *keys, output_dir=output, **moment)
        else:
            zero1 = ("--deepspeed_config", self.folder / "zero1.json") if engine == ZERO1 else ()
            run = run_script(
                *(json.dumps(moment), self.recipe, *zero1, *keys, "--output_dir", output),
                launch="ddp2" if zero1 else engine,
                output_dir=output,
                check=False,
                script="tests/switching.py",
            )
        stopped = 75 if engine == PLAIN else 1
        assert run.returncode == (stopped if moment else status), (
            f"{engine}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
        )
        # A launcher has status 1 for a stop and for an error.
        assert ("start the same command again" in run.stdout) == bool(moment), run.stderr[-6000:]
        for told in output.glob("*/engine.txt"):  # of what it took over and of what it left
            assert told.read_text() == engine
        return run


def assert_taken_over(restored: dict, saved: dict, what: str) -> None:
    """The same fp32 weights and moments, bit for bit; and it computes with those weights, in whatever precision."""
    assert_same_state(restored, saved, what)
    for (kind, name), own in restored.items():
        if kind == "computes":
            assert torch.equal(own, restored["weights", name].to(own.dtype)), f"{what}: {name} computes"


def assert_same_state(ours: dict, theirs: dict, what: str) -> None:
    """The fp32 weights and moments, bit for bit."""
    keys = {key for key in theirs if key[0] in KINDS}
    assert keys == {key for key in ours if key[0] in KINDS}
    assert len(keys) > 3 * 10
    for key in keys:
        assert ours[key].dtype == torch.float32
        assert torch.equal(ours[key], theirs[key]), f"{what}: {key}"


def walk(folder, kind: str, dtype: str, engines: list[str]) -> None:
    """Make a walk, and compare it as the module says."""
    walk = Walk(folder, kind, dtype, steps=len(engines))
    whole, output = folder / "whole", folder / "output"
    walk.start(PLAIN, whole)
    saved = {}
    for step, (before, engine) in enumerate(itertools.pairwise([None, *engines]), 1):
        last = step == len(engines)
        run = walk.start(engine, output, **({} if last else {"steps": 1}))
        what = f"{kind}, {dtype}, step {step}: {before} to {engine}"
        if before:
            assert f"going on from {output}/checkpoint-{step - 1}, after step {step - 1}" in run.stdout, what
            assert_taken_over(read_state(output / "restored"), saved, what)
        if not last:
            saved = read_state(output / "saved")
    lines, expected = metrics(output), metrics(whole)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    losses, expected = ([line["loss"] for line in each if "loss" in line] for each in (lines, expected))
    assert len(losses) == len(engines)
    off = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
    print(f"{kind}, {dtype}: {len(engines) - 1} changes, losses {off:.1e} off those of the plain run")
    assert off < TOLERANCE[dtype]


def test_the_walk_makes_every_change():
    assert set(itertools.pairwise(WHOLE)) == set(itertools.permutations(ENGINES, 2))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", SHORT)
def test_some_engines_go_on_from_each_other_in_bf16(tmp_path, kind):
    walk(tmp_path, kind, "bf16", SHORT[kind])


@pytest.mark.timeout(600)
def test_the_precision_may_change_with_the_engine(tmp_path):
    """Also where the model's file has fewer bits than the weights that the next engine computes with."""
    walk, output, saved = Walk(tmp_path, "gpt_neox", "fp32", steps=20), tmp_path / "output", {}
    for engine, dtype in ((ZERO2, "bf16"), (ZERO1, "fp32"), (ZERO2, "bf16"), (PLAIN, "fp32")):
        walk.start(engine, output, "--dtype", dtype, "--allow_changes", steps=4)  # the first two at rate 0
        if saved:
            assert_taken_over(read_state(output / "restored"), saved, f"{engine}, {dtype}")
        saved = read_state(output / "saved")


@pytest.mark.timeout(600)
def test_what_only_the_second_process_lacks_is_an_error_that_is_found(tmp_path):
    """By whoever looks for lines that begin with `error: `."""
    walk, output = Walk(tmp_path, "gpt_neox", "fp32", steps=2), tmp_path / "output"
    walk.start(ZERO2, output, steps=1)
    folder = output / "checkpoint-1" / "trainer_state"
    part = folder / "optimizer-00001-000.safetensors"
    tensors = load_file(part)
    lost = next(key for key in tensors if key.startswith("exp_avg/"))
    tensors[f"{lost}.of_another"] = tensors.pop(lost)
    save_file(tensors, part)
    run = walk.start(ZERO2, output, status=1)
    (error,) = run.errors
    assert f"trainer_state/{part.name} " in error
    reseal(folder.parent)
    run = walk.start(ZERO2, output, status=1)
    (error,) = run.errors
    assert error.startswith(f"error: process 1: {folder}: holds ")
    assert error.endswith(f"elements of exp_avg of {lost.split('/')[2]}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpt_neox", "llama", "mixture"])
def test_every_engine_goes_on_from_every_other(tmp_path, kind, dtype):
    walk(tmp_path, kind, dtype, WHOLE)
