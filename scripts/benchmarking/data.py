"""`benchmark.py data`: preparing a mix, next to TRL's preparation of the same conversations."""

import os
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml

from benchmarking.measuring import in_a_process
from recipe.keys import Recipe
from recipe.load import load_recipe
from utils.tables import progress_bar


def measure_ours(recipe_file: str) -> dict:
    """Prepare the mix, or open it where it is prepared; and prepare it once more, with the libraries warm."""
    recipe = load_recipe(recipe_file)
    started = time.perf_counter()
    from data.mix import prepare_mix
    from training.model import load_tokenizer

    libraries = time.perf_counter() - started  # the part of a start that no cache can save
    tokenizer = load_tokenizer(recipe)
    started = time.perf_counter()
    mix = prepare_mix(recipe, tokenizer)
    first = time.perf_counter() - started
    tokens = int(mix.train.lengths.sum() + mix.validation.lengths.sum())
    work = {"conversations": len(mix.train) + len(mix.validation), "tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prepare_mix(recipe.model_copy(update={"cache_dir": Path(folder)}), tokenizer)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "first_seconds": first, **work, "libraries": libraries}


def measure_trl(recipe_file: str, processes: int | None = None) -> dict:
    """What SFTTrainer's constructor takes longer with all conversations than with one."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, GPTNeoXConfig
    from trl import SFTConfig, SFTTrainer

    from data.mix import prepare_mix
    from training.model import load_tokenizer

    disable_progress_bars()
    recipe = load_recipe(recipe_file)
    tokenizer = load_tokenizer(recipe)
    mix = prepare_mix(recipe, tokenizer)
    rows = [{"messages": split.messages(row)} for split in (mix.train, mix.validation) for row in range(len(split))]
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=len(tokenizer), **tiny), dtype=torch.float32)

    def construct(chosen: list[dict]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            preparation = {"max_length": recipe.max_length, "assistant_only_loss": True, "dataset_num_proc": processes}
            settings = SFTConfig(output_dir=folder, report_to=[], use_cpu=True, bf16=False, **preparation)
            data = Dataset.from_list(chosen)
            started = time.perf_counter()
            SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
            return time.perf_counter() - started

    one = construct(rows[:1])
    tokens = int(mix.train.lengths.sum() + mix.validation.lengths.sum())
    return {"seconds": construct(rows) - one, "conversations": len(rows), "tokens": tokens}


def measure_trl_all_cores(recipe_file: str) -> dict:
    """The same with a process on each core."""
    return measure_trl(recipe_file, processes=os.cpu_count())


def benchmark_data(recipe: Recipe, rounds: int) -> dict[str, list[dict]]:
    """The figures of every round; each starts with nothing prepared."""
    from data.files import source_files

    measures = {"cold": measure_ours, "trl": measure_trl, "cached": measure_ours}  # "cached" finds what "cold" leaves
    measures["trl_all_cores"] = measure_trl_all_cores
    figures: dict[str, list[dict]] = {name: [] for name in measures}
    values = yaml.safe_load(recipe.to_yaml())
    for entry in values["datasets"]:  # the files where they are, since cache_dir becomes an empty folder
        ((name, given),) = entry.items()
        given["input_file_path"] = [str(path.absolute()) for path in source_files(name, recipe)]
        for option in given.keys() & {"hub_name", "config", "data_files"}:
            given[option] = None
    for _ in progress_bar(range(rounds), desc="rounds"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "recipe.yaml")
            file.write_text(yaml.safe_dump({**values, "cache_dir": folder}))
            for name, measure in measures.items():
                figures[name].append(in_a_process(measure, str(file)))
    return figures


def data_table(figures: dict[str, list[dict]]) -> str:
    """Medians over the rounds as a Markdown table, and the ratio to the better of TRL's two settings."""

    def rates(name: str, unit: str, seconds: str = "seconds") -> list[float]:
        return [figure[unit] / figure[seconds] for figure in figures[name]]

    labels = {
        "this collection, from the files": ("cold", "seconds"),
        "the same as a process's first work, with all that is done but once": ("cold", "first_seconds"),
        "TRL, one process": ("trl", "seconds"),
        "TRL, a process on each core": ("trl_all_cores", "seconds"),
    }
    lines = ["| preparation | conversations a second (range) | tokens a second |", "|---|---|---|"]
    for label, (name, which) in labels.items():
        seen, tokens = rates(name, "conversations", which), median(rates(name, "tokens", which))
        lines.append(f"| {label} | {median(seen):,.0f} ({min(seen):,.0f} to {max(seen):,.0f}) | {tokens:,.0f} |")
    best = max(("trl", "trl_all_cores"), key=lambda name: median(rates(name, "tokens")))
    ratio = median(a / b for a, b in zip(rates("cold", "tokens"), rates(best, "tokens"), strict=True))
    start = median(figure["first_seconds"] for figure in figures["cached"])
    imports = median(figure["libraries"] for figure in figures["cached"])
    work = figures["cold"][0]
    lines += [
        "",
        f"{work['conversations']:,} conversations, {work['tokens']:,} tokens, {len(figures['cold'])} rounds: "
        f"{ratio:.1f} times TRL's best (medians).",
        f"A start that finds them prepared takes {start:.2f} s more than importing the libraries ({imports:.1f} s).",
    ]
    return "\n".join(lines)
