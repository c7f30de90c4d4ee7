"""Train and score the two recipes of a project: `project train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.course import experiment
from pipelines.course.project.rubric import Missing, Project, require_plan
from pipelines.course.project.template import BASELINE, IDEA, PLAN
from pipelines.experiments import pipeline
from pipelines.experiments.comparison.compare import Comparison
from pipelines.features import pipeline as feature_pipeline
from pipelines.infra import console, manifest
from pipelines.recipes import runs as recipe_runs


@dataclass(frozen=True)
class Training:
    """The trainings of a project, finished or planned."""

    project: Project
    experiment: experiment.Experiment

    def warning(self) -> str:
        """Return a line on what is missing in the plan; empty if nothing is."""
        try:
            require_plan(self.project)
        except Missing as reason:
            return f"note: {reason}. Write the plan before anything is trained"
        return ""

    def run(self) -> Comparison:
        """Train and score what is missing, then score the base model; return the comparison of baseline and idea.

        The plan is stored as it was before the first training. An interrupted call continues. Raises LabError like
        Experiment.run, before anything is trained if the two recipes have different test sets.
        """
        self._keep_plan()
        comparison = self.experiment.run(self.project.runs)
        first, runs = self.experiment.idea[0], self.project.runs
        with console.silenced():
            cache = feature_pipeline.open_cache(first, runs=runs)
            pipeline.evaluate_base_and_tuned(first, cache, str(self.model(comparison)), runs=runs)
        return comparison

    def model(self, comparison: Comparison) -> Path:
        """Return the folder of the idea's model with the first seed."""
        digest = comparison.findings[1].experiment.reports[0].lineage["digest"]
        return recipe_runs.experiment_folder(self.experiment.idea[0], self.project.runs) / f"train-{digest}" / "model"

    def _keep_plan(self) -> None:
        stored = self.project.runs / PLAN
        if not stored.exists():
            stored.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_bytes(stored, self.project.text(PLAN).encode())


def plan(project: Project, seeds: Sequence[int]) -> Training:
    """Return the trainings of a project. Raises LabError if the recipes are equal, or for fewer than two seeds."""
    return Training(project, experiment.of_files(project.folder / BASELINE, project.folder / IDEA, seeds))
