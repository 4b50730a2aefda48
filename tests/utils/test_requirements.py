"""What requirements.txt asks for, checked before anything of it is imported."""

import importlib.metadata
import subprocess
import sys

import pytest
from conftest import ROOT, run_script
from packaging.specifiers import SpecifierSet

from utils.requirements import REQUIREMENTS, WHERE_USED, _fits, unmet


def test_all_is_met_here():
    assert unmet() == []


@pytest.mark.parametrize("wanted", [">=2.11,<2.14", ">=5.23,<6", "==2.13.0", ">=6", ""])
@pytest.mark.parametrize("version", ["2.10.9", "2.11", "2.13.0", "2.13.0+cpu", "2.14.0", "5.22.9", "5.23.0", "6.0"])
def test_bounds_mean_what_pip_takes_them_for(version, wanted):
    assert _fits(version, wanted) == SpecifierSet(wanted).contains(version)


def test_a_vendors_build_is_the_version_that_it_is_built_from():
    assert _fits("2.11.0a0+git1a2b3c.nv26.02", ">=2.11,<2.14")


WITH_VERSIONS = """
import importlib.metadata, runpy, sys
others = {name: version or None for name, version in (pair.split("=") for pair in sys.argv[1].split(","))}
real = importlib.metadata.version
def version(name):
    if name in others and not others[name]:
        raise importlib.metadata.PackageNotFoundError(name)
    return others.get(name) or real(name)
importlib.metadata.version = version
sys.argv = sys.argv[2:]
sys.path.insert(0, "scripts")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def start(script: str, versions: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITH_VERSIONS, versions, f"scripts/{script}", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_says_what_is_missing_or_too_old(script):
    run = start(script, "transformers=5.17.0,pydantic=")
    if script == "make_demo_data.py":  # which needs none of them
        assert run.returncode == 0
        return
    assert run.returncode == 2
    line = "error: requirements.txt: transformers is 5.17.0, not >=5.23,<6, pydantic is not installed: pip install "
    assert run.stderr == line + "-r requirements.txt -c constraints.txt\n"


def test_what_only_some_runs_use_may_be_missing():
    assert start("sft.py", ",".join(f"{name}=" for name in WHERE_USED)).returncode == 0


def test_every_line_of_the_requirements_is_understood():
    names = [line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if line and line[0] != "#"]
    assert len(names) >= 15
    for name in names:
        importlib.metadata.version(name.rstrip("0123456789.,<>="))


WITHOUT = """
import importlib.util, runpy, sys
missing, real = sys.argv[1], importlib.util.find_spec

def find_others(name, *rest):
    return None if name.split(".")[0] == missing else real(name, *rest)

for module in [*sys.modules.values()]:  # also where it has been imported by this name
    if getattr(module, "__dict__", {}).get("find_spec") is real:
        module.find_spec = find_others
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DEMO = ("scripts/sft.py", "recipes/demo.yaml", "--dry_run")
NEEDED = [  # the package, and what asks for it: tracebacks before, wandb's after the model had been loaded
    ("deepspeed", *DEMO, "--deepspeed_config", "ds_configs/zero2.json"),
    ("wandb", *DEMO, "--log_wandb", "true"),
    ("evaluate", "scripts/eval_gsm8k.py", "recipes/demo_data/model"),
    ("lm_eval", "scripts/eval_harness.py", "recipes/demo_data/model", "--tasks", "any"),
    ("prompt_toolkit", "scripts/chat.py", "recipes/demo_data/model"),
    ("gradio", "scripts/chat.py", "recipes/demo_data/model", "--web"),
]


@pytest.mark.parametrize(("package", "command"), [(package, command) for package, *command in NEEDED])
def test_what_only_some_runs_use_is_one_line_where_it_is_used(package, command, tmp_path):
    output = ["--output_dir", str(tmp_path / "out")] if "--dry_run" in command else []
    script = tmp_path / "without.py"
    script.write_text(WITHOUT)
    run = run_script(package, *command, *output, script=str(script), output_dir=tmp_path, check=False)
    assert run.returncode == 2, run.stderr
    line = run.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert f"{package} is not installed: pip install -r requirements" in line
    assert "Traceback" not in run.stderr
