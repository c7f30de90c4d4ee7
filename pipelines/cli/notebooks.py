"""The three notebooks in order, by papermill: what `make run` does. Each is handed the URI that the one before made."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from pipelines.experiments import evaluation
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError, Unfinished, missing_package
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.settings import Recipe

logger = logging.getLogger(__name__)

NOTEBOOKS = ("01_feature_pipeline", "02_training_pipeline", "03_inference_app")
_IN_BATCH = {NOTEBOOKS[2]: {"launch": False}}
"""Nobody sits before the page, even where the command was given in a terminal of Jupyter or an editor."""


def run(
    recipe: Recipe, recipe_name: str, overrides: dict[str, Any], *, runs: str | Path = "", progress: bool = True
) -> dict[str, Any]:
    """Execute 01, 02 and 03; the executed copies land in `runs/<recipe>/notebooks/`. Returns the summary.

    Every stage keeps what it finished: after a kill, the same call goes on where it was. The summary is written to
    `runs/<recipe>/summary.json`.
    """
    folder = recipe_runs.experiment_folder(recipe, runs) / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"recipe": recipe_name, "overrides": overrides, "runs": str(environment.runs_folder(runs))}
    handed, seconds = {}, {}
    for name in NOTEBOOKS:
        logger.info(f"{name} ...")
        started = time.monotonic()
        _execute(name, folder, shared | handed | _IN_BATCH.get(name, {}), progress)
        seconds[name] = round(time.monotonic() - started, 1)
        handed = _next_uri(name, recipe_runs.read_stages(recipe, runs))
        logger.info(f"{name}: {seconds[name]:.0f} s{''.join(f', {key} {value}' for key, value in handed.items())}")
    return _summarise(recipe, runs, seconds)


def _execute(name: str, folder: Path, parameters: dict[str, Any], progress: bool) -> None:
    try:
        import papermill
    except ImportError:
        raise missing_package("papermill", "papermill>=2.6", "running the notebooks in batch") from None
    copy = folder / f"{name}.ipynb"
    try:
        papermill.execute_notebook(
            str(environment.ROOT / "notebooks" / f"{name}.ipynb"),
            str(copy),
            parameters=parameters,
            cwd=str(environment.ROOT),
            kernel_name="python3",
            progress_bar=progress,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own log; what cells print stays in the copy
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == Unfinished.__name__:
            raise Unfinished(f"{name}: {error.evalue}") from None
        # what the lab refuses, it will refuse again; anything else may have been a passing fault
        next_step = "mend that, then" if error.ename == "LabError" else "to go on,"
        raise LabError(
            f"{name} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}. "
            f"The executed copy is {copy}; {next_step} run the same command again"
        ) from None


def _next_uri(name: str, noted: dict[str, Any]) -> dict[str, str]:
    """The parameter that the next notebook is handed."""
    if name == NOTEBOOKS[0]:
        return {"cache_uri": noted["features"]["cache_uri"]}
    return {"model_uri": noted["training"]["model_uri"]} if name == NOTEBOOKS[1] else {}


def _summarise(recipe: Recipe, runs: str | Path, seconds: dict[str, float]) -> dict[str, Any]:
    noted = recipe_runs.read_stages(recipe, runs)
    reports = {label: evaluation.read_report(Path(noted["scores"][label])) for label in ("before", "after")}
    summary = {
        "recipe": recipe.name,
        **{
            f"wer_{label}": {"wer": report.score.wer, "ci95": list(report.score.ci95), "model": report.model}
            for label, report in reports.items()
        },
        "n_test": reports["after"].score.n,
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
        "cache_uri": noted["features"]["cache_uri"],
        "model_uri": noted["training"]["model_uri"],
        "digest": noted["training"]["digest"],
    }
    manifest.write_json(recipe_runs.experiment_folder(recipe, runs) / "summary.json", summary)
    return summary


def in_words(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    lines = [f"recipe {summary['recipe']}, {summary['n_test']} test utterances, normalised WER with 95 % interval"]
    for label in ("before", "after"):
        told = summary[f"wer_{label}"]
        lines.append("  {:<7}{:.3f}  ({:.3f} to {:.3f})  {}".format(label, told["wer"], *told["ci95"], told["model"]))
    lines.append("seconds  " + json.dumps(summary["seconds"]))
    lines.append(f"cache    {summary['cache_uri']}")
    lines.append(f"model    {summary['model_uri']}")
    return "\n".join(lines)
