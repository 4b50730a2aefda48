"""Talking on a page in the browser, to one model or to two side by side. Nothing of it needs a network."""

import html
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
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


class Page:
    """The page: a panel for each model, one field for messages to all of them.

    What is said is kept here, in a `Chat` for each model and browser tab; a panel only shows it, as plain text.
    """

    def __init__(self, talkers: list[Talker], system: str, settings: Settings):
        self.talkers, self.settings = talkers, settings
        names = " and ".join(Path(talker.name).name for talker in talkers)
        with gradio.Blocks(title=f"{names} - chat", analytics_enabled=False, fill_height=True) as self.blocks:
            self.chats = gradio.State([Chat(system) for _ in talkers])
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
            with gradio.Accordion("The prompt as the model reads it", open=False, elem_id="prompts") as prompts:
                self.prompts = [gradio.HTML(elem_classes="prompt") for _ in talkers]
            new = gradio.Button("New conversation", size="sm", elem_id="new")
            self._connect(prompts, new)

    def _panel(self, talker: Talker) -> gradio.Chatbot:
        return gradio.Chatbot(
            label=talker.name,
            elem_classes="panel",
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

    def _connect(self, prompts: gradio.Accordion, new: gradio.Button) -> None:
        """What happens when. Nothing of it is offered as an interface to programs."""
        said = [self.chats, self.system, *self.fields]
        shown = [self.chats, self.message, self.note, *self.panels, self.seed]
        how = {"outputs": shown, "show_progress": "hidden", "api_visibility": "private"}
        replies = [self.message.submit(self.say, [self.message, *said], **how)]
        replies += [panel.retry(partial(self.retry, place), said, **how) for place, panel in enumerate(self.panels)]
        still = how | {"queue": False}
        self.message.stop(self.stop, self.chats, cancels=replies, **still)
        new.click(self.reset, self.system, cancels=replies, **still)
        for panel in self.panels:
            panel.undo(self.undo, self.chats, **still)
            panel.clear(self.reset, self.system, cancels=replies, **still)
        # Made anew whenever it is opened, and after a reply.
        for event in (prompts.expand, *(reply.then for reply in replies)):
            event(self.show_prompts, said, self.prompts, show_progress="hidden", api_visibility="private")

    # ---- Each returns what changes on the page ----

    def say(self, message: str, chats: list[Chat], system: str, *fields: Any) -> Iterator[dict]:
        """Send a message to each model, and show the replies as they come. If that cannot be, it stays in the field."""
        try:
            settings = self._settings(fields)
            asked = [Chat(system, [*chat.turns]) for chat in chats]
            for chat in asked:
                chat.ask(message)
            yield from self._replies([*range(len(chats))], chats, asked, settings)
        except UserError as error:
            yield self._ready(chats, str(error)) | {self.message: self._entry(False, message)}

    def retry(self, place: int, chats: list[Chat], system: str, *fields: Any) -> Iterator[dict]:
        """Another reply of one of the models to the last message. If that cannot be, the one before stays."""
        try:
            settings = self._settings(fields)
            asked = [*chats]
            asked[place] = Chat(system, [*chats[place].turns])
            asked[place].retry()
            yield from self._replies([place], chats, asked, settings)
        except UserError as error:
            yield self._ready(chats, str(error))

    def stop(self, chats: list[Chat]) -> dict:
        """Show what has come until now."""
        return self._ready(chats, "stopped")

    def undo(self, chats: list[Chat]) -> dict:
        """Take the last message back, with its replies, and put it into the field."""
        message = [chat.turns.pop().prompt for chat in chats if chat.turns]
        return self._ready(chats) | ({self.message: self._entry(False, message[-1])} if message else {})

    def reset(self, system: str) -> dict:
        """A new conversation, in which the settings stay."""
        chats = [Chat(system) for _ in self.talkers]
        return self._ready(chats) | {self.chats: chats}

    def show_prompts(self, chats: list[Chat], system: str, *fields: Any) -> list:
        """What each model read before its last reply, its control tokens marked, to tell them from text like them."""
        shown = []
        for talker, chat in zip(self.talkers, chats, strict=True):
            stretches = []
            if chat.turns:
                asked = Chat(system, [*chat.turns])
                asked.retry()
                with suppress(UserError):  # which the note has said
                    stretches = talker.as_read(talker.prompt(asked, self._settings(fields)).ids)
            marked = [
                f"<mark>{html.escape(text)}</mark>" if control else html.escape(text) for text, control in stretches
            ]
            name = f"<b>{html.escape(talker.name)}</b>" if len(self.talkers) > 1 else ""
            shown.append(f"{name}<pre>{''.join(marked)}</pre>")
        return shown if len(shown) > 1 else shown[0]

    # ---- What these share ----

    def _replies(self, places: list[int], chats: list[Chat], asked: list[Chat], settings: Settings) -> Iterator[dict]:
        """The page while models reply, those of `places` at the same time; `chats` become `asked` once they can."""
        prompts = {place: self.talkers[place].prompt(asked[place], settings) for place in places}
        left_out = [self.talkers[place].left_out_note(prompt) for place, prompt in prompts.items() if prompt.left_out]
        chats[:] = asked
        yield self._shown(chats, "; ".join(left_out)) | {self.message: self._entry(True, "")}
        with ExitStack() as stack:
            streams = {
                place: stack.enter_context(closing(self.talkers[place].answer(chats[place], prompt, settings)))
                for place, prompt in prompts.items()
            }
            last, shown = {}, 0.0
            while streams:
                for place, stream in [*streams.items()]:
                    if reply := next(stream, None):
                        last[place] = reply
                    else:
                        del streams[place]
                if streams and time.monotonic() - shown > REFRESH:
                    yield {self.panels[place]: self._turns(chats[place]) for place in last}
                    shown = time.monotonic()
        cut = [self.talkers[place].cut_note(reply, prompts[place]) for place, reply in last.items() if not reply.ended]
        yield self._ready(chats, "; ".join(left_out + cut)) | {self.seed: str(settings.next_seed().seed)}

    def _ready(self, chats: list[Chat], note: str = "") -> dict:
        """The page when no model replies. A message without any reply goes back into the field."""
        unanswered = [chat.turns.pop().prompt for chat in chats if chat.turns and chat.turns[-1].reply is None]
        entry = self._entry(False, unanswered[0]) if len(unanswered) == len(chats) else self._entry(False)
        return self._shown(chats, note) | {self.message: entry}

    def _shown(self, chats: list[Chat], note: str) -> dict:
        views = {panel: self._turns(chat) for panel, chat in zip(self.panels, chats, strict=True)}
        return views | {self.note: gradio.HTML(html.escape(note), visible=bool(note))}

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
