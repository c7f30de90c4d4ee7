"""The notebooks in Swedish: complete, equal to the English ones in all that is not language, and they run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.cli import notebooks
from pipelines.course import translation
from pipelines.infra.errors import LabError

ROOT = Path(__file__).parents[2]
NAMES = translation.names("sv")
COMPARISON, EXPERIMENT = "04_compare_experiments", "05_your_experiment"

each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the lab with all notebooks in Swedish."""
    folder = tmp_path_factory.mktemp("sv")
    assert translation.write("sv", folder) == []
    return folder


def cells(path: Path, kind: str = "markdown") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def english(name: str) -> Path:
    return translation.NOTEBOOKS / f"{name}.ipynb"


def pairs(name: str) -> list[tuple[str, str, str]]:
    """Return (cell id, English text, Swedish text) of each Markdown cell."""
    texts = translation.read(translation.TRANSLATIONS / "sv" / f"{name}.md")
    return [(cell.id, cell.source, texts[cell.id][1]) for cell in cells(english(name))]


def links(text: str) -> list[str]:
    return sorted(re.findall(r"\]\(([^)\s]+)\)", text))


def code(text: str) -> list[str]:
    """Return the code spans; drawings in code blocks may be translated."""
    return sorted(set(re.findall(r"`([^`]+)`", re.sub(r"(?s)```.*?```", "", text))))


def prose(text: str) -> str:
    """Return Markdown text without code and without the targets of links."""
    return re.sub(r"(?s)```.*?```|`[^`]*`|\]\([^)\s]+\)", " ", text)


def numbers(text: str) -> list[str]:
    """Return the numbers in prose; 16,000 and 16 000 are equal."""
    return sorted(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d)[,\s](?=\d{3}\b)", "", prose(text))))


def form(text: str) -> dict[str, object]:
    """Return what a translation keeps: headings, lists, tables, code blocks, HTML tags and signs of formulas."""
    return {
        "blocks": [block.count("\n") for block in re.findall(r"(?s)```.*?```", text)],
        "headings": re.findall(r"^#+(?= )", text, re.MULTILINE),
        "items": len(re.findall(r"^- ", text, re.MULTILINE)),
        "rows": [line.count("|") for line in text.splitlines() if line.startswith("|")],
        "tags": re.findall(r"</?\w+>", text),
        "signs": sorted(re.findall("[=Δ²·]", prose(text))),
    }


# --- the translations -------------------------------------------------------------------------------------------------


def test_every_notebook_is_translated():
    folder = translation.NOTEBOOKS
    paths = [*folder.glob("*.ipynb"), *(folder / "exercises").glob("*.ipynb")]
    assert sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths) == NAMES


@each
def test_every_cell_is_translated_and_up_to_date(name: str):
    path = english(name)
    assert translation.translate(name, "sv", path, {}).problems == []
    assert [cell for cell, text, swedish in pairs(name) if text == swedish] == []


@each
@pytest.mark.parametrize("part", [links, code, numbers, form])
def test_translation_keeps_all_that_is_not_language(name: str, part):
    different = {
        cell: (part(text), part(swedish)) for cell, text, swedish in pairs(name) if part(text) != part(swedish)
    }
    assert different == {}


@each
def test_translation_has_no_english_words_in_prose(name: str):
    words = re.compile(r"\b(the|and|of|with|that|this|you|your|not|are|which)\b", re.IGNORECASE)
    assert {
        cell: words.findall(prose(swedish)) for cell, _, swedish in pairs(name) if words.search(prose(swedish))
    } == {}


def test_same_english_text_has_the_same_translation():
    swedish: dict[str, set[str]] = {}
    for name in NAMES:
        for _, text, translated in pairs(name):
            swedish.setdefault(text, set()).add(translated)
    assert [text for text, translations in swedish.items() if len(translations) > 1] == []


# --- what is written --------------------------------------------------------------------------------------------------


@each
def test_written_notebook_differs_only_in_its_text(written: Path, name: str):
    notebook, source = (nbformat.read(path, as_version=4) for path in (written / f"{name}.ipynb", english(name)))
    nbformat.validate(notebook)
    assert notebook.metadata == source.metadata
    for cell, original in zip(notebook.cells, source.cells, strict=True):
        assert (cell.id, cell.cell_type, cell.metadata) == (original.id, original.cell_type, original.metadata)
        assert (cell.source == original.source) is (cell.cell_type == "code")


