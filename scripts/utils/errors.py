"""Errors that are the user's to mend: one clear line and exit status 2, never a traceback."""

import contextlib
import os
import sys


class UserError(Exception):
    """Something in the recipe, the data or the machine that the user can mend; the message is one line."""


@contextlib.contextmanager
def one_line_errors(rank_zero_only: bool = False):
    """Turn a `UserError` raised inside into one line on stderr and exit status 2.

    Args:
        rank_zero_only: True where every process fails alike (a bad recipe), so that the line is printed once.
    """
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or not rank_zero_only:
            where = f" (process {rank})" if rank else ""
            message = " ".join(str(error).split())  # one line, whatever a file name or a value holds
            print(f"error{where}: {message}", file=sys.stderr, flush=True)
        # Without a traceback and without waiting for the other processes, which may stand in a collective.
        sys.stdout.flush()
        raise SystemExit(2) from None
