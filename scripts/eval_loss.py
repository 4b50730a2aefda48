#!/usr/bin/env python3
"""Loss, perplexity and token accuracy of a checkpoint on the validation split of its recipe's mix.

    python scripts/eval_loss.py stablelm_7b/checkpoint-12000
    accelerate launch scripts/eval_loss.py stablelm_7b --datasets.vicuna.max_val_set 50     # any key, as for sft.py
    python scripts/eval_loss.py stabilityai/stablelm-base-alpha-7b --recipe recipes/mine.yaml --output base

The figures are those of sft.py's own evaluation: the same conversations, cut the same way, every scored token counted
once, in the recipe's dtype. Each stands with its 95 % interval, from a bootstrap of the conversations within each data
set (those with the same first message, as the threads of one Open-Assistant tree, are drawn together). By data set, by
turn (1st reply, 2nd, ...) and by language where the data say it.

A model without the chat tokens (with --recipe) gets them as sft.py gives them, so that it can be compared with what it
became. The result is CHECKPOINT/eval/loss.json; an evaluation that was interrupted goes on where it stopped.
"""

from dataclasses import replace

from evaluation.model import evaluation_parser, find_model
from recipe.command_line import describe_keys, parse_with_recipe
from recipe.load import load_recipe
from utils.errors import UserError, one_line_errors


def arguments():
    """This script's own options, the checkpoint, and its recipe with what is left of the command line."""
    parser = evaluation_parser(__doc__)
    parser.add_argument("--recipe", metavar="FILE", help="in place of the one beside the checkpoint")
    parser.epilog = f"Keys of the recipe, each also an option:\n{describe_keys()}"
    options, unknown, overrides = parse_with_recipe(parser)
    if unknown:
        raise UserError(f"command line: {unknown}: one checkpoint at a time (--help shows how)")
    checkpoint = find_model(options.checkpoint)
    recipe_file = options.recipe or checkpoint.recipe_file
    if recipe_file is None:
        lacks = "no recipe.yaml beside it: give --recipe FILE, which says on what to evaluate"
        raise UserError(f"{checkpoint.name}: {lacks}")
    if options.dtype:
        overrides["dtype"] = options.dtype
    if options.batch_size:
        overrides |= {"per_device_eval_batch_size": str(options.batch_size), "micro_batch_tokens": "null"}
    recipe = load_recipe(recipe_file, {"trust_remote_code": "false"} | overrides)
    return options, replace(checkpoint, trust_remote_code=recipe.trust_remote_code), recipe


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS, CHECKPOINT, RECIPE = arguments()

import math
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from rich.table import Table
from transformers import AutoTokenizer

from data.dialogue import ASSISTANT, CHAT_TOKENS
from data.files import source_files
from data.mix import Mix, prepare_mix
from data.reading import Reading
from evaluation.chat_model import load_chat_tokenizer
from evaluation.intervals import RESAMPLES, interval, item_columns, resampled_sums
from evaluation.results import Evaluation, digest, metric, start_processes
from recipe.keys import Recipe
from run.record_file import read_record
from sources.source import keys_that_change
from training.batches import Batches
from training.collate import cut
from training.loss import ScoredLoss
from training.model import load_config, load_model, load_tokenizer
from training.pretrained import load_pretrained
from utils.launch import set_up_process, training_dtype
from utils.tables import make_table, progress_bar, show_table

LAST_TURN = 5  # later replies are counted with it


