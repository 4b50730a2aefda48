"""Settings as they are typed, what fits into the context, and the file that a conversation goes to."""

import json
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatting.conversation import Chat, Turn
from chatting.settings import Settings
from sources.messages import MessagesOptions, read_messages
from sources.source import Record, Remarks
from utils.errors import UserError

# ---- Settings ----


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "0", 0),
        ("top_p", "off", None),
        ("top_p", "1", 1),
        ("top_k", "40", 40),
        ("top_k", "None", None),
        ("min_p", "", None),
        ("max_new_tokens", "8", 8),
        ("seed", "0", 0),
    ],
)
def test_a_setting_is_read(name, text, value):
    assert getattr(Settings().changed(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temprature", "1", "temprature is no setting: did you mean temperature?"),
        ("temperature", "hot", "temperature = hot: "),
        ("temperature", "-1", "temperature = -1: "),
        ("temperature", "nan", "temperature = nan: "),
        ("temperature", "inf", "temperature = inf: "),
        ("temperature", "off", "temperature = off: "),
        ("top_p", "0", "top_p = 0: "),
        ("top_p", "1.1", "top_p = 1.1: "),
        ("top_k", "0", "top_k = 0: "),
        ("top_k", "2.5", "top_k = 2.5: "),
        ("repetition_penalty", "0", "repetition_penalty = 0: "),
        ("no_repeat_ngram_size", "-2", "no_repeat_ngram_size = -2: "),
        ("max_new_tokens", "0", "max_new_tokens = 0: "),
        ("seed", "-1", "seed = -1: "),
        ("seed", str(2**64), "seed = "),
        ("", "1", " is no setting"),
    ],
)
def test_an_impossible_setting(name, text, message):
    with pytest.raises(UserError) as error:
        Settings().changed(**{name: text})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_at_temperature_0_a_reply_is_greedy():
    assert Settings(temperature=0, top_k=5, repetition_penalty=1.2).for_generate() == {
        "max_new_tokens": 512,
        "repetition_penalty": 1.2,
    }


# ---- What fits ----


def words(messages: list[dict]) -> list[int]:
    """A stand-in for a chat template: an id for each word and each message."""
    return [len(word) for message in messages for word in ["role", *message["content"].split()]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans(), st.integers(1, 60) | st.none())
def test_the_oldest_turns_leave_first(lengths, system, room):
    chat = Chat("s" * system, [Turn("u " * length, "a") for length in lengths])
    chat.turns[-1].reply = None
    ids, left_out = chat.fit(words, room)
    assert ids == words(chat.messages(left_out))
    fitting = [number for number in range(len(lengths)) if room is None or len(words(chat.messages(number))) <= room]
    assert left_out == min(fitting, default=len(lengths) - 1)
    assert chat.messages(left_out)[-1] == {"role": "user", "content": chat.turns[-1].prompt}
    assert (chat.messages(left_out)[0]["role"] == "system") == system


@pytest.mark.parametrize("text", ["", "  \n", "half of a pair: \ud83d"])
def test_what_cannot_be_said(text):
    chat = Chat()
    with pytest.raises(UserError):
        chat.ask(text)
    assert chat == Chat()


def test_nothing_to_take_back():
    for what in (Chat.undo, Chat.retry):
        with pytest.raises(UserError, match="yet"):
            what(Chat())


# ---- The file ----

HOSTILE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def as_read(path: Path) -> list[list[tuple[str, str, bool]]]:
    """The conversations of a file, as a recipe's `source: messages` reads them."""
    found, options = [], MessagesOptions(source="messages", input_file_path=str(path))
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        record = Record(json.loads(line), path, number, number)
        (conversation,) = read_messages(record, options, Remarks(), 0)
        found.append([(message.role, message.content, message.train) for message in conversation.messages])
    return found


@given(st.lists(st.tuples(HOSTILE, HOSTILE, st.booleans()), min_size=1, max_size=4), HOSTILE | st.just(""))
def test_a_saved_conversation_is_read_by_a_recipe(tmp_path_factory, turns, system):
    path = tmp_path_factory.mktemp("saved") / "chats.jsonl"
    Chat(system, [Turn(*turn) for turn in turns]).save(path)
    expected = [("system", system, True)] * bool(system)
    for prompt, reply, ended in turns:
        expected += [("user", prompt, True), ("assistant", reply, ended)]
    assert as_read(path) == [expected]


def test_a_file_keeps_what_others_have_saved(tmp_path):
    path = tmp_path / "chats.jsonl"
    first, second = Chat("", [Turn("a", "b", True)]), Chat("", [Turn("c", "d", True)])
    first.save(path)
    second.save(path)
    first.turns.append(Turn("e", "f", True))
    first.save(path)  # in place of its own earlier line
    assert [[content for _, content, _ in one] for one in as_read(path)] == [["a", "b", "e", "f"], ["c", "d"]]
    path.write_text(path.read_text().removesuffix("\n"))  # by hand, without a newline at its end
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    Chat("", [Turn("g", "h", True)]).save(link)
    assert len(as_read(path)) == 3
    assert link.is_symlink()


def test_chats_that_save_at_once_lose_nothing(tmp_path):
    """As of two terminals. Without a lock, of two that read the same lines the later one leaves out the other's."""
    path = tmp_path / "chats.jsonl"
    at_once = Barrier(4, timeout=60)

    def save(name: int) -> None:
        chat = Chat()
        for turn in range(10):
            chat.turns.append(Turn(f"{name}", f"{turn}", True))
            at_once.wait()
            chat.save(path)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert sorted(len(conversation) for conversation in as_read(path)) == [20] * 4
    assert list(tmp_path.iterdir()) == [path]


NO_CONVERSATION = '{"step": 5, "loss": 0.5}\n'  # such as a run's metrics.jsonl


@pytest.mark.parametrize(
    "content", [NO_CONVERSATION, "notes of mine\n", '"a text"\n', '{"messages": []}\nno more JSON\n', "\x00\xff"]
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"notes\.txt"):
        Chat("", [Turn("a", "b")]).save(path)
    assert path.read_bytes() == content.encode("latin-1")


@pytest.mark.parametrize("name", ["no/such/folder/chats.jsonl", ".", "~nobody-here/x", "a\0b", "x" * 300])
def test_where_no_file_can_be(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        Chat("", [Turn("a", "b")]).save(Path(name))
    assert "conversation file" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = Chat("", [Turn("a", "b", True)])
    chat.save(path)
    before = path.read_bytes()
    chat.turns.append(Turn("long", "x" * 10_000, True))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            chat.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("empty", [None, "", " \n"])
def test_a_turn_without_a_reply_is_left_out(tmp_path, empty):
    """With it `source: messages` would drop the conversation."""
    path = tmp_path / "chats.jsonl"
    with pytest.raises(UserError, match="no reply to save yet"):
        Chat("", [Turn("a", empty, True)]).save(path)
    assert not path.exists()
    Chat("", [Turn("a", empty, True), Turn("b", "c", True), Turn("d", empty), Turn("e", "f", True)]).save(path)
    Chat("", [Turn("a", "b", True), Turn("c", empty)]).save(path)
    assert [[content for _, content, _ in one] for one in as_read(path)] == [["b", "c", "e", "f"], ["a", "b"]]
