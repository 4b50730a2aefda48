"""Whether the packages that requirements.txt names are here, asked before anything of them is imported."""

import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

from utils.errors import UserError, let_the_first_speak

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
# Imported by what uses them alone, which asks with `require` (an engine, a metric, a log, a file format, keys), or does
# without (fastokens).
WHERE_USED = ("deepspeed", "datasets", "evaluate", "wandb", "gguf", "prompt_toolkit", "fastokens")


def unmet(requirements: Path = REQUIREMENTS) -> list[str]:
    """The packages that are missing or of a version that is not supported, each in some words."""
    found = []
    for line in requirements.read_text(encoding="utf-8").splitlines():
        name, wanted = re.match(r"([\w-]*)([^\s#]*)", line).groups()
        if not name:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name not in WHERE_USED:
                found.append(f"{name} is not installed")
            continue
        if not _fits(version, wanted):
            found.append(f"{name} is {version}, not {wanted}")
    return found


def _fits(version: str, wanted: str) -> bool:
    """Whether `version`, of which what follows its numbers does not count (`2.13.0a0+nv26.11` is 2.13.0), is within
    bounds such as `>=2.11,<2.14`. By hand, as `packaging` would double the time of --help."""

    def numbers(text: str) -> list[int]:
        release = [int(part) for part in re.match(r"\d+(\.\d+)*", text)[0].split(".")]
        return release + [0] * (6 - len(release))

    compare = {">=": list.__ge__, "<": list.__lt__, "==": list.__eq__}
    bounds = [re.match(r"(>=|<|==)(.*)", bound).groups() for bound in wanted.split(",") if bound]
    return all(compare[sign](numbers(version), numbers(bound)) for sign, bound in bounds)


def check_requirements() -> None:
    """End the script with one line, and status 2, where `unmet` finds something."""
    if found := unmet():
        if int(os.environ.get("LOCAL_RANK", 0)):
            let_the_first_speak()
        print(f"error: {REQUIREMENTS.name}: {', '.join(found)}: {remedy(REQUIREMENTS.name)}", file=sys.stderr)
        raise SystemExit(2)


def require(package: str, requirements: str = REQUIREMENTS.name) -> None:
    """UserError where a package is missing that only what the user asked for needs."""
    if not importlib.util.find_spec(package):
        raise UserError(f"{package} is not installed: {remedy(requirements)}")


def remedy(requirements: str) -> str:
    """What brings the packages of one of the requirements files."""
    return f"pip install -r {requirements} -c constraints.txt"
