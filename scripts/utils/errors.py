"""Errors that are the user's to mend: one clear line and exit status 2, never a traceback; nor is one for Ctrl-C."""

import contextlib
import errno
import os
import signal
import sys
import time

# The first process may be behind, on a machine that is busy: by seconds, not by minutes.
PATIENCE = 10.0


class UserError(Exception):
    """Something in the recipe, the data or the machine that the user can mend; the message is one line."""


@contextlib.contextmanager
def one_line_errors():
    """Turn a `UserError` raised inside into one line on stderr, `error: ...`, and exit status 2.

    From a process other than the first it is `error: process 3: ...`.
    Before the processes have met, those of one machine fail alike (a bad recipe, a broken file), so the first speaks;
    and where they have agreed on a failure (`utils.launch.stop_all`).
    """
    rank, status = int(os.environ.get("RANK", 0)), 2
    try:
        yield
        return
    except (UserError, OSError) as error:
        # An OSError wherever it came up; whoever can say more has made a UserError of it.
        number = error.errno if isinstance(error, OSError) else None
        cannot_write = number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        # These pathlib raises where it looks whether a file is there; whatever else is wrong with a path means "no".
        if isinstance(error, OSError) and not cannot_write and number not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        torch = sys.modules.get("torch")  # not imported here, since --help must not wait for it
        if int(os.environ.get("LOCAL_RANK", 0)) and not (torch and torch.distributed.is_initialized()):
            let_the_first_speak()
        where = f"process {rank}: " if rank else ""
        message = " ".join(str(error).split())  # one line, whatever a file name or a value holds
        line = f"error: {where}{'cannot write: ' * cannot_write}{message}"  # whoever looks for errors finds it so
    except SystemExit as end:
        if rank and end.code == 2:
            let_the_first_speak()
        raise
    except KeyboardInterrupt:  # sft.py, which has something to save, hears the signal itself
        line, status = "\ninterrupted", 128 + 2
    except RuntimeError as error:
        if not another_is_gone(error):  # which has said why itself, or the launcher does
            raise
        line = f"process {rank} ends, since another one has"
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm else []:
        bar.close()  # so that the line begins a line: behind a bar there is no newline, only a carriage return
    print(line, file=sys.stderr)
    for stream in (sys.stderr, sys.stdout):
        if stream:  # None where the shell has closed it, by `>&-`
            stream.flush()
    # Without a traceback and without waiting for the other processes, which may stand in a collective.
    raise SystemExit(status)


def let_the_first_speak() -> None:
    """In another process, before it ends with an error that the first says too: wait for the launcher to end it.

    A launcher ends all processes as soon as one has ended. Where that was not the first, it was ended before its line.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # at once, and in silence
    time.sleep(PATIENCE)


def another_is_gone(error: RuntimeError) -> bool:
    """Whether torch says, in gloo's words, that another process has ended."""
    return any(words in str(error) for words in ("Connection closed by peer", "Connection reset by peer"))


def reason(error: Exception) -> str:
    """What kind of error a library raised and what it said, in one line, for a message of ours."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return said[:300] + "..." * (len(said) > 300)
