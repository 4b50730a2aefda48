"""Families of models at a tiny size, what becomes of each here, and the table of it in docs/models.md, which

    python tests/families.py

writes anew.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "scripts")]

import torch
from mixes import make_recipe
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from data.dialogue import prepare_tokenizer
from recipe.keys import Recipe
from training.model import check_tiny, load_config, load_model
from utils.errors import UserError

PAGE = ROOT / "docs" / "models.md"
VOCABULARY = 1024
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Without dropout, so that a step can be made again.
NO_DROPOUT = {
    **{"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "dropout": 0, "attention_dropout": 0},
    **{"hidden_dropout": 0, "resid_dropout": 0, "embed_dropout": 0, "embedding_dropout": 0},
}
GROUPED, HEAD = {"num_key_value_heads": 2}, {"num_key_value_heads": 2, "head_dim": 8}
STATE = {"state_size": 4}
SHORT = 8  # chunks of tokens that a scan is made of, of a CPU's slow one
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA_HEADS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": SHORT,
}
LATENT = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    "first_k_dense_replace": 1,
}
VISION = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"image_size": 28, "patch_size": 14},
}
# By the name that people know: transformers' model_type, and what it takes beside TEXT.
FAMILIES = {
    "GPT-NeoX, StableLM-alpha, Pythia": ("gpt_neox", {}),
    "StableLM-2": ("stablelm", GROUPED),
    "Llama, SmolLM2": ("llama", GROUPED),
    "Mistral": ("mistral", GROUPED | {"sliding_window": 8}),
    "Mixtral": ("mixtral", GROUPED | EXPERTS),
    "Qwen2, Qwen2.5": ("qwen2", GROUPED),
    "Qwen2-MoE": ("qwen2_moe", GROUPED | SMALL_EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen3": ("qwen3", HEAD),
    "Qwen3-MoE": ("qwen3_moe", HEAD | SMALL_EXPERTS),
    "Gemma": ("gemma", HEAD),
    "Gemma 2": ("gemma2", HEAD),
    "Gemma 3, text": ("gemma3_text", HEAD | {"layer_types": ["sliding_attention", "full_attention"]}),
    "Gemma 3, multimodal": (
        "gemma3",
        {"text_config": TEXT | HEAD, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "Gemma 4, text": (
        "gemma4_text",
        {
            **HEAD,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
    ),
    "Phi-1, Phi-2": ("phi", {}),
    "Phi-3, Phi-4": ("phi3", GROUPED),
    "Phi-3.5-MoE": ("phimoe", GROUPED | EXPERTS | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "OPT": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "GPT-2": ("gpt2", {}),
    "GPT-J": ("gptj", {"rotary_dim": 4}),
    "GPT-Neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "GPT-BigCode, StarCoder": ("gpt_bigcode", {}),
    "StarCoder2": ("starcoder2", GROUPED),
    "CodeGen": ("codegen", {"rotary_dim": 4}),
    "GPT-OSS": ("gpt_oss", HEAD | EXPERTS),
    "OLMo": ("olmo", GROUPED),
    "OLMo2": ("olmo2", GROUPED),
    "OLMoE": ("olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "SmolLM3": ("smollm3", GROUPED),
    "Granite": ("granite", GROUPED | {"logits_scaling": 8.0}),
    "GraniteMoE": ("granitemoe", GROUPED | EXPERTS | {"logits_scaling": 6.0}),
    "Cohere, Command R": ("cohere", GROUPED),
    "DeepSeek-V3": ("deepseek_v3", LATENT),
    "GLM-4": ("glm4", HEAD),
    "Nemotron": ("nemotron", GROUPED),
    "Persimmon": ("persimmon", {}),
    "Falcon": ("falcon", {}),
    "Bloom": ("bloom", {}),
    "MPT": ("mpt", {"max_seq_len": 128}),
    "LFM2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "Mamba": ("mamba", STATE),
    "Mamba-2": ("mamba2", STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": SHORT}),
    "Falcon Mamba": ("falcon_mamba", STATE),
    "RWKV-4": ("rwkv", {"rescale_every": 1}),
    "RWKV-4 with rescale_every: 0": ("rwkv", {"rescale_every": 0}),
    "Jamba": (
        "jamba",
        GROUPED
        | {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4},
    ),
    "Bamba, Granite 4": ("bamba", GROUPED | MAMBA_HEADS | {"attn_layer_indices": [1]}),
    "Falcon-H1": ("falcon_h1", GROUPED | MAMBA_HEADS | {"mamba_d_ssm": 64}),
    "Llama 4": ("llama4_text", HEAD | EXPERTS | {"intermediate_size_mlp": 64, "num_experts_per_tok": 1}),
    "BERT, RoBERTa": ("roberta", {"is_decoder": True, "pad_token_id": 1}),
    "XLM": ("xlm", {"pad_token_id": 2}),
    "CTRL": ("ctrl", {"dff": 64}),
    "a mixture with output_router_logits: true": ("mixtral", GROUPED | EXPERTS | {"output_router_logits": True}),
}
STATES = ("Mamba", "Mamba-2", "Falcon Mamba", "RWKV-4", "RWKV-4 with rescale_every: 0")  # no attention heads


NO_TINY_MODEL = ("CodeGen",)  # transformers lays out its projection for four heads and more


def family_config(name: str):
    """A family's config at its tiny size."""
    kind, own = FAMILIES[name]
    around = {} if "text_config" in own else TEXT
    without = {"num_attention_heads"} if name in STATES else set()
    known = vars(AutoConfig.for_model(kind))
    no_dropout = {key: 0.0 for key in NO_DROPOUT if key in known}
    return AutoConfig.for_model(kind, **{key: around[key] for key in around if key not in without} | no_dropout | own)


