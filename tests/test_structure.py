"""The map in `pipelines/__init__.py` is the territory: rooms, arrows, light imports, and a clean repository."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipelines"
FREE = {"pipelines.__main__"}
"""May import every room and stands in no list: the command line."""
HEAVY = {"torch", "transformers", "gradio", "hopsworks", "matplotlib", "ray"}
PROMISED = {"README.md", "requirements.txt", "notebooks", "pipelines", "app.py", "log_base.csv", "tests"}
TOOLS = {"Makefile", "constraints.txt", "pyproject.toml", ".ci", ".gitignore", "LICENSE", "benchmarks", "docs"}
TOOLS |= {"Dockerfile", ".dockerignore"}


@cache
def rooms() -> list[str]:
    """The names of the indented list in the package's docstring, top to bottom."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")))
    return re.findall(r"^ {4}(\w+) {2,}\S", docstring, flags=re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Every module below pipelines, dotted name to file; a package is its `__init__.py`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def imported(source: str, known: set[str]) -> set[str]:
    """The modules of `known` that a piece of Python imports, wherever in it and in whichever way."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the arrow: name the room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


@cache
def arrows() -> dict[str, set[str]]:
    """Module to the modules of the package that it imports; the bare package, which is only the map, left out."""
    known = modules().keys() | {"app"}
    return {name: imported(path.read_text("utf-8"), known) - {"pipelines"} for name, path in modules().items()}


@cache
def repository_files() -> list[Path]:
    """Files that are committed or would be: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def fresh(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


# --- the map ----------------------------------------------------------------------------------------------------------


def test_every_room_stands_in_the_map_once_and_nothing_else_does():
    exist = {room(name) for name in modules() if "." in name and name not in FREE}
    assert len(rooms()) == len(set(rooms())), "a room stands in the map twice"
    assert set(rooms()) == exist


def test_imports_point_up_the_list():
    order = {name: place for place, name in enumerate(rooms())}
    backward = [
        f"{name} imports {target}"
        for name, targets in arrows().items()
        if name != "pipelines" and name not in FREE
        for target in sorted(targets)
        if target == "app" or target in FREE or order[room(target)] > order[room(name)]
    ]
    assert backward == []


def test_no_cycle_anywhere_not_even_inside_a_room():
    graphlib.TopologicalSorter(arrows()).prepare()  # CycleError names the modules


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("from pipelines import lab", {"pipelines.features.pipeline"}),
        ("import pipelines.features.pipeline as here", {"pipelines.features.pipeline"}),
        ("from pipelines.features.pipeline import train", {"pipelines.features.pipeline"}),
        (
            "from pipelines.whisper.mirror import npm, fetch",
            {"pipelines.whisper.mirror", "pipelines.whisper.mirror.npm"},
        ),
        ("def late():\n    from pipelines import lab, app", {"pipelines.features.pipeline", "pipelines"}),
        ("if TYPE_CHECKING:\n    import pipelines.whisper.mirror.npm", {"pipelines.whisper.mirror.npm"}),
        ("import app, json", {"app"}),
    ],
)
def test_the_reader_of_imports_sees_every_way_to_import(source: str, targets: set[str]):
    known = {
        "pipelines",
        "pipelines.features.pipeline",
        "pipelines.whisper.mirror",
        "pipelines.whisper.mirror.npm",
        "app",
    }
    assert imported(source, known) == targets


# --- importing runs nothing -------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import pipelines; print(*sorted(set(sys.modules) - before))"
    assert fresh(code).split() == ["pipelines"]


def test_importing_any_module_loads_nothing_heavy():
    code = f"""
import importlib, sys
for name in {sorted(modules())} + ["app"]:
    importlib.import_module(name)
    heavy = sorted({HEAVY} & sys.modules.keys())
    if heavy:
        sys.exit(print(name, "loads", *heavy))
"""
    assert fresh(code) == ""


# --- the repository ---------------------------------------------------------------------------------------------------


def test_the_top_level_holds_what_the_design_allows():
    found = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    assert found - PROMISED - TOOLS == set()
    assert PROMISED - found == set()


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a path of somebody's machine", r"(?<![\w.~-])/(?:home|Users|root|work)/[\w.]|[A-Z]:\\+Users\\"),
        ("a token", r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|sk-[A-Za-z0-9_-]{20,})"),
        ("what an unfinished merge left", r"^(?:<{7}|>{7}|\|{7}) "),
    ],
    ids=["path", "token", "merge"],
)
def test_no_file_holds(what: str, pattern: str):
    hits = []
    for path in repository_files():
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            found = re.search(pattern, line)
            if found and path != Path(__file__):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {found[0]}")
    assert hits == [], what


def test_no_notebook_holds_outputs():
    notebooks = [path for path in repository_files() if path.suffix == ".ipynb"]
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
