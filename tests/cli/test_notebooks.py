"""The notebooks: their form, and runs in order, with papermill, with a stale cache, and after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import psutil
import pytest
import sample_reports

from pipelines.cli import notebooks
from pipelines.experiments import run_log

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEATURES, TRAINING, APP = "01_feature_pipeline", "02_training_pipeline", "03_inference_app"
COMPARISON = "04_compare_experiments"
"""Reads results; not part of a run."""
EXPERIMENT = "05_your_experiment"
"""Runs two recipes; not part of a run."""
SHARED = ["recipe", "overrides", "runs"]
"""Parameters of every notebook of a run, in this order, before its other parameters."""

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tagged(path: Path) -> nbformat.NotebookNode:
    """Return the cell that papermill replaces."""
    (cell,) = [cell for cell in cells(path) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def links(path: Path) -> list[str]:
    """Return the targets of all Markdown links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", "\n".join(cell.source for cell in cells(path, "markdown")))


# --- how they are written ---------------------------------------------------------------------------------------------


def test_there_are_three_stages_a_comparison_and_an_experiment():
    assert [path.stem for path in PATHS] == [FEATURES, TRAINING, APP, COMPARISON, EXPERIMENT]
    assert notebooks.NOTEBOOKS == (FEATURES, TRAINING, APP)


@each
def test_notebook_is_valid_and_stripped(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in cells(path))
    assert "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"


@each
def test_parameters_are_tagged_and_consistent(path: Path):
    assigned = re.findall(r"^(\w+) = (.*)$", tagged(path).source, flags=re.MULTILINE)
    names = [name for name, _ in assigned]
    assert len(assigned) == len(tagged(path).source.splitlines()), "nothing but assignments"
    defaults = dict(assigned)
    if path.stem == COMPARISON:
        assert defaults == {"experiments": "[]", "baseline": '""', "runs": '""'}
        return
    assert names[:3] == SHARED
    assert [defaults[name] for name in SHARED] == ['"tour"', "{}", '""']
    own = {
        FEATURES: ["cache_uri", "publish"],
        TRAINING: ["cache_uri", "resume", "publish"],
        APP: ["model_uri", "launch"],
        EXPERIMENT: ["hypothesis", "change", "seeds", "space"],
    }
    assert names[3:] == own[path.stem]


def test_first_cell_is_the_same_in_all_notebooks():
    assert len({cells(path)[0].source for path in PATHS}) == 1


def bootstrap(monkeypatch: pytest.MonkeyPatch, words: list[str], prefix: Path, git_code: int = 0) -> str | None:
    """Run the first cell as a kernel would that a command with `words` started; return the lab's folder, None: cloned.

    The environment is at `prefix`, and nothing but the cell adds to the module path.
    """
    source = cells(PATHS[0])[0].source
    (clone,) = re.findall(r"!git clone .* lab$", source, flags=re.MULTILINE)
    parent = SimpleNamespace(as_dict=lambda names, default: {"cmdline": words})
    monkeypatch.setattr(psutil.Process, "parents", lambda self: [parent])
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "prefix", str(prefix))
    scope = {"cloned": [], "_exit_code": git_code}  # as IPython sets it
    exec(source.replace(clone, "cloned.append(1)"), scope)
    return None if scope["cloned"] else sys.path[0]


@pytest.mark.parametrize(
    ("folder", "words", "prefix", "lab"),
    [
        ("lab1", [], "", "lab1"),
        ("lab1/notebooks", [], "", "lab1"),
        ("", ["python", "-m", "papermill", "lab1/notebooks/01.ipynb", "out.ipynb"], "", "lab1"),
        ("lab2", ["papermill", "{}/lab1/notebooks/01.ipynb", "out.ipynb"], "", "lab1"),
        ("", ["papermill", "copy.ipynb", "out.ipynb"], "lab1/.venv", "lab1"),
        ("content", ["colab"], "", "content/lab"),
        ("mine", [], "", None),
    ],
)
def test_first_cell_finds_a_lab_before_it_clones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, words: list[str], prefix: str, lab: str | None
):
    for name in ("lab1", "lab2", "content/lab"):
        (tmp_path / name / "pipelines" / "infra").mkdir(parents=True)
        (tmp_path / name / "pipelines" / "infra" / "environment.py").touch()
    (tmp_path / "lab1" / "notebooks").mkdir()
    (tmp_path / "mine" / "pipelines").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    found = bootstrap(monkeypatch, [word.format(tmp_path) for word in words], tmp_path / (prefix or "none"))
    assert found == (lab and str(tmp_path / lab))
    assert Path.cwd() == tmp_path / folder, "relative paths stay the user's"


