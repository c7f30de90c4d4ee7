"""Notebooks in another language: the English notebook with the text of a hand-written translation.

    notebooks/01_feature_pipeline.ipynb + notebooks/translations/sv/01_feature_pipeline.md
        -> notebooks/sv/01_feature_pipeline.ipynb

In a translation the text of each Markdown cell follows a comment with the cell's id and the digest of its English text:

    <!-- 01-05 4f2a90c1 -->

    Vilken dator är det här, och saknas något?

Links are written as in the English notebook. A cell whose English text changed later has another digest: the notebook
then shows the English text there, until somebody translates it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import languages

ENGLISH = "en"
NOTEBOOKS = environment.ROOT / "notebooks"
TRANSLATIONS = NOTEBOOKS / "translations"
_MARK = re.compile(r"^<!-- ([\w-]+)(?: (\w*))? -->$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")


@dataclass(frozen=True)
class Translated:
    """A notebook in another language, as its JSON content."""

    notebook: dict[str, Any]
    problems: list[str]
    """One line for each cell that needs a new translation."""


def parse_language(text: str) -> str:
    """Return the code of a language that the notebooks are written in. Raises LabError for another one."""
    code, written = languages.find(text), [ENGLISH, *_translated_languages()]
    if code not in written:
        raise LabError(
            f"--language is the language of the notebooks' text: {' or '.join(written)}, got {text[:40]!r}. "
            "The language of the speech is a setting of the recipe: --set language=fi"
        )
    return code


def _translated_languages() -> list[str]:
    return sorted(folder.name for folder in TRANSLATIONS.glob("*") if folder.is_dir())


def names(language: str) -> list[str]:
    """Return the notebooks that are translated, such as `01_feature_pipeline` and `exercises/01_features`."""
    folder = TRANSLATIONS / language
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.md"))


def digest(text: str) -> str:
    """Return 8 hexadecimal digits that identify the English text of a cell."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read(path: Path) -> dict[str, tuple[str, str]]:
    """Return the translated cells of a file: id to (digest of the English text, text in the other language).

    Raises LabError if a cell is translated twice, or if text belongs to no cell.
    """
    head, *parts = _MARK.split(path.read_text("utf-8"))
    ids = parts[::3]
    twice = sorted({cell for cell in ids if ids.count(cell) > 1})
    if twice or head.strip():
        fault = (
            f"cell {twice[0]} is translated twice" if twice else "there is text before the first <!-- cell digest -->"
        )
        raise LabError(f"{path} cannot be used: {fault}. Correct the file")
    return {cell: (mark or "", text.strip()) for cell, mark, text in zip(ids, parts[1::3], parts[2::3])}


def english(name: str, path: Path, siblings: dict[str, Path]) -> dict[str, Any]:
    """Return the content of notebook `name` with the links that it needs at `path`, as `translate` does."""
    source = NOTEBOOKS / f"{name}.ipynb"
    notebook = json.loads(source.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            cell["source"] = _with_links(text, source.parent, path.parent, siblings).splitlines(keepends=True)
    return notebook


def translate(name: str, language: str, path: Path, siblings: dict[str, Path]) -> Translated:
    """Return notebook `name` in another language, to be written to `path`.

    Ids, tags and code are those of the English notebook. Links lead from the folder of `path` to the same targets; to a
    notebook of `siblings` (name to path), they lead there.
    """
    source, file = NOTEBOOKS / f"{name}.ipynb", TRANSLATIONS / language / f"{name}.md"
    notebook, cells = json.loads(source.read_text("utf-8")), read(file)
    texts = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"}
    problems = [
        f"{file}: remove cell {cell}, which {source.name} does not have" for cell in cells.keys() - texts.keys()
    ]
    for cell in notebook["cells"]:
        if cell["id"] not in texts:
            continue
        english, (mark, text) = texts[cell["id"]], cells.get(cell["id"], ("", ""))
        current = digest(english)
        if mark != current or not text:
            problems.append(
                f"{name} shows cell {cell['id']} in English: it {'changed' if text else 'is not translated'}. "
                f"Translate it in {file}, below <!-- {cell['id']} {current} -->"
            )
            text = english
        cell["source"] = _with_links(text, source.parent, path.parent, siblings).splitlines(keepends=True)
    return Translated(notebook, problems)


def _with_links(text: str, source: Path, folder: Path, siblings: dict[str, Path]) -> str:
    """Return Markdown text of a notebook in `source` with the links that it needs in `folder`."""

    def moved(link: re.Match[str]) -> str:
        target, hash_, anchor = link[0].partition("#")
        if "://" in target or not target:
            return link[0]
        file = Path(os.path.normpath(source / target))
        name = os.path.relpath(file.with_suffix(""), NOTEBOOKS)
        file = siblings.get(Path(name).as_posix(), file) if file.suffix == ".ipynb" else file
        return Path(os.path.relpath(file, folder)).as_posix() + hash_ + anchor

    return _LINK.sub(moved, text)


def paths(language: str, folder: Path, only: Collection[str] = ()) -> dict[str, Path]:
    """Return where each translated notebook is written below `folder`: name to path; `only`: those with these names."""
    return {name: folder / f"{name}.ipynb" for name in names(language) if not only or name in only}


def write(language: str, folder: Path, *, replace: bool = False) -> list[str]:
    """Write all notebooks in another language below `folder`. Return one line for each cell that needs a translation.

    A notebook that exists with the same text and code is left as it is, with its outputs. Raises LabError, before
    anything is written, if one exists with other text or code: it may hold a student's work. `replace` allows it.
    """
    folder = folder.absolute()
    files, problems, changed = paths(language, folder), [], []
    for name, path in files.items():
        translated = translate(name, language, path, files)
        problems += translated.problems
        if not path.exists() or _sources(manifest.read_json(path)) != _sources(translated.notebook):
            changed.append((path, translated.notebook))
    existing = [str(path) for path, _ in changed if path.exists()]
    if existing and not replace:
        raise LabError(
            f"{', '.join(existing)} would be replaced, and may hold your work. Give another folder with --to, "
            "or --replace to lose what is in it"
        )
    for path, notebook in changed:
        write_notebook(path, notebook)
    return problems


def write_notebook(path: Path, notebook: dict[str, Any]) -> None:
    """Write a notebook atomically, formatted as Jupyter does, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(path, (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode())


def _sources(notebook: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return id and source of each cell."""
    return [(cell.get("id", ""), "".join(cell["source"])) for cell in (notebook or {}).get("cells", ())]
