"""The conversations of a recipe: prepared where its data are on this machine, else as many and as long as is known."""

import numpy as np

from data.files import source_files
from data.mix import Mix, Split, prepare_mix
from recipe.keys import Recipe
from training.model import load_tokenizer
from training.weight_files import model_folder
from utils.errors import UserError

# Of each of the seed's sources: conversations that are kept of the hub's file, their tokens at SHARES of them (by
# GPT-NeoX's tokenizer), and the share of the tokens that is scored. Lengths are those of samples: 559 threads of
# Open-Assistant trees in the recipe's languages, 961 conversations of ShareGPT, 119 rows of Dolly, 5,999 of GSM8K,
# 1,500 of Code Alpaca. Rows are the hub's (dolly15k 15,011, grade_school_math 8,792, code_alpaca 20,022). oasst_export:
# 10,364 trees, of which 94 % are in those languages, of 5.2 threads each as in the sample. vicuna: what these leave of
# the run's 4,000 steps of 32 conversations an epoch (12,000 steps in 3, by the model's card).
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
KNOWN: dict[str, tuple[int, tuple[int, ...], float]] = {
    "oasst_export": (50_400, (17, 114, 177, 338, 552, 935, 1259, 2493, 2907), 0.77),
    "vicuna": (48_400, (12, 259, 549, 1312, 2106, 2409, 2556, 3219, 13320), 0.72),
    "dolly15k": (14_900, (21, 30, 41, 70, 120, 190, 256, 569, 834), 0.83),
    "grade_school_math_instructions": (8_790, (38, 79, 95, 122, 159, 197, 222, 275, 413), 0.55),
    "code_alpaca": (20_022, (14, 35, 49, 75, 117, 166, 206, 313, 589), 0.70),
}


def find_mix(recipe: Recipe, tokens: int | None = None) -> tuple[Mix, str]:
    """The mix, of which only lengths are looked at, and in words where it is from.

    Args:
        tokens: of an epoch, in conversations as long as the seed's; None: the recipe's data.
    Raises: UserError where the data are neither here nor known; or for what is wrong with where they are said to be.
    """
    if tokens is not None:
        return _of_tokens(recipe, tokens), f"{tokens:,} tokens an epoch (--tokens), as long as the seed's conversations"
    names = [*recipe.datasets.chosen()]
    folder = model_folder(recipe.model_name)
    here = [bool(source_files(name, recipe, download=False)) for name in names]
    if folder and (folder / "tokenizer.json").exists() and all(here):
        return prepare_mix(recipe, load_tokenizer(recipe)), "the recipe's data, prepared"
    if unknown := [name for name in names if name not in KNOWN]:
        raise UserError(
            f"data set {unknown[0]}: not on this machine with the tokenizer of {recipe.model_name}, and none of those "
            "whose lengths are known: give --tokens N, the training tokens of an epoch"
        )
    return _of_known(recipe), "known numbers and sampled lengths of the seed's data sets (an estimate)"


def _of_known(recipe: Recipe) -> Mix:
    train, validation = [], []
    for name, options in recipe.datasets.chosen().items():
        count, _, scored = KNOWN[name]
        held_out = round(count * options.val_split)
        train.append((_lengths(name, count - held_out), scored))
        validation.append((_lengths(name, min(held_out, options.max_val_set or held_out)), scored))
    return Mix([*recipe.datasets.chosen()], _split(train), _split(validation))


def _of_tokens(recipe: Recipe, tokens: int) -> Mix:
    every = np.sort(np.concatenate([_lengths(name, count // 10) for name, (count, _, _) in KNOWN.items()]))
    count = max(1, round(tokens / np.minimum(every, recipe.max_length).mean()))
    lengths = every[((np.arange(count) + 0.5) / count * len(every)).astype(int)]
    # As of a data set beside the recipe's: `fraction` and `size` are not looked at again.
    held_out = lengths[:: max(1, count // 1000)]
    return Mix(["any"], _split([(lengths, 0.72)]), _split([(held_out, 0.72)]))


def _lengths(name: str, count: int) -> np.ndarray:
    """Tokens of so many conversations, spread evenly over what is known of a source: int64 [count]."""
    places = (np.arange(count) + 0.5) / max(1, count)
    return np.interp(places, SHARES, KNOWN[name][1]).round().astype(np.int64)


def _split(parts: list[tuple[np.ndarray, float]]) -> Split:
    dataset = np.repeat(np.arange(len(parts)), [len(lengths) for lengths, _ in parts])
    lengths = np.concatenate([lengths for lengths, _ in parts])
    targets = np.concatenate([np.maximum(1, (lengths * scored).astype(np.int64)) for lengths, scored in parts])
    return Split(dataset, np.arange(len(lengths)), lengths, targets, [])
