"""Read a model's folder as a stranger does: in a process that knows nothing of this collection.

python -P read_back.py FOLDER < request > answer

The request is JSON: `chats`, each a list of messages, `ids` of a text, and `trust_remote_code`, whether code that is in
the folder is run. The answer is a line of JSON, the ids that the chat template makes of each chat, and behind it the
logits over the text, float32 [ids, rows], in the form of numpy.save.
"""

import io
import json
import os
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def template_ids(tokenizer: Any, chats: list[list[dict[str, str]]]) -> list[list[int]]:
    """Of each chat as a whole."""
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in chats]


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    """float32 [ids, rows], on the CPU."""
    return model.eval()(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu().numpy()


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    folder, request = sys.argv[1], json.load(sys.stdin)
    trust = request["trust_remote_code"]
    chats = template_ids(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust), request["chats"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust)
    logits = logits_of(model, request["ids"])
    numbers = io.BytesIO()  # numpy asks a file for its position, which a pipe has not
    np.save(numbers, logits)
    with answer:
        answer.write(json.dumps(chats).encode() + b"\n" + numbers.getbuffer())
