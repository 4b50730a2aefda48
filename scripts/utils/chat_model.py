"""A chat model to evaluate, loaded from a checkpoint, with its own tokenizer and chat template."""

import hashlib
import os
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from utils.errors import UserError
from utils.evaluated_model import EvaluatedModel
from utils.launch import has_gpu

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAMPLED_BYTES, SAMPLES = 1 << 16, 64  # of each weight file, for its fingerprint
CHAT_MARK = re.compile(r"<\|\w+\|>")  # how a chat template writes a control token


def fingerprint(checkpoint: EvaluatedModel) -> str:
    """A hash of the model: of its config, tokenizer and a sample of every weight file; a hub model's commit.

    The sample is 64 stretches of 64 KiB spread over each file, beside its size: reading 30 GB whole takes minutes, and
    a step of training changes all of it.
    """
    if not checkpoint.folder:
        return str(_load(AutoConfig, checkpoint)._commit_hash)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(checkpoint.folder.glob("*")):
        weights = path.suffix in (".safetensors", ".bin", ".pt")
        if not weights and path.name not in ("config.json", "tokenizer.json", "chat_template.jinja"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if not weights or size <= SAMPLES * SAMPLED_BYTES:
                digest.update(file.read())
                continue
            for number in range(SAMPLES):
                file.seek((size - SAMPLED_BYTES) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def load_chat_tokenizer(checkpoint: EvaluatedModel, template: bool = True):
    """The tokenizer of a chat model, with its own chat template.

    Args:
        template: False takes that of a base model too, which is only given plain text.

    Raises:
        UserError: there is none, it has no chat template or eos token, or lacks tokens that the template writes.
    """
    tokenizer = _load(AutoTokenizer, checkpoint)
    if set(tokenizer.encode("a b c", add_special_tokens=False)) <= {tokenizer.unk_token_id}:
        # Where there are no files, transformers makes an empty tokenizer of the model's kind and says nothing.
        raise UserError(f"{checkpoint.name}: it has no tokenizer ({_held(checkpoint)})")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{checkpoint.name}: its tokenizer has no eos token, which ends a reply")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not template:
        return tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"{checkpoint.name}: its tokenizer has no chat template, so it is no chat model")
    known = tokenizer.get_vocab()
    if missing := sorted(set(CHAT_MARK.findall(str(tokenizer.chat_template))) - known.keys()):
        raise UserError(f"{checkpoint.name}: its tokenizer lacks the chat tokens {' '.join(missing)}")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except Exception as error:  # jinja's own, and whatever the template raises
        raise UserError(f"{checkpoint.name}: its chat template does not work: {_reason(error)}") from error
    return tokenizer


def load_chat_model(checkpoint: EvaluatedModel, device: torch.device, dtype: str | None = None, template: bool = True):
    """The model and tokenizer of a chat model, ready to generate (`utils/generation.py`).

    Args:
        dtype: fp32, fp16 or bf16; None takes what the weights are stored in, on a CPU fp32.
        template: False takes a base model too, which has no chat template.

    Returns: (model, tokenizer). The model's generation_config names pad and end tokens and nothing else, so that no
        sampling default of the checkpoint's is mixed into the settings of an evaluation.
    Raises:
        UserError: anything is missing or damaged.
    """
    tokenizer = load_chat_tokenizer(checkpoint, template)
    wanted = DTYPES[dtype] if dtype else "auto" if has_gpu() else torch.float32
    model, info = _load(AutoModelForCausalLM, checkpoint, dtype=wanted, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"{checkpoint.name}: its weights lack {missing[0]}, which its config.json calls for")
    rows = model.get_input_embeddings().num_embeddings
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(f"{checkpoint.name}: its tokenizer has ids up to {last:,}, its embedding {rows:,} rows")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)
    return model.to(device).eval(), tokenizer


def _load(auto_class, checkpoint: EvaluatedModel, **kwargs) -> PreTrainedModel | Any:
    try:
        return auto_class.from_pretrained(checkpoint.name, **kwargs)
    except Exception as error:  # what transformers makes of a bad file ranges from OSError to AttributeError
        what = {AutoTokenizer: "tokenizer", AutoConfig: "config"}.get(auto_class, "model")
        raise UserError(f"{checkpoint.name}: no usable {what} ({_held(checkpoint)}): {_reason(error)}") from error


def _held(checkpoint: EvaluatedModel) -> str:
    if checkpoint.folder:
        return f"the folder holds {', '.join(sorted(os.listdir(checkpoint.folder))[:8]) or 'nothing'}"
    return f"no such folder under {os.getcwd()}, and the hub did not give it"


def _reason(error: Exception) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return reason[:300] + "..." * (len(reason) > 300)
