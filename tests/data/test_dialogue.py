"""Chat tokens, the chat template, and the invariants of the encoding, on a byte-level tokenizer trained here."""

import random

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.dialogue import CHAT_TOKENS, encode, prepare_tokenizer, render_scored, system_tag
from sources.source import Conversation, Message
from utils.errors import UserError

EOS = "<|endoftext|>"
CORPUS = ["the quick brown fox jumps over the lazy dog", "<|prompter|> <|endoftext|> assistant", "Größe und Maß"] * 5


def make_tokenizer(special=(EOS, "<|padding|>"), **names):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": EOS} | names))


@pytest.fixture(scope="module")
def tokenizer():
    return prepare_tokenizer(make_tokenizer())


def chat(*texts, system=None):
    messages = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return Conversation([Message("system", system)] * (system is not None) + messages)


def pieces(tokenizer, conversation, **options):
    """[(token, scored), ...] of one conversation."""
    ids, scored = next(iter(encode(tokenizer, [conversation], **options)))
    return list(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), scored.tolist(), strict=True))


# ---- Tokenizer ----


def test_chat_tokens_are_added_in_order_once():
    tokenizer = make_tokenizer()
    before = len(tokenizer)
    prepare_tokenizer(prepare_tokenizer(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(list(CHAT_TOKENS))
    assert ids == list(range(before, before + 5))
    assert len(tokenizer) == before + 5
    assert set(CHAT_TOKENS) <= set(tokenizer.all_special_tokens)
    assert tokenizer.decode(tokenizer("<|assistant|>x")["input_ids"], skip_special_tokens=True) == "x"


def test_present_chat_tokens_keep_their_ids():
    tokenizer = make_tokenizer(special=(EOS, "<|system|>", "<|assistant|>"))
    before = len(tokenizer)
    prepare_tokenizer(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<|system|>", "<|assistant|>"]) == [1, 2]
    new = ["<|prompter|>", "<|prefix_begin|>", "<|prefix_end|>"]
    assert tokenizer.convert_tokens_to_ids(new) == list(range(before, before + 3))


def test_pad_token():
    assert prepare_tokenizer(make_tokenizer()).pad_token == "<|padding|>"
    assert prepare_tokenizer(make_tokenizer(special=(EOS, "<pad>"), pad_token="<pad>")).pad_token == "<pad>"
    assert prepare_tokenizer(make_tokenizer(special=(EOS,))).pad_token == EOS


def test_refused_tokenizers():
    with pytest.raises(UserError, match="no eos token"):
        prepare_tokenizer(make_tokenizer(eos_token=None))


def test_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    size = len(loaded)
    assert loaded.chat_template == tokenizer.chat_template
    assert len(prepare_tokenizer(loaded)) == size == len(tokenizer)
    assert pieces(loaded, chat("a", "b")) == pieces(tokenizer, chat("a", "b"))


# ---- Template ----


def test_template_text(tokenizer):
    messages = chat("one", "two", "three", system="be brief").as_dicts()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|system|>be brief@<|prompter|>one@<|assistant|>two@<|prompter|>three@<|assistant|>"
    assert text == expected.replace("@", EOS)


@pytest.mark.parametrize("roles", [["user", "system"], ["tool"], ["prompter"]])
def test_other_roles_are_refused(tokenizer, roles):
    with pytest.raises(jinja2.exceptions.TemplateError, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)
    with pytest.raises(UserError, match=f"message {len(roles)} of a conversation: role '{roles[-1]}'"):
        list(encode(tokenizer, [Conversation([Message(role, "x") for role in roles])]))


words = st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"], exclude_characters="<|>"), min_size=1, max_size=20)


@settings(max_examples=60)
@given(texts=st.lists(words, min_size=2, max_size=6), system=st.none() | words)
def test_template_agrees_with_encoder(tokenizer, texts, system):
    conversation = chat(*texts, system=system)
    out = tokenizer.apply_chat_template(
        conversation.as_dicts(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, scored = next(encode(tokenizer, [conversation]))
    assert out["input_ids"] == ids.tolist()
    prompter = ids == tokenizer.convert_tokens_to_ids("<|prompter|>")
    assert out["assistant_masks"] == (scored & ~prompter).astype(int).tolist()
    assert scored[prompter].tolist() == [False] + [True] * (prompter.sum() - 1)


# ---- Encoding ----


def test_scored_positions(tokenizer):
    got = pieces(tokenizer, chat("x", "y", "x", "", system="x"))
    assert "".join(f"{token}{'+' * scored} " for token, scored in got).split() == [
        *["<|system|>", "x", EOS, "<|prompter|>", "x", EOS, "<|assistant|>", "y+", EOS + "+"],
        *["<|prompter|>+", "x", EOS, "<|assistant|>", EOS + "+"],
    ]
    unmasked = pieces(tokenizer, chat("x", "y"), label_masking=False)
    assert [scored for _, scored in unmasked] == [False] + [True] * (len(unmasked) - 1)


def test_dtypes_and_empty_input(tokenizer):
    ids, scored = next(encode(tokenizer, [chat("a", "b")]))
    assert (ids.dtype, scored.dtype, ids.shape) == (np.int32, bool, scored.shape)
    assert list(encode(tokenizer, [])) == []


contents = st.text(max_size=30) | st.lists(st.sampled_from([*CHAT_TOKENS, EOS, "<|", "|>", " ", "x"])).map("".join)


@settings(max_examples=100)
@given(
    chats=st.lists(st.tuples(st.lists(contents, min_size=1, max_size=6), st.none() | contents), min_size=1, max_size=5),
    batch_size=st.integers(1, 4),
)
def test_encoding_invariants(tokenizer, chats, batch_size):
    """Decoded, an example is the format; control ids are only the scaffold; scored: replies and what closes them."""
    conversations = [chat(*texts, system=system) for texts, system in chats]
    control = tokenizer.convert_tokens_to_ids([*CHAT_TOKENS, EOS])
    prompter, assistant, system_id, *_, eos = control
    encoded = list(encode(tokenizer, conversations, batch_size=batch_size))
    assert len(encoded) == len(conversations)
    for conversation, (ids, scored) in zip(conversations, encoded, strict=True):
        text = tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=False)
        assert tokenizer.decode(ids.tolist()) == text
        openers = {"user": prompter, "assistant": assistant, "system": system_id}
        scaffold = [token for message in conversation.messages for token in (openers[message.role], eos)]
        assert [token for token in ids.tolist() if token in control] == scaffold
        expected, owner = [], None
        for token in ids.tolist():
            if token in (prompter, assistant, system_id):
                expected.append(token == prompter and owner == assistant)
                owner = token
            else:
                expected.append(owner == assistant)
        assert scored.tolist() == expected


@settings(max_examples=40)
@given(replies=st.lists(st.booleans(), min_size=1, max_size=4), unanswered=st.booleans(), system=st.none() | contents)
def test_the_last_reply_alone(tokenizer, replies, unanswered, system):
    """And that not where it is marked as not to be learnt."""
    messages = [Message("system", system)] * (system is not None)
    for number, train in enumerate(replies):
        messages += [Message("user", f"question {number}"), Message("assistant", f"reply {number}", train=train)]
    messages += [Message("user", "and?")] * unanswered
    ids, scored = next(encode(tokenizer, [Conversation(messages)], train_on="last"))
    learnt = f"reply {len(replies) - 1}{EOS}" + "<|prompter|>" * unanswered
    assert tokenizer.decode(ids[scored].tolist()) == (learnt if replies[-1] else "")
    (whole, of_all), (_, of_system) = (
        next(encode(tokenizer, [Conversation(each)], train_on=which))
        for each, which in ((messages, "all"), ([Message("user", "q")], "last"))
    )
    assert whole.tolist() == ids.tolist()
    assert not (scored & ~of_all).any()
    assert not of_system.any()


def test_backend_settings_come_back(tokenizer):
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=50)
    before = backend.truncation, backend.padding, backend.encode_special_tokens
    ids, _ = next(encode(tokenizer, [chat("the quick brown fox jumps over it", "yes")]))
    assert (backend.truncation, backend.padding, backend.encode_special_tokens) == before
    backend.no_truncation()
    backend.no_padding()
    assert tokenizer.decode(ids.tolist()) == f"<|prompter|>the quick brown fox jumps over it{EOS}<|assistant|>yes{EOS}"


# ---- System tags ----

REPLY = Message(
    "assistant",
    "one two three four five",
    {"lang": "en", "quality": 0.75, "humor": 0.0, "creativity": 1.0, "context": "a\nb"},
)


def test_system_tag_text():
    tag = system_tag(REPLY, random.Random(1), dropout=0, add_length=True)
    *lines, context, more, last = tag.split("\n")
    assert sorted(lines) == ["creativity: 1.0", "humor: 0.0", "lang: en", "length: 2", "quality: 0.8"]
    assert (context, more, last) == ("context: a", "b", "")
    assert "length" not in system_tag(REPLY, random.Random(1), dropout=0)
    assert system_tag(REPLY, random.Random(1), dropout=1) == "\n"
    assert system_tag(Message("assistant", "x", {"lang": " ", "context": " \n"}), random.Random(1), 0) == "\n"
    assert len({system_tag(REPLY, random.Random(seed), 0) for seed in range(50)}) > 10
    kept = sum("quality" in system_tag(REPLY, random.Random(seed), 0.25) for seed in range(1000))
    assert 700 < kept < 800


def test_system_tags_in_place_and_never_scored(tokenizer):
    conversation = Conversation([Message("user", "p"), REPLY, Message("user", "q")])
    options = {"use_system_tag": True, "system_property_dropout": 0}
    ids, scored = next(encode(tokenizer, [conversation], **options))
    text = tokenizer.decode(ids.tolist())
    assert text.startswith(f"<|prompter|>p{EOS}<|system|>")
    assert text.endswith(f"context: a\nb\n{EOS}<|assistant|>{REPLY.content}{EOS}<|prompter|>q{EOS}")
    assert tokenizer.decode(ids[scored].tolist()) == f"{REPLY.content}{EOS}<|prompter|>"


def test_system_tags_depend_on_the_seed(tokenizer):
    def encoded(seed, batch_size=1000):
        options = {"use_system_tag": True, "seed": seed, "batch_size": batch_size}
        conversations = [Conversation([Message("user", "p"), REPLY])] * 5
        return [ids.tolist() for ids, _ in encode(tokenizer, conversations, **options)]

    assert encoded(1) == encoded(1, batch_size=2) != encoded(2)
    assert len({tuple(ids) for ids in encoded(1)}) > 1


def test_render_scored(tokenizer):
    ids, scored = next(encode(tokenizer, [chat("Größe?", "42", "x")]))
    shown = f"<|prompter|>Größe?{EOS}<|assistant|>[[42{EOS}<|prompter|>]]x{EOS}"
    assert render_scored(tokenizer, ids, scored) == shown
    assert render_scored(tokenizer, ids.tolist(), scored.tolist()) == shown
