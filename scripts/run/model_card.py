"""OUTPUT_DIR/README.md: the card of the final model."""

from pathlib import Path

from recipe.keys import Recipe
from run.progress import Progress
from utils.files import write_whole
from utils.launch import say


def write_model_card(recipe: Recipe, tokenizer, progress: Progress, tokens: int) -> None:
    """Write OUTPUT_DIR/README.md, the card of the final model; where that fails, say so: all else of the run is there.

    Args:
        progress: where the run has ended, with its last evaluation.
        tokens: trained on.
    """
    results = progress.results
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

A chat model: {base}`{recipe.model_name}`, fine-tuned for {progress.step:,} steps on {tokens:,} tokens of
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
    path = recipe.output_dir / "README.md"
    try:
        write_whole(path, card)
    except OSError as error:
        say(f"warning: {path}: the model's card could not be written: {error.strerror}")
