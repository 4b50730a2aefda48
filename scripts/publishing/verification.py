"""Whether a folder, read back in a fresh process, is the model that it was made from: the same ids, the same logits."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.dialogue import CHAT_TEMPLATE, encode
from publishing.read_back import logits_of, template_ids
from sources.source import Conversation, Message
from training.tokenizer_files import PROBES
from utils.errors import UserError, reason

QUESTION = "Name three rivers of Europe, and say in one sentence each where they rise and into which sea they flow."
REPLY = "The Rhine rises in the Alps; the Danube in the Black Forest; the Volga in the Valdai Hills.\n\n- 3 of many"
MOST_TOKENS = 128
# Of the logits' spread, what another precision may change: 0.04 for SmolLM2-135M in bf16, a tenth of it in fp16. What
# is really wrong with a precision, as an overflow, changes them altogether.
ROUNDING = {"fp32": 1e-4, "fp16": 0.1, "bf16": 0.3}
# What the order of sums may, which is up to the process: two units in the last place. Mostly nothing is changed at all.
SAME = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 8e-3}


@dataclass(frozen=True)
class Reference:
    """What a checkpoint makes of some chats and a text, before anything of it is changed.

    Attributes:
        chats, template: chats and the ids of each, those of training where the format is that of `data/dialogue.py`.
        ids, logits: a text, and the logits over it, float32 [ids, rows].
        dtype: of the model, as a recipe names it.
        trust_remote_code: whether its own Python code is run, also where it is read back.
    """

    chats: list[list[dict[str, str]]]
    template: list[list[int]]
    ids: list[int]
    logits: np.ndarray
    dtype: str
    trust_remote_code: bool = False


def make_reference(model: Any, tokenizer: Any, dtype: str, trust_remote_code: bool = False) -> Reference:
    """Of a checkpoint as it is.  Raises: UserError where its logits are not finite."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = [text for text in PROBES if not any(token in text for token in special)]
    dialogue = tokenizer.chat_template == CHAT_TEMPLATE
    if dialogue:
        conversations = [
            Conversation([Message(role, text) for role in ("system", "user", "assistant")]) for text in texts
        ]
        chats = [conversation.as_dicts() for conversation in conversations]
        template = [ids.tolist() for ids, _ in encode(tokenizer, conversations)]
    else:
        chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in texts]
        template = template_ids(tokenizer, chats)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    asked = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
    [ids] = template_ids(tokenizer, [asked])
    ids = ids[: min(positions, MOST_TOKENS)]
    logits = logits_of(model, ids)
    if not np.isfinite(logits).all():
        raise UserError("its logits are not finite numbers")
    return Reference(chats, template, ids, logits, dtype, trust_remote_code)


def read_back(folder: Path, reference: Reference) -> tuple[list[list[int]], np.ndarray]:
    """The ids of the chats and the logits over the text, by a process of its own.  Raises: UserError."""
    asked = ("chats", "ids", "trust_remote_code")
    request = json.dumps({name: getattr(reference, name) for name in asked})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-P", str(Path(__file__).with_name("read_back.py")), str(folder)]
    done = subprocess.run(command, input=request.encode(), env=environment, capture_output=True)
    try:
        if done.returncode:
            raise ValueError((done.stderr.decode(errors="replace").strip().splitlines() or ["no details"])[-1])
        line, _, numbers = done.stdout.partition(b"\n")
        return json.loads(line), np.load(io.BytesIO(numbers))
    except ValueError as error:
        raise UserError(f"what was written could not be read back: {reason(error)}") from error


def check_precision(reference: Reference, logits: np.ndarray, dtype: str) -> None:
    """See that a model in another precision, `dtype`, makes the logits of the reference but for rounding.

    Raises: UserError where it does not, or they are not finite.
    """
    if not np.isfinite(logits).all():
        raise UserError(f"in {dtype} its logits are not finite numbers: give --dtype bf16 or fp32")
    share, limit = distance(reference.logits, logits), max(ROUNDING[dtype], ROUNDING[reference.dtype])
    if not share <= limit:
        raise UserError(f"in {dtype} its logits differ by {share:.2%} of their spread, over {limit:.2%}: give another")


def check_same(reference: Reference, logits: np.ndarray, found: tuple[list[list[int]], np.ndarray], dtype: str) -> None:
    """See that what was read back (`read_back`) is the model that was written, of `logits` over the text in `dtype`.

    Raises: UserError where ids differ from the reference's, or logits by more than the order of sums explains.
    """
    template, there = found
    for chat, here, other in zip(reference.chats, reference.template, template, strict=True):
        if here != other:
            raise UserError(f"read back, its chat template makes other ids of {chat[-1]['content']!r} than training")
    share = distance(logits, there) if logits.shape == there.shape else math.inf
    if not share <= SAME[dtype]:
        raise UserError(f"read back, it is another model: its logits differ by {share:.2%} of their spread")


def distance(first: np.ndarray, other: np.ndarray) -> float:
    """How far logits over a text are apart, as a share of their spread, over the rows that both have.

    The median over the text's tokens: in a mixture of experts rounding sends one or another to another expert.
    """
    rows = min(first.shape[1], other.shape[1])
    first, other = first[:, :rows].astype(np.float64), other[:, :rows].astype(np.float64)
    apart = np.sqrt(((other - first) ** 2).mean(axis=1))
    return float(np.median(apart / np.maximum(first.std(axis=1), 1e-12)))
