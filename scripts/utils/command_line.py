"""Reading a command line; every script does it by this. Only light imports, so that --help is answered at once."""

import argparse
import re

from utils.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """argparse, its errors as a `UserError`; --help shows `usage`, the script's docstring, as it is written."""

    def __init__(self, usage: str):
        super().__init__(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        message = re.sub(r"^argument (\S+): expected one argument", r"\1 needs a value", message)
        message = re.sub(r"^argument (\S+): ignored explicit argument .*", r"\1 takes no value", message)
        raise UserError(f"command line: {message.removeprefix('argument ')} (--help shows how)")


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text or repr(text)} is no whole number of at least 1")
    return int(text)