@dataclass
class Outcome:
    """What becomes of a family.

    Attributes:
        trains: padding-free, padded, or refused.
        why: what padding-free training of it, or any, is refused with.
        recipe, model: as sft.py has them after `load_model`; None where it is refused.
    """

    trains: str
    why: str = ""
    recipe: Recipe | None = None
    model: PreTrainedModel | None = None

    def row(self, name: str) -> str:
        """Its line in the documents' table."""
        return f"| {name} | `{FAMILIES[name][0]}` | {self.trains} | {self.why} |"


def try_family(name: str, tokenizer, folder: Path) -> Outcome:
    """Load a family's tiny model of random weights, padding-free where it can be.

    The tiny model that stands for it in a dry run is refused in the same words.
    """
    family_config(name).save_pretrained(folder)
    refusals = []
    for trains in ("padding-free", "padded"):
        options = {"padding_free": trains == "padding-free", "dtype": "fp32", "max_length": 64, "warmup_steps": 0}
        recipe = make_recipe(model_name=str(folder), from_scratch=True, learning_rate=1e-2, max_grad_norm=0, **options)
        torch.manual_seed(0)
        try:
            config = load_config(recipe)
        except UserError as error:
            refusals.append(_words(error, folder))
            continue
        model, refusal, of_tiny = None, None, None
        try:
            assert check_tiny(recipe, config) is not None or name in NO_TINY_MODEL, name
        except UserError as error:
            of_tiny = _words(error, folder)
        try:
            model = load_model(recipe, config, tokenizer, torch.float32)
        except UserError as error:
            refusal = _words(error, folder)
        assert refusal == of_tiny, name
        if model:
            return Outcome(trains, *refusals, *[""] * (not refusals), recipe, model)
        refusals.append(refusal)
    return Outcome("refused", refusals[-1])


def _words(error: UserError, folder: Path) -> str:
    return str(error).removeprefix(f"model_name = {folder}: ").removesuffix(": give padding_free: false")


def main() -> None:
    """Write the table of the page anew."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo_data" / "model"))
    rows = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_family(name, tokenizer, Path(folder)).row(name))
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not re.match(r"\| .* \| `", line)]
    place = kept.index("|---|---|---|---|") + 1
    PAGE.write_text("\n".join([*kept[:place], *rows, *kept[place:]]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
