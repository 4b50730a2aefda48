"""Talking on a page in the browser, to one model or to two side by side. Nothing of it needs a network."""

import html
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported: no telemetry, no look for a newer version
import fastapi
import gradio
import uvicorn

from chatting.conversation import Chat
from chatting.replies import Talker
from chatting.settings import Settings, shown_value
from utils.errors import UserError

CSS = Path(__file__).with_name("page.css")
REFRESH = 0.05  # seconds between two looks of the page at a reply
SHOWN_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "seed")


def serve(talkers: list[Talker], system: str, settings: Settings, listening: socket.socket) -> None:
    """Serve the page until Ctrl-C."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = Page(talkers, system, settings).blocks
    gradio.mount_gradio_app(
        app, page, "/", ssr_mode=False, run_history=False, footer_links=[], show_error=True, css_paths=CSS, pwa=False
    )
    host, port = listening.getsockname()[:2]
    for talker in talkers:
        print(talker.describe())
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}   Ctrl-C ends it", flush=True)
    # A browser keeps a connection open for as long as the page is: not to wait for that.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listening])


@dataclass
class Session:
    """What is kept for a browser tab; the page only shows it."""

    chats: list[Chat]  # one for each model
    read: dict[int, list[int]] = field(default_factory=dict)  # the newest prompts' token ids, by the model's place
    stop: threading.Event | None = None  # of the newest replies

    def end_replies(self) -> None:
        """Stop what is being generated, if anything is."""
        if self.stop:
            self.stop.set()


class Page:
    """The page: a panel for each model, which shows plain text, and one field for messages to all of them."""

    def __init__(self, talkers: list[Talker], system: str, settings: Settings):
        self.talkers, self.settings = talkers, settings
        names = " and ".join(Path(talker.name).name for talker in talkers)
        with gradio.Blocks(title=f"{names} - chat", analytics_enabled=False, fill_height=True) as self.blocks:
            self.session = gradio.State(Session([Chat(system) for _ in talkers]))
            with gradio.Row(elem_id="panels"):
                self.panels = [self._panel(talker) for talker in talkers]
            self.note = gradio.HTML(elem_id="note", visible=False)
            with gradio.Row(elem_id="entry"):
                self.message = gradio.Textbox(
                    placeholder="Write a message",
                    show_label=False,
                    container=False,
                    lines=1,
                    max_lines=8,
                    autofocus=True,
                    submit_btn="Send",
                    stop_btn=False,
                    elem_id="message",
                )
            with gradio.Accordion("Settings", open=False, elem_id="settings"):
                self.system = gradio.Textbox(system, label="System message", lines=2, elem_id="system")
                with gradio.Row():
                    self.fields = [self._field(name) for name in SHOWN_SETTINGS]
                self.seed = self.fields[SHOWN_SETTINGS.index("seed")]
            with gradio.Accordion("The prompt as the model reads it", open=False, elem_id="prompts"):
                self.prompts = [gradio.HTML(elem_classes="prompt") for _ in talkers]
            new = gradio.Button("New conversation", size="sm", elem_id="new")
            self._connect(new)

    def _panel(self, talker: Talker) -> gradio.Chatbot:
        return gradio.Chatbot(
            label=talker.name,
            elem_classes="conversation",
            height="62vh",
            layout="bubble",
            render_markdown=False,
            latex_delimiters=[],
            reasoning_tags=[],
            feedback_options=None,
            group_consecutive_messages=False,
            buttons=[],
            placeholder="Say something to the model.",
        )

    def _field(self, name: str) -> gradio.Textbox:
        """Of a setting: a text, since a field for numbers cannot say `off`."""
        return gradio.Textbox(
            shown_value(getattr(self.settings, name)),
            label=name,
            info=Settings.model_fields[name].description,
            min_width=140,
            elem_id=name,
        )

    def _connect(self, new: gradio.Button) -> None:
        """What happens when. Nothing of it is offered as an interface to programs."""
        said = [self.session, self.system, *self.fields]
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        how = hidden | {"outputs": [self.message, self.note, *self.panels, self.seed, *self.prompts]}
        self.message.submit(self.say, [self.message, *said], **how)
        for place, panel in enumerate(self.panels):
            panel.retry(partial(self.retry, place), said, **how)
            panel.undo(self.undo, self.session, queue=False, **how)
            panel.clear(self.reset, [self.session, self.system], queue=False, **how)
        # Not by Gradio's `cancels`, after which a page now and then says "Error" where a reply was.
        self.message.stop(Session.end_replies, self.session, None, queue=False, **hidden)
        new.click(self.reset, [self.session, self.system], queue=False, **how)

    # ---- Each returns what changes on the page ----

    def say(self, message: str, session: Session, system: str, *fields: Any) -> Iterator[dict]:
        """Send a message to each model, and show the replies as they come. If that cannot be, it stays in the field."""
        try:
            settings = self._settings(fields)
            asked = [Chat(system, [*chat.turns]) for chat in session.chats]
            for chat in asked:
                chat.ask(message)
            yield from self._replies(session, [*range(len(asked))], asked, settings)
        except UserError as error:
            yield self._ready(session, str(error)) | {self.message: self._entry(False, message)}

    def retry(self, place: int, session: Session, system: str, *fields: Any) -> Iterator[dict]:
        """Another reply of one of the models to the last message. If that cannot be, the one before stays."""
        try:
            settings = self._settings(fields)
            asked = [*session.chats]
            asked[place] = Chat(system, [*asked[place].turns])
            asked[place].retry()
            yield from self._replies(session, [place], asked, settings)
        except UserError as error:
            yield self._ready(session, str(error))

    def undo(self, session: Session) -> dict:
        """Take the last message back, with its replies, and put it into the field."""
        session.end_replies()
        taken = [chat.turns.pop().prompt for chat in session.chats if chat.turns]
        session.read = {}
        return self._ready(session) | ({self.message: self._entry(False, taken[-1])} if taken else {})

    def reset(self, session: Session, system: str) -> dict:
        """A new conversation, in which the settings stay."""
        session.end_replies()
        session.chats, session.read = [Chat(system) for _ in self.talkers], {}
        return self._ready(session)

    # ---- What these share ----

    def _replies(self, session: Session, places: list[int], asked: list[Chat], settings: Settings) -> Iterator[dict]:
        """The page while the models of `places` reply to what is `asked`, which becomes the session's once they can."""
        prompts = {place: self.talkers[place].prompt(asked[place], settings) for place in places}
        notes = [self.talkers[place].left_out_note(prompt) for place, prompt in prompts.items() if prompt.left_out]
        before, session.chats, session.stop = session.chats, asked, threading.Event()
        session.read |= {place: prompt.ids for place, prompt in prompts.items()}
        yield self._shown(session, notes) | {self.message: self._entry(True, "")}
        stop, last, shown = session.stop, {}, 0.0
        try:
            with ExitStack() as stack:
                streams = {}
                for place, prompt in prompts.items():
                    stream = self.talkers[place].answer(asked[place], prompt, settings, stop)
                    streams[place] = stack.enter_context(closing(stream))
                while streams:
                    for place, stream in [*streams.items()]:
                        if reply := next(stream, None):
                            last[place] = reply
                        else:
                            del streams[place]
                    if streams and time.monotonic() - shown > REFRESH and session.chats is asked:
                        yield {self.panels[place]: self._turns(asked[place]) for place in last}
                        shown = time.monotonic()
        finally:
            if not last and session.chats is asked:
                session.chats = before
            for chat in asked:
                if chat.turns and chat.turns[-1].reply is None:  # stopped before its first word
                    chat.turns[-1].reply = ""
        if stop.is_set():
            notes.append("stopped")
        else:
            notes += [self.talkers[at].cut_note(reply, prompts[at]) for at, reply in last.items() if not reply.ended]
        back = {} if last else {self.message: self._entry(False, asked[places[0]].turns[-1].prompt)}
        yield self._ready(session, *notes) | {self.seed: str(settings.next_seed().seed)} | back

    def _ready(self, session: Session, *notes: str) -> dict:
        """The page when no model replies."""
        return self._shown(session, notes) | {self.message: self._entry(False)}

    def _shown(self, session: Session, notes: Iterable[str]) -> dict:
        shown = {panel: self._turns(chat) for panel, chat in zip(self.panels, session.chats, strict=True)}
        shown |= {prompt: self._prompt(session, place) for place, prompt in enumerate(self.prompts)}
        note = "; ".join(notes)
        return shown | {self.note: gradio.HTML(html.escape(note), visible=bool(note))}

    def _prompt(self, session: Session, place: int) -> str:
        """What a model read before its last reply, its control tokens marked, to tell them from text that looks like
        them."""
        talker = self.talkers[place]
        stretches = [
            (html.escape(text), is_control) for text, is_control in talker.as_read(session.read.get(place, []))
        ]
        marked = [f"<mark>{text}</mark>" if is_control else text for text, is_control in stretches]
        name = f"<b>{html.escape(talker.name)}</b>" if len(self.talkers) > 1 else ""
        return f"{name}<pre>{''.join(marked)}</pre>"

    def _turns(self, chat: Chat) -> list[dict]:
        """The turns as a panel takes them. What looks like HTML is escaped: a panel makes HTML of it even without
        Markdown. Not as a `str`, of which it would take the blanks at the start of lines."""
        messages = Chat("", chat.turns).messages()
        texts = [[{"type": "text", "text": html.escape(message["content"])}] for message in messages]
        return [message | {"content": text} for message, text in zip(messages, texts, strict=True)]

    def _entry(self, replying: bool, text: str | None = None) -> gradio.Textbox:
        """The field for messages, with Stop in place of Send while models reply."""
        buttons = {"submit_btn": False if replying else "Send", "stop_btn": "Stop" if replying else False}
        return gradio.Textbox(**buttons) if text is None else gradio.Textbox(text, **buttons)

    def _settings(self, fields: tuple) -> Settings:
        settings = self.settings.changed(**dict(zip(SHOWN_SETTINGS, fields, strict=True)))
        for talker in self.talkers:
            talker.checked(settings)
        return settings
