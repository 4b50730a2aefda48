"""sft.py with one process that takes longer for its forward passes.

accelerate launch ... tests/slow_process.py PROCESS SECONDS recipes/demo.yaml ...
"""

import os
import runpy
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
    from training.loss import ScoredLoss

    forward, process, seconds = ScoredLoss.forward, sys.argv[1], float(sys.argv[2])

    def slow_forward(self, *arguments):
        if os.environ["RANK"] == process:
            time.sleep(seconds)
        return forward(self, *arguments)

    ScoredLoss.forward = slow_forward
    sys.argv = ["scripts/sft.py", *sys.argv[3:]]
    runpy.run_path("scripts/sft.py", run_name="__main__")
