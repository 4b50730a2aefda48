"""The rows of the embedding beyond the tokenizer's tokens: 50,288 rows for 50,282 tokens, a multiple of 16 for speed.

No text is made of them, but converters look for their tokens, and sampling can draw them.
"""

from tokenizers import AddedToken
from transformers import PreTrainedModel

from training.model import set_special_ids
from utils.errors import UserError

VOCAB = ("trim", "name", "keep")


def fit_vocabulary(model: PreTrainedModel, tokenizer, how: str) -> str:
    """Remove these rows from both embeddings (`trim`), give them tokens (`name`), or leave them (`keep`); in each case
    let config and generation config name the tokenizer's end and pad tokens.

    Where ids have gaps, `trim` cuts above the highest one. A generation config's further end tokens stay.

    Returns: what was done, in words.
    Raises: UserError where the embedding has fewer rows than the tokenizer's ids call for, or `name` cannot name.
    """
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(f"its tokenizer has ids up to {highest:,}, its embedding {rows:,} rows: not one of its own")
    said = f"{rows:,} rows for {len(tokenizer.get_vocab()):,} tokens"
    if how == "trim" and highest + 1 < rows:
        model.resize_token_embeddings(highest + 1, mean_resizing=False)
        said += f": {rows - highest - 1:,} removed"
    elif how == "name" and (named := name_rows(tokenizer, rows)):
        said += f": {len(named):,} named, {named[0]} to {named[-1]}"
    elif how == "keep" and highest + 1 < rows:
        said += ": kept, some converters refuse that, and sampling can draw a row without a token"
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends = sorted(one for one in ends if one <= highest)
    set_special_ids(model, tokenizer)
    ends = ends if len(ends) > 1 else tokenizer.eos_token_id
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.eos_token_id, config.pad_token_id = ends, tokenizer.pad_token_id
    return said


def name_rows(tokenizer, rows: int) -> list[str]:
    """Give every row a token that has none, `<|unused_0|>` and so on, special ones, which decoding can leave out.

    Raises: UserError where ids have gaps, into which the tokenizer puts them in another order.
    """
    vocabulary = tokenizer.get_vocab()
    unnamed = sorted({*range(rows)} - {*vocabulary.values()})
    numbered = (f"<|unused_{number}|>" for number in range(len(unnamed) + len(vocabulary)))
    names = [name for name in numbered if name not in vocabulary][: len(unnamed)]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(names) != unnamed:
        raise UserError("its tokenizer's ids have gaps, whose rows cannot be named: give --vocab trim or keep")
    return names
