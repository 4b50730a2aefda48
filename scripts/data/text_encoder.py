"""Plain texts to token ids: by the tokenizer itself, or by fastokens where that gives the same ids much sooner.

Both read a text as plain text: special tokens spelled out in it stay text, nothing is cut or padded. Both read it as
it stands between two control tokens, which is not how it begins: what the chat template makes of it.

The texts of 9,138 conversations (9.5 million characters) take `tokenizers` 0.23 2.1 seconds on two cores and fastokens
0.3 a tenth of a second, after a third of a second for loading: worth it for a data set, not for one prompt.
(`tokenizers` 1.0, a release candidate now, is as fast; once transformers allows it, this module has done its work.)
"""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from utils.errors import reason

# Of a BPE model: each changes the ids, and none is set in the tokenizers that were compared.
SPECIAL_RULES = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)
TextEncoder = Callable[[list[str]], list[np.ndarray]]  # int32 [tokens] for each text


def text_encoder(tokenizer: Any) -> TextEncoder:
    """The tokenizer's own encoder; its settings are as they were after each call."""
    backend = tokenizer.backend_tokenizer
    splitter = backend.pre_tokenizer
    inside = not_at_the_start(splitter)
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    special.discard(tokenizer.unk_token_id)  # also what becomes of a character that the vocabulary lacks

    def encode_texts(texts: list[str]) -> list[np.ndarray]:
        recognised, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
        backend.encode_special_tokens = True  # as text
        backend.no_truncation()
        backend.no_padding()
        try:
            if inside is not None:
                backend.pre_tokenizer = inside
            found = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            for place, ids in enumerate(found):
                if not special.isdisjoint(ids):
                    found[place] = spelled_out(texts[place])
        finally:
            if inside is not None:
                backend.pre_tokenizer = splitter
            backend.encode_special_tokens = recognised
            if truncation:
                backend.enable_truncation(**truncation)
            if padding:
                backend.enable_padding(**padding)
        return [np.array(ids, dtype=np.int32) for ids in found]

    def spelled_out(text: str) -> list[int]:
        """A text in which the model itself finds a special token, as a word (Unigram's `</s>`): cut within that."""
        encoding = backend.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for number, (start, end) in found if number in special and end - start > 1]
        if not cuts:
            return encoding.ids
        return [number for part in pairwise([0, *cuts, len(text)]) for number in spelled_out(text[slice(*part)])]

    return encode_texts


def not_at_the_start(pre_tokenizer: Any) -> Any:
    """What splits a text alone as `pre_tokenizer` splits it behind a control token; None where that does already.

    Of all that a tokenizer.json can hold only Metaspace asks where a text stands: with `prepend_scheme: first` (Llama's
    since 2023) it puts a blank before the start, and before nothing that follows a control token.
    """
    from tokenizers.pre_tokenizers import Sequence

    def never_for_first(settings: dict[str, Any]) -> dict[str, Any]:
        first = settings.get("type") == "Metaspace" and settings["prepend_scheme"] == "first"
        return settings | {"prepend_scheme": "never"} if first else settings

    state = pre_tokenizer.__getstate__() if pre_tokenizer else b"{}"
    settings = json.loads(state, object_hook=never_for_first)  # in Sequences of Sequences, too
    if settings == json.loads(state):
        return None
    inside = Sequence([])
    inside.__setstate__(json.dumps(settings).encode())
    return inside


def fast_text_encoder(tokenizer: Any) -> TextEncoder:
    """fastokens with the tokenizer as it is now, where the two are known to agree; else `text_encoder`."""
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    if not fastokens_agrees(json.loads(tokenizer_json)):
        return text_encoder(tokenizer)
    from fastokens import Tokenizer

    try:
        fast = Tokenizer.from_json_str(tokenizer_json)
    except Exception as error:  # whatever it makes of what it does not know, such as ids with gaps (0.3.5)
        print(
            f"fastokens does not read this tokenizer, which encodes by itself, more slowly: {reason(error)}", flush=True
        )
        return text_encoder(tokenizer)
    fast.no_truncation()
    own = text_encoder(tokenizer)

    def encode_texts(texts: list[str]) -> list[np.ndarray]:
        try:
            ids, offsets = fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        except ValueError:  # a byte without a token, which `tokenizers` leaves out: U+0006 in SmolLM2's
            return own(texts)
        tokens = np.frombuffer(ids, dtype="<u4").astype(np.int32)
        return [tokens[start:end] for start, end in pairwise(np.frombuffer(offsets, dtype="<u8").tolist())]

    return encode_texts


def fastokens_agrees(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer.json, read, is of the kind for which tests/data/test_text_encoder.py compares all of Unicode.

    That is GPT-2's kind (GPT-NeoX, StableLM, Pythia, SmolLM2): byte-level BPE over words found by GPT-2's expression,
    with each digit apart or not, composed to NFC before or not.
    """
    model, splitter = settings["model"], settings["pre_tokenizer"] or {}
    if splitter.get("type") == "Sequence" and len(splitter["pretokenizers"]) == 2:
        digits, splitter = splitter["pretokenizers"]
        if digits != {"type": "Digits", "individual_digits": True}:
            return False
    return (
        settings["normalizer"] in (None, {"type": "NFC"})
        and splitter.get("type") == "ByteLevel"
        and not splitter["add_prefix_space"]
        and splitter.get("use_regex", True)
        and model["type"] == "BPE"
        and not any(model.get(name) for name in SPECIAL_RULES)
        and all(_is_known_kind(token) for token in settings["added_tokens"])
    )


def _is_known_kind(added: dict[str, Any]) -> bool:
    """GPT-NeoX's runs of blanks, and special tokens without a blank; where others overlap the two libraries differ."""
    if any(added[rule] for rule in ("single_word", "lstrip", "rstrip")):
        return False
    content = added["content"]
    return " " not in content if added["special"] else added["normalized"] and not content.strip(" ")