@each
def test_links_lead_to_existing_files(written: Path, name: str):
    path = written / f"{name}.ipynb"
    targets = [link for cell in cells(path) for link in links(cell.source) if "://" not in link]
    assert targets
    assert [target for target in targets if not (path.parent / target.partition("#")[0]).exists()] == []
    linked = [(path.parent / target).resolve() for target in targets if target.endswith(".ipynb")]
    assert [notebook for notebook in linked if written.resolve() not in notebook.parents] == [], "not in Swedish"


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_links_of_an_executed_english_copy_lead_to_files(tmp_path: Path, name: str):
    files = {name: tmp_path / "runs" / f"{name}.ipynb" for name in notebooks.NOTEBOOKS}
    for each_name, path in files.items():
        translation.write_notebook(path, translation.english(each_name, path, files))
    targets = [link for cell in cells(files[name]) for link in links(cell.source) if "://" not in link]
    linked = [(files[name].parent / target.partition("#")[0]).resolve() for target in targets]
    assert [path for path in linked if not path.exists()] == []
    assert any(path in files.values() for path in linked), "the other copies are linked"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lab with one notebook of one text cell, and its translation."""
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(translation, "NOTEBOOKS", folder)
    monkeypatch.setattr(translation, "TRANSLATIONS", folder / "translations")
    (folder / "translations" / "sv").mkdir(parents=True)
    write_english(folder, "One cell.")
    translated = f"<!-- a-1 {translation.digest('One cell.')} -->\n\nEn cell.\n"
    (folder / "translations" / "sv" / "a.md").write_text(translated, "utf-8")
    return folder


def write_english(folder: Path, text: str) -> None:
    cell = nbformat.v4.new_markdown_cell(text, id="a-1")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "a.ipynb")


def command(*arguments: object) -> str:
    """Run `python -m pipelines notebooks --language sv` and return what it prints."""
    done = CliRunner().invoke(app, ["notebooks", "--language", "sv", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_changed_cell_is_reported_and_shown_in_english(lab: Path):
    write_english(lab, "One new cell.")
    report, *_ = command().splitlines()
    assert report == (
        "a shows cell a-1 in English: it changed. "
        f"Translate it in {lab}/translations/sv/a.md, below <!-- a-1 {translation.digest('One new cell.')} -->"
    )
    assert [cell.source for cell in cells(lab / "sv" / "a.ipynb")] == ["One new cell."]
    assert json.loads(command("--json"))["untranslated"] == [report]


def test_missing_cell_is_reported_and_shown_in_english(lab: Path):
    (lab / "translations" / "sv" / "a.md").write_text("<!-- b-9 1234abcd -->\n\nBorta.\n")
    (remove, missing) = translation.write("sv", lab / "sv")
    assert "remove cell b-9, which a.ipynb does not have" in remove
    assert missing.startswith("a shows cell a-1 in English: it is not translated.")
    assert [cell.source for cell in cells(lab / "sv" / "a.ipynb")] == ["One cell."]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<!-- a-1 1 -->\nx\n<!-- a-1 2 -->\ny\n", "cell a-1 is translated twice"),
        ("Text.\n<!-- a-1 1 -->\nx\n", "there is text before the first"),
    ],
)
def test_faulty_translation_is_one_line(lab: Path, text: str, fault: str):
    (lab / "translations" / "sv" / "a.md").write_text(text)
    with pytest.raises(LabError, match=fault):
        translation.write("sv", lab / "sv")


def test_written_notebook_keeps_the_students_outputs(lab: Path):
    command()
    path = lab / "sv" / "a.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    notebook["metadata"]["output"] = "a student's"
    path.write_text(json.dumps(notebook))
    command()
    assert json.loads(path.read_text("utf-8"))["metadata"] == {"output": "a student's"}


def test_edited_notebook_is_replaced_only_on_request(lab: Path):
    command()
    path = lab / "sv" / "a.ipynb"
    path.write_text(path.read_text("utf-8").replace("En cell.", "Min cell."), "utf-8")
    with pytest.raises(LabError, match=rf"^{path} would be replaced, and may hold your work\. .*--to.*--replace"):
        command()
    assert "Min cell." in path.read_text("utf-8")
    command("--replace")
    assert "Min cell." not in path.read_text("utf-8")


def test_dry_run_writes_nothing(lab: Path):
    assert str(lab / "sv") in command("--dry-run")
    assert not (lab / "sv").exists()


@pytest.mark.parametrize("language", ["fi", "klingon", ""])
def test_unknown_language_names_the_known_ones(language: str):
    with pytest.raises(LabError, match=r"en or sv, got .*--set language=fi"):
        translation.parse_language(language)
    assert translation.parse_language("svenska") == "sv"


# --- how they run -----------------------------------------------------------------------------------------------------


def run(*arguments: object, runs: Path) -> subprocess.CompletedProcess:
    given = os.environ | {"OMP_NUM_THREADS": "1", "LAB_RUNS": str(runs), "VSCODE_PID": "1"}
    words = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def check_executed(path: Path, name: str) -> None:
    """Check that an executed notebook has Swedish text, ran every cell and stopped nowhere."""
    assert all(cell.execution_count for cell in cells(path, "code"))
    outputs = [output for cell in cells(path, "code") for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    texts = {cell.id: cell.source for cell in cells(path)}
    assert {cell for cell, text, _ in pairs(name) if texts[cell] == text} == set()


@pytest.mark.slow
def test_run_executes_the_notebooks_in_swedish(toy_recipe: Path, toy_model: Path, tmp_path: Path):
    given = ("--recipe", toy_recipe, "--set", f"model.base={toy_model}", "--language", "sv", "--json")
    summary = json.loads(run("pipelines", "run", *given, runs=tmp_path).stdout)
    assert summary["n_test"] == 12
    for name in notebooks.NOTEBOOKS:
        check_executed(tmp_path / "toy" / "notebooks" / f"{name}.ipynb", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [COMPARISON, EXPERIMENT])
def test_papermill_executes_a_written_notebook(written: Path, toy_recipe: Path, toy_model: Path, tmp_path: Path, name):
    overrides = f"overrides: {{model.base: '{toy_model}', training.steps: 4}}"
    given = ["-p", "recipe", toy_recipe, "-y", overrides] if name == EXPERIMENT else []
    out = tmp_path / "out.ipynb"
    run("papermill", written / f"{name}.ipynb", out, *given, "--no-progress-bar", runs=tmp_path / "runs")
    check_executed(out, name)
