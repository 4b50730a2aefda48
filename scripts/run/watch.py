"""Watching a run: one that stands still is ended, and says what each process was last seen doing.

A process that waits in a collective for one that is gone waits for hours: NCCL and gloo know nothing of training. So a
thread of each process looks at what its main thread says of itself (`Watch.at`), and tells it the others' threads
through a store of the first process's. Where no process of the run has come further for `stall_minutes`, each prints
where it stands, the first of each machine that still does also what it knows of all, and ends.

Times are of each machine's own monotonic clock, by when it heard a thing: clocks that differ do no harm. A pause of the
process itself (SIGSTOP, a laptop asleep) does not count.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import gather_object
from torch.distributed import TCPStore

from run.progress import Progress
from run.starts import end_start
from utils import files
from utils.errors import UserError
from utils.launch import num_processes, process_index

SILENT_BEATS = 5  # without a word, and a process does not run
BEATS = 20  # within stall_minutes: how often a process looks and tells
SHORTEST_BEAT, LONGEST_BEAT = 0.2, 10.0  # seconds
STORE_PATIENCE = timedelta(seconds=10)  # for an answer of the first process's
SHORTEST_END = 60.0  # seconds of the interpreter's own
RECORD_PATIENCE = 10.0  # seconds, for a file system that may be gone with the machine
EXIT_STALLED = 70  # EX_SOFTWARE of sysexits.h


def bytes_moved() -> int:
    """MiB that this process has read and written by system calls, and files that are on the disk: the pulse of one
    that works on files."""
    try:
        counters = psutil.Process().io_counters()
    except (psutil.Error, AttributeError, OSError):  # not on macOS, nor in every container
        return time.monotonic_ns()
    return ((counters.read_chars + counters.write_chars) >> 20) + files.flushed


def alive() -> int:
    """The pulse of a process that works by itself for as long as it takes: it only has to be there."""
    return time.monotonic_ns()


@dataclass
class Sign:
    """What is known here of a process.

    Attributes:
        doing: in words; None where nothing was heard of it yet.
        moved, heard: by this process's monotonic clock, when it had come further, and when it was heard.
    """

    doing: str | None
    moved: float
    heard: float
    last: Any = None
    host: str = "?"
    pid: int = 0

    def hear(self, word: list, now: float) -> None:
        """Take what it has told: [beat, pulse, doing, host, pid]."""
        beat, pulse, doing, host, pid = word
        if self.last is None or beat != self.last[0]:
            self.heard = now
        if self.last is None or (pulse, doing) != tuple(self.last[1:]):
            self.moved = now
        self.last, self.doing, self.host, self.pid = [beat, pulse, doing], doing, host, pid


class Watch:
    """The watch of one process; `at` costs nothing where the recipe gives no `stall_minutes`.

    Attributes:
        progress: where the run stands; None before there is a plan.
    """

    def __init__(self, stall_minutes: float | None, record: Path):
        """
        Args:
            record: run.json, in which it is written why the run ended.
        """
        self.minutes, self.record = stall_minutes, record
        self.progress: Progress | None = None
        self._mark: tuple[int, str, Callable[[], int] | None] = (0, "starting", None)  # changed as a whole
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._server: TCPStore | None = None
        self._port: int | None = None
        now = time.monotonic()
        self.signs = {process: Sign(None, now, now) for process in range(num_processes())}

    def start(self, doing: str) -> None:
        """Watch from now on."""
        self.at(doing)
        # So that `kill -USR2 PID` shows where a process stands, also one that does not let go of the interpreter.
        faulthandler.register(signal.SIGUSR2, sys.__stderr__, all_threads=True)
        if self.minutes is None:
            return
        self._in_background(self._judge)

    def connect(self) -> None:
        """Hear of the other processes, too. Every process calls this, when all have met."""
        if self.minutes is None or num_processes() == 1:
            return
        if process_index() == 0:
            self._server = self._store(0)
            self._port = self._server.port
        self._port = gather_object([self._port])[0]
        self._in_background(self._tell)

    def at(self, doing: str, pulse: Callable[[], int] | None = None) -> None:
        """The main thread has come to something, which is progress.

        Args:
            pulse: what shows progress until the next call, by changing.
        """
        self._mark = (self._mark[0] + 1, doing, pulse)

    def each(self, items: Iterable[Any], doing: str) -> Iterator[Any]:
        """The same items; each that is taken is progress."""
        for item in items:
            self.at(doing)
            yield item

    def close(self) -> None:
        """The run is over. The threads end before the interpreter does: one that comes back from within torch to an
        interpreter that is ending aborts the process (exit status -6), and the launchers of other machines wait 300
        seconds for this one's. What hangs from here on is ended by a thread that needs no interpreter."""
        self._closed.set()
        for thread in self._threads:
            thread.join(2 * STORE_PATIENCE.total_seconds())
        self._server = None
        if self._threads:
            faulthandler.dump_traceback_later(max(SHORTEST_END, 60 * self.minutes), exit=True, file=2)

    def _in_background(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work, name=work.__name__, daemon=True))
        self._threads[-1].start()

    @property
    def _beat(self) -> float:
        return min(LONGEST_BEAT, max(SHORTEST_BEAT, 60 * self.minutes / BEATS))

    def _own_word(self) -> list:
        number, doing, pulse = self._mark
        return [time.monotonic_ns(), [number, pulse() if pulse else 0], doing, socket.gethostname(), os.getpid()]

    def _store(self, port: int) -> TCPStore:
        """A connection to the first process's store; of port 0 that store itself."""
        options = {"is_master": port == 0, "wait_for_workers": False, "timeout": STORE_PATIENCE}
        return TCPStore(os.environ["MASTER_ADDR"], port, **options)

    def _tell(self) -> None:
        """Tell the others of this process, and hear of them; a first process that cannot be reached is tried again."""
        store, ended = None, False
        while not ended:
            try:
                store = store or self._store(self._port)
                store.set(str(process_index()), json.dumps(self._own_word()))
                names = [str(process) for process in self.signs]
                there = names if store.check(names) else [name for name in names if store.check([name])]
                for name, word in zip(there, store.multi_get(there), strict=True):
                    self.signs[int(name)].hear(json.loads(word), time.monotonic())
            except RuntimeError:  # of torch: nobody answers, or the connection is broken
                store = None
            ended = self._closed.wait(self._beat)

    def _judge(self) -> None:
        """End the process when the run has stood still for too long."""
        own, looked = self.signs[process_index()], time.monotonic()
        while not self._closed.wait(self._beat):
            now = time.monotonic()
            paused = now - looked - self._beat
            looked = now
            if paused > self._beat:  # this process itself did not run
                for sign in self.signs.values():
                    sign.moved, sign.heard = sign.moved + paused, sign.heard + paused
            own.hear(self._own_word(), now)
            if now - max(sign.moved for sign in self.signs.values()) > 60 * self.minutes:
                self._end(now)

    def _end(self, now: float) -> None:
        who = f"process {process_index()}: " if process_index() else ""
        step = self.progress.step if self.progress else 0
        why = f"no progress for {self.minutes:g} minutes (stall_minutes), after step {step:,}"
        lines = [f"\nerror: {who}{why}: ended"]
        here = {process: sign for process, sign in self.signs.items() if sign.host == socket.gethostname()}
        silent = {process for process, sign in here.items() if now - sign.heard > SILENT_BEATS * self._beat}
        speaks = process_index() == min(here.keys() - silent)  # for this machine; itself it has just heard
        if speaks:
            lines += [f"  {line}" for line in self.describe(now)]
        lines += [f"where process {process_index()} stands:", *_stacks()]
        os.write(2, ("\n".join(lines) + "\n").encode())
        for process in silent:  # one that does not let the interpreter go cannot say itself where it stands
            with suppress(OSError):
                os.kill(here[process].pid, signal.SIGUSR2)
        if speaks:
            writer = threading.Thread(target=self._write_down, args=(why, step), daemon=True)
            writer.start()
            writer.join(RECORD_PATIENCE)
        os._exit(EXIT_STALLED)

    def _write_down(self, why: str, step: int) -> None:
        with suppress(UserError, OSError):
            end_start(self.record, "stalled", why, step)

    def describe(self, now: float) -> list[str]:
        """A line for each process: what it was last seen doing, and when it was last heard."""
        lines = []
        for process, sign in self.signs.items():
            if sign.doing is None:
                lines.append(f"process {process}: nothing heard")
                continue
            lines.append(
                f"process {process} on {sign.host} (pid {sign.pid}): {sign.doing}, for {now - sign.moved:.1f} s; "
                f"last heard {now - sign.heard:.1f} s ago"
            )
        return lines


def _stacks() -> list[str]:
    """Of this process's threads, the main one last."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().splitlines()
