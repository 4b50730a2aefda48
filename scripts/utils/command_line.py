"""What the evaluation scripts are called with. Only light imports, so that --help is answered at once."""

import argparse

from utils.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse, its errors as a `UserError`; --help shows the script's own description as it is written."""

    def __init__(self, usage: str):
        super().__init__(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"command line: {message} (--help shows how)")


def evaluation_parser(usage: str) -> OneLineParser:
    """The arguments that all evaluation scripts have in common; a script adds its own.

    Args:
        usage: the script's docstring.
    """
    parser = OneLineParser(usage)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a model (a run's checkpoint), or hub name")
    parser.add_argument("--output", metavar="PATH", help=".json file or folder of the result; else CHECKPOINT/eval")
    parser.add_argument("--batch_size", type=positive, metavar="N", help="at once on each process")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="precision of the model")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    if (number := int(text)) < 1:
        raise ValueError
    return number
