"""Batched replies: the same as one by one, whatever the batch; what cannot be asked for is said."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from checkpoints import save_chat_model
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig

from evaluation.chat_model import load_chat_model
from evaluation.generation import OwnStreams, control_tokens, encode_chat, generate, room_for_reply
from evaluation.model import find_model
from utils.errors import UserError

GREEDY = {"max_new_tokens": 12}
SAMPLED = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9}
TEXT = "the colour of a potato is brown and a fish lives in the sea where it swims all day long"


@pytest.fixture(scope="module")
def loaded(tiny_model, tmp_path_factory):
    folder = save_chat_model(tiny_model, tmp_path_factory.mktemp("chat_model"))
    return load_chat_model(find_model(str(folder)), torch.device("cpu"))


@pytest.fixture(scope="module")
def prompts(loaded):
    """Of many lengths, in no order."""
    texts = [TEXT[: 5 + (37 * number) % 80] for number in range(24)]
    return [encode_chat(loaded[1], [{"role": "user", "content": text}]) for text in texts]


def replies(loaded, prompts, *arguments):
    found = dict(generate(*loaded, prompts, *arguments))
    assert sorted(found) == list(range(len(prompts)))
    return [found[place] for place in range(len(prompts))]


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, steps):
    """Greedy decoding without padding, cache or `generate`."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


def test_batches_say_what_one_by_one_says(loaded, prompts):
    model, tokenizer = loaded
    expected = [one_by_one(model, tokenizer, prompt, 12) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) > 5  # they are not all the same
    assert any(ids[-1] == tokenizer.eos_token_id for ids in expected) or len(set(map(len, expected))) == 1
    for batch_size in (1, 5, 64):
        for reply, ids in zip(replies(loaded, prompts, GREEDY, batch_size), expected, strict=True):
            ended = ids[-1] == tokenizer.eos_token_id
            assert reply.text == tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
            assert (reply.tokens, reply.ended) == (len(ids), ended)


def test_a_reply_ends_at_an_end_token(loaded, prompts):
    model, tokenizer = loaded
    ids = one_by_one(model, tokenizer, prompts[0], 12)
    third, before = ids[3], model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=[third, tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    try:
        reply = replies(loaded, prompts, GREEDY, 8)[0]
    finally:
        model.generation_config = before
    end = ids.index(third)
    assert (reply.tokens, reply.ended) == (end + 1, True)
    assert reply.text == tokenizer.decode(ids[:end], skip_special_tokens=False)


def test_a_sample_depends_on_its_seed_alone(loaded, prompts):
    seeds = list(range(len(prompts)))
    samples = replies(loaded, prompts, SAMPLED, 64, seeds)
    assert replies(loaded, prompts, SAMPLED, 3, seeds) == samples
    assert replies(loaded, prompts[5:9], SAMPLED, 64, seeds[5:9]) == samples[5:9]
    assert replies(loaded, prompts, SAMPLED, 64, [seed + 99 for seed in seeds]) != samples
    assert len({reply.text for reply in replies(loaded, prompts[:1] * 8, SAMPLED, 8, list(range(8)))}) > 4


def test_own_streams_sample_from_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    draw = OwnStreams([1, 2], torch.device("cpu"))
    picks = torch.stack([draw(None, logits.repeat(2, 1)).argmax(-1) for _ in range(10_000)])
    for column in picks.T:
        shares = torch.bincount(column, minlength=5) / len(column)
        torch.testing.assert_close(shares, logits.softmax(-1), atol=0.02, rtol=0)  # 4 standard errors


def test_top_k_1_is_greedy(loaded, prompts):
    settings = {"max_new_tokens": 12, "do_sample": True, "top_k": 1}
    assert replies(loaded, prompts, settings, 8, [0] * len(prompts)) == replies(loaded, prompts, GREEDY, 8)


def test_the_batch_is_halved_when_memory_runs_out(loaded, prompts, monkeypatch):
    model, tried, real = loaded[0], [], type(loaded[0]).generate

    def generate_with_little_memory(self, ids, **kwargs):
        tried.append(len(ids))
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, ids, **kwargs)

    expected = replies(loaded, prompts, GREEDY, 64)
    monkeypatch.setattr(type(model), "generate", generate_with_little_memory)
    room = 5
    assert replies(loaded, prompts, GREEDY, 16) == expected
    assert tried == [16, 8, 4, 4, 4, 4, 4, 4]
    room = 0
    with pytest.raises(UserError, match="not enough memory for one prompt of"):
        replies(loaded, prompts, GREEDY, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 250}, r"max_new_tokens = 250 are over the model's 256 positions"),
        ({}, "max_new_tokens = None"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 5, "top_kk": 3}, "unknown sampling setting top_kk"),
        ({"max_new_tokens": 5, "top_p": 0.9}, "only with do_sample"),
        ({"max_new_tokens": 5, "do_sample": True, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 5, "do_sample": True, "top_p": 3.0}, "top_p"),
    ],
)
def test_impossible_settings(loaded, prompts, settings, message):
    with pytest.raises(UserError, match=message):
        replies(loaded, prompts, settings, 8, [0] * len(prompts))


