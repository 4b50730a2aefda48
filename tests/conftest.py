"""What the tests share: a tiny model, the demo's data, and running a script as a user would."""

import contextlib
import gc
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from forking import run_forked

import utils  # noqa: F401, before torch is loaded: how long its threads spin

# Under `pytest -n 2` each worker keeps to its own core, and so does what it starts: two runs of two threads on two
# cores hold each other up.
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
if CORES and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    os.sched_setaffinity(0, {sorted(CORES)[int(worker.removeprefix("gw")) % len(CORES)]})
# A shell ignores Ctrl-C for what it starts in the background, and nohup a closed terminal; what that starts in turn
# would never hear of either.
for number, heard in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, heard)


# How long an example takes says nothing where the machine is slow, or others work on it.
UNCHECKED = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("shared machine", deadline=None, suppress_health_check=UNCHECKED)
hypothesis.settings.load_profile("shared machine")


def pytest_collection_finish():
    """What is imported by now stays: the collector need not look through it again and again."""
    gc.freeze()


ROOT = Path(__file__).resolve().parent.parent
TRANSFORMERS_4 = ROOT / ".venv" / "transformers4"  # of `make test-transformers4`
BIN = Path(sys.executable).parent
# Real data and the original's results on it; tests that want them skip where they are not.
SHARED = Path(os.environ.get("SHARED_FILES", ROOT.parent / "shared"))
SHARED_DATA = {  # the seed's five data sets, in SHARED/data
    "oasst_export": "oasst_trees.jsonl.gz",
    "vicuna": "sharegpt_vicuna.json.gz",
    "dolly15k": "dolly15k.jsonl",
    "grade_school_math_instructions": "grade_school_math_instructions.jsonl.gz",
    "code_alpaca": "code_alpaca.json",
}

ACCELERATE = [str(BIN / "accelerate"), "launch"]
# How a script is started, as the README says it. On a machine without a GPU the DDP config's two processes are joined
# over gloo by sft.py, and the ZeRO-2 config starts the real engine on CPU processes.
LAUNCH = {
    "python": [sys.executable],
    "bare": ACCELERATE,
    "bare2": ACCELERATE,  # two processes by whatever --config_file follows
    "cpu": [*ACCELERATE, "--config_file", "accelerate_configs/cpu.yaml"],
    "single_gpu": [*ACCELERATE, "--config_file", "accelerate_configs/single_gpu.yaml"],
    "ddp2": [*ACCELERATE, "--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2"],
    "fsdp2x2": [*ACCELERATE, "--config_file", "accelerate_configs/fsdp2.yaml", "--num_processes", "2"],
    "hsdp2x2": [*ACCELERATE, "--config_file", "accelerate_configs/hsdp.yaml"],  # of two, two replicas
    "zero2x2": [*ACCELERATE, "--config_file", "accelerate_configs/zero2.yaml", "--num_processes", "2"],
    "zero3x2": [*ACCELERATE, "--config_file", "accelerate_configs/zero3.yaml", "--num_processes", "2"],
}


# A hundred for each process, below those that the system gives to whoever asks it for any: between the look whether
# one is free and its use somebody else would be given that.
FIRST_PORT = 10_000 + os.getpid() % 200 * 100
PORTS = itertools.cycle(range(FIRST_PORT, FIRST_PORT + 100))


def free_port() -> int:
    """A port that nobody listens on, nor will be given by the system."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def launch_command(launch: str) -> list[str]:
    """The launcher's part of a command; several processes get a free port, so that tests can run side by side."""
    port = ["--main_process_port", str(free_port())] if launch.endswith("2") else []
    return [*LAUNCH[launch], *port]


def launcher_options(launch: str) -> list[str] | None:
    """What follows `accelerate launch` there; None without it."""
    return None if launch == "python" else launch_command(launch)[len(ACCELERATE) :]


class Run:
    """A finished script: its exit status, what it printed, and the metrics it left."""

    def __init__(self, process: subprocess.CompletedProcess, output_dir: Path | None):
        self.returncode, self.stdout, self.stderr = process.returncode, process.stdout, process.stderr
        self.output_dir = output_dir

    @property
    def errors(self) -> list[str]:
        """The lines that say what the user has to mend."""
        return re.findall(r"^error: .*$", self.stderr, flags=re.MULTILINE)

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.output_dir / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name: str) -> list[float]:
        """One metric, line by line of those that have it."""
        return [line[name] for line in self.metrics() if name in line]


def run_script(
    *arguments,
    launch: str = "python",
    output_dir: Path,
    check: bool = True,
    env: dict | None = None,
    script: str = "scripts/sft.py",
    real: bool = False,
    stdin: bytes = b"",
) -> Run:
    """Run a script with no hub; unless `check` is off it has to succeed.

    Args:
        real: start it by the very command that a user types; else sooner, by forking (tests/forking.py).
    """
    arguments = [*map(str, arguments)]
    if script == "scripts/sft.py" and not {"--output_dir", "--help"} & set(arguments):
        arguments += ["--output_dir", str(output_dir)]
    if real or env:
        command = [*launch_command(launch), script, *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    else:
        process = run_forked(launcher_options(launch), script, arguments, ROOT, stdin)
    if check and process.returncode:
        pytest.fail(f"{script} {' '.join(arguments)}\n{process.stdout[-3000:]}\n{process.stderr[-6000:]}")
    return Run(process, output_dir)


@pytest.fixture
def run_sft(tmp_path):
    """Call it with a recipe and options: run_sft("recipes/demo.yaml", "--max_steps", 2, launch="zero2x2")."""

    def run(*arguments, output_dir: Path | None = None, **how) -> Run:
        return run_script(*arguments, output_dir=output_dir or tmp_path / "output", **how)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random two-layer GPT-NeoX with the demo's tokenizer, saved as a base model is: safetensors, fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny_model")
    demo = ROOT / "recipes" / "demo_data" / "model"
    config = AutoConfig.from_pretrained(
        demo, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    """Chromium, which has all cores: on one, a page that a model writes to came to a stand."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page in a browser: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    if not (found := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("the page in a browser: no Chromium on this machine (apt-get install chromium)")
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found)
        os.sched_setaffinity(0, own)
        yield browser
        browser.close()
