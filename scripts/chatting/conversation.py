"""A conversation with a model: its turns, what of them still fits into the model's context, and the file it goes to."""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sources.messages import MessagesOptions, read_messages
from sources.source import Record, Remarks
from utils.errors import UserError
from utils.files import locked, parse_json, read_text, write_whole


@dataclass
class Turn:
    """What the user said, and what the model replied."""

    prompt: str
    reply: str | None = None  # None while there is none
    ended: bool = False  # whether the model ended it by itself; else it was stopped, or cut at max_new_tokens


@dataclass
class Chat:
    """Turns in order, with the system message above them, "" for none."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    saved: dict[Path, str] = field(default_factory=dict)  # by file, the line in which this conversation stands there

    def messages(self, without: int = 0) -> list[dict[str, str]]:
        """[{"role", "content"}], as a chat template takes them, but the oldest `without` turns."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[without:]:
            messages.append({"role": "user", "content": turn.prompt})
            if turn.reply is not None:
                messages.append({"role": "assistant", "content": turn.reply})
        return messages

    def ask(self, prompt: str) -> None:
        """Begin a turn.  Raises: UserError for a text that is blank, or holds what UTF-8 cannot write."""
        if not prompt.strip():
            raise UserError("the message is empty: write something")
        self.turns.append(Turn(written(prompt)))

    def undo(self) -> Turn:
        """Take back the last turn.  Raises: UserError where there is none."""
        if not self.turns:
            raise UserError("there is no turn to take back yet")
        return self.turns.pop()

    def retry(self) -> None:
        """Take back the last reply, but not what it replied to.  Raises: UserError where there is none."""
        if not self.turns:
            raise UserError("there is no reply to try again yet")
        self.turns[-1] = Turn(self.turns[-1].prompt)

    def fit(self, encode: Callable[[list[dict[str, str]]], list[int]], room: int | None) -> tuple[list[int], int]:
        """The prompt for the next reply: without the oldest turns where all of them are over `room` tokens.

        Args:
            encode: token ids of messages up to where the reply begins.
            room: None for a model without a limit.

        Returns: (token ids, number of turns left out). The last turn is never left out, however long it is.
        """
        whole = encode(self.messages())
        if room is None or len(whole) <= room:
            return whole, 0
        choices = range(1, len(self.turns))
        without = bisect_left(choices, True, key=lambda number: len(encode(self.messages(number))) <= room)
        without = min(without + 1, len(self.turns) - 1)
        return encode(self.messages(without)), without

    def save(self, path: Path) -> None:
        """Add the conversation to a JSON Lines file, which `source: messages` of a recipe reads.

        What stands in the file stays; only the line of an earlier save of this conversation is replaced. A reply that
        the model did not end is marked `"train": false`, so that nobody learns to end there. A turn with no reply, or
        an empty one, for which a recipe would drop the whole conversation, is left out.

        Raises: UserError where there is no reply yet, the file holds something else, or it cannot be written; it is as
            it was then.
        """
        answered = [turn for turn in self.turns if turn.reply and turn.reply.strip()]
        if not answered:
            raise UserError("there is no reply to save yet")
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in answered:
            messages.append({"role": "user", "content": turn.prompt})
            reply = {"role": "assistant", "content": turn.reply}
            messages.append(reply if turn.ended else reply | {"train": False})
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        try:
            path = path.expanduser().resolve()  # a link's target is what is replaced
            with locked(path.parent):  # another chat may be saving to it, whose line would be lost
                lines = _conversations(path) if path.exists() else []
                earlier = self.saved.get(path)
                if earlier in lines:
                    lines[lines.index(earlier)] = line
                else:
                    lines.append(line)
                write_whole(path, "\n".join(lines) + "\n")
        except (OSError, RuntimeError, ValueError) as error:  # a folder that is not there, a full disk, "~nobody", NUL
            said = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot write this conversation file: {said}") from None
        self.saved[path] = line


def _conversations(path: Path) -> list[str]:
    """The lines of a conversation file.  Raises: UserError for one that a recipe would not read."""
    lines, options = (
        read_text(path, "conversation file").split("\n"),
        MessagesOptions(source="messages", input_file_path=str(path)),
    )
    for number, line in enumerate(lines, 1):
        if line.strip():
            values = parse_json(line, path, number)
            if not isinstance(values, dict):
                raise UserError(f"{path} line {number}: not a conversation: give another file")
            read_messages(Record(values, path, number, number), options, Remarks(), 0)
    return [line for line in lines if line.strip()]


def written(text: str) -> str:
    """A text that UTF-8 can write; UserError for half of a surrogate pair, what a terminal makes of other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the message holds bytes that are no UTF-8, so it is not sent") from None
    return text
