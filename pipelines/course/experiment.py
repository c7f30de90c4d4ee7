"""Notebook 05 and `project train`: one hypothesis, one change of a recipe, a few seeds, and the verdict.

plan(recipe, change, seeds)         -> Experiment of notebook 05
of_files(baseline, idea, seeds)     -> Experiment of a project folder
Experiment.run(runs)                -> Comparison: trains and scores what is missing
Experiment.readme(text, comparison) -> the text of a README, for the student to finish
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments.comparison.compare import Comparison, compare
from pipelines.experiments.series import run as series
from pipelines.features import pipeline as feature_pipeline
from pipelines.features.cache import FeatureCache
from pipelines.infra import console
from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import flatten
from pipelines.recipes.commands import command
from pipelines.recipes.settings import Recipe
from pipelines.training.run import NOT_IN_IDENTITY

DATA_GROUPS = ("source", "curation", "features", "augment")
"""Groups of settings whose change is data-centric; all others are model-centric."""
_IN_A_SCORE = ("model.base", "evaluation.beam_size")
_NO_CHANGE = {
    *(name for name in NOT_IN_IDENTITY if name not in _IN_A_SCORE),
    *("name", "features.workers", "features.shard_clips", "features.max_rejected_share"),
}
"""Settings that change neither weights nor transcripts."""


@dataclass(frozen=True)
class Experiment:
    """A baseline and an idea that differ in a setting, with the same seeds."""

    baseline: tuple[Recipe, ...]
    """One for each seed."""
    idea: tuple[Recipe, ...]

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ: name to the values of baseline and idea. Notebook 05 has exactly one."""
        return changes(self.baseline[0], self.idea[0])

    @property
    def is_data_centric(self) -> bool:
        return any(name.partition(".")[0] in DATA_GROUPS for name in self.changes)

    def table(self) -> pd.DataFrame:
        """Return one row per run: recipe, seed, and the value of each changed setting."""
        rows = [
            {"recipe": recipe.name, "seed": recipe.training.seed}
            | {name: str(values[is_idea]) for name, values in self.changes.items()}
            for is_idea, group in enumerate((self.baseline, self.idea))
            for recipe in group
        ]
        return pd.DataFrame(rows)

    def run(self, runs: str | Path = "") -> Comparison:
        """Train and score each run that has no report yet; return the comparison. An interrupted call continues.

        Raises LabError if the features cannot be computed or the change gives another test set, before anything is
        trained, or if a run failed, with its reason.
        """
        self._require_same_test_set(runs)
        pairs = [recipe for pair in zip(self.baseline, self.idea, strict=True) for recipe in pair]
        result = series.run(pairs, runs=runs)
        if result.failed:
            raise LabError(f"{len(result.failed)} of {len(pairs)} runs failed. {result.failed[0]}")
        folders = [str(report.folder) for report in (*result.reports[::2], *result.reports[1::2])]
        return compare(folders, runs=runs)

    def _require_same_test_set(self, runs: str | Path) -> None:
        try:
            with console.silenced():
                caches = [feature_pipeline.run(one[0], runs=runs) for one in (self.baseline, self.idea)]
        except LabError:
            if self.idea[0].curation.label_model.startswith("run:"):
                return  # it may be trained by the series
            raise
        before, after = map(_test_clips, caches)
        if before != after:
            raise LabError(
                f"both recipes must have the same test set, but {', '.join(self.changes)} changes it: {len(before)} "
                f"clips before, {len(after)} after, {len(before & after)} in both. Change what is trained, not what is "
                "scored"
            )

    def changed(self) -> str:
        """Return a sentence that names the change."""
        values = (f"`{name}` from `{before}` to `{after}`" for name, (before, after) in self.changes.items())
        return f"Changed: {', '.join(values)}."

    def readme(self, hypothesis: str, comparison: Comparison) -> str:
        """Return the Markdown text of a README: what is known is filled in, the rest is marked TODO.

        The headings are those of a project's plan and README.
        """
        change = f"{self.changed()} See Result."
        other = "TODO: what else could be improved here, and why you did not start with it."
        texts = (other, change) if self.is_data_centric else (change, other)
        notes = "\n".join(f"- {note}" for note in comparison.notes(with_slices=False))
        return (
            f"# {self.idea[0].name}\n\n## Hypothesis\n\n{hypothesis or 'TODO: what you expected, and why.'}\n\n"
            f"## Model-centric\n\n{texts[0]}\n\n## Data-centric\n\n{texts[1]}\n\n"
            f"## Result\n\n{summary(comparison)}\n\nWhat this does not show:\n\n{notes}\n"
            "- TODO: what you would test next.\n"
        )

    def project_command(self) -> str:
        """Return the command that begins a project with the same change."""
        changes = [f"{name}={_as_json(after)}" for name, (_, after) in self.changes.items()]
        options = [word for change in changes for word in ("--set", change)]
        base = [] if (origin := self.baseline[0].origin) in ("", "tour") else ["--base", origin]
        return command("project", "new", "my-idea", *base, *options)

    def share_commands(self, space: str, comparison: Comparison) -> str:
        """Return the commands that publish the best model and its Space `owner/name`; nothing is executed.

        Raises LabError if `space` is neither empty nor of this form.
        """
        if space and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(space)):
            raise LabError(f"space must be owner/name, such as anna/my-experiment, got {space!r}")
        model = comparison.best.reports[0].lineage["digest"]
        folder = Path(comparison.runs) / comparison.best.reports[0].lineage["recipe"] / f"train-{model}" / "model"
        name = space or "YOUR-NAME/my-experiment"
        uri = f"hub://{name}-model"
        return "\n".join(
            (
                "hf auth login",
                f"python -m pipelines publish {shlex.quote(str(folder))} {uri}",
                f"python -m pipelines publish-space {name} --model {uri}",
                f"# Then make it public: https://huggingface.co/spaces/{name}/settings, Change visibility.",
            )
        )


