"""sft.py, which stays half a second longer at the place that LINGER_AT names: some of them are over in milliseconds,
and whoever waits for one would miss it on a busy machine. Or which dies there in the middle of writing a file.

    LINGER_AT="save: optimizer" python tests/lingering.py recipes/demo.yaml ...
    LINGER_AT="save: optimizer" DIES_OF=1000000 python tests/lingering.py recipes/demo.yaml ...
"""

import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

SECONDS = 0.5


def linger(holder, name: str, when: str) -> None:
    """Wait `before` or `after` each call of that function."""
    real = getattr(holder, name)

    def lingering(*arguments, **options):
        if when == "before":
            time.sleep(SECONDS)
        result = real(*arguments, **options)
        if when == "after":
            time.sleep(SECONDS)
        return result

    setattr(holder, name, lingering)


def die_within(holder, name: str, size: int) -> None:
    """Be killed by the kernel in that function, as it writes the first file that is larger than so many bytes."""
    real = getattr(holder, name)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores, and gets an error

    def dying(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return real(*arguments, **options)

    setattr(holder, name, dying)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    from run import saving
    from run.run import Run
    from training.batches import Batches

    places = {
        "evaluation": (Batches, "validation", "before"),  # of each data set
        "evaluated": (Run, "write_evaluation", "after"),
        "save: model": (saving, "save_trained", "after"),
        "save: optimizer": (saving, "save_optimizer", "after"),
        "saved": (saving, "keep_checkpoints", "after"),
        "the final model": (saving, "write_final_model", "before"),
        "final": (saving, "save_trained", "after"),
    }
    if place := places.get(os.environ.get("LINGER_AT")):
        if size := os.environ.get("DIES_OF"):
            die_within(*place[:2], int(size))
        else:
            linger(*place)
    sys.argv[0] = "scripts/sft.py"
    runpy.run_path("scripts/sft.py", run_name="__main__")
