"""Check a project folder against the rubric: what is there, what is missing, and how to get it.

It never grades taste, and executes nothing of the folder: a teacher may check the folders of strangers.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines import recipes
from pipelines.course import experiment
from pipelines.course.project.template import BASELINE, IDEA, PLAN, README, TODO
from pipelines.experiments.comparison import compare as comparisons
from pipelines.experiments.comparison.compare import Comparison
from pipelines.experiments.evaluation import EvalReport, read_report
from pipelines.infra import manifest, redact, stores
from pipelines.infra.errors import LabError
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.settings import Recipe

MIN_SEEDS = 2
_BEFORE_TEXTS = ("plan", "change", "reproducible", "before_after", "comparison")
"""Lines of the rubric that come first, before texts are written."""
N_CLIPS = 5
"""Clips of the test set that the section Errors discusses."""
_MAX_TEXT_BYTES = 200_000
_MIN_WORDS = 8
_LINK = re.compile(r"https://[^\s)>\]]+")
_CLIP = re.compile(r"^[-*] +`([^`\n]+)`:?(.*(?:\n(?![-*] |\n).*)*)", re.MULTILINE)
_WORD = re.compile(r"[\w./-]+")
_RECORDINGS = {"mp4", "webm", "mov", "mkv", "gif", "wav", "mp3", "ogg", "png", "jpg"}
_MAX_NAME_CHARS = 200


@dataclass(frozen=True)
class Line:
    """One line of the rubric."""

    key: str
    title: str
    missing: str = ""
    """What is missing and how to get it; empty if nothing is."""

    @property
    def is_met(self) -> bool:
        return not self.missing


class Missing(Exception):
    """A line of the rubric is not met; the message says what to do."""


@dataclass(frozen=True)
class Project:
    """A project folder, read without executing anything in it."""

    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @cached_property
    def readme(self) -> dict[str, str]:
        return sections(self.text(README))

    @cached_property
    def plan(self) -> dict[str, str]:
        return sections(self.text(PLAN))

    @cached_property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ: name to the values of baseline and idea."""
        return experiment.changes(self.baseline, self.idea)

    @property
    def plan_note(self) -> str:
        """Return a line for the teacher if the plan is not the one that the first training kept; else nothing."""
        kept = self.text(f"runs/{PLAN}")
        return f"{PLAN} was changed after the first training: runs/{PLAN} is the earlier one" * (
            bool(kept) and kept.split() != self.text(PLAN).split()
        )

    @property
    def train_command(self) -> str:
        return shlex.join(["python", "-m", "pipelines", "project", "train", str(self.folder)])

    @cached_property
    def idea(self) -> Recipe:
        return recipes.load(str(self.folder / IDEA))

    @cached_property
    def baseline(self) -> Recipe:
        return recipes.load(str(self.folder / BASELINE))

    @cached_property
    def stages(self) -> dict[str, Any]:
        return recipe_runs.read_stages(self.idea, self.runs)

    def stage(self, name: str) -> dict[str, Any]:
        """Return the record of a stage; empty if there is none, or none that can be read."""
        record = self.stages.get(name)
        return record if isinstance(record, dict) else {}

    @cached_property
    def scores(self) -> dict[str, EvalReport]:
        """The reports of the base model and of the tuned model: before, after. Raises Missing."""
        folders = {name: Path(str(folder)) for name, folder in self.stage("scores").items() if name != "seconds"}
        reports = self.runs / self.idea.name / "reports"
        try:
            return {name: read_report(reports / folder.name) for name, folder in folders.items()}
        except (LabError, OSError) as error:
            raise Missing(f"a report cannot be read: {str(error)[:300]}") from None

    @cached_property
    def comparison(self) -> Comparison:
        return comparisons.compare([self.baseline.name, self.idea.name], runs=self.runs)

    def text(self, name: str) -> str:
        """Return the text of a file in the folder; empty if there is none, or only a link to one."""
        path = self.folder / name
        if not path.is_file() or path.is_symlink():
            return ""
        with path.open("rb") as file:
            return file.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")


def open_folder(folder: Path) -> Project:
    """Return the project in a folder. Raises LabError if there is none, or if it holds links to other places."""
    if not (folder / IDEA).is_file():
        raise LabError(
            f"a project folder holds {IDEA}, {folder} does not. Begin one with: python -m pipelines project new my-idea"
        )
    _require_files(folder)
    return Project(folder)


