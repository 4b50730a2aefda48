"""Replies as they are generated: those of `generate`, token by token, and stopped when nobody waits for them."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from checkpoints import save_chat_model

from chatting.conversation import Chat, Turn
from chatting.replies import load_talker
from chatting.settings import Settings
from evaluation.generation import WARPERS, generate
from evaluation.model import find_model
from utils.errors import UserError

ENDLESS = Settings(temperature=1.5, max_new_tokens=100_000, min_new_tokens=100_000)


@pytest.fixture(scope="module")
def talker(tiny_model, tmp_path_factory):
    folder = save_chat_model(tiny_model, tmp_path_factory.mktemp("chat_model"))
    return load_talker(find_model(str(folder)), None)


@pytest.fixture(scope="module")
def endless(tiny_model, tmp_path_factory):
    """A model of so many positions that a reply takes minutes."""
    folder = save_chat_model(tiny_model, tmp_path_factory.mktemp("endless_model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200_000}))
    return load_talker(find_model(str(folder)), None)


def asked(text: str, *turns: Turn) -> Chat:
    return Chat("", [*turns, Turn(text)])


@pytest.mark.parametrize(
    "settings",
    [
        Settings(temperature=0, max_new_tokens=40),
        Settings(max_new_tokens=40),
        Settings(max_new_tokens=60, seed=7, temperature=3, top_p=None, top_k=50, repetition_penalty=1.3),
        Settings(max_new_tokens=1),
    ],
)
def test_a_reply_is_that_of_generate(talker, settings):
    chat = asked("the colour of a fish?", Turn("hello", "a reply", True))
    prompt = talker.prompt(chat, settings)
    replies = list(talker.answer(chat, prompt, settings))
    given = settings.for_generate()
    ((_, whole),) = generate(
        talker.model, talker.tokenizer, [talker.encode(chat.messages()[:3])], given, 1, [settings.seed]
    )
    assert replies[-1] == whole
    assert (chat.turns[-1].reply, chat.turns[-1].ended) == (whole.text, whole.ended)
    for before, after in pairwise(replies):
        assert after.text.startswith(before.text)
        assert after.tokens >= before.tokens
    assert not any(reply.ended for reply in replies[:-1])


def test_every_setting_is_one_of_generate(talker):
    values = {"min_new_tokens": 2, "no_repeat_ngram_size": 2, "top_k": 5}
    names = Settings.model_fields.keys() - {"seed"}
    assert names > WARPERS.keys()
    settings = Settings(**{name: values.get(name, 0.5) for name in names - {"max_new_tokens"}}, max_new_tokens=5)
    assert talker.checked(settings) == settings
    chat = asked("the sea?")
    assert list(talker.answer(chat, talker.prompt(chat, settings), settings))


def test_characters_are_held_back_until_they_are_whole(talker):
    for text in ("plain", "Größe 你好 👩‍👩‍👧", "a\ufffdb", "🐟" * 3):
        ids = talker.tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) > len(text) / 2
        for length in range(len(ids)):
            held = talker.text_so_far(ids[:length])
            assert text.startswith(held)
        assert talker.text_so_far(ids) == text


@contextmanager
def passes_when_stopped(talker):
    """The model's passes that come to their end although they have been stopped: of the one at whose last layer it was,
    none of another."""
    passes = []

    def count(*_) -> None:
        if any(stop.is_set() for stop in talker._stops):
            passes.append(1)

    hook = talker.model.register_forward_hook(count)
    try:
        yield passes
    finally:
        hook.remove()


def test_a_reply_that_nobody_waits_for_is_not_generated(endless):
    chat = asked("a fish")
    prompt = endless.prompt(chat, ENDLESS)
    replies = endless.answer(chat, prompt, ENDLESS)
    some = [next(replies) for _ in range(3)]
    with passes_when_stopped(endless) as passes:
        replies.close()
    assert len(passes) <= 1
    assert chat.turns[-1].reply == some[-1].text
    assert not chat.turns[-1].ended
    short = Settings(temperature=0, max_new_tokens=3)  # the model is free again, for chats and others
    assert list(endless.reply(endless.prompt(chat, short), short))[-1].tokens <= 3
    assert dict(generate(endless.model, endless.tokenizer, [prompt.ids], {"max_new_tokens": 2}, 1))


def test_another_thread_can_stop_it(endless):
    stop = threading.Event()
    replies = endless.reply(endless.prompt(asked("a fish"), ENDLESS), ENDLESS, stop)
    next(replies)
    with passes_when_stopped(endless) as passes:
        stop.set()
        assert all(not reply.ended for reply in replies)
    assert len(passes) <= 1


def test_one_reply_does_not_stop_another(talker, endless):
    """That are stopped together: the first to be done."""
    stop, short = threading.Event(), Settings(temperature=0, max_new_tokens=3)
    long = endless.reply(endless.prompt(asked("a fish"), ENDLESS), ENDLESS, stop)
    next(long)
    assert list(talker.reply(talker.prompt(asked("a fish"), short), short, stop))
    assert not stop.is_set()
    assert [next(long).tokens for _ in range(3)]
    long.close()


def test_ctrl_c_stops_while_the_prompt_is_read(endless):
    first, second = [module for module in endless.model.modules() if type(module).__name__ == "GPTNeoXLayer"]
    reached = []

    def press_ctrl_c(*_):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(6000):  # until the main thread has heard it
            if any(stop.is_set() for stop in endless._stops):
                return
            time.sleep(0.01)

    hooks = [first.register_forward_hook(press_ctrl_c), second.register_forward_hook(lambda *_: reached.append(1))]
    try:
        with pytest.raises(KeyboardInterrupt):
            next(endless.reply(endless.prompt(asked("a fish"), ENDLESS), ENDLESS))
    finally:
        for hook in hooks:
            hook.remove()
    assert reached == []


def test_two_at_once_take_turns(talker):
    settings, found = Settings(temperature=0, max_new_tokens=30), {}

    def reply(text: str) -> None:
        found[text] = list(talker.reply(talker.prompt(asked(text), settings), settings))[-1]

    threads = [threading.Thread(target=reply, args=(text,)) for text in ("one fish", "two fish", "a red fish")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, together in found.items():
        reply(text)
        assert found[text] == together


def test_a_conversation_over_the_context(talker):
    turns = [Turn("what is a fish? " * 3, f"number {number}", True) for number in range(20)]
    chat, settings = asked("and where?", *turns), Settings(max_new_tokens=20)
    prompt = talker.prompt(chat, settings)
    assert 0 < prompt.left_out < 20
    assert len(prompt.ids) <= 256 - 20
    assert prompt.max_new_tokens == 20
    assert len(talker.encode(chat.messages(prompt.left_out - 1))) > 256 - 20
    assert f"the {prompt.left_out} oldest turns are left out" in talker.left_out_note(prompt)
    long = asked("fish " * 90)  # more than half of the positions, so the reply gets what is left
    prompt = talker.prompt(long, Settings())
    assert len(prompt.ids) + prompt.max_new_tokens == 256
    with pytest.raises(UserError, match="leaves no room for a reply in the model's 256 positions"):
        talker.prompt(asked("fish " * 400), settings)


def test_what_the_model_reads(talker):
    shown = talker.as_read(talker.encode([{"role": "user", "content": "a<|endoftext|>b"}]))
    assert shown == [
        ("<|prompter|>", True),
        ("a<|endoftext|>b", False),
        ("<|endoftext|><|assistant|>", True),
    ]


def test_not_enough_memory_is_one_line(talker):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = next(talker.model.children()).register_forward_pre_hook(full)
    try:
        with pytest.raises(UserError, match="not enough memory for one prompt"):
            list(talker.reply(talker.prompt(asked("a"), Settings()), Settings()))
    finally:
        hook.remove()
