"""A chat model to evaluate, loaded from a checkpoint, with its own tokenizer and chat template."""

import hashlib
import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evaluation.model import EvaluatedModel
from training.adapter_files import ADAPTER_CONFIG, BASE_FILE
from training.pretrained import load_pretrained
from utils.errors import UserError, reason
from utils.files import sampled
from utils.launch import DTYPES, has_gpu

# Files of a model, beside its weights, by which it is another one.
DESCRIBING = ("config.json", "tokenizer.json", "chat_template.jinja", ADAPTER_CONFIG, BASE_FILE)
CHAT_MARK = re.compile(r"<\|\w+\|>")  # how a chat template writes a control token


def fingerprint(checkpoint: EvaluatedModel) -> str:
    """A hash of the model: its config, tokenizer, own code and a sample of every weight file; a hub model's commit."""
    if not checkpoint.folder:
        return str(load_pretrained(AutoConfig, checkpoint.name, "", checkpoint.trust_remote_code)._commit_hash)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(checkpoint.folder.glob("*")):
        weights = path.suffix in (".safetensors", ".bin", ".pt")
        if weights or path.name in DESCRIBING or path.suffix == ".py":
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in sampled(path) if weights else [path.read_bytes()]:
                digest.update(block)
    return digest.hexdigest()


def load_chat_tokenizer(checkpoint: EvaluatedModel, template: bool = True):
    """The tokenizer of a chat model; without `template` also that of a base model, which is only given plain text.

    Raises: UserError for none, one without chat template or eos token, or without tokens that the template writes.
    """
    tokenizer = load_pretrained(AutoTokenizer, checkpoint.name, "", checkpoint.trust_remote_code)
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
        question = {"role": "user", "content": "a question"}
        written = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja's own, and whatever the template raises
        raise UserError(f"{checkpoint.name}: its chat template does not work: {reason(error)}") from error
    if question["content"] not in written:  # a template that was cut off is a text like any other
        raise UserError(f"{checkpoint.name}: its chat template does not write what the user says: is it cut off?")
    return tokenizer


def load_chat_model(checkpoint: EvaluatedModel, device: torch.device, dtype: str | None = None, template: bool = True):
    """The model and tokenizer of a chat model, ready to generate (`evaluation/generation.py`).

    Args:
        dtype: fp32, fp16 or bf16; None takes what the weights are stored in, on a CPU fp32.
        template: False takes a base model too, which has no chat template.

    Returns: (model, tokenizer). The model's generation_config names pad and end tokens and nothing else, so that no
        sampling default of the checkpoint's is mixed into the settings of an evaluation.
    Raises: UserError where anything is missing or damaged.
    """
    tokenizer = load_chat_tokenizer(checkpoint, template)
    wanted = DTYPES[dtype] if dtype else "auto" if has_gpu() else torch.float32
    model = load_pretrained(AutoModelForCausalLM, checkpoint.name, "", checkpoint.trust_remote_code, dtype=wanted)
    rows = model.get_input_embeddings().num_embeddings
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(f"{checkpoint.name}: its tokenizer has ids up to {last:,}, its embedding {rows:,} rows")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)
    return model.to(device).eval(), tokenizer