def check(folder: Path) -> tuple[Project, list[Line]]:
    """Return the project and every line of the rubric. Raises LabError like `open_folder`."""
    project = open_folder(folder)
    return project, [Line(key, title, _missing(rule, project)) for key, (title, rule) in RULES.items()]


def next_step(lines: list[Line]) -> str:
    """Return what to do first: plan and change, then training, then the texts; empty if nothing is missing."""
    missing = {line.key: line.missing for line in lines if not line.is_met}
    return next((missing[key] for key in (*_BEFORE_TEXTS, *missing) if key in missing), "")


def _require_files(folder: Path) -> None:
    """Raise LabError if a link leads out of the folder, or something in it is neither a file nor a folder."""
    root = folder.resolve()
    for path in (Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*folders, *files)):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise LabError(f"{path} is a link to a place outside the project: put there what it leads to, or remove it")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise LabError(f"{path} is neither a file nor a folder: remove it")


def sections(markdown: str) -> dict[str, str]:
    """Return the text below each heading of level 2, by the heading in lower case; those in blocks of code are none."""
    texts: dict[str, list[str]] = {}
    lines: list[str] = []
    fence = ""
    for line in markdown.splitlines():
        mark, rest = line.lstrip()[:3], line.strip().lstrip("`~")
        if fence:
            fence = "" if mark == fence and not rest else fence
        elif mark in ("```", "~~~") and "`" not in rest:
            fence = mark
        elif line.startswith("## ") and (heading := line[3:].strip().rstrip("#").rstrip()):
            lines = texts.setdefault(heading.lower(), [])
            continue
        lines.append(line)
    return {heading: "\n".join(text).strip() for heading, text in texts.items()}


def discussed_clips(project: Project) -> dict[str, str]:
    """Return the clips of the section Errors: id to discussion."""
    rows = _CLIP.findall(project.readme.get("errors", ""))
    return {name: text.strip() for name, text in rows if TODO not in text}


def without_clips(errors: str) -> str:
    """Return the section Errors without the discussed clips."""
    return _CLIP.sub("", errors).strip()


def _missing(rule: Callable[[Project], None], project: Project) -> str:
    try:
        rule(project)
    except (Missing, LabError) as error:
        return str(error)
    return ""


def _require_sections(file: str, filled: dict[str, str], headings: tuple[str, ...]) -> None:
    """Raise Missing unless each heading has text in which nothing is left to replace."""
    for heading in headings:
        text = filled.get(heading.lower())
        if text is None:
            raise Missing(f"{file} needs the section '## {heading}'")
        if TODO in text:
            raise Missing(f"{file}, section {heading}: replace {TODO}")
        if len(text.split()) < _MIN_WORDS:
            raise Missing(f"{file}, section {heading}: write at least {_MIN_WORDS} words, it has {len(text.split())}")


def require_plan(project: Project) -> None:
    """Raise Missing unless every section of the plan is written."""
    _require_sections(PLAN, project.plan, ("Hypothesis", "Change", "Data", "Primary comparison"))


def _change(project: Project) -> None:
    if not project.changes:
        raise Missing(f"{IDEA} equals {BASELINE}: change the one thing that your hypothesis is about")


def _data(project: Project) -> None:
    _require_sections(README, project.readme, ("Data",))
    if project.idea.curation.leaks == "ignore":
        raise Missing("curation.leaks=ignore keeps test speakers and sentences in training: use refuse or drop")
    if "features" not in project.stages:
        raise Missing(f"no feature cache of {IDEA}: {project.train_command}")
    uri = str(project.stage("features").get("cache_uri", ""))
    if not stores.is_remote(uri) and not _is_inside(project.runs, f"features/{Path(uri).name}/README.md"):
        raise Missing(
            "no data card: it is the README.md of the feature cache, which stage 01 writes. Keep it in the project "
            "below runs/features, or run the recipe again"
        )


def _reproducible(project: Project) -> None:
    models = sorted((project.runs / project.idea.name).glob("train-*/model/recipe.json"))
    if "features" not in project.stages or not models:
        raise Missing(f"no trained model of {IDEA}: {project.train_command}")
    published = redact.redact_settings(project.idea.model_dump(mode="json"))  # a model's folder names no local path
    expected = recipes.resolve(published, {}).settings()
    free = {"training.seed", *(name for name, value in expected.items() if value == AUTO)}  # training derives those
    for path in models:
        stored = recipes.resolve(manifest.read_json(path) or {}, {}).settings()
        different = [name for name, value in expected.items() if stored.get(name) != value and name not in free]
        if not different:
            return
    raise Missing(f"the model was trained with another {different[0]} than {IDEA} has: train again with this recipe")


