"""Scripts in processes of their own that start sooner: forked from one that has imported what scripts import.

A start of sft.py takes 5 CPU seconds of imports, under `accelerate launch` with two processes three times that; forked,
a tenth of a second. The environment is the one that `accelerate launch` would give each process, by its own code. What
it does beyond that (watching processes, passing signals on) is left to the tests that start it for real.
"""

import atexit
import fcntl
import json
import multiprocessing
import os
import pty
import runpy
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, reduction
from pathlib import Path

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
HERE = Path(__file__).parent
SECONDS = 600.0  # for a script
GRACE = 30.0  # seconds from SIGTERM to SIGKILL, once one of several has failed


def run_forked(
    launcher: list[str] | None, script: str, arguments: list[str], folder: Path, stdin: bytes = b""
) -> subprocess.CompletedProcess:
    """Run a script as `python SCRIPT` or `accelerate launch ... SCRIPT` would, within `folder`.

    Args:
        launcher: what follows `accelerate launch`; None for a process without it.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        processes = start_forked(launcher, script, arguments, folder, {}, stdout, stderr, given)
        wait_for_all(processes, SECONDS)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess([script, *arguments], status_of(processes, launcher), *said)


def call_forked(function: Callable, *arguments, **keywords):
    """What a function of a module returns, called in a process of its own; RuntimeError with what it raised there, or
    the status that it died with. It has `SECONDS`."""
    _start_server()
    receiving, sending = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_call, args=(sending, function, arguments, keywords))
    process.start()
    sending.close()
    try:
        assert receiving.poll(SECONDS), f"{function.__name__} has not come to its end"
        result, error = receiving.recv()
    except EOFError:
        process.join()
        result, error = None, f"it died with {process.exitcode}"
    except BaseException:
        process.kill()
        raise
    process.join()
    if error:
        raise RuntimeError(error)
    return result


def measure_forked(measure: Callable[..., dict], *arguments, limit: float | None = None) -> dict:
    """As `benchmarking.measuring.in_a_process`, which starts Python anew: through JSON, within a limit of the test."""
    return json.loads(json.dumps(call_forked(measure, *json.loads(json.dumps(arguments)))))


def _call(sending, function: Callable, arguments: tuple, keywords: dict) -> None:
    try:
        sending.send((function(*arguments, **keywords), None))
    except BaseException as error:
        sending.send((None, f"{type(error).__name__}: {error}"))


def start_forked(
    launcher: list[str] | None,
    script: str,
    arguments: list[str],
    folder: Path,
    env: dict[str, str],
    stdout,
    stderr,
    stdin=None,
) -> list[multiprocessing.Process]:
    """The processes of a script, writing to these files and reading from that one.

    Args:
        env: further variables; those that are read when a library is imported come too late.
    """
    _start_server()
    environments = [dict(os.environ)] if launcher is None else launched_environments(launcher, script)
    processes = []
    for environment in environments:
        files = [_Descriptor(file) for file in ((stdout, stderr) if stdin is None else (stdout, stderr, stdin))]
        processes.append(CONTEXT.Process(target=_run, args=(script, arguments, environment | env, folder, *files)))
        processes[-1].start()
    return processes


def status_of(processes: list, launcher: list[str] | None) -> int:
    """The exit status; `accelerate launch` makes 1 of every one that is not 0."""
    failed = next((process.exitcode for process in processes if process.exitcode), 0)
    return failed if launcher is None else int(failed != 0)


@cache
def _start_server() -> None:
    """The process that the others are forked from; what it preloads it finds by PYTHONPATH only (Python 3.11)."""
    CONTEXT.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent / "scripts")]))
        forkserver.ensure_running()


def launched_environments(launcher: list[str], script: str) -> list[dict[str, str]]:
    """Of each process, by the code of `accelerate launch` and the variables of `torchrun`."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    arguments, defaults, precision = _validate_launch_command(launch_command_parser().parse_args([*launcher, script]))
    if arguments.use_deepspeed and not arguments.cpu:
        fields = [*defaults.deepspeed_config] + ["mixed_precision"] * precision
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif (arguments.multi_gpu or arguments.use_fsdp) and not arguments.cpu:
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
        return [environment]
    count = int(arguments.num_processes)
    environment = {**os.environ, **environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": arguments.main_process_port}
    environment |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": "1"}
    ranks = [{**environment, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


class _Descriptor:
    """An open file as the forked process gets it."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return _detached, (reduction.DupFd(self.file if isinstance(self.file, int) else self.file.fileno()),)


def _detached(duplicate) -> int:
    return duplicate.detach()


def start_in_terminal(script: str, arguments: list[str], folder: Path) -> tuple[multiprocessing.Process, int]:
    """A script in a terminal of its own, 100 columns wide: its process, and the keyboard and screen of the terminal."""
    _start_server()
    keyboard, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm"}
    files = [_Descriptor(screen)] * 3
    process = CONTEXT.Process(target=_run, args=(script, arguments, environment, folder, *files), daemon=True)
    process.start()
    os.close(screen)
    return process, keyboard


def _run(script, arguments, environment, folder, stdout, stderr, stdin=None) -> None:
    """In the forked process: become the script."""
    for file, descriptor in ((stdout, 1), (stderr, 2), (stdin, 0)):
        if file is not None:
            os.dup2(file, descriptor)
    if os.isatty(1):
        os.setsid()
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)  # Ctrl-C comes to this process
    if stdin is not None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has closed it
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)  # of another kind than the server's
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def wait_for_all(processes: list, seconds: float) -> None:
    """Wait until all have ended; where one fails the others are ended, as `torchrun` does it."""
    begun, failed = time.monotonic(), None
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        assert now - begun < seconds, "a forked script has not come to its end"
        if failed is None and any(process.exitcode for process in processes):
            failed = now
            for process in processes:
                process.terminate()
        if failed is not None and now - failed > GRACE:
            for process in processes:
                process.kill()
        time.sleep(0.01)
