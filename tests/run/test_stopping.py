"""Signals: the step is finished, all is saved and the exit status says so; a second one ends at once; nobody is left.

That the run then goes on as if nothing had been, and that one process's signal stops all, is tests/run/test_resume.py.
"""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ACCELERATE, ROOT, launch_command
from forking import start_in_terminal
from interruption import metrics, run_here, small_recipe

from run.checkpoint import read_checkpoint
from run.retention import list_checkpoints

WAITS = """
import os, sys, time
sys.path.insert(0, "scripts")
from run.stopping import StopSignal
class Heard(StopSignal):
    def _hear(self, number, frame):
        super()._hear(number, frame)
        os.write(1, b"heard\\n")
stop = Heard() if "told" in sys.argv else StopSignal()
if "defer" in sys.argv:
    stop.defer()
if "taken" in sys.argv:  # as LLVM does, within Triton's first compilation
    import ctypes
    from types import SimpleNamespace
    ctypes.CDLL(None).signal(10, 1)  # SIGUSR1, SIG_IGN
    assert not stop.agreed(SimpleNamespace(num_processes=1))
    print("ready", flush=True)
    time.sleep(0.5)
    print("agreed" if stop.agreed(SimpleNamespace(num_processes=1)) else "not heard", flush=True)
    raise SystemExit
if "told" in sys.argv:  # how much time goes by
    from run import stopping
    stopping.time = type("Clock", (), {"monotonic": lambda: now})
    now = 100.0
    print("ready", flush=True)
    for line in sys.stdin:
        now += float(line)
        os.write(1, f"at {now:g}\\n".encode())
if "finalizer" in sys.argv:
    class Slow:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(60)
    slow = Slow()
    del slow
else:
    print("ready", flush=True)
time.sleep(60)
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.fixture
def start():
    """Start a command with a group of its own; whatever is left of it at the end is killed."""
    started: list[psutil.Process] = []

    def start(*command, **environment) -> subprocess.Popen:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(psutil.Process(process.pid))
        return process

    yield start
    for process in started:
        with suppress(psutil.NoSuchProcess):
            for child in [*process.children(recursive=True), process]:
                child.kill()


def waits(start, *arguments) -> subprocess.Popen:
    """A process that only hears signals, ready to."""
    process = start(sys.executable, "-c", WAITS, *arguments)
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- what a signal does ----


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_before_there_is_something_to_save_it_ends_at_once(start, name):
    process = waits(start)
    process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=60)[0] == f"{name}: stopped before the first step, nothing to save\n"
    assert process.returncode == 75


def test_it_ends_too_where_python_drops_the_exit(start):
    process = waits(start, "finalizer")
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert lines == ["SIGTERM: stopped before the first step, nothing to save"] * 2  # and no traceback
    assert process.returncode == 75


def test_the_second_signal_ends_at_once_unless_it_is_the_same_request(start):
    """Signals from outside; the seconds between them are those that the process is told, however busy the machine."""
    process = waits(start, "defer", "told")

    def after(seconds: float) -> str:
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
        return process.stdout.readline()

    process.send_signal(signal.SIGINT)  # a terminal's Ctrl-C reaches the process by itself,
    said = [process.stdout.readline() for _ in range(3)]
    assert said == ["\n", "SIGINT: saving after this step (a second signal ends at once)\n", "heard\n"]
    assert after(1.9) == "at 101.9\n"
    process.send_signal(signal.SIGTERM)  # and through its launcher
    assert process.stdout.readline() == "heard\n"
    assert after(0.2) == "at 102.1\n"  # it goes on
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_each_signal_saves_after_the_step(tmp_path, tiny_model, name):
    run = run_here(small_recipe(tmp_path, tiny_model), output_dir=tmp_path / "output", steps=2, by=name)
    assert run.returncode == 75
    assert f"\n{name}: saving after this step" in run.stderr
    assert "2 of 20 steps" in run.stdout
    assert read_checkpoint(tmp_path / "output" / "checkpoint-2").step == 2


# ---- whom it is sent to ----


def long_run(tmp_path: Path, tiny_model: Path) -> list:
    """A run's arguments that lasts until it is told to stop."""
    recipe = small_recipe(tmp_path, tiny_model, max_steps=100_000, logging_steps=1, eval_steps=100_000)
    return ["scripts/sft.py", recipe, "--save_strategy", "no", "--output_dir", tmp_path / "output"]


