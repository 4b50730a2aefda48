#!/usr/bin/env python3
"""Measure this collection next to its peers, on the same work in the same run.

    python scripts/benchmark.py data RECIPE [--rounds 3] [--json FILE] [--key value ...]
    python scripts/benchmark.py train RECIPE [--rounds 3] [--conversations 160] [--json FILE] [--key value ...]
    python scripts/benchmark.py train --gpu 3b [--rounds 3] [--layers 16] [--json FILE]
    python scripts/benchmark.py scaling [--gpu 3b] [--layers 16] [--rounds 3] [--json FILE] [--plot FILE.png]
    python scripts/benchmark.py attention [--gpu 3b] [--layers 16] [--json FILE]
    python scripts/benchmark.py gpu --out DIR [--minutes 8] [--rehearse]
    python scripts/benchmark.py roofline --gpu 3b [--tokens 4096] [--layers 16] [--json FILE]
    python scripts/benchmark.py chat CHECKPOINT [--rounds 3] [--json FILE] [--trust_remote_code]
    python scripts/benchmark.py checkpoint MODEL [--rounds 3] [--json FILE] [--trust_remote_code]
    [accelerate launch ...] scripts/benchmark.py balance RECIPE [--json FILE] [--key value ...]

`data`: tokens and conversations a second of a cold preparation, and the seconds of a start that finds it done, next to
TRL's own preparation of the same conversations (SFTTrainer with assistant_only_loss and our chat template, the
better of one and of all cores). Ours starts from the data files, with reading, filtering and splitting; TRL from the
conversations in memory. What is done but once (loading libraries and the tokenizer) counts for neither; ours is given
with it, too.

`train`: optimizer steps on the recipe's first conversations, a 4-layer GPT-NeoX 256 wide with StableLM's vocabulary in
fp32, batches of 4 x 2: this trainer, TRL's SFTTrainer padded and padding-free (which its documentation supports with
flash-attn only; it runs with SDPA, too, and its losses are right), a bare loop. With --gpu a StableLM shape
(3b or 7b, bf16, random weights and tokens, --layers of it), which needs no data: what cannot be imported is said in the
table.

`scaling`: this trainer's tokens a second against max_length and against the conversations in a micro-batch.

`attention`: how far every layer's output is from fp32, for each implementation and dtype that runs here.

`gpu`: all that is worth knowing of a machine with a GPU in one go, the most valuable first: its ceilings, how exact
each path is, real runs, the contenders on a StableLM 3B shape, profiles. DIR/gpu.md and gpu.json are written after
each part. --rehearse does all of it on a CPU, with tiny shapes.

`roofline`: without a GPU, the milliseconds of a step of a StableLM shape on an H100 that reaches given rates, by part,
tokens a second, MFU and peak memory, from a trace of the real step; for each setting of a recipe that changes them.

`chat`: seconds to the first token and tokens a second of chat.py's replies, next to a bare `generate` for the same
prompt.

`checkpoint`: how long training waits for a checkpoint of a model that is trained plainly, with save_in_background and
without, and what a step takes while one is written.

`balance`: tokens of a micro-batch, and the share of their time that 1, 2, 4 and 8 processes wait for the slowest, with
a recipe's steps cut by conversations and by tokens (micro_batch_tokens), counted from its plan. Where a launcher starts
several processes, the time of 12 steps of the small model of `train` on them, by either cut in turn.

Each measurement is a process of its own; contenders alternate. TRL is in requirements-dev.txt. RECIPE is any
recipe whose data files are on this machine.
"""

import argparse
import json
import os
from pathlib import Path

from evaluation.model import find_model
from recipe.command_line import parse_with_recipe, recipe_parser
from recipe.keys import Recipe
from recipe.load import load_recipe
from utils.command_line import positive
from utils.errors import UserError, one_line_errors

# What each option is for, and its value where none is given.
TAKEN_BY = {
    "rounds": ("data", "train", "scaling", "chat", "checkpoint"),
    "conversations": ("train",),
    "gpu": ("train", "scaling", "attention", "roofline"),
    "layers": ("train", "scaling", "attention", "roofline"),
    "tokens": ("roofline",),
    "plot": ("scaling",),
    "json": ("data", "train", "scaling", "attention", "roofline", "chat", "checkpoint", "balance"),
    "out": ("gpu",),
    "minutes": ("gpu",),
    "rehearse": ("gpu",),
}
OF_A_MODEL = {"chat": "CHECKPOINT", "checkpoint": "MODEL"}
DEFAULTS = {"rounds": 3, "tokens": 4096, "minutes": 8, "rehearse": False}


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.usage = None
    parser.add_argument("what", choices=[*BENCHMARKS])
    parser.add_argument("--rounds", type=positive, metavar="N", help="of the contenders, taking turns (3)")
    parser.add_argument("--conversations", type=positive, metavar="N", help="of the recipe (160)")
    parser.add_argument("--gpu", choices=["3b", "7b"], help="a StableLM shape in place of a recipe")
    parser.add_argument("--layers", type=positive, metavar="N", help="of that shape")
    parser.add_argument("--tokens", type=positive, metavar="N", help="of a micro-batch (4096)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured, and on what")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where gpu.md and gpu.json go")
    parser.add_argument("--minutes", type=positive, metavar="N", help="after which nothing more is begun (8)")
    parser.add_argument("--rehearse", action="store_const", const=True, help="on a CPU, with tiny shapes")
    options, recipe_file, overrides = parse_with_recipe(parser)
    recipe = None
    if options.what in ("data", "balance") or (options.what == "train" and not options.gpu):
        recipe = load_recipe(recipe_file, overrides)
    elif options.what in OF_A_MODEL and recipe_file and overrides in ({}, {"trust_remote_code": "true"}):
        options.model, options.trust_remote_code = find_model(recipe_file).name, bool(overrides)
    elif options.what not in OF_A_MODEL and (recipe_file or overrides):
        raise UserError(f"command line: {options.what} takes no {recipe_file or '--' + next(iter(overrides))}")
    check_options(options)
    result = BENCHMARKS[options.what](options, recipe)
    if result and int(os.environ.get("RANK", 0)) == 0:
        write_json(options, *result)
        print(result[0])