def test_failed_download_of_the_lab_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^git could not download the lab: make room.*again$"):
        bootstrap(monkeypatch, [], tmp_path, git_code=128)


@each
def test_code_cells_are_few_short_and_define_nothing(path: Path):
    sources = [cell.source for cell in cells(path)]
    assert 8 <= len(sources) <= 16
    assert not [source for source in sources if re.search(r"^\s*(async )?(def|class) ", source, flags=re.MULTILINE)]
    short = [source for source in sources if len(source.splitlines()) <= 5]
    assert len(short) / len(sources) >= 0.8
    assert max(len(source.splitlines()) for source in sources) <= 11


@each
def test_text_precedes_code(path: Path):
    kinds = [cell.cell_type for cell in nbformat.read(path, as_version=4).cells]
    assert kinds[0] == "markdown"
    code, prose = kinds.count("code"), kinds.count("markdown")
    assert prose >= 0.7 * code
    for place, kind in enumerate(kinds):
        assert kind == "markdown" or "markdown" in kinds[max(0, place - 2) : place], "two code cells in a row at most"


@each
def test_local_links_exist(path: Path):
    local = [target for target in links(path) if "://" not in target]
    assert [target for target in local if target.startswith("../pipelines/")], "it names the rooms it shows"
    assert [target for target in local if not (path.parent / target.partition("#")[0]).exists()] == []


