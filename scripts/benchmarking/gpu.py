"""`benchmark.py gpu`: all that is worth knowing of a machine with a GPU, in one go, the most valuable first.

Each part is a process of its own with a limit of its own, and is written down as soon as it is there: where the minutes
end, what was measured until then is in the files.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarking.adamw import adamw_table, measure_adamw
from benchmarking.ceilings import measure_ceilings
from benchmarking.contenders import Work, train_bare, train_ours, train_trl
from benchmarking.exactness import exactness_table, measure_exactness
from benchmarking.measuring import in_a_process, machine
from benchmarking.profile import profile_ours, profile_table
from benchmarking.real_run import measure_run, run_table
from benchmarking.roofline import predict, prediction_table
from benchmarking.train import SMALL, describe, gpu_works, random_conversations, save_data, shape
from utils.errors import UserError


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    measure: Callable[..., dict]
    arguments: tuple
    limit: int  # seconds
    table: Callable[[dict], str]


def all_parts(rehearse: bool) -> list[Part]:
    """What is measured, in this order; `rehearse` does the same with tiny shapes."""
    config = SMALL | {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512} if rehearse else shape("3b", None)
    if rehearse:
        rows = save_data(random_conversations([64] * 12, config["vocab_size"], 1.0))
        rows, mixed = (Work(config, rows, 1, 4, 64, 2, "bf16", checkpointing) for checkpointing in (False, True))
    else:
        rows, mixed = gpu_works("3b", None).values()
    twos = replace(rows, batch=2, accumulation=2, moments="bf16")  # which do not fit beside moments in fp32
    layer = {"hidden_size": config["hidden_size"], "intermediate_size": 4 * config["hidden_size"]}
    layer |= {"num_attention_heads": config["num_attention_heads"], "num_hidden_layers": 2}
    length, steps = (256, 30) if rehearse else (2048, 200)
    fp16 = "bf16" if rehearse else "fp16"  # which a CPU does not have

    def run(name: str, *options: str) -> Part:
        return Part(
            f"sft.py, {name}, stopped and gone on with", measure_run, (layer, length, steps, options), 90, run_table
        )

    def train(name: str, work: Work, measure: Callable, *arguments) -> Part:
        return Part(name, measure, (asdict(work), *arguments), 75, describe_training)

    heads = config["num_attention_heads"]
    return [
        Part("ceilings", measure_ceilings, (rows.max_length, config["hidden_size"], heads), 60, ceilings_line),
        Part("exactness", measure_exactness, (64 if rehearse else 512,), 120, exactness_table),
        Part("AdamW", measure_adamw, (2**12 if rehearse else 2**26,), 45, adamw_table),
        train("this collection, rows", rows, train_ours),
        run("bf16", "--dtype", "bf16"),
        train("TRL, padding-free, rows", rows, train_trl, True),
        train("a bare loop, all logits, rows", rows, train_bare),
        Part("profile, rows", profile_ours, (asdict(rows),), 60, profile_table),
        train("this collection, moments in bf16, rows in twos", twos, train_ours),
        train("this collection, mixed lengths", mixed, train_ours),
        train("TRL, padding-free, mixed lengths", mixed, train_trl, True),
        run("fp16", "--dtype", fp16),
        run("bf16, ZeRO-2", "--dtype", "bf16", "--deepspeed_config", "ds_configs/zero2.json"),
        train("TRL, padded, mixed lengths", mixed, train_trl, False),
        train("this collection, rows, again", rows, train_ours),
        train("TRL, padding-free, rows, again", rows, train_trl, True),
    ]


def benchmark_gpu(folder: Path, minutes: float, rehearse: bool) -> dict[str, Any]:
    """Measure part after part, and keep gpu.json and gpu.md in the folder up to date; what fails says why there."""
    if not rehearse and not torch.cuda.is_available():
        raise UserError("benchmark: there is no GPU; --rehearse does the same on the CPU, with tiny shapes")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found: dict[str, Any] = {"machine": machine(), "rehearsal": rehearse, "parts": {}}
    prediction = str(folder / "gpu.json"), 1 if rehearse else None
    parts = [*all_parts(rehearse), Part("roofline at these rates", predict, prediction, 300, prediction_table)]
    for part in parts:
        left = started + 60 * minutes - time.monotonic()
        begun = time.monotonic()
        try:
            if left < 15:
                raise UserError("not measured: the minutes are over")
            figures: dict[str, Any] = {
                "figures": in_a_process(part.measure, *part.arguments, limit=min(part.limit, left))
            }
            figures["table"] = part.table(figures["figures"])
        except UserError as error:
            figures = {"failed": str(error), "table": str(error)}
        found["parts"][part.name] = figures | {"seconds": round(time.monotonic() - begun, 1)}
        print(f"\n## {part.name} ({found['parts'][part.name]['seconds']:.0f} s)\n\n{figures['table']}", flush=True)
        write(folder, found)
    return found


def write(folder: Path, found: dict[str, Any]) -> None:
    """Both files, anew."""
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    device = found["machine"].get("gpu", "rehearsal on a CPU, tiny shapes")
    tables = [f"## {name}\n\n{part['table']}" for name, part in found["parts"].items()]
    (folder / "gpu.md").write_text("\n\n".join([f"# {device}", *tables]) + "\n")


def ceilings_line(figures: dict[str, float]) -> str:
    """The machine's ceilings in a line."""
    units = {name: "TB/s" if name == "copy" else "TFLOP/s" for name in figures}
    return ", ".join(f"{name} {rate / 1e12:.3g} {units[name]}" for name, rate in figures.items())


def describe_training(figures: dict) -> str:
    """One contender's figures, with its MFU where it is known, in a line."""
    mfu = ""
    if figures.get("peak_flops"):
        mfu = f", MFU {figures['flops'] / figures['seconds'] / figures['peak_flops']:.1%}"
    settings = ", ".join(f"{key} {value}" for key, value in figures["settings"].items())
    return f"{describe(figures)}{mfu}; last loss {figures['losses'][-1]:.6f}; {settings}"
