"""The house: rooms in one direction, modules of a size to be read, no second home for the words of a room."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "scripts"
# A room may import itself and those of a lower number.
FLOORS = {"utils": 0, "sources": 1, "recipe": 2, "data": 3, "training": 4, "run": 5, "evaluation": 5, "publishing": 6}
FLOORS |= {"planning": 6, "chatting": 6, "sft": 7, "benchmarking": 8}  # which times the step of sft
MODULES = sorted(path for room in FLOORS for path in (SCRIPTS / room).glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """The dotted names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return found


def test_every_room_says_what_it_holds_and_may_import():
    rooms = {path.parent.name for path in SCRIPTS.glob("*/__init__.py")}
    assert rooms | {"sft"} == FLOORS.keys()
    for room in rooms:
        sentence = ast.get_docstring(ast.parse((SCRIPTS / room / "__init__.py").read_text()))
        assert "import" in sentence, room


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SCRIPTS).as_posix())
def test_no_import_of_a_room_above(path):
    room = path.parent.name
    for name in imports_of(path):
        other = name.partition(".")[0]
        assert other not in FLOORS or other == room or FLOORS[other] < FLOORS[room], f"{path} imports {name}"


def test_no_circles():
    names = {f"{path.parent.name}.{path.stem}": path for path in MODULES}
    below = {name: imports_of(path) & names.keys() - {name} for name, path in names.items()}
    walked = set()  # else each way to a module is walked: two minutes

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        for other in below[name] if name not in walked else ():
            walk(other, (*above, name))
        walked.add(name)

    for name in names:
        walk(name, ())


def test_no_room_has_the_name_of_a_package(monkeypatch):
    """scripts/ comes first on the path: a room of that name would take the package's place."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith((str(SCRIPTS), str(ROOT)))])
    for room in FLOORS:
        assert importlib.machinery.PathFinder.find_spec(room) is None, room


def test_a_reader_can_take_a_file_in():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SCRIPTS.rglob("*.py")}
    assert {str(path): count for path, count in lines.items() if count > 300} == {}
    assert len(list((SCRIPTS / "utils").glob("*.py"))) <= 8
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_sft_is_read_in_one_go():
    text = (SCRIPTS / "sft.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)) <= 20
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    main = functions["main"]
    assert main.end_lineno - main.lineno < 100
    assert all(len(function.args.args) <= 5 for function in functions.values())
    for word in ("model(batch)", "accelerator.backward(", "optimizer.step()", "evaluate_mix(", "run.save("):
        assert word in text


def test_what_the_documents_name_is_there():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("requirements*.txt"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for name in re.findall(r"(?<![\w/.])(?:scripts|recipes|accelerate_configs|ds_configs|tests)/[\w/]+\.\w+", text):
            if "mine" not in name:
                assert (ROOT / name).exists(), f"{page.name}: {name}"
