"""Base models for adapters, whose tokenizer lacks the chat tokens: their rows have to be learnt."""

import json
from pathlib import Path

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CHAT = ("<|prompter|>", "<|assistant|>", "<|system|>", "<|prefix_begin|>", "<|prefix_end|>")
BASES = {  # of 1,024 tokens, to which five come
    "with spare rows": {"vocab_size": 1040, "tie_word_embeddings": False},
    "without rows, tied": {"vocab_size": 1024, "tie_word_embeddings": True},
}


def write_base(folder: Path, kind: str = "with spare rows", seed: int = 0) -> Path:
    import torch
    from conftest import ROOT
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    demo = ROOT / "recipes" / "demo_data" / "model"
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(demo, **SIZES, **BASES[kind], hidden_act="gelu_new")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text()
    for number, token in enumerate(CHAT):
        text = text.replace(json.dumps(token), json.dumps(f"<|reserved_{number}|>"))
    (folder / "tokenizer.json").write_text(text)
    return folder
