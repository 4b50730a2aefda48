#!/usr/bin/env python3
"""Measure this collection next to its peers, on the same work in the same run.

    python scripts/benchmark.py data RECIPE [--rounds 3] [--json FILE] [--key value ...]

`data`: tokens and conversations a second of a cold preparation, and the seconds of a start that finds it done, next to
TRL's own preparation of the same conversations (SFTTrainer with assistant_only_loss and our chat template, the
better of one and of all cores). Ours starts from the data files, with reading, filtering and splitting; TRL from the
conversations in memory. Each measurement is a process of its own; the two alternate.

TRL is in requirements-dev.txt. RECIPE is any recipe whose data files are on this machine.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from utils.errors import UserError, one_line_errors
from utils.recipe import Recipe, load_recipe, recipe_from_command_line


def measure_libraries(recipe: Recipe) -> dict:
    """Import what a start needs; the part of a start that no cache can save."""
    started = time.perf_counter()
    import utils.mix
    import utils.model  # noqa: F401

    return {"seconds": time.perf_counter() - started}


def measure_ours(recipe: Recipe) -> dict:
    """Prepare the mix, or open it where it is prepared."""
    libraries = measure_libraries(recipe)["seconds"]
    from utils.mix import prepare_mix
    from utils.model import load_tokenizer

    tokenizer = load_tokenizer(recipe)
    started = time.perf_counter()
    mix = prepare_mix(recipe, tokenizer)
    seconds = time.perf_counter() - started
    tokens = int(mix.train.lengths.sum() + mix.validation.lengths.sum())
    conversations = len(mix.train) + len(mix.validation)
    return {"seconds": seconds, "conversations": conversations, "tokens": tokens, "libraries": libraries}


def measure_trl(recipe: Recipe, processes: int | None = None) -> dict:
    """What SFTTrainer's constructor takes longer with all conversations than with one."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, GPTNeoXConfig
    from trl import SFTConfig, SFTTrainer

    from utils.mix import prepare_mix
    from utils.model import load_tokenizer

    disable_progress_bars()
    tokenizer = load_tokenizer(recipe)
    mix = prepare_mix(recipe, tokenizer)
    rows = [{"messages": split.messages(row)} for split in (mix.train, mix.validation) for row in range(len(split))]
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=len(tokenizer), **tiny), dtype=torch.float32)

    def construct(chosen: list[dict]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(
                output_dir=folder,
                max_length=recipe.max_length,
                assistant_only_loss=True,
                dataset_num_proc=processes,
                report_to=[],
                use_cpu=True,
                bf16=False,
            )
            data = Dataset.from_list(chosen)
            started = time.perf_counter()
            SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
            return time.perf_counter() - started

    one = construct(rows[:1])
    tokens = int(mix.train.lengths.sum() + mix.validation.lengths.sum())
    return {"seconds": construct(rows) - one, "conversations": len(rows), "tokens": tokens}


MEASURES = {
    "libraries": measure_libraries,
    "ours": measure_ours,
    "trl": measure_trl,
    "trl_all_cores": lambda recipe: measure_trl(recipe, processes=os.cpu_count()),
}


def in_a_process(measure: str, recipe_file: Path) -> dict:
    """Run one measurement in a fresh process and return its figures."""
    command = [sys.executable, __file__, "measure", measure, str(recipe_file)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"benchmark: measuring {measure} failed: {reason}")
    return json.loads(process.stdout.splitlines()[-1])


def benchmark_data(recipe: Recipe, rounds: int) -> dict[str, list[dict]]:
    """The figures of every round; each starts with nothing prepared."""
    from utils.data_files import find_data_file
    from utils.sources import find_source

    figures: dict[str, list[dict]] = {name: [] for name in ("cold", "cached", "trl", "trl_all_cores")}
    values = yaml.safe_load(recipe.to_yaml())
    for entry in values["datasets"]:  # the files where they are, since cache_dir becomes an empty folder
        ((name, given),) = entry.items()
        options = recipe.datasets.chosen()[name]
        hub = find_source(name, options).hub
        paths = find_data_file(name, options.input_file_path, recipe.cache_dir, options.revision, hub)
        given["input_file_path"] = str(paths[0].resolve())
    for _ in tqdm(range(rounds), desc="rounds"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "recipe.yaml")
            file.write_text(yaml.safe_dump({**values, "cache_dir": folder}))
            for name, measure in (("cold", "ours"), ("trl", "trl"), ("cached", "ours"), ("trl_all_cores",) * 2):
                figures[name].append(in_a_process(measure, file))
    return figures


def data_table(figures: dict[str, list[dict]]) -> str:
    """Medians over the rounds as a Markdown table, and the ratio to the better of TRL's two settings."""

    def rates(name: str, unit: str) -> list[float]:
        return [figure[unit] / figure["seconds"] for figure in figures[name]]

    labels = {
        "cold": "this collection, from the files",
        "trl": "TRL, one process",
        "trl_all_cores": "TRL, a process on each core",
    }
    lines = ["| preparation | conversations a second (range) | tokens a second |", "|---|---|---|"]
    for name, label in labels.items():
        seen, tokens = rates(name, "conversations"), statistics.median(rates(name, "tokens"))
        lines.append(
            f"| {label} | {statistics.median(seen):,.0f} ({min(seen):,.0f} to {max(seen):,.0f}) | {tokens:,.0f} |"
        )
    best = max(("trl", "trl_all_cores"), key=lambda name: statistics.median(rates(name, "tokens")))
    ratio = statistics.median(a / b for a, b in zip(rates("cold", "tokens"), rates(best, "tokens"), strict=True))
    start = statistics.median(figure["seconds"] for figure in figures["cached"])
    imports = statistics.median(figure["libraries"] for figure in figures["cached"])
    work = figures["cold"][0]
    lines += [
        "",
        f"{work['conversations']:,} conversations, {work['tokens']:,} tokens, {len(figures['cold'])} rounds: "
        f"{ratio:.1f} times TRL's best (medians).",
        f"A start that finds them prepared takes {start:.2f} s more than importing the libraries ({imports:.1f} s).",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["measure"]:
        print(json.dumps(MEASURES[arguments[1]](load_recipe(arguments[2]))))
        return
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("what", nargs="?", choices=["data"])
    own.add_argument("--rounds", type=int, default=3)
    own.add_argument("--json", type=Path)
    options, rest = own.parse_known_args(arguments)
    recipe = recipe_from_command_line(__doc__, rest).recipe
    figures = benchmark_data(recipe, options.rounds)
    table = data_table(figures)
    print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "table": table, "figures": figures}, indent=1) + "\n")


def machine() -> dict:
    """What the figures were measured on, and with which libraries."""
    libraries = ("torch", "transformers", "tokenizers", "fastokens", "datasets", "trl")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