def is_training(tmp_path: Path):
    return lambda: (tmp_path / "output" / "metrics.jsonl").exists() and len(metrics(tmp_path / "output")) > 3


def saved(tmp_path: Path) -> bool:
    """Whether there is one checkpoint, whole, of the step that metrics.jsonl ends with."""
    (path,) = list_checkpoints(tmp_path / "output")
    return read_checkpoint(path).step == metrics(tmp_path / "output")[-1]["step"]


def test_the_launcher_of_one_process_is_killed(tmp_path, tiny_model, start):
    """The worker, which nobody would hear of any more, saves and ends too."""
    launcher = start(*launch_command("cpu"), *long_run(tmp_path, tiny_model))
    wait_until(is_training(tmp_path))
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    assert saved(tmp_path)
    assert "SIGTERM: saving after this step" in launcher.communicate(timeout=60)[0]


@pytest.mark.parametrize("launch", ["python", "cpu"])
def test_a_terminal_is_closed(tmp_path, tiny_model, launch):
    """What leads its session ends first: the launcher, whose worker hears of both. The lines go nowhere then."""
    script, *arguments = map(str, long_run(tmp_path, tiny_model))
    if launch == "python":
        process, terminal = start_in_terminal(script, arguments, ROOT)
        leader = process.pid
    else:
        leader, terminal = pty.fork()
        if not leader:
            os.chdir(ROOT)
            os.execv(ACCELERATE[0], [*launch_command(launch), script, *arguments])
    wait_until(lambda: read_some(terminal) and is_training(tmp_path)())
    running = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
    os.close(terminal)
    _, left = psutil.wait_procs(running, timeout=60)
    for process in left:
        process.kill()
    assert not left
    assert saved(tmp_path)
    if launch == "python":
        process.join()
        assert process.exitcode == 75


def read_some(terminal: int) -> bool:
    """Read what has been written to a terminal, which would be full at some time; True."""
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 2**16)
    return True


def test_nohup_goes_on(start):
    """What ignores SIGHUP at its start goes on ignoring it."""
    process = start("nohup", sys.executable, "-c", WAITS)
    while process.stdout.readline() != "ready\n":  # nohup's own line comes first
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_slurm_warns_every_process_of_a_job(tmp_path, tiny_model, start):
    """`sbatch --signal=USR1@300` reaches the launcher too, which would die of it where it is not told to ignore it."""
    command = " ".join(map(str, [*launch_command("ddp2"), *long_run(tmp_path, tiny_model)]))
    script = start("bash", "-c", f"trap '' USR1; {command}; echo launcher ended with $?")
    wait_until(is_training(tmp_path))
    for process in [psutil.Process(script.pid), *psutil.Process(script.pid).children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    output = script.communicate(timeout=120)[0]
    assert "SIGUSR1: saving after this step" in output
    assert "launcher ended with 1" in output
    assert saved(tmp_path)


def test_while_data_are_prepared(tmp_path, tiny_model, start):
    """One of two processes prepares them and the other waits for it; both end, and what was half done is removed."""
    arguments = long_run(tmp_path, tiny_model)
    data = tmp_path / "sums.jsonl"
    data.write_text(data.read_text() * 10_000)
    run = start(*launch_command("ddp2"), *arguments)
    prepared = tmp_path / "cache" / "prepared"
    wait_until(lambda: [path for path in prepared.glob(".sums-*/examples.arrow") if path.stat().st_size])
    workers = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=60)[0]
    assert "SIGTERM: stopped before the first step, nothing to save" in output
    assert "Traceback" not in output.partition("torch/distributed")[0]
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not list(prepared.glob(".sums-*"))
    assert not list_checkpoints(tmp_path / "output")


@pytest.mark.skipif(sys.platform != "linux", reason="the number of SIGUSR1")
def test_a_handler_that_a_library_took_is_set_again(start):
    """Triton's first kernel: without it, Slurm's SIGUSR1 was not heard on a GPU."""
    process = start(sys.executable, "-c", WAITS, "defer", "taken")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "agreed"