def plan(
    recipe: str, change: Mapping[str, Any], seeds: Sequence[int], overrides: Mapping[str, Any] | None = None
) -> Experiment:
    """Return the runs of a recipe and of the same recipe with `change`, one for each seed.

    Raises LabError unless `change` is one setting with a new value, and the seeds are at least two different numbers.
    """
    setting, after = _one_setting(change)
    seeds = _different_seeds(seeds)
    common = dict(overrides or {})
    baseline = [recipes.load(recipe, {**common, "training.seed": seed}) for seed in seeds]
    name = f"{baseline[0].name[:30]}-idea"
    idea = [recipes.load(recipe, {**common, "name": name, "training.seed": seed, setting: after}) for seed in seeds]
    planned = Experiment(tuple(baseline), tuple(idea))
    if not planned.changes:
        value = baseline[0].settings().get(setting)
        raise LabError(f"change must differ from the recipe, but {setting} is {value!r} there already")
    return planned


def of_files(baseline: Path, idea: Path, seeds: Sequence[int]) -> Experiment:
    """Return the runs of two recipes, one of each for each seed.

    Raises LabError if the recipes are equal, or unless the seeds are at least two different numbers.
    """
    seeds = _different_seeds(seeds)
    planned = Experiment(
        *(tuple(recipes.load(str(file), {"training.seed": seed}) for seed in seeds) for file in (baseline, idea))
    )
    if not planned.changes:
        raise LabError(f"{idea.name} equals {baseline.name}: change the one thing that your hypothesis is about")
    return planned


def changes(baseline: Recipe, idea: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, except the name: name to the values of baseline and idea."""
    before, after = baseline.settings(), idea.settings()
    names = [name for name in {**before, **after} if name != "name" and before.get(name) != after.get(name)]
    return {name: (before.get(name), after.get(name)) for name in names}


def summary(comparison: Comparison) -> str:
    """Return the result of a comparison of two experiments in one sentence, and the verdict."""
    return f"{result(comparison)} Verdict: {comparison.findings[1].verdict}."


def result(comparison: Comparison) -> str:
    """Return the figures of a comparison of two experiments in one sentence."""
    baseline, finding = comparison.findings[:2]
    seeds = ", ".join(map(str, finding.experiment.seeds))
    return (
        f"WER {baseline.score.wer:.3f} without and {finding.score.wer:.3f} with the change, "
        f"ΔWER {finding.difference.delta:+.3f} "
        f"(95 % {finding.units.interval(finding.difference.ci95, '{:+.3f}')}), "
        f"{comparison.report.score.n} test utterances, {comparison.units.who}, seeds {seeds}."
    )


def _one_setting(change: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the new value of the only setting of `change`; groups may be nested."""
    expected = "change must be one setting and its value, such as {'model.dropout': 0.1}"
    if not isinstance(change, Mapping):
        raise LabError(f"{expected}, got {change!r}")
    flat = flatten({str(name): value for name, value in change.items()})
    if len(flat) != 1:
        raise LabError(f"{expected}, got {len(flat)}: if two things change, you cannot know which of them helped")
    ((setting, value),) = flat.items()
    if setting == "training.seed":
        raise LabError(f"{expected}. The seeds are a parameter of their own: seeds = [42, 43]")
    if setting in _NO_CHANGE or setting.startswith("guards."):
        raise LabError(f"{setting} changes neither weights nor transcripts: change another setting")
    return setting, value


def _different_seeds(seeds: Sequence[int]) -> list[int]:
    """Return the seeds without repetitions."""
    expected = f"seeds must be at least two different numbers, such as [42, 43], got {seeds!r}"
    try:
        numbers = [] if isinstance(seeds, str) else list({float(seed): seed for seed in seeds}.values())
    except (TypeError, ValueError):
        raise LabError(expected) from None
    if len(numbers) < 2:
        raise LabError(f"{expected}: one training may be luck")
    return numbers


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _test_clips(cache: FeatureCache) -> set[tuple[str, str]]:
    """Return id and text of each test clip."""
    rows = cache.rows.iloc[cache.split("test")]
    return set(zip(rows["id"], rows["text"], strict=True))
