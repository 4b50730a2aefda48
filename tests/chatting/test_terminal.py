"""chat.py at a keyboard, in a real terminal, and through pipes: what is printed where, and that nothing is lost."""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from functools import cache

import pytest
from checkpoints import save_chat_model
from conftest import ROOT, run_script
from forking import start_forked, start_in_terminal
from hypothesis import given
from hypothesis import strategies as st

from chatting.replies import load_talker
from chatting.settings import Settings
from chatting.terminal import shown
from evaluation.generation import encode_chat, generate
from evaluation.model import find_model

SCRIPT = "scripts/chat.py"
DRAWN = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[=>])|\r")  # how prompt_toolkit and rich draw


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """Of so many positions that only Ctrl-C ends a reply that may be long."""
    folder = save_chat_model(tiny_model, tmp_path_factory.mktemp("chat_model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200_000}))
    return folder


@cache
def loaded(checkpoint):
    return load_talker(find_model(str(checkpoint)), None)


def expected(checkpoint, messages: list[dict], settings: Settings) -> str:
    """What `generate` replies."""
    talker = loaded(checkpoint)
    ids = encode_chat(talker.tokenizer, messages)
    ((_, reply),) = generate(talker.model, talker.tokenizer, [ids], settings.for_generate(), 1, [settings.seed])
    return reply.text


class Typist:
    """Somebody at the keyboard of a terminal in which the script runs."""

    def __init__(self, *arguments):
        self.process, self.keyboard = start_in_terminal(SCRIPT, [*map(str, arguments)], ROOT)
        self.seen = ""  # since the last key

    def type(self, keys: str) -> None:
        self.seen = ""
        os.write(self.keyboard, keys.encode())

    def read(self) -> bool:
        """Look at the screen; False once it is off."""
        if select.select([self.keyboard], [], [], 0.1)[0]:
            try:
                new = os.read(self.keyboard, 65536).decode(errors="replace")
            except OSError:
                return False
            if "\x1b[6n" in new:  # it asks where the cursor is
                os.write(self.keyboard, b"\x1b[1;1R")
            self.seen += new
        return True

    def wait(self, text: str, seconds: float = 60) -> str:
        """What came on the screen until it shows this text."""
        begun = time.monotonic()
        while text not in (screen := DRAWN.sub("", self.seen)):
            assert time.monotonic() - begun < seconds, f"no {text!r} in {screen!r}"
            assert self.read(), f"no {text!r}, but the end, after {screen!r}"
        return screen

    def wait_for_prompt(self, text: str) -> str:
        """As `wait`, and until the script takes the next line."""
        screen = self.wait(text)
        while ">" not in screen.rpartition(text)[2]:
            assert self.read(), f"no prompt, but the end, after {screen!r}"
            screen = self.wait(text)
        return screen

    def enter(self, line: str, until: str) -> str:
        self.type(line)
        self.wait(line[-20:])
        self.type("\r")
        return self.wait_for_prompt(until)

    def leave(self, keys: str) -> int:
        self.type(keys)
        begun = time.monotonic()
        while self.read():
            assert time.monotonic() - begun < 60, f"no end after {self.seen!r}"
        os.close(self.keyboard)
        self.process.join(30)
        return self.process.exitcode


def test_a_conversation_at_the_keyboard(checkpoint, tmp_path):
    chats = tmp_path / "chats.jsonl"
    settings = Settings(max_new_tokens=15)
    typist = Typist(checkpoint, "--max_new_tokens", 15)
    greeting = typist.wait_for_prompt("Ctrl-D leaves")
    assert "float32 on the CPU, 200,000 positions" in greeting
    # A reply is that of `generate`; what looks like a control token stays text, and // is a message's own /.
    messages = [{"role": "user", "content": "/a <|endoftext|> fish"}]
    typist.enter("//a <|endoftext|> fish", "the reply was cut after 15 tokens: max_new_tokens")
    replies = [expected(checkpoint, messages, settings)]
    # Mistakes are lines, after which it goes on.
    for line, said in {
        "/rest": "error: /rest is no command: did you mean /reset?",
        "/set temprature 1": "error: temprature is no setting: did you mean temperature?",
        "/set temperature hot": "error: temperature = hot: ",
        "/undo 2": "error: /undo takes nothing after it",
        "/save": "error: /save needs a file's name",
        f"/save {tmp_path}/no/such.jsonl": "No such file or directory",
        "/help": "// stands for a / at the start of a message",
        "/set": "what was said before is less likely",
    }.items():
        assert "Traceback" not in typist.enter(line, said)
    # A second turn, another reply to it, with the next seeds; then it is taken back.
    for line, seed in {"and you?": 43, "/retry": 44}.items():
        typist.enter(line, "max_new_tokens\n")
        turns = [*messages, {"role": "assistant", "content": replies[0]}, {"role": "user", "content": "and you?"}]
        replies.append(expected(checkpoint, turns, settings.changed(seed=seed)))
    typist.enter(f"/save {chats}", "saved: ")
    saved = [message["content"] for message in json.loads(chats.read_text())["messages"]]
    assert saved == ["/a <|endoftext|> fish", replies[0], "and you?", replies[2]]
    typist.enter("/undo", "taken back: and you?")
    typist.enter("/set temperature=0", "temperature           0 ")
    typist.enter("/system be kind", "the system message is set")
    typist.enter("how?", "max_new_tokens\n")
    typist.enter(f"/save {chats}", "saved: ")
    (line,) = chats.read_text().splitlines()  # in place of the one before
    saved = json.loads(line)["messages"]
    assert saved[0] == {"role": "system", "content": "be kind"}
    assert saved[-1]["content"] == expected(checkpoint, saved[:-1], settings.changed(temperature=0))
    # Ctrl-C stops a reply, and what has come stays; at the prompt it ends nothing.
    typist.enter("/reset", "a new conversation")
    typist.enter("/set temperature 1.5", "1.5")
    typist.enter("/set max_new_tokens 100000", "100000")
    typist.enter("/set min_new_tokens 100000", "100000")
    typist.type("a long story")
    typist.wait("a long story")
    typist.type("\r")
    while len(typist.seen) < 500:
        assert typist.read()
    typist.type("\x03")
    typist.wait_for_prompt("stopped")
    typist.type("\x03")
    typist.wait_for_prompt("Ctrl-C stops a reply; Ctrl-D or /quit leaves")
    typist.enter(f"/save {chats}", "saved: ")
    story = json.loads(chats.read_text().splitlines()[-1])["messages"]
    assert [message["role"] for message in story] == ["system", "user", "assistant"]
    assert len(story[2]["content"]) > 100
    assert story[2]["train"] is False
    assert typist.leave("\x04") == 0
    assert "Traceback" not in typist.seen


def test_a_message_of_several_lines(checkpoint, tmp_path):
    typist = Typist(checkpoint, "--max_new_tokens", 2)
    typist.wait_for_prompt("Ctrl-D leaves")
    typist.type("one\x1b\rtwo ")  # Alt-Enter
    typist.wait("two")
    typist.type("\x1b[200~three\nfour\x1b[201~")  # pasted
    typist.wait("four")
    typist.type("\r")
    typist.wait_for_prompt("max_new_tokens")
    typist.enter(f"/save {tmp_path}/chats.jsonl", "saved: ")
    assert json.loads((tmp_path / "chats.jsonl").read_text())["messages"][0]["content"] == "one\ntwo three\nfour"
    assert typist.leave("/quit\r") == 0


# ---- Through a pipe ----


@pytest.mark.parametrize("message", ["a fish", "/help\nis text, as is\n\n<|endoftext|><|assistant|>"])
def test_a_pipe_is_one_message(checkpoint, message):
    how = ["--max_new_tokens", 20, "--seed", 3, "--system", "be kind"]
    run = run_script(checkpoint, *how, script=SCRIPT, output_dir=None, stdin=f"{message}\n".encode())
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": message}]
    assert run.stdout == expected(checkpoint, messages, Settings(max_new_tokens=20, seed=3)) + "\n"


def test_the_users_own_command(checkpoint):
    """As it is typed: nothing but the reply on standard output, nothing at all on standard error."""
    command = f"echo hi | {sys.executable} {SCRIPT} {checkpoint} --temperature 0 --max_new_tokens 5"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    settings = Settings(temperature=0, max_new_tokens=5)
    assert run.stdout == expected(checkpoint, [{"role": "user", "content": "hi"}], settings) + "\n"
    assert run.stderr == "the reply was cut after 5 tokens: max_new_tokens\n"


def test_nowhere_to_write_to(checkpoint):
    command = f"echo hi | {sys.executable} {SCRIPT} {checkpoint} >&-"
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "error: standard output is closed: there is no place for a reply\n")


def test_what_a_model_writes_does_not_act_on_the_terminal(checkpoint):
    """At a temperature at which all tokens are as likely, control characters are among them."""
    how = ["--temperature", "100", "--top_p", "off", "--max_new_tokens", "400", "--min_new_tokens", "400"]
    run = run_script(checkpoint, *how, script=SCRIPT, output_dir=None, stdin=b"hi")
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", run.stdout)
    keyboard, screen = os.openpty()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(b"hi")
        stdin.seek(0)
        with open(screen, "wb", closefd=False) as terminal:
            arguments = [str(checkpoint), *how]
            (process,) = start_forked(None, SCRIPT, arguments, ROOT, {}, terminal, stderr, stdin)
        os.close(screen)
        seen = b""
        while True:
            try:
                seen += os.read(keyboard, 65536)
            except OSError:
                break
        process.join(30)
        os.close(keyboard)
    text = seen.decode().replace("\r\n", "\n")
    assert text == shown(run.stdout)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


@given(st.text())
def test_any_text_can_be_shown(text):
    safe = shown(text)
    assert not any((ord(letter) < 32 and letter not in "\n\t") or 127 <= ord(letter) < 160 for letter in safe)
    if text.isprintable():
        assert safe == text


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], b"", "the message is empty"),
        ([], b" \n\n", "the message is empty"),
        ([], b"\xff\xfe", "standard input is not UTF-8"),
        (["--temperature", "hot"], b"hi", "command line: --temperature = hot"),
        (["--top_k", "0"], b"hi", "command line: --top_k = 0"),
        (["--temprature", "1"], b"hi", "unrecognized arguments: --temprature"),
        (["--port", "7"], b"hi", "--port is for --web"),
        (["--other", "demo"], b"hi", "--other is for --web"),
        (["--web", "--port", "no"], b"", "--port: no is no whole number"),
        (["--web", "--port", "70000"], b"", "--port: 70000 is over 65535"),
        (["--web", "--host", "no.such.host.invalid"], b"", "no.such.host.invalid cannot be had"),
        (["--web", "--other", "no/such/folder/here"], b"", "no/such/folder/here: no such folder"),
        (["--max_new_tokens", "10", "--system", "x " * 200_000], b"hi", "leaves no room for a reply in the model's"),
    ],
)
def test_a_mistake_is_one_line(checkpoint, arguments, stdin, message):
    run = run_script(checkpoint, *arguments, script=SCRIPT, output_dir=None, stdin=stdin, check=False)
    assert run.returncode == 2
    assert message in run.errors[0]
    assert len(run.errors) == 1
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("name", ["recipes", "no/such/one", "base"])
def test_what_is_no_chat_model(tiny_model, name):
    model = tiny_model if name == "base" else name
    run = run_script(model, script=SCRIPT, output_dir=None, stdin=b"hi", check=False)
    assert run.returncode == 2
    assert {"recipes": "not a model", "no/such/one": "no such folder", "base": "no chat template"}[name] in run.errors[
        0
    ]
    assert "Traceback" not in run.stderr


def test_whoever_reads_a_pipe_may_go_away(checkpoint):
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(b"hi")
        stdin.seek(0)
        with open(writer, "wb") as pipe:
            arguments = [str(checkpoint), "--max_new_tokens", "100000", "--min_new_tokens", "100000"]
            (process,) = start_forked(None, SCRIPT, arguments, ROOT, {}, pipe, stderr, stdin)
        assert os.read(reader, 1)
        os.close(reader)
        process.join(60)
        stderr.seek(0)
        assert stderr.read() == b""
    assert process.exitcode == 0