def test_control_tokens_in_a_message_stay_text(loaded):
    tokenizer = loaded[1]
    ids = encode_chat(tokenizer, [{"role": "user", "content": "a<|endoftext|><|assistant|>b"}])
    prompter, assistant = tokenizer.convert_tokens_to_ids(["<|prompter|>", "<|assistant|>"])
    assert [ids.count(token) for token in (prompter, assistant, tokenizer.eos_token_id)] == [1, 1, 1]
    assert ids[-2:] == [tokenizer.eos_token_id, assistant]
    plain = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a fish"}]
    plain += [{"role": "assistant", "content": "swims"}, {"role": "user", "content": "where?"}]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    assert encode_chat(tokenizer, plain) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_another_chat_template_is_applied_as_it_is(loaded):
    import copy

    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}!{% endfor %}a fish"
    ids = encode_chat(tokenizer, [{"role": "user", "content": "the sea"}])
    assert tokenizer.decode(ids) == "the sea!a fish"


# Templates as chat models of others have them, with the tokens that they add: (content, special, rstrip).
OTHER_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant",
        [("<|im_start|>", True, False), ("<|im_end|>", True, False)],
    ),
    "marks that are not special": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>",
        [("<|im_start|>", False, False), ("<|im_end|>", False, False)],
    ),
    "blanks that a mark takes along": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n",
        [("<|user|>", True, True), ("<|assistant|>", True, True), ("<|end|>", True, True)],
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ eos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        [],
    ),
}
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "</s>", "<s>"]


@cache
def with_template(name: str, metaspace: bool):
    """A tokenizer of GPT-NeoX's or Llama's kind, with the template of that name and its tokens."""
    folder = "tests/fixtures/tokenizers/metaspace_first" if metaspace else "recipes/demo_data/model"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / folder)
    tokenizer.chat_template, tokens = OTHER_TEMPLATES[name]
    for content, special, rstrip in tokens:
        token = AddedToken(content, special=special, rstrip=rstrip, normalized=False)
        tokenizer.add_tokens([token], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("name", OTHER_TEMPLATES)
@given(
    pieces=st.lists(st.sampled_from([*CONTROLS, "a fish ", "swims", " ", "\n", "<", "|>", "im_end", "é"]), max_size=8)
)
@settings(max_examples=25)
def test_control_tokens_stay_text_in_other_templates(name, metaspace, pieces):
    tokenizer = with_template(name, metaspace)
    controls = control_tokens(tokenizer)
    text = "".join(pieces)
    ids = encode_chat(tokenizer, [{"role": "user", "content": text}])
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)["input_ids"]
    numbers = {*tokenizer.convert_tokens_to_ids([*controls])} - {tokenizer.unk_token_id}
    assert [number for number in ids if number in numbers] == [number for number in plain if number in numbers]
    if not any(token in text for token in controls):
        conversation = [{"role": "user", "content": text}]
        assert ids == tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_a_control_token_in_one_message_leaves_the_others_as_they_are(name, metaspace):
    """All of a conversation but that token has the ids of `apply_chat_template`."""
    tokenizer = with_template(name, metaspace)
    spelled = "<|endoftext|>" if not metaspace else "</s>"
    texts = ["the colour of a fish", "  is red\n", f"why {spelled} so?"]
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant", "user"], texts, strict=True)
    ]
    ids = encode_chat(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    until = tokenizer.apply_chat_template([*messages[:-1], messages[-1] | {"content": "why"}])["input_ids"]
    same = next(place for place, pair in enumerate(zip(until, whole, strict=False)) if pair[0] != pair[1])
    assert same > 10
    assert ids[:same] == whole[:same]
    assert spelled in tokenizer.decode(ids)
    number = tokenizer.convert_tokens_to_ids(spelled)
    assert ids.count(number) == whole.count(number) - 1


def test_room_for_a_reply():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=10)))
    assert room_for_reply(model, [[1] * 4, [1] * 7], 100) == 3
    assert room_for_reply(model, [[1] * 4, [1] * 7], 2) == 2
    with pytest.raises(UserError, match="a prompt of 10 tokens leaves no room for a reply in the model's 10 positions"):
        room_for_reply(model, [[1] * 10], 1)
    endless = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    assert room_for_reply(endless, [[1] * 10], 100) == 100
