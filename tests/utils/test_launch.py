"""Every shipped recipe, and every shipped accelerate config that a CPU can run: a dry run, then two real steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, launch_command, run_script

from utils.tables import counted

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
DEMO_DATA = {
    "oasst_export": "oasst_trees.jsonl",
    "vicuna": "sharegpt.json",
    "dolly15k": "dolly.jsonl",
    "grade_school_math_instructions": "grade_school_math.jsonl",
    "code_alpaca": "code_alpaca.json",
}
REAL_DATA = {
    "oasst_export": "oasst_trees.jsonl.gz",
    "vicuna": "sharegpt_vicuna.json.gz",
    "dolly15k": "dolly15k.jsonl",
    "grade_school_math_instructions": "grade_school_math_instructions.jsonl.gz",
    "code_alpaca": "code_alpaca.json",
}


def inputs(files: dict[str, str], folder: Path) -> list[str]:
    """Options that give each data set its local file, and few validation conversations."""
    options = []
    for name, file in files.items():
        options += [f"--datasets.{name}.input_file_path", str(folder / file), f"--datasets.{name}.max_val_set", "6"]
    return options


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run(run_sft, recipe, tmp_path):
    run = run_sft(f"recipes/{recipe}", "--dry_run")
    assert "conversations a step" in run.stdout
    assert not (tmp_path / "output").exists()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The data of each recipe are prepared once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("recipe", "launch"),
    [
        *(("demo.yaml", launch) for launch in ("bare", "cpu", "single_gpu", "ddp2", "zero2x2")),
        *((recipe, "zero2x2") for recipe in RECIPES if recipe != "demo.yaml"),
    ],
)
def test_two_steps(run_sft, tiny_model, cache, recipe, launch):
    if "qlora" in recipe and launch == "zero2x2":
        pytest.skip("refused: tests/test_adapters.py")
    own = [] if recipe == "demo.yaml" else inputs(DEMO_DATA, ROOT / "recipes" / "demo_data")
    own += [] if recipe == "demo.yaml" else ["--model_name", tiny_model, "--max_length", 128]
    small = ["--max_steps", 2, "--logging_steps", 1, "--gradient_accumulation_steps", 2, "--log_wandb", "false"]
    # By the user's own command once; others', also of a process alone and of DDP, are in tests/run/test_stopping.py.
    real = recipe == "demo.yaml" and launch == "zero2x2"
    small += [] if real else ["--sample_replies", 0]
    run = run_sft(f"recipes/{recipe}", *own, *small, "--cache_dir", cache, launch=launch, real=real)
    processes = 2 if launch.endswith("2") else 1
    assert f"\n{counted(processes, 'process')} x" in run.stdout
    by_deepspeed = launch == "zero2x2" or recipe == "stablelm7b_oasst.yaml"
    engine = "ZeRO-2" if by_deepspeed else "DDP" if processes > 1 else "one process"
    assert f", {engine}{', 2 processes' * (processes > 1)}, cpu\n" in run.stdout
    assert len(run.curve("loss")) == 2
    assert {f"eval_{name}_loss" for name in DEMO_DATA} <= run.metrics()[-1].keys()


@pytest.mark.skipif(not SHARED.exists(), reason="the real data are not here")
@pytest.mark.parametrize("launch", ["zero2x2", pytest.param("bare", marks=pytest.mark.soak)])
def test_the_main_job_on_real_data(run_sft, tmp_path, launch):
    """The seed's recipe as it stands, on a tiny StableLM with its real tokenizer: ZeRO-2 and all five sources; by the
    user's own command in `make soak`."""
    make = [sys.executable, str(SHARED / "tools" / "make_tiny_stablelm.py"), str(tmp_path / "tiny")]
    subprocess.run(make, check=True, capture_output=True)
    # At the seed's 1e-5 a random model would hardly move in so few steps.
    short = ["--max_steps", 8, "--learning_rate", 1e-3, "--warmup_steps", 2, "--max_length", 256, "--logging_steps", 1]
    run = run_sft(
        "recipes/stablelm7b_oasst.yaml",
        *["--model_name", tmp_path / "tiny", "--cache_dir", SHARED / "data", "--log_wandb", "false", *short],
        *inputs(REAL_DATA, Path()),
        launch=launch,
        real=launch == "bare",
    )
    assert "ZeRO-2, 2 processes, cpu" in run.stdout
    losses = run.curve("loss")
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
    assert {f"eval_{name}_loss" for name in REAL_DATA} <= run.metrics()[-1].keys()
    assert json.loads((run.output_dir / "config.json").read_text())["vocab_size"] == 50288


# ---- CPU threads ----

THREADS = """
import os, sys
os.sched_setaffinity(0, range(os.cpu_count()))  # PyTorch takes no more threads than there are cores
os.sched_getaffinity = lambda _: range(8)  # as on a machine of eight cores, whatever this one is
sys.path.insert(0, "scripts")
from utils.launch import set_up_process
set_up_process()
import torch
print(f"threads {torch.get_num_threads()}\\n", end="")  # at once: the processes share this output
"""


@pytest.mark.parametrize(
    ("launch", "said", "threads"),
    [
        ("python", None, 8),
        ("python", "2", 2),
        ("ddp2", None, 4),
        ("ddp2", "1", 1),  # which is also what the launcher puts there when nobody says anything
        pytest.param("torchrun", None, 4, marks=pytest.mark.soak),
    ],
)
def test_omp_num_threads_is_the_users(tmp_path, monkeypatch, launch, said, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    if launch == "python" and not said:  # which asks nothing of how it was started
        run = run_script(script=str(script), output_dir=tmp_path)
        assert run.stdout.split()[-1] == str(threads)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [*torchrun, "--standalone"] if launch == "torchrun" else launch_command(launch)
    run = subprocess.run([*command, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split().count(str(threads)) == (1 if launch == "python" else 2), run.stdout