def main(options, checkpoint, recipe: Recipe) -> None:
    set_up_process()
    if not options.recipe:
        load_chat_tokenizer(checkpoint)  # a run's checkpoint has all of it, or is damaged
    instead = {"model_name": checkpoint.name, "from_scratch": False, "gradient_checkpointing": False}
    instead |= {"use_peft": False, "load_in_4bit": False}  # an adapter is merged as it is loaded
    recipe = recipe.model_copy(update=instead)
    config, tokenizer = load_config(recipe), load_tokenizer(recipe)
    # Data first, as in sft.py: no process group exists yet that could time out.
    mix = prepare_mix(recipe, tokenizer)
    if not len(mix.validation):
        nothing = "the recipe holds out no conversation (val_split 0 everywhere)"
        raise UserError(f"{nothing}: there is nothing to evaluate on")

    # As in sft.py: fp32 weights under autocast, or weights in half precision as DeepSpeed left them.
    dtype = training_dtype(recipe.dtype)
    stored = dtype if dtype == torch.float32 else config.dtype or torch.float32
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype) if stored == torch.float32 else None
    accelerator = start_processes(mixed_precision=half or "no")
    set_seed(recipe.rng_seed)  # the embedding rows of chat tokens that a base model lacks are drawn as in sft.py
    model = load_model(recipe, config, tokenizer, torch.float32 if half else dtype).to(accelerator.device)
    settings = recipe.model_dump(mode="json", include=keys_that_change("evaluation", Recipe))
    settings["datasets"] = {
        name: options.model_dump(mode="json", include=keys_that_change("evaluation", type(options)))
        for name, options in recipe.datasets.chosen().items()
    }
    settings |= {"data": mix.fingerprints, "resamples": RESAMPLES}
    evaluation = Evaluation(accelerator, checkpoint, "loss", settings, options.output)
    own_tokens = load_pretrained(AutoTokenizer, checkpoint.name, "", recipe.trust_remote_code).get_vocab()
    if missing := [token for token in CHAT_TOKENS if token not in own_tokens]:
        lacks = " ".join(missing)
        evaluation.warn(f"it lacks {lacks}: added with embeddings that were never trained, as sft.py starts")

    if not options.recipe and (changed := changed_data(checkpoint.recipe_file.with_name("run.json"), mix)):
        evaluation.warn(
            f"the data of {', '.join(changed)} are not those that the run had: other conversations are held out, and "
            "it may have been trained on some of them"
        )

    conversations = describe_conversations(mix, recipe)
    rows = [conversation["row"] for key, conversation in conversations.items() if key not in evaluation.done]
    measure(evaluation, ScoredLoss(model, recipe).eval(), mix, recipe, tokenizer, rows)
    measured = evaluation.gather()
    items = {key: conversation | measured[key] for key, conversation in conversations.items()}
    results, table = summarize(list(items.values()), mix.names, recipe)
    if accelerator.is_main_process:
        show_table(table)
    evaluation.write(results, items=items)
    accelerator.end_training()


# ---- The conversations ----


def changed_data(record: Path, mix: Mix) -> list[str]:
    """Names of the data sets that are other ones than a run's, by its run.json; none where that does not say."""
    try:
        data = read_record(record)["data"] or {}
    except (UserError, KeyError):
        return []
    then = {name: described.get("fingerprint") for name, described in data.items()}
    return [name for name, now in mix.fingerprints.items() if then.get(name, now) != now]


def describe_conversations(mix: Mix, recipe: Recipe) -> dict[str, dict]:
    """What is known of each validation conversation before it is measured, by `conversation_key`.

    Returns: {key: {"dataset", "row": of the validation split, "group": of its first message, "times": how often the
        split holds it, "lang": where the data say it}}.
    """
    language_of = languages(recipe)
    found: dict[str, dict] = {}
    for row in range(len(mix.validation)):
        name = mix.names[mix.validation.dataset[row]]
        key = conversation_key(name, *cut(mix.validation, row, recipe, epoch=None))
        if key in found:
            found[key]["times"] += 1
            continue
        messages = mix.validation.messages(row)
        first = next(message["content"] for message in messages if message["role"] == "user")
        found[key] = {"dataset": name, "row": row, "group": f"{name} {digest(first)}", "times": 1}
        if lang := language_of.get((name, digest(repr(messages)))):
            found[key]["lang"] = lang
    return found


def conversation_key(name: str, ids: np.ndarray, scored: np.ndarray) -> str:
    """A name for a conversation that is the same in every run that scores the same tokens of it."""
    return f"{name} {digest(ids.astype(np.int32).tobytes() + scored.astype(bool).tobytes())}"


def languages(recipe: Recipe) -> dict[tuple[str, str], str]:
    """The language of each conversation of the sources that say it, by data set and the hash of its messages.

    The prepared data do not keep it, so the files are read once more.
    """
    found = {}
    for name, options in recipe.datasets.chosen().items():
        if not hasattr(options, "lang"):
            continue
        for conversation in Reading(name, options, source_files(name, recipe), recipe.rng_seed):
            spoken = [message.properties["lang"] for message in conversation.messages if "lang" in message.properties]
            if spoken:
                found[name, digest(repr(conversation.as_dicts()))] = spoken[0]
    return found


# ---- Measuring them ----


