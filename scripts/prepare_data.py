#!/usr/bin/env python3
"""Prepare a recipe's data mix once, and see exactly what will be learnt.

    python scripts/prepare_data.py recipes/stablelm7b_oasst.yaml                  # the table
    python scripts/prepare_data.py RECIPE --show 3 --dataset vicuna               # examples, token by token
    python scripts/prepare_data.py RECIPE --show_batch                            # the first training batch, collated
    python scripts/prepare_data.py RECIPE --export mix.jsonl.gz --plot lengths.png
    python scripts/prepare_data.py RECIPE --learning_rate 2e-5 ...                # any key, as for sft.py

sft.py prepares the same data by itself where they are not prepared yet; this is for looking first, or for preparing on
a machine without a GPU.
"""

import argparse

from recipe.command_line import parse_with_recipe, recipe_parser
from recipe.keys import Recipe
from recipe.load import load_recipe
from utils.command_line import positive
from utils.errors import UserError, one_line_errors


def arguments() -> tuple[argparse.Namespace, Recipe]:
    """This script's own options, and the recipe with what is left of the command line."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--show", type=positive, default=0, metavar="N", help="print N examples of each data set")
    parser.add_argument("--dataset", metavar="NAME", help="of this data set only")
    parser.add_argument("--show_batch", action="store_true", help="print the first training batch")
    parser.add_argument("--export", metavar="FILE", help="write every example, a JSON object a line")
    parser.add_argument("--plot", metavar="FILE", help="draw histograms of the lengths")
    options, recipe_file, overrides = parse_with_recipe(parser)
    recipe = load_recipe(recipe_file, overrides, for_a_run=True)
    if options.dataset is not None and options.dataset not in recipe.datasets.chosen():
        raise UserError(f"--dataset {options.dataset}: the mix has {', '.join(recipe.datasets.chosen())}")
    return options, recipe


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS, RECIPE = arguments()

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from rich.text import Text

from data.mix import Mix, prepare_mix
from training import contamination, plan
from training.collate import collate, cut, kept_targets, window_start
from training.loss_shares import loss_shares
from training.micro_batches import rows_of_step
from training.model import load_tokenizer
from utils.launch import num_processes
from utils.tables import counted, make_console, make_table, show_table

console = make_console()


def main(options: argparse.Namespace, recipe: Recipe) -> None:
    tokenizer = load_tokenizer(recipe)
    mix = prepare_mix(recipe, tokenizer)
    print_contamination(mix, recipe)
    mix = contamination.without_contamination(mix, recipe)
    print_tables(mix, recipe)
    if options.show:
        show_examples(mix, recipe, tokenizer, options.show, options.dataset)
    if options.show_batch:
        show_batch(mix, recipe, tokenizer)
    if options.export:
        export(mix, recipe, Path(options.export))
    if options.plot:
        plot_lengths(mix, recipe, Path(options.plot))


def print_tables(mix: Mix, recipe: Recipe) -> None:
    """What was read, dropped and kept of each data set; how long it is, and what it adds to an epoch."""
    read = make_table("rows", "data set", "read", "dropped", "train", "validation", "turns", "an epoch", "of the loss")
    title, cut_off = "tokens of the training conversations", f"over {recipe.max_length:,}"
    long = make_table(title, "data set", "tokens", "scored", "p50", "p90", "p99", "max", cut_off, "lost")
    rows = plan.training_rows(mix, recipe, epoch=0)
    of_loss = loss_shares(mix, recipe, kept_targets(mix.train, recipe, epoch=0), num_processes())
    for index, name in enumerate(mix.names):
        own, drawn = np.flatnonzero(mix.train.dataset == index), rows[mix.train.dataset[rows] == index]
        report, held_out = mix.reports[name], (mix.validation.dataset == index).sum()
        messages = mix.train.tables[index]["messages"].take(mix.train.position[own])
        turns = pc.sum(pc.list_value_length(messages)).as_py() or 0
        counts = report["rows_read"], sum(report["dropped"].values()), len(own), held_out, turns, len(drawn)
        read.add_row(name, *(f"{count:,}" for count in counts), f"{of_loss[index]:.1%}")

        lengths, scored = mix.train.lengths[own], mix.train.targets[own].sum() / mix.train.lengths[own].sum()
        percentiles = (f"{value:,.0f}" for value in np.percentile(lengths, [50, 90, 99, 100]))
        over = lengths[lengths > recipe.max_length] - recipe.max_length
        lost = f"{over.sum() / lengths.sum():.1%}"
        long.add_row(name, f"{lengths.sum():,}", f"{scored:.0%}", *percentiles, f"{len(over):,}", lost)
    show_table(read)
    for name in mix.names:
        report = mix.reports[name]
        for fields, count in report["used"].items():
            console.print(f"{name}: {count:,} made of {fields}")
        for reason, count in report["dropped"].items():
            console.print(f"{name}: dropped {counted(count, reason)}")
        for field, count in report["unused"].items():
            console.print(f"{name}: not used: {field!r} of {count:,}")
        if report["bad_records"]:
            count, first = report["bad_records"], report["first_bad_record"]
            console.print(f"{name}: left out {counted(count, 'record')} as bad, first: {first}")
    show_table(long)

    processes, steps = num_processes(), plan.steps_per_epoch(mix, recipe, num_processes())
    tokens = np.minimum(mix.train.lengths[rows], recipe.max_length).sum()
    step = f"{plan.describe_step(recipe, processes)} ({plan.describe_cut(recipe, processes)})"
    console.print(
        f"an epoch: {counted(len(rows), 'conversation')}, {tokens:,} tokens, {counted(steps, 'step')}, {step}"
    )
    if recipe.packing:
        console.print(plan.describe_packing(mix, recipe, processes))


def print_contamination(mix: Mix, recipe: Recipe) -> None:
    """Whether benchmark test items, or validation conversations, stand in the training split; a few of them as text."""
    for name in contamination.BENCHMARKS:
        questions = contamination.load_benchmark(name, recipe.cache_dir)
        if isinstance(questions, str):
            console.print(f"test questions in training: not looked for, since {questions}", soft_wrap=True)
        else:
            found = contamination.contaminated_rows(mix.train, questions)
            print_overlaps(f"training conversations with questions of {name} ({len(questions):,} items)", found, mix)
    found = contamination.duplicated_rows(mix.validation, mix.train)
    print_overlaps("validation conversations that also stand in training", found, mix)


def print_overlaps(what: str, found: contamination.Overlaps, mix: Mix) -> None:
    counts = ", ".join(f"{count:,} in {name}" for name, count in zip(mix.names, found.counts, strict=True) if count)
    exact = f" ({int(found.exact.sum()):,} exact; {counts})" if counts else ""
    console.print(f"contamination: {len(found):,} {what}{exact}", style="bold red" if counts else None)
    for sample in found.samples():
        console.print(f"  {sample}", style="dim")


def render(tokenizer, ids: np.ndarray, scored: np.ndarray) -> Text:
    """The tokens of an example, divided by |; the scored ones green and between [[ and ]]."""
    text = Text()
    for place, (token, is_scored) in enumerate(zip(ids.tolist(), scored.tolist(), strict=True)):
        before = scored[place - 1] if place else False
        after = scored[place + 1] if place + 1 < len(ids) else False
        shown = tokenizer.decode([token]).replace("\n", "\\n\n")
        text.append("[[" if is_scored and not before else "|" if place else "", style="dim")
        text.append(shown, style="bold green" if is_scored else "default")
        text.append("]]" if is_scored and not after else "", style="dim")
    return text


def weight_of(mix: Mix, row: int) -> str:
    """What each token of a training example counts in the loss, in words; none where all count the same."""
    return "" if mix.train.weights is None else f", weight {mix.train.weights[row]:g}"


def show_examples(mix: Mix, recipe: Recipe, tokenizer, count: int, dataset: str | None) -> None:
    """Print the first examples of each data set, or of one, as the first epoch sees them."""
    for index, name in enumerate(mix.names):
        for row in np.flatnonzero(mix.train.dataset == index)[:count] if dataset in (None, name) else []:
            ids, scored = cut(mix.train, row, recipe, epoch=0)
            title = f"{name}, row {row}: {len(ids):,} tokens, {scored.sum():,} scored{weight_of(mix, row)}"
            console.print(f"--- {title}", style="bold")
            console.print(render(tokenizer, ids, scored))


def show_batch(mix: Mix, recipe: Recipe, tokenizer) -> None:
    """Print the first micro-batch of the first process: where each conversation is from, its window, its positions, its
    tokens; and what is padding."""
    epoch = plan.epoch_plan(mix, recipe, epoch=0)
    rows = rows_of_step(epoch, epoch.tokens(mix, recipe), 0, recipe, num_processes())[0]
    batch = collate(mix.train, rows, recipe, tokenizer.pad_token_id, epoch=0)
    count, length = batch.input_ids.shape
    shape = counted(count, f"row of {length:,} tokens")
    padding = batch.input_ids.numel() - sum(batch.lengths)
    layout = f"{shape}, {padding:,} of them padding" if batch.boundaries is None else f"end to end, {shape}, no padding"
    packs = f" in {counted(int(np.isin(epoch.rows[epoch.bounds[:-1]], rows).sum()), 'pack')}" if recipe.packing else ""
    console.print(f"the first batch: {counted(len(rows), 'conversation')}{packs}, {layout}", style="bold")
    for row, (ids, scored) in zip(rows, batch.conversations(), strict=True):
        start, length = window_start(mix.train.tokens(row)[1], row, recipe, 0), len(ids)
        console.print(
            f"--- {mix.names[mix.train.dataset[row]]}, row {row}: tokens {start:,} to {start + length:,} of "
            f"{mix.train.lengths[row]:,} at positions 0 to {length - 1:,}, {int(scored.sum()):,} scored"
            f"{weight_of(mix, row)}",
            style="bold",
        )
        console.print(render(tokenizer, ids.numpy(), scored.numpy()))


def export(mix: Mix, recipe: Recipe, file: Path) -> None:
    """Write a JSON object a line for each example, cut to its first max_length tokens as validation is.

    dataset, split ("train", "validation"), messages, input_ids, labels (-100 where not scored; labels[i] belongs to
    input_ids[i], the model shifts); where the split has weights, weight: what each label counts in the loss.
    """
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "wt", encoding="utf-8") as out:
            for name, split in (("train", mix.train), ("validation", mix.validation)):
                for row in range(len(split)):
                    ids, scored = cut(split, row, recipe, epoch=None)
                    example = {
                        "dataset": mix.names[split.dataset[row]],
                        "split": name,
                        "messages": split.messages(row),
                        "input_ids": ids.tolist(),
                        "labels": np.where(scored, ids, -100).tolist(),
                    }
                    if split.weights is not None:
                        example["weight"] = split.weights[row]
                    out.write(json.dumps(example, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--export {file}: cannot write there: {error.strerror}") from error
    console.print(f"{len(mix.train) + len(mix.validation):,} examples written to {file}")


def plot_lengths(mix: Mix, recipe: Recipe, file: Path) -> None:
    """Draw a histogram of each data set's lengths, with max_length."""
    from matplotlib.figure import Figure

    figure = Figure((10, 2.2 * len(mix.names)), layout="tight")
    axes = figure.subplots(len(mix.names), sharex=True, squeeze=False)
    bins = np.geomspace(1, mix.train.lengths.max() + 1, 80)
    for index, (name, axis) in enumerate(zip(mix.names, axes[:, 0], strict=True)):
        axis.hist(mix.train.lengths[mix.train.dataset == index], bins=bins)
        axis.axvline(recipe.max_length, color="black", linestyle="--", linewidth=1)
        axis.set(title=name, xscale="log", ylabel="conversations")
    axes[-1, 0].set_xlabel(f"tokens (dashed: max_length {recipe.max_length:,})")
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {file}: cannot write there: {error}") from error
    console.print(f"histograms written to {file}")


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS, RECIPE)
