"""`benchmark.py checkpoint`: how long training waits for a checkpoint, written behind it and waited for."""

import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarking.measuring import in_a_process

LENGTH, SAVES = 256, 3  # tokens of a step; checkpoints measured of each kind, after one whose memory is new


def measure_saving(model: str, background: bool, trust_remote_code: bool = False) -> dict:
    """Train a model on random tokens, plain, and save it now and then.

    Returns: seconds of a step between two saves, of each save's stall, of a step while one is written, and from a save
        to its checkpoint; and its bytes.
    """
    import numpy as np
    import torch

    import sft
    from benchmarking.contenders import split_in_memory
    from benchmarking.train import random_conversations
    from data.mix import Mix
    from recipe.keys import Recipe
    from run.health import StepHealth
    from run.processes import Processes
    from run.resume import run_state, starting_point
    from run.saving import Saver
    from run.stats import Clock, TrainingStats
    from training.batches import Batches
    from training.engine import prepare_engine, start_accelerator
    from training.flops import ModelFlops
    from training.model import load_config, load_model, load_tokenizer
    from utils.launch import has_gpu, set_up_process, training_dtype

    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model_name": model,
            "trust_remote_code": trust_remote_code,
            "output_dir": folder,
            "datasets": ["vicuna"],
            "dtype": "bf16" if has_gpu() else "fp32",
        }
        cut = {"max_length": LENGTH, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        keep = {"save_in_background": background, "save_total_limit": 1, "random_offset_probability": 0}
        recipe = Recipe.model_validate(values | cut | keep)
        set_up_process()
        config, tokenizer = load_config(recipe), load_tokenizer(recipe)
        accelerator = start_accelerator(recipe, training_dtype(recipe.dtype), deepspeed=None)
        engine = prepare_engine(accelerator, load_model(recipe, config, tokenizer, torch.float32), recipe, 10**6)
        split = split_in_memory(random_conversations([LENGTH] * 500, 1000, 1.0))
        mix = Mix(["vicuna"], split, split, {"vicuna": {"fingerprint": "of no file"}})
        batches = Batches(mix, recipe, 0, 1, tokenizer.pad_token_id)
        stats = TrainingStats(mix, accelerator.device, Clock(), ModelFlops(engine.language_model))
        progress, health, saver = (
            starting_point(None, mix, recipe),
            StepHealth(1, None),
            Saver(engine, tokenizer, recipe, Processes(accelerator)),
        )
        steps = batches.training_steps(progress.position)
        alone, beside, stalls, writing = [], [], [], []

        def step(seconds: list[float]) -> None:
            begun = time.perf_counter()
            position, micro_batches = next(steps)
            grad_norm, _ = sft.train_step(engine, micro_batches, recipe, stats)
            stats.end_step()
            progress.advance(position, recipe.learning_rate, grad_norm)
            seconds.append(time.perf_counter() - begun)

        for _ in range(SAVES + 1):
            for _ in range(3):
                step(alone)
            begun = time.perf_counter()
            saver.save(run_state(recipe, mix, engine, progress, health), stats)
            stalls.append(time.perf_counter() - begun)
            while not saver.is_idle:
                step(beside)
            saver.wait()
            writing.append(time.perf_counter() - begun)
        size = sum(path.stat().st_size for path in Path(folder).rglob("checkpoint-*/**/*") if path.is_file())
        return {
            "step": median(alone[1:]),
            "stalls": stalls[1:],
            "first_stall": stalls[0],
            "step_beside": float(np.median(beside)) if beside else None,
            "written_after": median(writing[1:]),
            "bytes": size,
        }


def benchmark_checkpoint(model: str, rounds: int, trust_remote_code: bool = False) -> dict[str, list[dict]]:
    """Both kinds in turn, each in a process of its own."""
    figures: dict[str, list[dict]] = {"waited for": [], "behind": []}
    for _ in range(rounds):
        for kind, found in figures.items():
            found.append(in_a_process(measure_saving, model, kind == "behind", trust_remote_code))
    return figures


def checkpoint_table(figures: dict[str, list[dict]]) -> str:
    """Medians over the rounds, as Markdown."""
    lines = [
        "| save_in_background | training waits for a save | a step before | a step beside it | written after |",
        "|---|---|---|---|---|",
    ]
    for kind, found in figures.items():
        stall = median(stall for each in found for stall in each["stalls"])
        beside = median(each["step_beside"] for each in found) if found[0]["step_beside"] else None
        lines.append(
            f"| {str(kind == 'behind').lower()} | {stall:.3f} s | {median(each['step'] for each in found):.3f} s | "
            f"{f'{beside:.3f} s' if beside else ''} | {median(each['written_after'] for each in found):.2f} s |"
        )
    waited, behind = (median(stall for each in found for stall in each["stalls"]) for found in figures.values())
    size = figures["behind"][0]["bytes"] / 2**30
    first = median(each["first_stall"] for each in figures["behind"])
    return "\n".join(
        [
            *lines,
            "",
            f"A checkpoint of {size:.2f} GiB: {behind / waited:.1%} of the wait; the first, {first / waited:.1%}.",
        ]
    )