@torch.inference_mode()
def measure(evaluation: Evaluation, model: ScoredLoss, mix: Mix, recipe: Recipe, tokenizer, rows: list[int]) -> None:
    """Add to the evaluation, for each conversation of these rows: `loss`, summed over its scored tokens, `correct`,
    how many of them the model finds likeliest, and `targets`, how many there are; and the three of each turn."""
    accelerator = evaluation.accelerator
    left = replace(mix, validation=mix.validation.select(np.array(rows, dtype=np.int64)))
    batches = Batches(left, recipe, accelerator.process_index, accelerator.num_processes, tokenizer.pad_token_id)
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    quiet = not accelerator.is_main_process
    progress = progress_bar(total=len(rows), desc="evaluating", unit="conversation", disable=quiet)
    for index, name in enumerate(mix.names):
        for batch in batches.validation(index):
            with accelerator.autocast():
                _, losses, predictions = model(batch.to(accelerator.device))
            right = (predictions.cpu() == batch.targets).double()
            conversations = [(ids.numpy(), is_target.numpy()) for ids, is_target in batch.conversations()]
            sizes = [int(is_target.sum()) for _, is_target in conversations]
            parts = zip(conversations, losses.double().cpu().split(sizes), right.split(sizes), strict=True)
            for (ids, is_target), loss, correct in parts:
                turn = np.minimum(np.cumsum(ids == assistant)[is_target], LAST_TURN)
                chosen = {"": turn >= 0} | {f"_turn_{number}": turn == number for number in np.unique(turn).tolist()}
                result = {}
                for ending, own in chosen.items():
                    result[f"loss{ending}"] = float(loss.numpy()[own].sum())
                    result[f"correct{ending}"] = float(correct.numpy()[own].sum())
                    result[f"targets{ending}"] = float(own.sum())
                evaluation.add(conversation_key(name, ids, is_target), result)
            progress.update(min(len(batch.lengths) * accelerator.num_processes, len(rows) - progress.n))
    progress.close()


# ---- What they come to ----


def summarize(items: list[dict], names: list[str], recipe: Recipe) -> tuple[dict[str, dict], Table]:
    """The figures of all, of each data set, language and turn, with their intervals; and the table of them."""
    # For each part the ending of the items' fields, and which items.
    parts = {"all": ("", {})} | {name: ("", {"dataset": name}) for name in names}
    for lang in sorted({item["lang"] for item in items if "lang" in item}):
        parts[f"language {lang}"] = "", {"lang": lang}
    if recipe.label_masking:  # else a prompt counts, too, with the reply before it
        for turn in range(1, LAST_TURN + 1):
            parts[f"turn {turn}{' on' * (turn == LAST_TURN)}"] = f"_turn_{turn}", {}
    columns = {}
    for label, (ending, where) in parts.items():
        part = item_columns(items, [f"loss{ending}", f"correct{ending}", f"targets{ending}"], where)
        if part[:, 2].any():
            columns[label] = part
    drawn = resampled_sums(items, np.concatenate(list(columns.values()), axis=1), recipe.rng_seed)

    results: dict[str, dict] = {}
    titles = ("conversations", "tokens", "loss", "95 %", "perplexity", "token accuracy", "95 %")
    table = make_table("validation split", "", *titles)
    for number, (label, part) in enumerate(columns.items()):
        (loss, correct, targets), samples = part.sum(0), drawn[:, 3 * number : 3 * number + 3].T
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no conversation of a small part
            losses, shares = interval(samples[0] / samples[2]), interval(samples[1] / samples[2])
        count = sum(item["times"] for item, scored in zip(items, part[:, 2], strict=True) if scored)
        suffix, (ending, where) = "" if label == "all" else f"/{label}", parts[label]
        mean, share = loss / targets, correct / targets
        of = {"ratio": [f"loss{ending}", f"targets{ending}"], "where": where}
        exp = tuple(bound and perplexity(bound) for bound in losses)
        results[f"loss{suffix}"] = metric(mean, losses, "lower", count, targets=int(targets), **of)
        results[f"perplexity{suffix}"] = metric(perplexity(mean), exp, "lower", count, exp=True, **of)
        of = {"ratio": [f"correct{ending}", f"targets{ending}"], "where": where}
        results[f"accuracy{suffix}"] = metric(share, shares, "higher", count, **of)
        counts = f"{count:,}", f"{int(targets):,}"
        of_loss = "" if losses[0] is None else f"{losses[0]:.4f} to {losses[1]:.4f}"
        of_share = "" if shares[0] is None else f"{shares[0]:.2%} to {shares[1]:.2%}"
        table.add_row(label, *counts, f"{mean:.4f}", of_loss, f"{perplexity(mean):,.2f}", f"{share:.2%}", of_share)
    return results, table


def perplexity(loss: float) -> float:
    """e to the power of a loss, up to what a number in JSON can be (a model that diverged)."""
    return math.exp(min(loss, 700))


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS, CHECKPOINT, RECIPE)
