#!/usr/bin/env python3
"""Talk to a checkpoint, in the terminal or on a page in the browser; two checkpoints side by side.

    python scripts/chat.py demo_output
    python scripts/chat.py stablelm_7b/checkpoint-12000 --system "Answer in one sentence." --temperature 0
    echo "What colour is a banana?" | python scripts/chat.py demo_output > reply.txt
    python scripts/chat.py stablelm_7b --web --other stablelm_7b/checkpoint-6000     # on http://127.0.0.1:7860

The checkpoint is a folder, or the hub name of any chat model. In the terminal a line is a message, or a command that
begins with /: /help lists them. Ctrl-C stops a reply, Ctrl-D leaves. Where standard input is no terminal, all of it is
one message, and standard output has the reply and nothing else.

The model reads the conversation in the format of its own chat template, where what you write is text, whatever it
looks like. Where the conversation grows over the model's positions, its oldest turns are left out, and a line says so.
A reply depends on the conversation, the settings and the seed, which counts on from reply to reply.

--web needs the packages of requirements-web.txt, but no network. The page is for this machine alone, unless --host says
otherwise: 0.0.0.0 lets in whoever can reach it, without a password.
"""

import errno
import os
import socket
import sys

from chatting.settings import Settings
from evaluation.model import find_model, trust_option
from utils.command_line import OneLineParser, positive
from utils.errors import UserError, one_line_errors
from utils.requirements import require

PORT = 7860


def arguments():
    parser = OneLineParser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model (a run's checkpoint), or hub name")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of the model")
    trust_option(parser)
    parser.add_argument("--system", metavar="TEXT", default="", help="what the model is told before all else")
    for name, field in Settings.model_fields.items():
        default = "off" if field.default is None else field.default
        parser.add_argument(f"--{name}", metavar="X", help=f"{field.description} ({default})")
    parser.add_argument("--web", action="store_true", help="a page in the browser instead of the terminal")
    parser.add_argument("--other", metavar="CHECKPOINT", help="with --web: a second model, beside the first")
    parser.add_argument("--host", metavar="ADDRESS", help="with --web: where the page is (127.0.0.1)")
    parser.add_argument("--port", type=positive, metavar="N", help=f"with --web: its port ({PORT})")
    options = parser.parse_args()
    if options.port is not None and options.port >= 2**16:  # which a look-up of its address takes modulo 65,536
        raise UserError(f"command line: --port: {options.port} is over 65535")
    for name in ("other", "host", "port"):
        if getattr(options, name) is not None and not options.web:
            raise UserError(f"command line: --{name} is for --web")
    given = {name: value for name in Settings.model_fields if (value := getattr(options, name)) is not None}
    try:
        options.settings = Settings().changed(**given)
    except UserError as error:
        raise UserError(f"command line: --{error}") from None
    return options


def bind(host: str, port: int) -> socket.socket:
    """The socket that the page is served on.  Raises: UserError where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # taken, a port below 1,024, no such address or name
        remedy = "another --port may be free" if host == "127.0.0.1" else "give another --port or --host"
        is_ours = getattr(error, "errno", None) in errno.errorcode  # the others are of looking a name up
        said = os.strerror(error.errno) if is_ours else getattr(error, "strerror", None) or error
        raise UserError(f"command line: port {port} of {host} cannot be had: {said}: {remedy}") from None


if __name__ == "__main__":
    with one_line_errors():
        OPTIONS = arguments()
        require("prompt_toolkit")
        NAMES = [name for name in (OPTIONS.checkpoint, OPTIONS.other) if name is not None]
        CHECKPOINTS = [find_model(name, OPTIONS.trust_remote_code) for name in NAMES]
        if OPTIONS.web:
            require("gradio", "requirements-web.txt")
            SOCKET = bind(OPTIONS.host or "127.0.0.1", OPTIONS.port or PORT)  # before a model is loaded

from chatting.conversation import Chat
from chatting.replies import load_talker
from chatting.terminal import Terminal, read_pipe, reply_to_pipe
from utils.launch import set_up_process


def main(options, checkpoints) -> None:
    chat, at_keyboard = Chat(options.system), bool(sys.stdin and sys.stdin.isatty())
    if not options.web and sys.stdout is None:  # `>&-`
        raise UserError("standard output is closed: there is no place for a reply")
    if not options.web and not at_keyboard:
        chat.ask(read_pipe())
    set_up_process()
    talkers = [load_talker(checkpoint, options.dtype) for checkpoint in checkpoints]
    for talker in talkers:
        talker.check_system(options.system)
        talker.checked(options.settings)
    if options.web:
        from chatting.web import serve

        serve(talkers, options.system, options.settings, SOCKET)
    elif at_keyboard:
        Terminal(talkers[0], chat, options.settings).run()
    else:
        reply_to_pipe(talkers[0], chat, options.settings)


if __name__ == "__main__":
    with one_line_errors():
        main(OPTIONS, CHECKPOINTS)
