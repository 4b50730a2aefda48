"""The tokenizer as it leaves the house, and whether what is trained on is what its readers will feed the model."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from data.dialogue import ROLE_TOKENS, encode
from sources.source import Conversation, Message
from training.pretrained import folder_to_read_back, load_pretrained, modules_lock
from utils.errors import UserError, reason
from utils.files import read_json

# What transformers 5 notes of how a tokenizer was loaded here, which is nobody's business elsewhere.
NOT_OF_THE_TOKENIZER = ("backend", "is_local", "local_files_only")

# Where tokenizers are known to differ: the start of a text, blanks and newlines at both ends, digits, letters that a
# normalizer changes, characters of several bytes, and what looks like a control token but is none.
PROBES = (
    *("", "a", "Hello, world!", "The colour of 12345 is 3.14, it's said.", "I", "1", "42", "007 1,000,000", "3.5e-7"),
    *(" ", "  ", "   leading", "trailing   ", " both ", "two  inside", "\n", "\n\n", "\nleading", "trailing\n"),
    *("a\n\nb", "\t", "\tx\t", "a\r\nb", "\r", " \n ", "\xa0x\xa0", "\u3000x", "\u200b", "\ufeffx", "x\u2028y"),
    *("def f(x):\n    return x  # 1\n", "- a\n  - b\n", "| a | b |\n|---|---|\n", "$x^2$", "https://a.b/c?d=e&f"),
    *("\u2581", "\u2581x", "\u0120x", "##x", "@@ x", "'s", "'", '"', "...", "_", "<", ">", "</", "<|", "|>", "a<"),
    *("Größe und Maß", "¿Qué tal, señor?", "Ça va ? Où ça ?", "Zażółć gęślą jaźń", "Příliš žluťoučký kůň", "İstanbul"),
    *("Привет, как дела?", "Њива", "Καλημέρα", "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते १२", "สวัสดีครับ", "வணக்கம்"),
    *("你好\uff0c世界", "こんにちは世界", "안녕하세요", "Xin chào", "e\u0301 \u212b \ufb01 \uff21\uff11", "ÀÉÎ ÕÜ"),
    *("👍🏽", "👩‍👩‍👧 family", "𝄞", "½ x² ①", "\u0301x", "\u0338x", "\0", "\a"),
)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Write a tokenizer that AutoTokenizer, of transformers 4 or 5, reads as it is.  Raises: OSError and the like."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = as_older_tokenizer(read_json(path))
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    if splitter is not None and json.loads(splitter.__getstate__()).get("add_prefix_space"):
        config["add_prefix_space"] = True  # else transformers 4 turns it off in a ByteLevel
    if hasattr(tokenizer, "legacy"):  # lost by transformers 5, and what a LlamaTokenizer puts in front hangs on it
        config["legacy"] = tokenizer.legacy
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 and 5 take for the same: what tokenizer.json says, and no more."""
    config = {key: value for key, value in config.items() if key not in NOT_OF_THE_TOKENIZER}
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def check_tokenizer(tokenizer, name: str, trust_remote_code: bool = False) -> None:
    """Save a tokenizer, read it back, and compare its chat template's ids with those of training, over `PROBES`.

    Args:
        tokenizer: as `prepare_tokenizer` leaves it.
        name: the model's, for messages; its config, where there is one, has a say in how its tokenizer is read.

    Raises:
        UserError: it cannot be read back, or is another one then; or a message has other ids in the template.
    """
    with folder_to_read_back() as folder:
        with contextlib.suppress(Exception):  # load_config says what is wrong with it
            load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code).save_pretrained(folder)
        try:
            save_tokenizer(tokenizer, folder)
            with modules_lock() if trust_remote_code else contextlib.nullcontext():
                again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # as many kinds as transformers has
            raise UserError(
                f"model_name = {name}: its tokenizer, as a run saves it, could not be read back: {reason(error)}"
            ) from error
    if again.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"model_name = {name}: its tokenizer is another one when saved and read back")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = dict.fromkeys([*_swallowing(tokenizer), *PROBES])
    texts = [text for text in texts if not any(token in text for token in special)]
    conversations = [Conversation([Message(role, text) for role in ("system", "user", "assistant")]) for text in texts]
    served = again.apply_chat_template([one.as_dicts() for one in conversations], tokenize=True)["input_ids"]
    for text, (ids, _), other in zip(texts, encode(tokenizer, conversations), served, strict=True):
        if ids.tolist() != other:
            first = next(place for place in range(len(other) + 1) if ids[: place + 1].tolist() != other[: place + 1])
            ours, theirs = (
                " ".join(tokenizer.convert_ids_to_tokens(list(some[max(first - 1, 0) : first + 3])))
                for some in (ids.tolist(), other)
            )
            raise UserError(
                f"model_name = {name}: its tokenizer reads the message {text!r} as {theirs} in its saved chat template "
                f"and as {ours} in training: take the added token or the normalizer that does this out of its "
                "tokenizer.json, or give another model_name"
            )


def _swallowing(tokenizer) -> Iterator[str]:
    """Texts that an added token would join to the control token behind or before them: "x" where there is a "x<"."""
    controls = [*ROLE_TOKENS.values(), tokenizer.eos_token]
    for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values():
        for control in controls:
            if token.content.startswith(control):
                yield token.content.removeprefix(control)
            for length in range(1, len(token.content)):
                if control.startswith(token.content[length:]) or control in token.content[length:]:
                    yield token.content[:length]
