"""Talking in the terminal, where a line is a message or a command; through a pipe all of the input is one message."""

import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from rich.console import Console

from chatting.conversation import Chat
from chatting.replies import Talker
from chatting.settings import Settings
from recipe.load import nearest
from training.replies import shown
from utils.errors import UserError


def print_reply(talker: Talker, chat: Chat, settings: Settings, note: Callable[[str], None]) -> None:
    """Reply to the conversation's last message on standard output as the reply comes; notes go where `note` puts them.

    Raises: UserError as `Talker.prompt` and `Talker.answer`.
    """
    prompt = talker.prompt(chat, settings)
    if prompt.left_out:
        note(talker.left_out_note(prompt))
    escape, printed = shown if sys.stdout.isatty() else str, 0
    try:
        with closing(talker.answer(chat, prompt, settings)) as replies:
            for reply in replies:
                sys.stdout.write(escape(reply.text[printed:]))
                sys.stdout.flush()
                printed = max(printed, len(reply.text))
    finally:
        if printed:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if not reply.ended:
        note(talker.cut_note(reply, prompt))
    elif not reply.text:
        note("the model ended its reply before the first word")


# ---- Through a pipe ----


def read_pipe() -> str:
    """All of standard input, without the newlines at its end.  Raises: UserError where it is not UTF-8."""
    try:
        return (sys.stdin.buffer.read() if sys.stdin else b"").decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8") from None


def reply_to_pipe(talker: Talker, chat: Chat, settings: Settings) -> None:
    """The reply, and nothing else, on standard output. Whoever reads it may go away before its end."""
    sys.stdout.reconfigure(errors="backslashreplace")  # where it is not UTF-8, such as LC_ALL=en_US.ISO-8859-1
    try:
        print_reply(talker, chat, settings, lambda text: print(text, file=sys.stderr))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes it


# ---- At the keyboard ----


class Terminal:
    """A conversation at the keyboard. What is said about it goes to standard error, replies to standard output."""

    def __init__(self, talker: Talker, chat: Chat, settings: Settings):
        self.talker, self.chat, self.settings = talker, chat, settings
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        # By what is typed: what follows it, what it does, and how.
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/reset": ("", "begin a new conversation; system message and settings stay", self.reset),
            "/undo": ("", "take the last message and its reply back", self.undo),
            "/retry": ("", "another reply to the last message", self.retry),
            "/system": ("TEXT", "what the model is told before all else; without TEXT nothing", self.system),
            "/set": ("NAME VALUE", "a sampling setting, off for none; without NAME all are shown", self.set),
            "/save": ("FILE", "add the conversation to a .jsonl file, which a recipe can train on", self.save),
            "/help": ("", "this list", self.help),
            "/quit": ("", "leave, as does Ctrl-D", self.quit),
        }

    def run(self) -> None:
        """Read and reply until /quit or Ctrl-D. A mistake is a line, after which the conversation goes on."""
        sys.stdout.reconfigure(errors="backslashreplace")
        session = self._session()
        self.note(f"{self.talker.describe()}\n/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = session.prompt("> ")
                self.take(line)
            except KeyboardInterrupt:
                self.note("Ctrl-C stops a reply; Ctrl-D or /quit leaves")
            except EOFError:
                return
            except UserError as error:
                self.note(f"error: {' '.join(str(error).split())}", "red")

    def _session(self) -> PromptSession:
        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        return PromptSession(
            completer=WordCompleter([*self.commands], sentence=True),
            complete_while_typing=False,
            key_bindings=keys,
            output=create_output(always_prefer_tty=True),  # not into a file that replies are sent to
        )

    def note(self, text: str, style: str = "dim") -> None:
        """Say something about the conversation."""
        self.console.print(shown(text), style=style)

    def take(self, line: str) -> None:
        """What was typed: a command, or a message. `//` stands for a message's own `/` in front."""
        if line.startswith("//") or not line.startswith("/"):
            if line.strip():
                self.reply_to(line.removeprefix("/"))
            return
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            raise UserError(f"{name} is no command{nearest(name, self.commands)}; // begins a message with /")
        what, _, command = self.commands[name]
        if rest and not what:
            raise UserError(f"{name} takes nothing after it")
        command(rest.strip())

    def reply_to(self, message: str | None) -> None:
        """Reply to a new message, or once more to the last one. Where nothing comes of it, all is as it was."""
        before = list(self.chat.turns)
        try:
            if message is None:
                self.chat.retry()
            else:
                self.chat.ask(message)
            print_reply(self.talker, self.chat, self.settings, self.note)
        except KeyboardInterrupt:
            self.note("stopped")
        finally:
            if len(self.chat.turns) and self.chat.turns[-1].reply is None:
                self.chat.turns = before
        self.settings = self.settings.next_seed()

    # ---- Commands ----

    def reset(self, _) -> None:
        self.chat = Chat(self.chat.system)
        self.note("a new conversation")

    def undo(self, _) -> None:
        self.note(f"taken back: {self.chat.undo().prompt}")

    def retry(self, _) -> None:
        self.reply_to(None)

    def system(self, text: str) -> None:
        self.talker.check_system(text)
        self.chat.system = text
        self.note("the system message is set" if text else "no system message")

    def set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.settings = self.talker.checked(self.settings.changed(**{name: value.strip()}))
        self.note("\n".join(line for line in self.settings.as_lines() if not rest or line.split()[0] == name))

    def save(self, file: str) -> None:
        if not file:
            raise UserError("/save needs a file's name, such as /save chats.jsonl")
        self.chat.save(Path(file))
        self.note(f"saved: {file}")

    def help(self, _) -> None:
        lines = [f"{f'{name} {what}':<18}{meaning}" for name, (what, meaning, _) in self.commands.items()]
        lines.append("Ctrl-C stops a reply; Alt-Enter begins a new line; // stands for a / at the start of a message")
        self.note("\n".join(lines))

    def quit(self, _) -> None:
        raise EOFError