def check_options(options: argparse.Namespace) -> None:
    """UserError for what does not go together or cannot run here; fills in what was not given."""
    for name, where in TAKEN_BY.items():
        if getattr(options, name) is not None and options.what not in where:
            raise UserError(f"command line: --{name} is for {', '.join(where)}")
    if options.gpu and options.conversations:
        raise UserError("command line: --conversations is of a recipe, --gpu makes its own")
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"command line: --json {options.json}: there is no folder {options.json.parent}")
    if options.what == "roofline" and not options.gpu:
        raise UserError("command line: roofline needs --gpu 3b or 7b")
    if options.what in OF_A_MODEL and not hasattr(options, "model"):
        takes = f"{options.what} needs a {OF_A_MODEL[options.what]}, and takes no key but --trust_remote_code"
        raise UserError(f"command line: {takes}")
    if options.what == "gpu" and not options.out:
        raise UserError("command line: gpu needs --out DIR")
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.gpu and options.what != "roofline":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"command line: --gpu {options.gpu}: there is no GPU")
        if options.what in ("train", "scaling"):
            from benchmarking.train import check_fits

            check_fits(options.gpu, options.layers)


def write_json(options: argparse.Namespace, table: str, figures: dict) -> None:
    """What was measured, and on what, to --json."""
    if options.json:
        from benchmarking.measuring import machine

        asked = {name: value for name, value in vars(options).items() if name not in ("json", "plot", "out")}
        result = {"machine": machine(), "options": asked, "table": table, **figures}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


# ---- Each returns its table and what goes into the JSON; imports come late, since --help must not wait for them ----


def data(options: argparse.Namespace, recipe: Recipe):
    from benchmarking.data import benchmark_data, data_table

    figures = benchmark_data(recipe, options.rounds)
    return data_table(figures), {"figures": figures}


def train(options: argparse.Namespace, recipe: Recipe | None):
    from benchmarking.train import benchmark_train, gpu_works, recipe_work, train_table

    works = recipe_work(recipe, options.conversations or 160) if recipe else gpu_works(options.gpu, options.layers)
    figures, table = {}, ""
    for what, work in works.items():
        figures[what] = benchmark_train(work, options.rounds)
        table = "\n\n".join(f"{name}:\n\n{train_table(measured)}" for name, measured in figures.items())
        write_json(options, table, {"figures": figures})  # before the next, for which time may not suffice
    return table, {"figures": figures}


def scaling(options: argparse.Namespace, _):
    from benchmarking.scaling import benchmark_scaling, plot_scaling, scaling_table

    figures = benchmark_scaling(options.gpu, options.layers, options.rounds)
    if options.plot:
        plot_scaling(figures, options.plot)
    return scaling_table(figures), {"figures": figures}


def attention(options: argparse.Namespace, _):
    from benchmarking.attention import attention_table, benchmark_attention

    figures = benchmark_attention(options.gpu, options.layers)
    return attention_table(figures), {"figures": figures}


def gpu(options: argparse.Namespace, _) -> None:
    from benchmarking.gpu import benchmark_gpu

    benchmark_gpu(options.out, options.minutes, options.rehearse)


def roofline(options: argparse.Namespace, _):
    from benchmarking.roofline import benchmark_roofline, roofline_table

    figures = benchmark_roofline(options.gpu, options.layers, options.tokens)
    return roofline_table(figures), figures


def chat(options: argparse.Namespace, _):
    from benchmarking.chat import benchmark_chat, chat_table

    figures = benchmark_chat(options.model, options.rounds, options.trust_remote_code)
    return chat_table(figures), {"figures": figures}


def checkpoint(options: argparse.Namespace, _):
    from benchmarking.checkpoint import benchmark_checkpoint, checkpoint_table

    figures = benchmark_checkpoint(options.model, options.rounds, options.trust_remote_code)
    return checkpoint_table(figures), {"figures": figures}


def balance(options: argparse.Namespace, recipe: Recipe):
    from benchmarking.balance import balance_table, benchmark_balance, measure_balance, measured_table
    from utils.launch import num_processes

    several = num_processes() > 1
    figures = measure_balance(recipe) if several else benchmark_balance(recipe)
    return (measured_table if several else balance_table)(figures), {"figures": figures}


BENCHMARKS = {
    each.__name__: each for each in (data, train, scaling, attention, gpu, roofline, chat, checkpoint, balance)
}

if __name__ == "__main__":
    with one_line_errors():
        main()
