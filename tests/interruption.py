"""sft.py, interrupted at an exact moment of its work: within the test's own process, or as a script under a launcher.

    run_here("recipes/demo.yaml", "--max_steps", 9, output_dir=folder, steps=4)            # SIGTERM after 4 steps
    accelerate launch ... tests/interruption.py '{"evaluation_batches": 2, "process": 1}' recipes/demo.yaml ...

A run within the test's process takes a second where a process of its own takes ten, most of them imports.
"""

import contextlib
import faulthandler
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "tests/interruption.py"
MEASURED = {"tokens_per_second", "tokens_per_second_per_device", "data_wait_share", "peak_memory_gib", "mfu"}
OF_SEVERAL = {"backward_share", "collective_wait_share", "slowest_process", "slowest_share"}


def small_recipe(folder: Path, model: Path, **keys) -> Path:
    """A recipe of two small data sets, one of them drawn anew each epoch: 38 conversations, 20 steps in two epochs."""
    talks = {"sums": 40, "words": 24}
    for name, count in talks.items():
        lines = []
        for n in range(count):
            turns = [("user", f"{name} {n} and {n * 7 % 13}?"), ("assistant", f"That is {n + n * 7 % 13}. ")]
            turns[1] = ("assistant", turns[1][1] * (1 + n % 5))
            messages = [{"role": role, "content": content} for role, content in turns * (1 + n % 3)]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    mix = {name: {"source": "messages", "input_file_path": str(folder / f"{name}.jsonl")} for name in talks}
    mix["words"]["fraction"] = 0.3
    values = {
        "model_name": str(model),
        "datasets": [{name: options} for name, options in mix.items()],
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "unused"),
        "dtype": "fp32",
        "max_length": 48,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 3,
        "logging_steps": 3,
        "eval_steps": 4,
        "save_steps": 5,
        "save_total_limit": None,
        "log_wandb": False,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values | keys))  # which is YAML too
    return path


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without what is measured, which is another in every run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED | OF_SEVERAL} for line in lines]


class Died(BaseException):
    """The process ends, as by a power cut, but for the checkpoint that it is writing: nothing more is saved."""


@contextlib.contextmanager
def interrupted(
    steps: int | None = None,
    evaluation_batches: int | None = None,
    process: int = 0,
    by: str = "SIGTERM",
) -> Iterator[None]:
    """Let what runs inside be interrupted once.

    Args:
        steps, evaluation_batches: after so many of this start; without either it is left alone.
        process: the one that the signal is sent to.
        by: name of the signal, or `death`.
    """
    from run.curves import Curves
    from run.health import StepHealth
    from run.saving import Saver
    from training.batches import Batches

    good_step, validation, draw, make_saver = StepHealth.good_step, Batches.validation, Curves.draw, Saver.__init__
    done = {"steps": 0, "evaluation_batches": 0}
    savers = []

    def count(what: str, limit: int | None) -> None:
        done[what] += 1
        if done[what] == limit and int(os.environ.get("RANK", 0)) == process:
            if by == "death":
                raise Died
            os.kill(os.getpid(), signal.Signals[by])

    def counted_step(self, grad_norm):
        good_step(self, grad_norm)
        count("steps", steps)

    def counted_batches(self, dataset):
        for batch in validation(self, dataset):
            count("evaluation_batches", evaluation_batches)
            yield batch

    def remembered(self, *arguments):
        make_saver(self, *arguments)
        savers.append(self)

    StepHealth.good_step, Batches.validation, Saver.__init__ = counted_step, counted_batches, remembered
    Curves.draw = lambda *_: None  # no curves: a picture takes as long as ten of these steps
    try:
        yield
    finally:
        # A process that ends waits for its threads. Within the test's process the thread that saves would go on writing
        # into the folder of the run that the test starts next.
        while not all(saver.is_idle for saver in savers):
            time.sleep(0.01)
        StepHealth.good_step, Batches.validation, Curves.draw = good_step, validation, draw
        Saver.__init__ = make_saver


def run_here(*arguments, output_dir: Path, **moment):
    """Run sft.py within this process; returns a `conftest.Run`, its exit status None where it died."""
    from accelerate.state import AcceleratorState, GradientState
    from conftest import Run

    from run.stopping import SIGNALS

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    argv, folder = sys.argv, os.getcwd()
    sys.argv = ["scripts/sft.py", *map(str, arguments), "--output_dir", str(output_dir)]
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), interrupted(**moment):
            runpy.run_path("scripts/sft.py", run_name="__main__")
    except SystemExit as end:
        code = end.code
    except Died:
        code = None
    finally:
        sys.argv = argv
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()  # which ends a process that does not end by itself
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if (output_dir / ".lock").exists():
            (output_dir / ".lock").open().close()  # gives a POSIX lock of this process back, as the end of a run does
    return Run(subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue()), output_dir)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    moment = json.loads(sys.argv[1])
    sys.argv = ["scripts/sft.py", *sys.argv[2:]]
    with interrupted(**moment):
        runpy.run_path("scripts/sft.py", run_name="__main__")
