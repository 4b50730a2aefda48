"""Replies as they are generated, one at a time, from a model in a thread of its own; each can be stopped."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from chatting.conversation import Chat, written
from chatting.settings import Settings
from evaluation.chat_model import load_chat_model
from evaluation.generation import Reply, control_tokens, encode_chat, generate, room_for_reply
from evaluation.model import EvaluatedModel
from utils.errors import UserError
from utils.launch import has_gpu
from utils.tables import counted

LONGEST_WAIT = 0.2  # seconds
HELD_BACK = "\N{REPLACEMENT CHARACTER}"  # what a part of a character's bytes is decoded as


class Stopped(Exception):
    """Raised within the generation of a reply that nobody waits for any more."""


@dataclass(frozen=True)
class Prompt:
    """What a reply begins from."""

    ids: list[int]
    left_out: int  # turns, the oldest, for which there was no room
    max_new_tokens: int  # for which there is room


class Talker:
    """A chat model to talk to.

    Its replies are those of `evaluation.generation.generate` with the same settings and seed, token by token.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replies")  # one reply at a time
        self._stops: list[threading.Event] = []  # of the reply that is being generated
        # Looked at before each layer, since a long prompt is read for as long as a hundred tokens are written.
        for layer in model.modules():
            if type(layer).__name__ in (model._no_split_modules or ()):
                layer.register_forward_pre_hook(lambda *_: self._check())

    def describe(self) -> str:
        """Its name, size, precision, device and context, in one line."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        shown = f"{size / 1e9:.1f} billion" if size >= 1e9 else f"{size / 1e6:.1f} million"
        dtype = str(self.model.dtype).removeprefix("torch.")
        device = "the CPU" if self.model.device.type == "cpu" else torch.cuda.get_device_name(self.model.device)
        context = f", {self.positions:,} positions" if self.positions else ""
        return f"{self.name}: {shown} parameters, {dtype} on {device}{context}"

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of messages up to where the reply begins.  Raises: UserError as `encode_chat`."""
        return encode_chat(self.tokenizer, messages)

    def prompt(self, chat: Chat, settings: Settings) -> Prompt:
        """What the next reply begins from: the conversation, without the oldest turns where there is no room for them.

        There is room where max_new_tokens are left for the reply, or half of the positions.

        Raises: UserError where the last message alone leaves no room, or the template refuses the conversation.
        """
        wanted = settings.max_new_tokens
        room = self.positions - min(wanted, self.positions // 2) if self.positions else None
        ids, left_out = chat.fit(self.encode, room)
        return Prompt(ids, left_out, room_for_reply(self.model, [ids], wanted))

    def left_out_note(self, prompt: Prompt) -> str:
        """That turns were left out, for the user."""
        turns = "the oldest turn is" if prompt.left_out == 1 else f"the {prompt.left_out:,} oldest turns are"
        return f"{turns} left out: the model has {self.positions:,} positions, and the reply needs some of them"

    def cut_note(self, reply: Reply, prompt: Prompt) -> str:
        """Why the model did not end a reply, for the user."""
        room = self.positions and len(prompt.ids) + reply.tokens >= self.positions
        why = f"the model's {self.positions:,} positions are used up" if room else "max_new_tokens"
        return f"the reply was cut after {counted(reply.tokens, 'token')}: {why}"

    def check_system(self, text: str) -> None:
        """UserError where the model's template takes no system message."""
        chat = Chat(written(text))
        chat.ask("a")
        self.encode(chat.messages())

    def checked(self, settings: Settings) -> Settings:
        """The settings, once transformers has taken them.  Raises: UserError where it refuses them."""
        list(generate(self.model, self.tokenizer, [], settings.for_generate(), 1))
        return settings

    def answer(
        self, chat: Chat, prompt: Prompt, settings: Settings, stop: threading.Event | None = None
    ) -> Iterator[Reply]:
        """`reply` to the conversation's last message, written into it as it comes: what there is of it stays."""
        turn = chat.turns[-1]
        with closing(self.reply(prompt, settings, stop)) as replies:
            for reply in replies:
                turn.reply, turn.ended = reply.text, reply.ended
                yield reply

    def reply(self, prompt: Prompt, settings: Settings, stop: threading.Event | None = None) -> Iterator[Reply]:
        """The reply so far, longer each time; at last all of it, as `generate` returns it.

        It is stopped, before the model's next layer, by closing the iterator, by an exception within it, such as that
        of Ctrl-C, and from another thread by `stop`, after which the iterator ends.

        Raises: UserError as `generate`.
        """
        tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: there will be no more
        closed = threading.Event()
        stops = [closed, stop] if stop else [closed]
        chosen = settings.for_generate() | {"max_new_tokens": prompt.max_new_tokens}
        ids: list[int] = []
        done: Future | None = None
        try:
            done = self._thread.submit(self._generate, prompt.ids, chosen, settings.seed, tokens, stops)
            done.add_done_callback(lambda _: tokens.put(None))
            while (token := _next(tokens)) is not None:
                ids.append(token)
                if token in self.model.generation_config.eos_token_id:
                    break
                if tokens.empty():  # else the next has come already: decoding never holds the model up
                    yield Reply(self.text_so_far(ids), len(ids), ended=False)
            with suppress(Stopped):
                yield done.result()
        finally:
            closed.set()
            while done and not done.done():
                try:
                    wait([done])
                except KeyboardInterrupt:  # Ctrl-C twice: it is stopping
                    continue

    def text_so_far(self, ids: list[int]) -> str:
        """The text of a reply's first token ids, without a character of which some bytes have yet to come."""
        return self.tokenizer.decode(ids, skip_special_tokens=False).rstrip(HELD_BACK)

    def _generate(self, ids, chosen, seed, tokens, stops) -> Reply:
        self._stops = stops
        try:
            self._check()  # nobody may wait for it any more by the time that it begins
            streamer = _Tokens(tokens, self._check)
            ((_, reply),) = generate(self.model, self.tokenizer, [ids], chosen, 1, [seed], streamer)
            return reply
        finally:
            self._stops = []

    def _check(self) -> None:
        if any(stop.is_set() for stop in self._stops):
            raise Stopped

    def as_read(self, ids: list[int]) -> list[tuple[str, bool]]:
        """Token ids as text, in stretches that are control tokens or not: [(text, whether it is a control token)]."""
        controls = {*self.tokenizer.convert_tokens_to_ids([*control_tokens(self.tokenizer)])}
        return [
            (self.tokenizer.decode(list(run), skip_special_tokens=False), is_control)
            for is_control, run in groupby(ids, key=controls.__contains__)
        ]


def _next(tokens: queue.SimpleQueue) -> int | None:
    """What the queue has next, when it has it. Python may miss a Ctrl-C that comes in the moment in which a wait
    begins, and would hear it only when that is over: with a long prompt after minutes."""
    while True:
        with suppress(queue.Empty):
            return tokens.get(timeout=LONGEST_WAIT)


class _Tokens(BaseStreamer):
    """Hands on what `model.generate` puts into a streamer: first the prompt, which is left out, then token by token."""

    def __init__(self, tokens: queue.SimpleQueue, check):
        self.tokens, self.check, self.begun = tokens, check, False

    def put(self, value: torch.Tensor) -> None:
        self.check()
        for token in value.tolist() if self.begun else ():
            self.tokens.put(token)
        self.begun = True

    def end(self) -> None:
        pass


def load_talker(checkpoint: EvaluatedModel, dtype: str | None) -> Talker:
    """The model of a checkpoint, on the GPU where there is one.  Raises: UserError as `load_chat_model`."""
    device = torch.device("cuda" if has_gpu() else "cpu")
    try:
        return Talker(checkpoint.name, *load_chat_model(checkpoint, device, dtype))
    except torch.OutOfMemoryError as error:
        raise UserError(f"{checkpoint.name}: the model does not fit into the GPU's memory") from error