def _before_and_after(project: Project) -> None:
    reports = project.scores
    if not {"before", "after"} <= reports.keys():
        raise Missing(f"no scores before and after: {project.train_command}")
    if reports["before"].test_set != reports["after"].test_set:
        raise Missing("the scores before and after are from different test sets: run the recipe again")
    if not reports["after"].score.units.enough:
        raise Missing("the test set has too few speakers for an interval over speakers: say so in Result, or add some")


def _comparison(project: Project) -> None:
    for recipe in (project.baseline, project.idea):
        if not list((project.runs / recipe.name / "reports").glob("test-*")):
            raise Missing(f"{recipe.name} has no score yet: {project.train_command}")
    for finding in project.comparison.findings:
        if (n_seeds := len(finding.experiment.seeds)) < MIN_SEEDS:
            raise Missing(
                f"{finding.experiment.name} has {n_seeds} seed(s), expected {MIN_SEEDS}: "
                f"{project.train_command} --seeds 42,43"
            )
    _require_sections(README, project.readme, ("Result",))


def _discussion(project: Project) -> None:
    _require_sections(README, project.readme, ("Model-centric", "Data-centric"))


def _errors(project: Project) -> None:
    reports = project.scores
    if "after" not in reports:
        raise Missing(f"no scores yet: {project.train_command}")
    known = set(reports["after"].predictions["id"].astype(str))
    clips = discussed_clips(project)
    if unknown := sorted(clips.keys() - known):
        raise Missing(f"section Errors: {unknown[0][:60]!r} is no clip of the test set; ids are in predictions.csv")
    if short := [name for name, text in clips.items() if len(text.split()) < _MIN_WORDS]:
        raise Missing(f"section Errors, {short[0][:60]}: say what is wrong and why, in at least {_MIN_WORDS} words")
    if len(clips) < N_CLIPS:
        page = os.path.relpath(reports["after"].folder / "report.html", project.folder)
        raise Missing(
            f"section Errors discusses {len(clips)} clips of the test set, expected {N_CLIPS}: listen to them in {page}"
        )


def _demo(project: Project) -> None:
    text = project.readme.get("demo", "")
    if TODO in text:
        raise Missing(f"{README}, section Demo: replace {TODO}")
    if not demo_files(project) and not _LINK.search(text):
        raise Missing("section Demo: give the https address of your Space, or the name of a recording in this folder")


def demo_files(project: Project) -> list[str]:
    """Return the recordings and pictures in the folder that the section Demo names."""
    words = [word.rstrip(".") for word in _WORD.findall(project.readme.get("demo", "")) if len(word) <= _MAX_NAME_CHARS]
    names = [word for word in dict.fromkeys(words) if word.rpartition(".")[2].lower() in _RECORDINGS]
    return [name for name in names if _is_inside(project.folder, name)]


def _is_inside(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _model_card(project: Project) -> None:
    if not list((project.runs / project.idea.name).glob("train-*/model/README.md")):
        raise Missing("no model card: it is the README.md of the model's folder, which training writes")


def _cost(project: Project) -> None:
    if "seconds" not in project.stage("training"):
        raise Missing(f"no training time is recorded: {project.train_command}")
    _require_sections(README, project.readme, ("Cost",))


RULES: dict[str, tuple[str, Callable[[Project], None]]] = {
    "plan": ("Plan: hypothesis, change, data and primary comparison, before training", require_plan),
    "change": ("One named change between baseline and idea", _change),
    "data": ("Data documented (source, speakers, licence, consent) and free of leaks", _data),
    "reproducible": ("Features and model reproducible from the recipe", _reproducible),
    "before_after": ("Scores before and after on one test set, with intervals", _before_and_after),
    "comparison": (f"Idea against baseline with at least {MIN_SEEDS} seeds each, and a conclusion", _comparison),
    "discussion": ("Discussion: model-centric against data-centric", _discussion),
    "errors": (f"Error analysis: {N_CLIPS} clips of the test set discussed", _errors),
    "demo": ("A published demo, or a recording of it", _demo),
    "model_card": ("Model card", _model_card),
    "cost": ("Cost: computing time and working time", _cost),
}
"""Key to title and rule, in the order of docs/course.md."""
