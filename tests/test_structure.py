"""The structure of the package: folders in order, no cycles, small files, light imports, and a clean repository."""

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
MAX_FILES = 12
"""Python modules in one folder, `__init__.py` not counted."""
MAX_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
"""Outside cli/, whose functions have one parameter for each option."""
HEAVY = {"torch", "transformers", "gradio", "hopsworks", "matplotlib", "ray"}
DEFINES_TORCH_MODULES = {"pipelines.whisper.export.onnx_modules"}
"""Modules that subclass torch.nn.Module; others import them late, within functions."""
REQUIRED = {"README.md", "requirements.txt", "notebooks", "pipelines", "app.py", "log_base.csv", "tests"}
TOOLS = {"Makefile", "constraints.txt", "pyproject.toml", ".ci", ".gitignore", "LICENSE", "benchmarks", "docs"}
TOOLS |= {"Dockerfile", ".dockerignore", ".gitattributes", "CONTRIBUTING.md"}


@cache
def folders() -> list[str]:
    """Return the folders listed in the package's docstring, highest first."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text("utf-8")))
    return re.findall(r"^ {4}(\w+) {2,}\S", docstring, flags=re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package: dotted name to file."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def folder_of(module: str) -> str:
    """Return the folder below `pipelines` that holds a module."""
    return module.split(".")[1]


def imported(source: str, existing: set[str]) -> set[str]:
    """Return the modules among `existing` that a piece of Python imports, in any scope and in any way."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide which folder is imported: write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in existing:
                name = name.rpartition(".")[0]
            modules.add(name)
    return modules - {""}


@cache
def import_graph() -> dict[str, set[str]]:
    """Return module to imported modules; the package itself, which is only a docstring, is left out."""
    existing = modules().keys() | {"app"}
    return {name: imported(path.read_text("utf-8"), existing) - {"pipelines"} for name, path in modules().items()}


def folder_graph() -> dict[str, set[str]]:
    """Return the import graph of folders and subfolders."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, targets in import_graph().items():
        package = name if name in packages else name.rpartition(".")[0]
        others = {target if target in packages else target.rpartition(".")[0] for target in targets}
        graph.setdefault(package, set()).update(others - {package, "pipelines", ""})
    return graph


def levels(graph: dict[str, set[str]]) -> int:
    """Return the number of dependency levels: the length of the longest chain of imports."""
    depth: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        depth[name] = 1 + max((depth[target] for target in graph.get(name, ())), default=0)
    return max(depth.values())


def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Return (location, definition) of every function of the package and the app."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for path in [*modules().values(), ROOT / "app.py"]
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def is_route(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether FastAPI calls the function for a route: it has one parameter for each form field."""
    return any(isinstance(item, ast.Call) and ast.unparse(item.func).endswith(".post") for item in node.decorator_list)


@cache
def repository_files() -> list[Path]:
    """Return the files that are committed or would be: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def output_of(code: str) -> str:
    """Return what `code` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


# --- folders and imports ----------------------------------------------------------------------------------------------


def test_docstring_lists_every_folder_once():
    existing = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert sorted(folders()) == sorted(existing)
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}


def test_imports_point_down_the_list_of_folders():
    rank = {name: number for number, name in enumerate(folders())}
    upward = [
        f"{name} imports {target}"
        for name, targets in import_graph().items()
        if name not in ("pipelines", "pipelines.__main__")
        for target in sorted(targets)
        if target in ("app", "pipelines.__main__") or rank[folder_of(target)] < rank[folder_of(name)]
    ]
    assert upward == []


def test_inference_imports_nothing_of_training():
    pairs = [
        f"{name} imports {target}"
        for name, targets in import_graph().items()
        for target in targets
        if name.startswith("pipelines.inference") and target.startswith("pipelines.training")
    ]
    assert pairs == []


