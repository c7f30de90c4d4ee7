"""Fill in the exercise notebooks: `python tests/solve_exercises.py FOLDER` writes them, solved, for teachers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks" / "exercises").glob("*.ipynb"))


def module_of(path: Path) -> str:
    """Return the name of a notebook's module of checks: 01_features.ipynb is checked by features.py."""
    return path.stem.partition("_")[2]


def solutions(name: str) -> dict[int, str]:
    """Return the code of each task of an exercise; imports before the first task belong to it."""
    text = (Path(__file__).parent / "course" / "solutions" / f"{name}.py").read_text("utf-8")
    imports, *parts = re.split(r"^# task \d+\n", text, flags=re.MULTILINE)
    return {number: ((imports if number == 1 else "") + part).strip() for number, part in enumerate(parts, 1)}


def tasks(notebook: nbformat.NotebookNode) -> dict[int, nbformat.NotebookNode]:
    """Return the cells that students fill in, by the number of their task."""
    cells = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("solution")]
    return {int(cell.metadata.nbgrader.grade_id.rpartition("-")[2]): cell for cell in cells}


def solved(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the solution in every task's cell."""
    notebook = nbformat.read(path, as_version=4)
    code = solutions(module_of(path))
    for number, cell in tasks(notebook).items():
        cell.source = code[number]
    return notebook


def main(folder: Path) -> None:
    """Write all solved notebooks into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in NOTEBOOKS:
        nbformat.write(solved(path), folder / path.name)
    print(f"{len(NOTEBOOKS)} solved notebooks in {folder}")
    print(f"Next: jupyter lab {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
