"""Two machines on this one: each has a network, a host name and, where it is told, folders of its own.

They are network namespaces with a cable each to a switch, a bridge in a third namespace; pulling a cable is what it is
on a real machine: the interface stays, without a carrier.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = "29511"


def why_not() -> str | None:
    """Why there can be no such machines; None where there can."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        return "two machines: as root, with ip (apt-get install iproute2) and unshare"
    name = f"try-{os.getpid()}"
    made = all(not _ip(*words, check=False).returncode for words in (("netns", "add", name), ("netns", "del", name)))
    return None if made else "two machines: no network namespaces can be made here"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, check=check, timeout=60)


class Machines:
    """Two machines and the switch between them; use it in a `with`, which leaves nothing behind."""

    def __init__(self):
        name = secrets.token_hex(3)
        self.switch = f"switch-{name}"
        self.names = [f"machine{number}-{name}" for number in range(len(ADDRESSES))]
        self.started: list[Launcher] = []

    def __enter__(self) -> "Machines":
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES, strict=True)):
            _ip("netns", "add", name)
            cable = ("link", "add", f"cable{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self.switch, *cable)
            _ip("-n", self.switch, "link", "set", f"cable{number}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", name, "link", "set", interface, "up")
        return self

    def __exit__(self, *_) -> None:
        for launcher in self.started:
            launcher.kill()
        for name in (*self.names, self.switch):
            _ip("netns", "del", name, check=False)

    def cable(self, number: int, state: str) -> None:
        """Pull a machine's cable (`down`), or plug it in (`up`)."""
        _ip("-n", self.switch, "link", "set", f"cable{number}", state)

    def start(self, number: int, command: list, log: Path, own: dict[Path, Path], **env: str) -> "Launcher":
        """Start a command on a machine.

        Args:
            log: what it prints goes there.
            own: folders that it has for itself: the name that all use -> where the machine's own lies.
        """
        mounts = " && ".join(f"mount --bind '{folder}' '{name}'" for name, folder in own.items()) or ":"
        script = f'hostname "$0" && {mounts} && exec "$@"'
        inside = ["ip", "netns", "exec", self.names[number], "unshare", "--uts", "--mount", "sh", "-c", script]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": "eth0"} | env
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [*inside, f"machine{number}", *map(str, command)],
                cwd=ROOT,
                env={name: value for name, value in environment.items() if value},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(Launcher(process, log))
        return self.started[-1]


class Launcher:
    """`accelerate launch` on one machine, with all that it has started."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log
        self._known = {psutil.Process(process.pid)}

    def processes(self) -> list[psutil.Process]:
        """Those alive, the launcher's processes too."""
        for process in list(self._known):
            with suppress(psutil.NoSuchProcess):
                self._known.update(process.children(recursive=True))
        return [process for process in self._known if _is_alive(process)]

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        commands = {process: process.cmdline() for process in self.processes()}
        return [process for process, words in commands.items() if "scripts/sft.py" in words and "launch" not in words]

    def kill(self) -> None:
        """End all of them at once, as when the machine loses its power; its network stays."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float) -> int:
        """Until none of them is left; returns the launcher's exit status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < deadline, f"still there after {seconds} s: {self._standing()}"
            time.sleep(0.1)
        return self.process.returncode

    def _standing(self) -> str:
        """What is left of it, and where its training processes stand, which the watch has them say on SIGUSR2."""
        for process in self.workers():
            process.send_signal(signal.SIGUSR2)
        time.sleep(1)
        return f"{[process.cmdline() for process in self.processes()]}\n{self.said()}"

    def said(self) -> str:
        """What it has printed, without the states of its progress bar."""
        lines = self.log.read_text(errors="replace").split("\n")
        return "\n".join(line.rpartition("\r")[2][-1000:] for line in lines)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