def test_import_graph_has_no_cycle():
    graphlib.TopologicalSorter(import_graph()).prepare()  # CycleError names the modules


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("from pipelines import lab", {"pipelines.lab"}),
        ("import pipelines.lab as here", {"pipelines.lab"}),
        ("from pipelines.lab import train", {"pipelines.lab"}),
        ("from pipelines.mirror import npm, fetch", {"pipelines.mirror", "pipelines.mirror.npm"}),
        ("def late():\n    from pipelines import lab, app", {"pipelines.lab", "pipelines"}),
        ("if TYPE_CHECKING:\n    import pipelines.mirror.npm", {"pipelines.mirror.npm"}),
        ("import app, json", {"app"}),
    ],
)
def test_import_reader_sees_every_form_of_import(source: str, targets: set[str]):
    existing = {"pipelines", "pipelines.lab", "pipelines.mirror", "pipelines.mirror.npm", "app"}
    assert imported(source, existing) == targets


@pytest.mark.parametrize("name", ["features", "training", "inference", "experiments"])
def test_each_pipeline_has_one_entry_point(name: str):
    assert (PACKAGE / name / "pipeline.py").is_file()


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_no_folder_is_over_full():
    counts = {
        str(folder.relative_to(ROOT)): sum(path.name != "__init__.py" for path in folder.glob("*.py"))
        for folder in {path.parent for path in modules().values()}
    }
    assert {name: count for name, count in counts.items() if count > MAX_FILES} == {}


def test_no_file_is_too_long():
    files = [*modules().values(), ROOT / "app.py", *(ROOT / "benchmarks").glob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_is_too_long():
    lengths = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
    assert {where: length for where, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_no_function_has_too_many_parameters():
    counts = {
        where: len(node.args.args) + len(node.args.kwonlyargs)
        for where, node in functions()
        if not where.startswith(("pipelines/cli/", "pipelines/__main__.py")) and not is_route(node)
    }
    assert {where: count for where, count in counts.items() if count > MAX_PARAMETERS} == {}


# --- importing runs nothing -------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import pipelines; print(*sorted(set(sys.modules) - before))"
    assert output_of(code).split() == ["__future__", "pipelines", "pipelines.infra", "pipelines.infra.telemetry"]


def test_importing_any_module_loads_nothing_heavy():
    code = f"""
import importlib, sys
for name in {sorted(modules().keys() - DEFINES_TORCH_MODULES)} + ["app"]:
    importlib.import_module(name)
    heavy = sorted({HEAVY} & sys.modules.keys())
    if heavy:
        sys.exit(print(name, "loads", *heavy))
"""
    assert output_of(code) == ""


# --- the repository ---------------------------------------------------------------------------------------------------


def test_top_level_holds_only_what_is_allowed():
    names = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    assert names - REQUIRED - TOOLS == set()
    assert REQUIRED - names == set()


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a path of somebody's machine", r"(?<![\w.~-])/(?:home|Users|root|work)/[\w.]|[A-Z]:\\+Users\\"),
        ("a token", r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}|sk-[A-Za-z0-9_-]{20,})"),
        ("a merge conflict marker", r"^(?:<{7}|>{7}|\|{7}) "),
    ],
    ids=["path", "token", "merge"],
)
def test_no_file_holds(what: str, pattern: str):
    hits = []
    for path in repository_files():
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            match = re.search(pattern, line)
            if match and path != Path(__file__):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert hits == [], what


def test_no_notebook_holds_outputs():
    notebooks = [path for path in repository_files() if path.suffix == ".ipynb"]
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name


if __name__ == "__main__":
    graph = import_graph()
    print(f"{len(modules())} modules, {sum(map(len, graph.values()))} imports, {levels(graph)} levels")
    graph = {name: targets for name, targets in folder_graph().items() if name != "pipelines"}
    print(f"{len(graph)} folders, {sum(map(len, graph.values()))} imports between them", end="")
    try:
        print(f", {levels(graph)} levels")
    except graphlib.CycleError as error:
        print(f", with a cycle: {' -> '.join(error.args[1])}")
