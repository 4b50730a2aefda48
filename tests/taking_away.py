"""sft.py, whose output folder is deleted by somebody else after its second step.

accelerate launch ... tests/taking_away.py OUTPUT_DIR recipes/demo.yaml --output_dir OUTPUT_DIR
"""

import os
import runpy
import shutil
import sys

from interruption import ROOT

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "scripts"))
    from run.run import Run

    output, end_step = sys.argv[1], Run.end_step

    def end_step_and_delete(self, *others):
        end_step(self, *others)
        if self.progress.step == 2 and os.environ.get("RANK", "0") == "0":
            shutil.rmtree(output)

    Run.end_step = end_step_and_delete
    sys.argv = ["scripts/sft.py", *sys.argv[2:]]
    runpy.run_path("scripts/sft.py", run_name="__main__")
