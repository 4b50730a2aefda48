"""A batch of replies by transformers' `generate`: of a model that is evaluated, chatted with, or still trained."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel

# What a terminal obeys in place of showing it: control characters but newline and tabulator, and those that turn the
# direction of writing, behind which a line says another thing than it shows.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Reply:
    """What the model wrote."""

    text: str  # decoded, with control tokens it may hold, without the one that ended it
    tokens: int  # how many were generated, the one that ended it counted
    ended: bool  # whether the model ended it by itself; else max_new_tokens were used up


def reply_to(
    model: PreTrainedModel, tokenizer, prompts: list[list[int]], config: GenerationConfig, **how: Any
) -> list[Reply]:
    """The replies to prompts of token ids, each padded on the left, which the attention has to know.

    Args:
        config: its eos_token_id is a list.
        how: further arguments of `model.generate`.
    """
    left = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=tokenizer.pad_token_id, **left)
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts], **left)
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model.generate(ids, attention_mask=mask, generation_config=config, **how)
    replies = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in config.eos_token_id), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=False)
        replies.append(Reply(text, tokens=len(row) if end is None else end + 1, ended=end is not None))
    return replies


def shown(text: str) -> str:
    r"""A text with what a terminal would obey spelled out, such as `\x1b[2J`, which clears the screen."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
