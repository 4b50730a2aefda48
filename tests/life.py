"""One start of sft.py with all its processes: watched from outside, frozen, sent signals, waited for."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import ROOT, launch_command, launcher_options
from forking import start_forked, status_of, wait_for_all

LIFE_SECONDS = 900  # of a start, until the end of the last process; 10 to 30 s where cores are idle
POLL_SECONDS = 0.001


class Life:
    """One start of `sft.py`, with every process that came of it; use it in a `with`, which leaves none behind.

    Attributes:
        returncode: of the launcher, as its parent sees it; None until `wait`.
    """

    def __init__(self, arguments: list, output_dir: Path, launch: str, env: dict[str, str], log: Path):
        self.output_dir, self.log = output_dir, log
        self.started = time.monotonic()
        self.returncode: int | None = None
        self.checkpoint = newest_step(output_dir)  # that it goes on from
        command = [*launch_command(launch), "scripts/sft.py", *map(str, arguments), "--output_dir", str(output_dir)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **env}
        with open(log, "wb") as file:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._known = {psutil.Process(self.launcher.pid)}

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes():
            process.kill()
        self.launcher.wait()

    def processes(self) -> list[psutil.Process]:
        """Those alive, the launcher first. Each worker of a launcher of several has a session of its own."""
        for process in list(self._known):
            try:
                self._known.update(process.children(recursive=True))
            except psutil.NoSuchProcess:
                continue
        alive = [process for process in self._known if _is_alive(process)]
        return sorted(alive, key=lambda process: (process.pid != self.launcher.pid, process.pid))

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        return [
            process
            for process in self.processes()
            if "scripts/sft.py" in process.cmdline() and "launch" not in process.cmdline()
        ]

    def freeze(self) -> None:
        """Stop all processes where they stand."""
        while running := [process for process in self.processes() if process.status() != psutil.STATUS_STOPPED]:
            self.signal(running, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let them run again."""
        self.signal(self.processes(), signal.SIGCONT)

    def signal(self, processes: list[psutil.Process], number: int) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def printed(self) -> str:
        """What all processes have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher.poll() is not None

    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def wait_for(self, condition: Callable[["Life"], bool]) -> bool:
        """Wait until something can be seen of the run; False when it ended before."""
        while not condition(self):
            if self.is_over():
                return False
            assert self.age() < LIFE_SECONDS, f"it never came to the place\n{self.printed()[-3000:]}"
            time.sleep(POLL_SECONDS)
        return True

    def wait(self) -> int:
        """Wait for the end of every process."""
        while alive := self.processes():
            self.launcher.poll()  # which reaps it
            assert self.age() < LIFE_SECONDS, f"still there: {alive}\n{self.printed()[-3000:]}"
            time.sleep(0.02)
        self.returncode = self.launcher.wait()
        return self.returncode


class ForkedLife(Life):
    """The same of processes that `forking.py` starts, where it is not the launcher that matters."""

    script = "scripts/sft.py"

    def __init__(self, arguments: list, output_dir: Path, launch: str, env: dict[str, str], log: Path):
        self.output_dir, self.log = output_dir, log
        self.started = time.monotonic()
        self.returncode = None
        self.checkpoint = newest_step(output_dir)
        self._launcher = launcher_options(launch)
        arguments = [*map(str, arguments), "--output_dir", str(output_dir)]
        with open(log, "wb") as file:
            self._forked = start_forked(self._launcher, self.script, arguments, ROOT, env, file, file)
        self._known = {psutil.Process(process.pid) for process in self._forked}

    def __exit__(self, *_) -> None:
        for process in self._forked:
            process.kill()
            process.join()

    def processes(self) -> list[psutil.Process]:
        return sorted(filter(_is_alive, self._known), key=lambda process: process.pid)

    def workers(self) -> list[psutil.Process]:
        return self.processes()

    def is_over(self) -> bool:
        return not any(process.is_alive() for process in self._forked)

    def wait(self) -> int:
        wait_for_all(self._forked, LIFE_SECONDS)
        self.returncode = status_of(self._forked, self._launcher)
        return self.returncode


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)  # some containers have no reaper
    except psutil.NoSuchProcess:
        return False


def newest_step(output_dir: Path) -> int:
    """Of the newest checkpoint that bears its name; 0 without one."""
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdecimal()), default=0)