def test_repository_name_is_consistent():
    pages = [page.read_text("utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    texts = [path.read_text("utf-8") for path in PATHS]
    named = {name for text in (*texts, *pages) for name in re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)/blob", text)}
    cloned = {name for text in texts for name in re.findall(r"https://github\.com/([\w.-]+/[\w.-]+) lab", text)}
    assert len(named) == 1
    assert named == cloned


@each
def test_colab_badge_opens_its_notebook(path: Path):
    badges = [link for link in links(path) if link.startswith("https://colab.research.google.com/github/")]
    assert len(badges) == 1
    assert badges[0].endswith(f"/blob/main/notebooks/{path.name}")


# --- how they run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A toy experiment: recipe, model, runs folder, and commands with one thread."""

    recipe: Path
    model: Path
    runs: Path

    @property
    def environment(self) -> dict[str, str]:
        # VSCODE_PID: a terminal inside an editor is no reason to open the page
        return os.environ | {"OMP_NUM_THREADS": "1", "LAB_RUNS": str(self.runs), "VSCODE_PID": "1"}

    def command(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False)

    def run(self) -> dict[str, Any]:
        """Run `python -m pipelines run` and return the summary that it prints."""
        settings = ("--recipe", str(self.recipe), "--set", f"model.base={self.model}")
        done = self.command("pipelines", "run", *settings, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        assert "IPKernelApp" not in done.stderr
        return json.loads(done.stdout)

    def papermill(self, name: str, out: Path, overrides: str, **parameters: str) -> list[str]:
        """Return the arguments of a papermill command, as in the README."""
        given = [word for key, value in parameters.items() for word in ("-p", key, value)]
        overridden = ["-y", f"overrides: {{model.base: '{self.model}'{overrides}}}"]
        notebook = str(ROOT / "notebooks" / f"{name}.ipynb")
        return [
            "papermill",
            notebook,
            str(out),
            "-p",
            "recipe",
            str(self.recipe),
            *given,
            *overridden,
            "--no-progress-bar",
        ]

    @property
    def folder(self) -> Path:
        """Folder of the toy recipe's runs."""
        return self.runs / "toy"

    def copy(self, name: str) -> Path:
        return self.folder / "notebooks" / f"{name}.ipynb"


@pytest.fixture(scope="module")
def place(toy_recipe: Path, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(toy_recipe, toy_model, tmp_path_factory.mktemp("notebooks") / "runs")


@pytest.fixture(scope="module")
def summary(place: Place) -> dict[str, Any]:
    """Return the summary of the first run."""
    return place.run()


def printed(path: Path) -> str:
    """Return everything that an executed copy printed."""
    outputs = [output for cell in cells(path) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def changed(folder: Path) -> dict[str, int]:
    """Return modification times of shards and weights below `folder`."""
    return {str(path): path.stat().st_mtime_ns for kind in ("*.bin", "*.safetensors") for path in folder.rglob(kind)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_summary_has_scores_and_uris(place: Place, summary: dict[str, Any]):
    assert summary == json.loads((place.folder / "summary.json").read_text("utf-8"))
    for name in ("wer_before", "wer_after"):
        low, high = summary[name]["ci95"]
        assert 0 <= low <= summary[name]["wer"] <= high
    assert summary["wer_before"]["model"] != summary["wer_after"]["model"]
    assert summary["n_test"] == 12
    assert summary["seconds"].keys() == {FEATURES, TRAINING, APP, "total"}
    assert summary["seconds"]["total"] == pytest.approx(sum(summary["seconds"].values()) / 2, abs=0.2)
    assert (Path(summary["cache_uri"]) / "manifest.json").is_file()
    assert (Path(summary["model_uri"]) / "model.safetensors").is_file()
    assert summary["digest"] == json.loads((Path(summary["model_uri"]) / "manifest.json").read_text("utf-8"))["digest"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pictures"), [(FEATURES, 2), (TRAINING, 5), (APP, 1)])
def test_executed_copies_have_all_outputs(place: Place, summary: dict[str, Any], name: str, pictures: int):
    executed = cells(place.copy(name))
    outputs = [output for cell in executed for output in cell.outputs]
    assert all(cell.execution_count for cell in executed)
    assert [output.ename for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == [], "no warnings in the copy"
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in shown for shown in data) >= pictures
    assert any("text/html" in shown for shown in data)
    players = sum("<audio" in shown.get("text/html", "") for shown in data)
    assert players == {FEATURES: 3, TRAINING: 1, APP: 2}[name]


@pytest.mark.slow
def test_executed_copies_print_their_uris(place: Place, summary: dict[str, Any]):
    assert f"cache URI  {summary['cache_uri']}\n" in printed(place.copy(FEATURES))
    assert f"model URI  {summary['model_uri']}\n" in printed(place.copy(TRAINING))
    assert f"digest     {summary['digest']}, best at step " in printed(place.copy(TRAINING))
    assert f"MODEL_URI={summary['model_uri']} python app.py" in printed(place.copy(APP))


@pytest.mark.slow
def test_app_is_built_but_not_launched_in_batch(place: Place, summary: dict[str, Any]):
    (built,) = [cell for cell in cells(place.copy(APP)) if "app.build(" in cell.source]
    assert built.outputs == []


@pytest.mark.slow
def test_second_run_reuses_cache_and_model(place: Place, summary: dict[str, Any]):
    before = changed(place.runs)
    assert len(before) == 2, "one shard and one model"
    again = place.run()
    assert changed(place.runs) == before
    assert "feature cache found, nothing is extracted again" in printed(place.copy(FEATURES))
    assert f"this run is finished: {summary['model_uri']}" in printed(place.copy(TRAINING))
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


@pytest.mark.slow
def test_papermill_takes_recipe_and_overrides(place: Place, tmp_path: Path):
    out = tmp_path / "out.ipynb"
    given = place.papermill(FEATURES, out, ", source.train: 4, source: {test: 2}", runs="runs")
    done = place.command(*given, cwd=tmp_path)  # outside of the lab, where `runs` is meant
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "features").glob("tour-*")
    assert f"cache URI  {folder}\n" in printed(out)
    counts = json.loads((folder / "manifest.json").read_text("utf-8"))["counts"]
    assert (counts["train"], counts["validation"], counts["test"]) == (4, 8, 2)


@pytest.mark.slow
def test_misspelt_override_stops_papermill_with_hint(place: Place, tmp_path: Path):
    out = tmp_path / "out.ipynb"
    done = place.command(*place.papermill(FEATURES, out, ", source.trian: 4", runs=str(tmp_path / "runs")))
    assert done.returncode != 0
    assert "unknown setting 'source.trian'; did you mean 'source.train'?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_stale_cache_is_refused_with_field_name(place: Place, summary: dict[str, Any], tmp_path: Path):
    before = changed(place.runs)
    given = place.papermill(TRAINING, tmp_path / "out.ipynb", ", source.seed: 8", cache_uri=summary["cache_uri"])
    done = place.command(*given)
    assert done.returncode != 0
    assert "source.seed: wanted 8, found 7" in done.stderr
    (error,) = [output for cell in cells(tmp_path / "out.ipynb") for output in cell.outputs if "ename" in output]
    assert error.traceback == [f"StaleCache: {error.evalue}"], "one line, without a traceback"
    assert changed(place.runs) == before


@pytest.mark.slow
def test_comparison_notebook_runs_no_pipeline(place: Place, tmp_path: Path):
    for name, errors in (("raw", 3), ("better", 2)):
        run_log.add(sample_reports.report(tmp_path, name, sample_reports.wrong(errors)), tmp_path)
    before = set(tmp_path.rglob("*"))
    given = ["-p", "runs", str(tmp_path), "-y", "experiments: [raw, better]", "--no-progress-bar"]
    out = tmp_path / "out.ipynb"
    done = place.command("papermill", f"notebooks/{COMPARISON}.ipynb", str(out), *given)
    assert done.returncode == 0, done.stderr
    outputs = [output for cell in cells(out) for output in cell.outputs]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in shown for shown in data) == 2, "differences, and the WER of each speaker"
    tables = [shown["text/html"] for shown in data if "text/html" in shown]
    assert len(tables) == 6
    assert "-0.083" in tables[0] and "<td>better</td>" in tables[0]
    assert "Next: python -m pipelines features --recipe tour --set name=raw --set training.seed=43" in printed(out)
    assert set(tmp_path.rglob("*")) - before == {out}


@pytest.mark.slow
def test_comparison_notebook_answers_its_question_without_runs(place: Place, tmp_path: Path):
    out = tmp_path / "out.ipynb"
    given = ("-p", "runs", str(tmp_path / "runs"), "--no-progress-bar")
    done = place.command("papermill", f"notebooks/{COMPARISON}.ipynb", str(out), *given)
    assert done.returncode == 0, done.stderr
    outputs = [output.get("data", {}) for cell in cells(out) for output in cell.outputs]
    html = "".join(data.get("text/html", "") for data in outputs)
    assert "-0.028 to +0.014" in html and "no difference shown" in html
    assert html.count("<audio") == 8, "the worst errors have players"
    assert "16 speakers: 7 better, 4 equal, 5 worse." in printed(out)


@pytest.mark.slow
def test_experiment_notebook_trains_twice_with_two_seeds(place: Place, tmp_path: Path):
    out, runs = tmp_path / "out.ipynb", tmp_path / "runs"
    arguments = place.papermill(EXPERIMENT, out, "", runs=str(runs), hypothesis="Fewer clips are as good.")
    done = place.command(*arguments, "-y", "change: {training.label_smoothing: 0.2}")
    assert done.returncode == 0, done.stderr
    assert [output for cell in cells(out) for output in cell.outputs if output.get("name") == "stderr"] == []
    assert len(list(runs.glob("toy/train-*"))) == len(list(runs.glob("toy-idea/train-*"))) == 2
    (readme,) = [
        output.data["text/markdown"]
        for cell in cells(out)
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]
    assert "Fewer clips are as good." in readme and "Changed: `training.label_smoothing`" in readme
    assert "no difference shown" in readme and readme.index("Changed: ") < readme.index("## Data-centric")
    assert f"publish {runs}/toy" in printed(out) and "publish-space YOUR-NAME/my-experiment" in printed(out)


@pytest.mark.slow
def test_failed_run_prints_notebook_and_cell(place: Place, tmp_path: Path):
    settings = ("--set", "source.kind=folder", "--set", f"source.path={tmp_path / 'none'}")
    given = ("--recipe", str(place.recipe), "--set", f"model.base={place.model}", *settings)
    done = place.command("pipelines", "run", *given, "--runs", str(tmp_path / "runs"), "--json")
    assert (done.returncode, done.stdout) == (1, "")
    *_, error = done.stderr.splitlines()
    assert error.startswith(f"error: {FEATURES} stopped in cell ")
    assert f"The executed copy is {tmp_path / 'runs' / 'toy' / 'notebooks' / FEATURES}.ipynb" in error
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_signal_leaves_a_cell_time_for_its_checkpoint(tmp_path: Path):
    source, checkpoint = tmp_path / "source.ipynb", tmp_path / "checkpoint"
    waits = """
        import pathlib, time
        try:
            pathlib.Path("started").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(1)
            pathlib.Path("checkpoint").touch()"""
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(waits))]), source)
    code = (
        "import pathlib, sys; from pipelines.cli import notebooks;"
        "notebooks._execute_notebook('copy', *map(pathlib.Path, sys.argv[1:]), {})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, source, tmp_path], cwd=tmp_path, env=environment)
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        while process.poll() is None and not checkpoint.exists():
            time.sleep(0.1)
        assert checkpoint.exists()
    finally:
        process.kill()


@pytest.mark.slow
def test_unfinished_training_stops_the_run(place: Place, summary: dict[str, Any]):
    hasty = ("--set", "training.seed=43", "--set", "training.max_hours=1e-9")
    given = ("--recipe", str(place.recipe), "--set", f"model.base={place.model}", *hasty)
    done = place.command("pipelines", "run", *given)
    assert done.returncode == 75
    told = f"unfinished: {TRAINING}: the time budget of 1e-09 h ended training after step 1 of 12; "
    assert done.stderr.splitlines()[-1].startswith(told)
    outputs = [output for cell in cells(place.copy(TRAINING)) for output in cell.outputs]
    (error,) = [output for output in outputs if output.output_type == "error"]
    assert error.ename == "Unfinished"
    assert error.evalue in done.stderr


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(place: Place, summary: dict[str, Any], tmp_path: Path):
    """All processes get SIGKILL after a checkpoint; the second run resumes from it."""
    runs, out = tmp_path / "runs", tmp_path / "out.ipynb"
    command = [
        sys.executable,
        "-m",
        *place.papermill(TRAINING, out, "", runs=str(runs), cache_uri=summary["cache_uri"]),
    ]
    _kill_after_a_checkpoint(command, place.environment, runs / "toy")
    assert not list(runs.rglob("model/manifest.json")), "killed before the end"

    done = subprocess.run(command, cwd=ROOT, env=place.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming from checkpoint-(4|8)$", printed(out), flags=re.MULTILINE)
    (weights,) = runs.rglob("model/model.safetensors")
    assert sha256(weights) == sha256(Path(summary["model_uri"]) / "model.safetensors")
    assert summary["digest"] in weights.parent.parent.name


def _kill_after_a_checkpoint(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run papermill, and kill it and its kernel (another process group) when a checkpoint is complete."""
    started = time.monotonic()
    process = psutil.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not list(folder.glob("train-*/checkpoints/checkpoint-*/manifest.json")):
            assert process.poll() is None, "training ended before it could be killed"
            assert time.monotonic() - started < 120
            time.sleep(0.005)
    finally:
        family = [*process.children(recursive=True), process]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=10)
