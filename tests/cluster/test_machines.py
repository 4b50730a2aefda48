"""Two machines of two processes each, started by the shipped config: what they learn is what one machine learns.

`make test-machines` has all of it, CI the first; every one starts four processes by the user's own command.
"""

import json
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import ACCELERATE, ROOT
from forking import run_forked
from interruption import metrics, small_recipe
from machines import ADDRESSES, PORT, Launcher, Machines, why_not

pytestmark = [pytest.mark.machines, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
# Of each engine the accelerate config, and what is said beside the recipe.
ENGINES = {
    "zero2": ("accelerate_configs/multi_node.yaml", ["--deepspeed_config", "ds_configs/zero2.json"]),
    "ddp": ("accelerate_configs/multi_node.yaml", []),
    "fsdp2": ("accelerate_configs/fsdp2.yaml", []),
    "hsdp": ("accelerate_configs/hsdp.yaml", []),
}
every_engine = pytest.mark.parametrize("engine", ENGINES)
STEPS = 60
ENOUGH = 240  # seconds for a start, where the cores are shared


class Trial:
    """A run on two machines, and the same on one."""

    def __init__(self, machines: Machines, folder: Path, model: Path, engine: str, **keys):
        self.machines, self.folder, self.output = machines, folder, folder / "output"
        self.config, self.arguments = ENGINES[engine]
        keys = {"max_steps": STEPS, "num_train_epochs": 99, "logging_steps": 1, "save_steps": 20, **keys}
        keys |= {"eval_steps": 10_000, "global_batch_size": 8, "output_dir": str(self.output)}
        self.recipe = small_recipe(folder, model, **keys)

    def start(self, number: int, own: dict[Path, Path] | None = None, **env: str) -> Launcher:
        """One machine's launcher."""
        command = [*ACCELERATE, "--config_file", self.config, "--num_machines", 2, "--num_processes", 4]
        command += ["--machine_rank", number, "--main_process_ip", ADDRESSES[0], "--main_process_port", PORT]
        command += ["scripts/sft.py", self.recipe, *self.arguments]
        return self.machines.start(number, command, self.folder / f"machine{number}.log", own or {}, **env)

    def start_both(self) -> list[Launcher]:
        return [self.start(number) for number in range(2)]

    def steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_steps(self, count: int, launchers: list[Launcher]) -> None:
        deadline = time.monotonic() + ENOUGH
        while self.steps() < count:
            said = "\n".join(launcher.said() for launcher in launchers)
            assert all(launcher.process.poll() is None for launcher in launchers), said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    def finish(self) -> None:
        """The same command on both machines, to the end."""
        for launcher in self.start_both():
            assert launcher.wait(ENOUGH) == 0, launcher.said()

    def assert_as_on_one_machine(self) -> None:
        """Of each line of metrics.jsonl all that is not measured, to 1e-6."""
        whole = self.folder / "whole"
        launcher = ["--config_file", self.config, "--num_machines", "1", "--num_processes", "4"]
        launcher += ["--main_process_port", PORT]
        arguments = [*map(str, [self.recipe, *self.arguments, "--output_dir", whole])]
        process = run_forked(launcher, "scripts/sft.py", arguments, ROOT)
        assert process.returncode == 0, process.stderr
        lines, expected = metrics(self.output), metrics(whole)
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        for line, other in zip(lines, expected, strict=True):
            assert line == pytest.approx(other, rel=1e-6)


@pytest.fixture
def machines():
    with Machines() as machines:
        yield machines


@every_engine
def test_two_machines_learn_what_one_does(machines, tmp_path, tiny_model, engine):
    trial = Trial(machines, tmp_path, tiny_model, engine)
    trial.finish()
    trial.assert_as_on_one_machine()


@every_engine
def test_a_cable_is_out_for_a_while(machines, tmp_path, tiny_model, engine):
    """The run waits, and goes on."""
    trial = Trial(machines, tmp_path, tiny_model, engine, stall_minutes=1)
    launchers = trial.start_both()
    trial.wait_for_steps(5, launchers)
    machines.cable(1, "down")
    time.sleep(2)
    stood = trial.steps()
    time.sleep(6)
    assert trial.steps() == stood
    machines.cable(1, "up")
    for launcher in launchers:
        assert launcher.wait(ENOUGH) == 0, launcher.said()
    trial.assert_as_on_one_machine()


@every_engine
def test_a_cable_is_out_for_good(machines, tmp_path, tiny_model, engine):
    """Both machines end within the recipe's time and say why; the same command goes on when the cable is in."""
    trial = Trial(machines, tmp_path, tiny_model, engine, stall_minutes=0.2)
    launchers = trial.start_both()
    trial.wait_for_steps(25, launchers)
    machines.cable(1, "down")
    cut = time.monotonic()
    for launcher in launchers:
        assert launcher.wait(ENOUGH) == 1
        assert "no progress for 0.2 minutes" in launcher.said()
    assert time.monotonic() - cut < 60
    assert json.loads((trial.output / "run.json").read_text())["status"] == "stalled"
    machines.cable(1, "up")
    trial.finish()
    trial.assert_as_on_one_machine()


@every_engine
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_dies(machines, tmp_path, tiny_model, engine, killed):
    trial = Trial(machines, tmp_path, tiny_model, engine, stall_minutes=0.2)
    launchers = trial.start_both()
    trial.wait_for_steps(25, launchers)
    launchers[killed].kill()
    assert launchers[1 - killed].wait(60) == 1
    trial.finish()
    trial.assert_as_on_one_machine()


def test_an_output_folder_of_its_own_is_refused_before_training(machines, tmp_path, tiny_model):
    """In one line that names the machine; its data have been prepared by then, once on each machine."""
    trial = Trial(machines, tmp_path, tiny_model, "ddp")
    launchers = []
    for number in range(2):
        own = {}
        for name in ("output", "cache") if number else ():
            for folder in (tmp_path / name, tmp_path / "elsewhere" / name):
                folder.mkdir(parents=True)
            own[tmp_path / name] = tmp_path / "elsewhere" / name
        launchers.append(trial.start(number, own))
    for launcher in launchers:
        assert launcher.wait(ENOUGH) == 1
    said = [launcher.said() for launcher in launchers]
    (error,) = [line for line in "\n".join(said).splitlines() if line.startswith("error: ")]
    assert error == (
        f"error: output_dir = {trial.output}: what machine0 (process 0) writes there is not seen by machine1 "
        "(process 2, 3): give a folder on a file system that all machines share"
    )
    assert [each.count("prepared sums: 40 rows") for each in said] == [1, 1]
    assert not (trial.output / "metrics.jsonl").exists()


def test_loopback_is_one_line_that_names_the_remedy(machines, tmp_path, tiny_model):
    """gloo takes it where a machine's own name is unknown to it, as it is to these."""
    trial = Trial(machines, tmp_path, tiny_model, "ddp", stall_minutes=0.2)
    launchers = [trial.start(number, GLOO_SOCKET_IFNAME="") for number in range(2)]
    for launcher in launchers:
        assert launcher.wait(ENOUGH) == 1
    said = "".join(launcher.said() for launcher in launchers)
    assert "error: the processes do not reach each other by gloo: RuntimeError: Gloo connectFullMesh failed" in said
    assert "set GLOO_SOCKET_IFNAME to the network" in said


CLOCK = """
import datetime, time
OFFSET = -2 * 86_400
seconds, nanoseconds = time.time, time.time_ns
time.time, time.time_ns = lambda: seconds() + OFFSET, lambda: nanoseconds() + OFFSET * 10**9
class Late(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=OFFSET)
datetime.datetime = Late
"""


def test_clocks_that_differ_do_no_harm(machines, tmp_path, tiny_model):
    """The first machine is two days behind: the run is watched, saves, is stopped, and goes on as on one machine.

    Of Python's clock: libfaketime moves what is slept by, too (glibc's clock_nanosleep then refuses the time).
    """
    trial = Trial(machines, tmp_path, tiny_model, "zero2", stall_minutes=1)
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    for status in (1, 0):
        launchers = [trial.start(0, PYTHONPATH=str(tmp_path / "clock")), trial.start(1)]
        if status:
            trial.wait_for_steps(25, launchers)
            for worker in launchers[1].workers():
                worker.send_signal(signal.SIGUSR1)
        assert [launcher.wait(ENOUGH) for launcher in launchers] == [status] * 2
    first, last = json.loads((trial.output / "run.json").read_text())["starts"]
    assert datetime.now(UTC) - datetime.fromisoformat(first["started"]) > timedelta(days=1)
    assert (first["why"], last["why"]) == ("a signal to another process", "finished")
    assert last["from_step"] == first["step"]
    trial.assert_as_on_one_machine()
