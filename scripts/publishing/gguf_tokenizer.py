"""A tokenizer in the keys of a GGUF file, as far as llama.cpp splits text the way that this tokenizer does.

llama.cpp has no pre-tokenizer to be described, only names of those it knows (`tokenizer.ggml.pre`). A wrong one gives
other ids without a word, so a tokenizer is taken where its tokenizer.json says exactly what one of the names means
(llama.cpp's src/llama-vocab.cpp), and refused otherwise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import gguf

from utils.errors import UserError
from utils.files import read_json

# The regular expressions of Llama 3 and Qwen 2, as their tokenizer.json has them.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS_AND_BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
# llama.cpp's name: the steps before the merges, and whether a text that is a token as a whole is left whole.
PRE_TOKENIZERS = {
    "gpt-2": ([BYTES | {"use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}], False),
    "llama-bpe": ([CONTRACTIONS + WORDS + r"|\p{N}{1,3}" + SYMBOLS_AND_BLANKS, BYTES | {"use_regex": False}], True),
    "qwen2": ([CONTRACTIONS + WORDS + r"|\p{N}" + SYMBOLS_AND_BLANKS, BYTES | {"use_regex": False}], False),
}
CONVERTER = "llama.cpp's convert_hf_to_gguf.py knows more of them"


@dataclass(frozen=True)
class GGUFTokenizer:
    """What GGUF says of a tokenizer.

    Attributes:
        pre: llama.cpp's name of the way it splits text before the merges.
        tokens: one for each row of the embedding, in the order of the ids.
        types: of each token: normal, control (a text cannot hold it), user-defined (found in a text first) or unused.
        merges: pairs of tokens, each in one string with a blank between.
        normalizes: whether text is brought into a normal form first (GPT-NeoX's NFC), which llama.cpp does not do.
    """

    pre: str
    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]
    normalizes: bool

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")  # byte-level BPE
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_add_bos_token(False)  # the chat template writes all there is


def read_tokenizer(file: Path, rows: int) -> GGUFTokenizer:
    """The tokenizer of a tokenizer.json, for an embedding of `rows` rows.

    Raises:
        UserError: no pre-tokenizer that llama.cpp knows is this one's.
    """
    content = read_json(file, "tokenizer")
    model, normalizer = content["model"], content.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback") or (normalizer or {"type": "NFC"})["type"] != "NFC":
        raise UserError(f"{file}: a GGUF file is written of byte-level BPE tokenizers alone; {CONVERTER}")
    steps, whole = _steps(content["pre_tokenizer"]), bool(model.get("ignore_merges"))
    pre = next((name for name, known in PRE_TOKENIZERS.items() if known == (steps, whole)), None)
    if pre is None:
        raise UserError(f"{file}: llama.cpp has no name for this pre-tokenizer: {json.dumps(steps)[:200]}; {CONVERTER}")

    tokens = [f"[PAD{row}]" for row in range(rows)]  # as llama.cpp's converter names rows without a token
    types = [gguf.TokenType.UNUSED] * rows
    for token, row in model["vocab"].items():
        tokens[row], types[row] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GGUFTokenizer(pre, tokens, types, merges, normalizes=normalizer is not None)


def _steps(pre_tokenizer: dict | None) -> list[dict | str]:
    """The steps of a pre-tokenizer, a split by a regular expression as that alone."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if pre_tokenizer["type"] == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return [pre_tokenizer["pattern"].get("Regex", pre_tokenizer)]
    if pre_tokenizer["type"] == "ByteLevel":
        return [{key: pre_tokenizer.get(key, True) for key in ("type", "add_prefix_space", "use_regex")}]
    return [pre_tokenizer]
