"""A real run of sft.py on the demo's data, stopped in the middle and gone on with; for `benchmark.py gpu`."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run.stopping import EXIT_STOPPED
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "recipes" / "demo_data" / "model"


def measure_run(sizes: dict, length: int, steps: int, options: list[str]) -> dict:
    """Train a GPT-NeoX of these sizes from random weights, in rows of `length` tokens; the demo's tokenizer is its own.

    Returns: `metrics` (the lines of metrics.jsonl with a loss, of both starts), the last `evaluation`, `seconds` of
        each start, and `stopped_at`, the step of the checkpoint that it went on from.
    """
    with tempfile.TemporaryDirectory() as folder:
        base, output = Path(folder, "base"), Path(folder, "output")
        shutil.copytree(DEMO_MODEL, base)
        config = json.loads((base / "config.json").read_text())
        config |= {"max_position_embeddings": length, "initializer_range": 0.02} | sizes
        (base / "config.json").write_text(json.dumps(config))
        keys = {"model_name": base, "output_dir": output, "cache_dir": Path(folder, "cache"), "max_length": length}
        keys |= {"packing": "true", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        keys |= {"learning_rate": 1e-4, "warmup_steps": 4, "max_steps": steps, "num_train_epochs": 100}
        keys |= {"logging_steps": 1, "eval_steps": steps, "sample_replies": 0, "use_flash_attention": "true"}
        command = [sys.executable, "scripts/sft.py", "recipes/demo.yaml", *options]
        command += [part for key, value in keys.items() for part in (f"--{key}", str(value))]
        started = time.perf_counter()
        status, said = _start(command, output / "metrics.jsonl", stop_after=2)
        checkpoints = [path.name for path in output.glob("checkpoint-*")]
        if status != EXIT_STOPPED or not checkpoints:
            last = " / ".join(said.strip().splitlines()[-4:])
            raise UserError(f"benchmark: a stopped run ended with status {status}, checkpoints {checkpoints}: {last}")
        stopped = time.perf_counter()
        status, _ = _start(command, output / "metrics.jsonl", stop_after=None)
        if status:
            raise UserError(f"benchmark: the second start ended with status {status}")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return {
            "metrics": [line for line in lines if "loss" in line],
            "evaluation": {name: value for name, value in lines[-1].items() if name.startswith("eval_")},
            "stopped_at": int(re.search(r"\d+", max(checkpoints))[0]),
            "seconds": [stopped - started, time.perf_counter() - stopped],
        }


def _start(command: list[str], metrics: Path, stop_after: int | None) -> tuple[int, str]:
    """The exit status of a start, and what it said; it is asked to stop when so many steps are written down."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if stop_after and metrics.exists() and metrics.read_text().count('"loss"') >= stop_after:
                process.send_signal(signal.SIGUSR1)
                stop_after = None
            time.sleep(0.05)
        said.seek(0)
        text = said.read()
    if process.returncode not in (0, EXIT_STOPPED):
        raise UserError("benchmark: sft.py: " + " / ".join(text.strip().splitlines()[-6:])[-1500:])
    return process.returncode, text


def run_table(figures: dict) -> str:
    """Losses of a run, and what else its metrics say, in some lines."""
    lines, last = figures["metrics"], figures["metrics"][-1]
    losses = ", ".join(f"{line['loss']:.4f}" for line in lines[:: max(1, len(lines) // 12)])
    shown = {name: last[name] for name in ("mfu", "peak_memory_gib", "loss_scale", "skipped_steps") if name in last}
    seconds = " and ".join(f"{each:.0f} s" for each in figures["seconds"])
    return f"losses {losses}; stopped and gone on with after step {figures['stopped_at']}; {seconds}; " + ", ".join(
        f"{name} {value:.3g}" for name, value in shown.items()
    )
