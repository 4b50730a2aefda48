"""What a version of transformers makes of a model's folder, as JSON; run by test_model_files.py in its environment.

python tests/read_elsewhere.py FOLDER ...
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT = [
    {"role": "user", "content": "Hello  there, \u00fcn\u00efcode \u4e2d\u6587\n 12 345?"},
    {"role": "assistant", "content": " ok\n\n- a"},
    {"role": "user", "content": "x"},
]


def read(folder: str) -> dict:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model.float()(torch.tensor([ids])).logits
    return {
        "version": transformers.__version__,
        "text": text,
        "ids": ids,
        "special": sorted(tokenizer.all_special_tokens),
        "pad, eos": [tokenizer.pad_token, tokenizer.eos_token],
        "rotary": [buffer.tolist() for name, buffer in model.named_buffers() if name.endswith("inv_freq")][:1],
        "logits": logits[0, -1].tolist(),
    }


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps([read(folder) for folder in sys.argv[1:]]))
