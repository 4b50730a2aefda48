"""Stopping on a signal: finish the step, save, and exit with a status by which a scheduler knows to start again.

SIGTERM and SIGINT; SIGUSR1, which Slurm sends ahead of a time limit (`sbatch --signal=USR1@300`); and SIGHUP, which
comes where a terminal is closed, or a connection lost, unless `nohup` has said to go on. Before training there is
nothing to save, and the process exits at once. Only light imports here: it is set up before torch is loaded.
"""

import ctypes
import errno
import io
import os
import signal
import sys
import threading
import time
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again, and it goes on
# A terminal's Ctrl-C reaches every process by itself, and a moment later again through torch's launcher, which passes
# on what it gets: two signals this close are one request.
SAME_REQUEST = 2.0  # seconds


class _Terminal(io.FileIO):
    """A terminal, which may go away."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


class StopSignal:
    """Hears the signals, from the moment it is made.

    Attributes:
        name: of the signal that asked to stop; None while nobody has.
    """

    def __init__(self):
        self.name: str | None = None
        self._deferred = False
        self._first = 0.0
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # by nohup
        self._signals = [number for number in SIGNALS if number not in ignored]
        self._outlive_terminal()
        self._listen()
        if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by every `accelerate launch`
            # The launcher of one process dies of a SIGTERM without passing it on; the process would train on, orphaned.
            ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG, linux/prctl.h
        sys.unraisablehook = self._raise_again

    def _listen(self) -> None:
        """Set the handlers, or set them again: LLVM takes the signals for itself when Triton compiles its first kernel,
        and drops SIGUSR1 (seen with Triton 3.6 and 3.9; it takes them but once)."""
        for number in self._signals:
            signal.signal(number, self._hear)

    @staticmethod
    def _outlive_terminal() -> None:
        """Have what is printed to a terminal that is closed go nowhere: an error would end the run before its save."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))

    def defer(self) -> None:
        """From now on only take note: there is something to save, and the caller asks `agreed` between two steps."""
        self._deferred = True
        self._listen()

    def agreed(self, accelerator, failed: bool = False) -> bool:
        """Whether any process has been asked to stop, or has `failed`; the same answer on all. Every process calls
        this."""
        self._listen()
        stop = self.name is not None or failed
        if accelerator.num_processes == 1:
            return stop
        import torch

        asked = torch.tensor(int(stop), device=accelerator.device)
        return bool(accelerator.reduce(asked))

    def _hear(self, number: int, _frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGHUP and self.name is not None:
            return  # the launcher that led the terminal's session has ended on the same request
        if not self._deferred:
            print(f"{name}: stopped before the first step, nothing to save", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_STOPPED)
        if self.name is None:
            self.name, self._first = name, now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"\n{name}: saving after this step (a second signal ends at once)", file=sys.stderr, flush=True)
        elif now - self._first > SAME_REQUEST:
            os._exit(128 + number)

    @staticmethod
    def _raise_again(unraisable) -> None:
        """Python drops a SystemExit raised within a finalizer or a callback of C code: signal again when that is over.

        A daemon, since the process may be ending already.
        """
        if not isinstance(unraisable.exc_value, SystemExit):
            sys.__unraisablehook__(unraisable)
            return
        again = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM])
        again.daemon = True
        with suppress(RuntimeError):  # no thread starts any more: the process is ending
            again.start()
