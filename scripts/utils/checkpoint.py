"""The output folder: what a run writes there, and which checkpoints are kept."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from utils.errors import UserError
from utils.recipe import Recipe

# The first line of OUTPUT_DIR/recipe.yaml, by which it is known from a file of the user's.
RECIPE_HEADER = "# The resolved recipe of this run: `sft.py THIS_FILE --output_dir NEW` repeats it.\n"


def refuse_other_run(recipe: Recipe) -> None:
    """Keep a run from writing over another, or over files that are not a run's.

    Raises:
        UserError: output_dir holds metrics, a checkpoint, a model or a README.
    """
    folder = recipe.output_dir
    names = ("metrics.jsonl", "training.png", "config.json", "model.safetensors", "tokenizer.json", "README.md")
    # os.path, since Path.exists raises for a name too long to be one.
    held = [name for name in names if os.path.lexists(folder / name)]
    if os.path.lexists(folder / "recipe.yaml") and not _is_ours(folder / "recipe.yaml"):
        held.append("recipe.yaml")
    held += [path.name for path in list_checkpoints(folder)]
    if held:
        raise UserError(
            f"output_dir = {folder}: holds another run ({', '.join(held)}); give another --output_dir, or remove it"
        )


def _is_ours(recipe_file: Path) -> bool:
    try:
        return recipe_file.read_text(encoding="utf-8").startswith(RECIPE_HEADER)
    except (OSError, UnicodeDecodeError):
        return False


def claim_output_dir(recipe: Recipe) -> None:
    """Make the output folder and write the resolved recipe there.

    Raises:
        UserError: it holds another run, or cannot be written.
    """
    refuse_other_run(recipe)
    folder = recipe.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".checkpoint-*"):  # half-written when an earlier run was killed
            shutil.rmtree(leftover)
        (folder / "recipe.yaml").write_text(RECIPE_HEADER + recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output_dir = {folder}: cannot write there: {error.strerror}") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-<step> folders of a run, by step."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, model: PreTrainedModel, tokenizer, recipe: Recipe, step: int) -> None:
    """Write checkpoint-<step>, then remove the oldest over save_total_limit. Every process calls this."""
    if accelerator.is_main_process:
        name = f"checkpoint-{step}"
        work = recipe.output_dir / f".{name}"
        save_model(model, tokenizer, work)
        os.replace(work, recipe.output_dir / name)  # it appears under its name only when it is whole
        if recipe.save_total_limit is not None:
            for old in list_checkpoints(recipe.output_dir)[: -recipe.save_total_limit]:
                shutil.rmtree(old.rename(old.with_name(f".{old.name}")))  # nor does half of one keep its name
    accelerator.wait_for_everyone()


def save_model(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write model and tokenizer as AutoModelForCausalLM and AutoTokenizer read them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_model_card(recipe: Recipe, tokenizer, results: dict[str, Any], steps: int, tokens: int) -> None:
    """Write OUTPUT_DIR/README.md, the card of the final model.

    Args:
        results: the last evaluation, `eval_<dataset>_loss` and `eval_<dataset>_accuracy`; empty without one.
        steps, tokens: optimizer steps and tokens trained on.
    """
    rows = ["| data set | loss | token accuracy |", "|---|---|---|"]
    rows += [
        f"| {name} | {results[f'eval_{name}_loss']:.4f} | {results[f'eval_{name}_accuracy']:.2%} |"
        for name in recipe.datasets.chosen()
        if f"eval_{name}_loss" in results
    ]
    validation = "\n".join(rows) if results else "No conversation was held out."
    base = "random weights of the shape of " if recipe.from_scratch else ""
    card = f"""---
pipeline_tag: text-generation
library_name: transformers
tags: [sft]
{"" if recipe.from_scratch or Path(recipe.model_name).exists() else f"base_model: {recipe.model_name}"}
---

# {recipe.output_dir.resolve().name}

A chat model: {base}`{recipe.model_name}`, fine-tuned for {steps:,} steps on {tokens:,} tokens of
{", ".join(recipe.datasets.chosen())}. `recipe.yaml` beside this file repeats the run, `metrics.jsonl` and
`training.png` show how it went.

## Prompting

`<|prompter|>` and `<|assistant|>` begin a turn, `{tokenizer.eos_token}` ends it; the tokenizer's chat template
writes them:

    <|prompter|>What is a meme?{tokenizer.eos_token}<|assistant|>

## Validation

{validation}

![training curves](training.png)
"""
    (recipe.output_dir / "README.md").write_text(card, encoding="utf-8")
