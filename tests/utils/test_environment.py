"""What every script has in its environment before PyTorch is loaded, which reads it then."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# Runs a script's imports, and stops at the first one of torch.
LOOK = """
import json, os, runpy, sys
NAMES = "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"

class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({name: os.environ.get(name) for name in NAMES}), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Look())
sys.path.insert(0, "scripts")
runpy.run_path(sys.argv[1])
import utils.launch  # where a script imports torch when it is needed
"""
# All but the one that writes texts with the standard library alone.
SCRIPTS = sorted({path.name for path in (ROOT / "scripts").glob("*.py")} - {"make_demo_data.py"})


def environment_of(script: str, **own: str) -> dict[str, str | None]:
    names = ("GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", LOOK, f"scripts/{script}"]
    run = subprocess.run(command, cwd=ROOT, env=inherited | own, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_gpu_memory_grows_in_segments_and_threads_sleep(script):
    expected = {"GOMP_SPINCOUNT": "1000", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment_of(script) == expected | {"PYTORCH_CUDA_ALLOC_CONF": None}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_word_stays(name):
    """By the old name, too: PyTorch takes one of the two."""
    found = environment_of("sft.py", **{name: "max_split_size_mb:64", "GOMP_SPINCOUNT": "7"})
    other = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} - {name}
    assert found == {name: "max_split_size_mb:64", other.pop(): None, "GOMP_SPINCOUNT": "7"}
