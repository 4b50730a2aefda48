"""fastokens next to the tokenizer's own encoder: the same ids for every text, or not used at all."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.dialogue import CHAT_TOKENS, prepare_tokenizer
from data.text_encoder import fast_text_encoder, fastokens_agrees, text_encoder

EOS = "<|endoftext|>"
NEOX_FILE = ROOT.parent / "shared" / "data" / "gpt_neox_20b_tokenizer.json"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])
BLANKS = [AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)]  # GPT-NeoX's


def train(splitter=BYTE_LEVEL, normalizer=None, added=(), alphabet=True, **bpe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1,500 tokens."""
    backend = Tokenizer(models.BPE(**bpe))
    backend.pre_tokenizer, backend.normalizer = splitter, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[EOS, "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "scripts" / "utils").glob("*.py")))]
    backend.train_from_iterator([*texts, "Größe und Maß, naïve, 中文, 한국어, it's, we're"], trainer)
    backend.add_tokens(list(added))
    return prepare_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS))


KINDS = {
    "like GPT-NeoX's": lambda: train(normalizer=normalizers.NFC(), added=BLANKS),
    "like SmolLM2's": lambda: train(DIGITS, alphabet=False),
    "the demo's": lambda: prepare_tokenizer(AutoTokenizer.from_pretrained(ROOT / "recipes" / "demo_data" / "model")),
}
if NEOX_FILE.is_file():
    KINDS["GPT-NeoX's"] = lambda: prepare_tokenizer(
        PreTrainedTokenizerFast(tokenizer_file=str(NEOX_FILE), eos_token=EOS)
    )


@pytest.fixture(scope="module", params=KINDS)
def encoders(request):
    """The two encoders of one tokenizer."""
    tokenizer = KINDS[request.param]()
    assert fastokens_agrees(json.loads(tokenizer.backend_tokenizer.to_str()))
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    return SimpleNamespace(tokenizer=tokenizer, fast=fast_text_encoder(tokenizer), own=text_encoder(tokenizer))


def differences(encoders, texts: list[str]) -> list[str]:
    """The texts of which the ids differ; one by one, since fastokens refuses a batch with a byte that is no token."""
    own = encoders.own(texts)
    fast = [encoders.fast([text])[0] for text in texts]
    assert {ids.dtype for ids in own + fast} <= {np.dtype(np.int32)}
    return [text for text, one, other in zip(texts, own, fast, strict=True) if one.tolist() != other.tolist()]


IDEOGRAPHS = [*range(0x3400, 0xA000), *range(0x17000, 0x18D00), *range(0x20000, 0x33480)]  # all alike: every 16th
PRIVATE_AND_UNASSIGNED = [0x33480, 0xDFFFF, 0xE0200, 0xEFFFF, 0xF0000, 0x10FFFF]
CODE_POINTS = sorted(
    {*range(0xD800), *range(0xE000, 0x20000), *range(0xE0000, 0xE0200), *PRIVATE_AND_UNASSIGNED} - set(IDEOGRAPHS)
    | set(IDEOGRAPHS[::16])
)


def test_every_character(encoders):
    """Between letters, blanks, digits and marks, alone and doubled; 16 to a text."""
    texts = [f"a{c} {c}b\n {c}1{c}!{c}{c}" for c in map(chr, CODE_POINTS)]
    assert differences(encoders, [" ".join(texts[start : start + 16]) for start in range(0, len(texts), 16)]) == []


PIECES = [
    *["", " ", "  ", " " * 23, " " * 25, "\n", "\t", "\r", "\0", "\x06", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"],
    *["'s", "'re", "'S", "'", "\u2019ll", "a", "Zz", "1", "23", "\u00b2", "\u0663", "!", "...", "_", "-->", "\ufb01"],
    *["\u00e9", "e\u0301", "\u0301", "\u212b", "\u1e9b\u0323", "\u1100", "\u1161", "\ud55c", "\u4e2d\u6587"],
    *["\U0001f44d\U0001f3fd", "\u200d", "\ufeff", "\U000e0061", "\U0001d11e", EOS, "<|padding|>", "<|", "|>"],
    *CHAT_TOKENS,
]


def test_mixtures(encoders):
    dice = random.Random(0)
    texts = ["".join(dice.choices(PIECES, k=dice.randint(1, 14))) for _ in range(10_000)]
    assert differences(encoders, texts) == []


@settings(max_examples=300)
@given(st.lists(st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join), max_size=5))
def test_any_texts(encoders, texts):
    assert differences(encoders, texts) == []
    assert [ids.tolist() for ids in encoders.fast(texts)] == [ids.tolist() for ids in encoders.own(texts)]


def test_no_control_token_comes_of_a_text(encoders):
    control = {encoders.tokenizer.convert_tokens_to_ids(token) for token in (*CHAT_TOKENS, EOS, "<|padding|>")}
    for encode_texts in (encoders.fast, encoders.own):
        (ids,) = encode_texts(["".join([*CHAT_TOKENS, EOS, "<|padding|>"])])
        assert not control & set(ids.tolist())


def test_one_long_text(encoders):
    for text in ("ha " * 100_000, "a" * 100_000, " " * 100_000, "\n" * 100_000, "e" + "\u0301" * 100_000):
        assert differences(encoders, [text]) == []


def test_half_of_a_surrogate_pair_is_refused_by_both(encoders):
    for encode_texts in (encoders.fast, encoders.own):
        with pytest.raises((TypeError, UnicodeEncodeError)):
            encode_texts(["a\ud83d"])


GPT_4 = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
OTHERS = {
    "another normalizer": lambda: train(normalizer=normalizers.NFKC()),
    "another expression": lambda: train(pre_tokenizers.Sequence([GPT_4, BYTE_LEVEL])),
    "no expression": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "a blank in front": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits together": lambda: train(pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTE_LEVEL])),
    "an unknown token": lambda: train(alphabet=False, unk_token=EOS),
    "an added word": lambda: train(added=["colour"]),
    "blanks of both kinds": lambda: train(added=[*BLANKS[:3], AddedToken("  ", normalized=False)]),
    "a special token with a blank": lambda: train(added=[AddedToken("<| |>", special=True)]),
    "a token that takes blanks along": lambda: train(added=[AddedToken("<|x|>", special=True, lstrip=True)]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tokenizers_keep_their_own_encoder(kind):
    tokenizer = OTHERS[kind]()
    assert not fastokens_agrees(json.loads(tokenizer.backend_tokenizer.to_str()))
    encoders = SimpleNamespace(fast=fast_text_encoder(tokenizer), own=text_encoder(tokenizer))
    assert differences(encoders, ["The colour of   12345 <|x|> it's <| |>", " \ufb01ne"]) == []
