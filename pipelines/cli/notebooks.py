"""Commands of the notebooks: run executes the three in order, each with the URI that the previous one produced.

`notebooks` writes all of them in another language.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from pipelines.cli import progress
from pipelines.cli.options import (
    DryRun,
    Json,
    Overrides,
    RecipeName,
    Runs,
    load_recipe,
    parse_overrides,
    print_plan,
    print_result,
)
from pipelines.course import translation
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError, Unfinished, missing_package
from pipelines.infra.files import Unavailable
from pipelines.recipes import runs as recipe_runs
from pipelines.recipes.settings import Recipe

if TYPE_CHECKING:
    from pipelines.experiments.evaluation import EvalReport

logger = logging.getLogger(__name__)

NOTEBOOKS = ("01_feature_pipeline", "02_training_pipeline", "03_inference_app")
_BATCH_PARAMETERS = {NOTEBOOKS[2]: {"launch": False}}
"""No one uses the app here, even if the command runs in a terminal of Jupyter or of an editor."""
TextLanguage = Annotated[
    str,
    typer.Option("--language", callback=translation.parse_language, help="Language of the notebooks' text: en or sv."),
]


def run(
    recipe: RecipeName = "tour",
    set_: Overrides = (),
    runs: Runs = "",
    language: TextLanguage = translation.ENGLISH,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Run the three notebooks in order: features, training, app.

    Example: python -m pipelines run --recipe tour --set training.steps=60

    On your own data: python -m pipelines run --recipe own --set name=mine --set source.path=my_recordings
    """
    settings = load_recipe(recipe, set_)
    if dry_run:
        folder = environment.runs_folder(runs) / settings.name
        return print_plan(as_json, f"execute {', '.join(NOTEBOOKS)}", folder, settings)
    stream = sys.stderr if as_json else sys.stdout
    summary = execute(settings, recipe, parse_overrides(set_), runs=runs, language=language, stream=stream)
    command = f"MODEL_URI={shlex.quote(summary.model_uri)} make app"
    from pipelines.experiments.report import guards

    text = f"{summary}\nNext: {command}, then open its address\n{guards.warning(summary.after.guards)}"
    print_result(as_json, summary.as_dict(), text.rstrip())


def notebooks(
    language: Annotated[
        str, typer.Option(callback=translation.parse_language, help="Language of the notebooks' text: sv.")
    ],
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the notebooks; default: notebooks/LANGUAGE.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace notebooks that exist with other text or code.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Write the notebooks and exercises with their text in another language; the code is the same.

    Example: python -m pipelines notebooks --language sv
    """
    if language == translation.ENGLISH:
        raise LabError(f"the notebooks in English are in {translation.NOTEBOOKS}; give --language sv")
    folder = to or translation.NOTEBOOKS / language
    if dry_run:
        return print_plan(as_json, f"write the notebooks in the language {language}", folder)
    problems = translation.write(language, folder, replace=replace)
    files = [str(path) for path in translation.paths(language, folder).values()]
    text = "\n".join(
        [*problems, f"{len(files)} notebooks in {folder}", f"Next: jupyter lab {shlex.quote(str(folder))}"]
    )
    print_result(as_json, {"folder": str(folder), "notebooks": files, "untranslated": problems}, text)


@dataclass(frozen=True)
class RunSummary:
    """The results of one run of the notebooks."""

    recipe: str
    before: EvalReport
    """Test score of the base model."""
    after: EvalReport
    """Test score of the fine-tuned model."""
    seconds: dict[str, float]
    """Wall-clock time per notebook, and `total`."""
    cache_uri: str
    model_uri: str
    digest: str
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """Why clips were not used: reason, clips, example, detail, fault."""

    def as_dict(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        from pipelines.experiments.report import stock

        scores = {
            f"wer_{label}": {
                "wer": report.score.wer,
                "ci95": report.score.ci95 and list(report.score.ci95),
                "over": report.score.over,
                "model": report.model,
                "stock": report.stock and stock.facts(report.stock),
            }
            for label, report in (("before", self.before), ("after", self.after))
        }
        return {
            "recipe": self.recipe,
            **scores,
            **({"guards": [guard.as_dict() for guard in self.after.guards]} if self.after.guards else {}),
            "n_test": self.after.score.n,
            "seconds": self.seconds,
            "cache_uri": self.cache_uri,
            "model_uri": self.model_uri,
            "digest": self.digest,
            "rejected": self.rejected,
        }

    def __str__(self) -> str:
        from pipelines.experiments.report import guards

        lines = [
            f"recipe {self.recipe}, {self.after.score.n} test utterances, normalised WER in this lab with 95 % interval"
        ]
        for label, report in (("before", self.before), ("after", self.after)):
            score = report.score
            lines.append(f"  {label:<7}{score.wer:.3f}  ({score.units.interval(score.ci95)})  {report.model}")
        for label, report in (("before", self.before), ("after", self.after)):
            if report.stock:
                lines.append(f"  {label:<7}{report.stock.comparison}")
        lines += [guards.describe(self.after.guards)] if self.after.guards else []
        lines += [f"note: {note}" for note in self.after.caveats]
        lines.append("seconds  " + json.dumps(self.seconds))
        lines.append(f"cache    {self.cache_uri}")
        if self.rejected:
            reasons = ", ".join(f"{one['reason']} {one['clips']:,}" for one in self.rejected)
            lines.append(f"not used {reasons}: see rejected.csv in the cache")
        lines.append(f"model    {self.model_uri}")
        return "\n".join(lines)


def execute(
    recipe: Recipe,
    recipe_name: str,
    overrides: dict[str, Any],
    *,
    runs: str | Path = "",
    language: str = translation.ENGLISH,
    stream: TextIO | None = None,
) -> RunSummary:
    """Execute the notebooks, with their text in `language`, with papermill, and show their progress on `stream`.

    The executed copies are stored in `runs/<recipe>/notebooks/`, the summary in `runs/<recipe>/summary.json`. Finished
    stages are not repeated: after an interruption, the same call continues.
    """
    folder = recipe_runs.experiment_folder(recipe, runs) / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"recipe": recipe_name, "overrides": overrides, "runs": str(environment.runs_folder(runs))}
    previous, seconds = {}, {}
    for name in NOTEBOOKS:
        logger.info(f"{name} ...")
        started = time.monotonic()
        with progress.follow(name, stream or sys.stdout):
            source = _source(name, language, folder)
            _execute_notebook(name, source, folder, shared | previous | _BATCH_PARAMETERS.get(name, {}))
        seconds[name] = round(time.monotonic() - started, 1)
        previous = _next_parameters(name, recipe_runs.read_stages(recipe, runs))
        logger.info(f"{name}: {seconds[name]:.0f} s{''.join(f', {key} {value}' for key, value in previous.items())}")
    summary = _summarise(recipe, runs, seconds)
    manifest.write_json(recipe_runs.experiment_folder(recipe, runs) / "summary.json", summary.as_dict())
    return summary


def _source(name: str, language: str, folder: Path) -> Path:
    """Write the notebook to execute where its executed copy will be, with the links that it needs there."""
    files = {name: folder / f"{name}.ipynb" for name in NOTEBOOKS}
    if language == translation.ENGLISH:
        notebook = translation.english(name, files[name], files)
    else:
        translated = translation.translate(name, language, files[name], files)
        notebook = translated.notebook
        for problem in translated.problems:
            logger.warning(problem)
    translation.write_notebook(files[name], notebook)
    return files[name]


def _execute_notebook(name: str, source: Path, folder: Path, parameters: dict[str, Any]) -> None:
    try:
        import papermill
    except ImportError:
        raise missing_package("papermill", "papermill>=2.6", "running the notebooks in batch") from None
    copy = folder / f"{name}.ipynb"
    try:
        papermill.execute_notebook(
            str(source),
            str(copy),
            parameters=parameters,
            cwd=str(Path.cwd()),  # relative paths in the settings are the user's
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--log-level=CRITICAL"],  # log of the kernel itself; output of cells goes to the copy
            engine_name=_register_engine(),
        )
    except papermill.PapermillExecutionError as error:
        if error.ename in (Unfinished.__name__, Unavailable.__name__):
            raise Unfinished(f"{name}: {error.evalue}") from None
        # a LabError will occur again; another error may have been temporary
        next_step = "fix that, then" if error.ename in ("LabError", "TooManyRejected") else "to continue,"
        raise LabError(
            f"{name} stopped in cell {error.exec_count}: {error.ename}: {error.evalue}. "
            f"The executed copy is {copy}; {next_step} run the same command again"
        ) from None


def _register_engine() -> str:
    """Return the name of papermill's engine that ends a kernel at once, but only when all its cells have ended.

    An orderly end of Python takes 2 to 3 s. A signal before that leaves a training the seconds to write a checkpoint.
    """
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines

    class Client(PapermillNotebookClient):
        def papermill_execute_cells(self) -> None:
            super().papermill_execute_cells()
            self.shutdown_kernel = "immediate"

    class EndsIdleKernels(Engine):
        @classmethod
        def execute_managed_notebook(
            cls, nb_man: Any, kernel_name: str, *, start_timeout: float = 60, extra_arguments: Any = (), **_: Any
        ) -> None:
            options = {"startup_timeout": start_timeout, "timeout": None, "extra_arguments": [*extra_arguments]}
            Client(nb_man, kernel_name=kernel_name, log=logging.getLogger("papermill"), **options).execute()

    papermill_engines.register("ends-idle-kernels", EndsIdleKernels)
    return "ends-idle-kernels"


def _next_parameters(name: str, stages: dict[str, Any]) -> dict[str, str]:
    """Return the parameter that the next notebook gets from notebook `name`."""
    if name == NOTEBOOKS[0]:
        return {"cache_uri": stages["features"]["cache_uri"]}
    return {"model_uri": stages["training"]["model_uri"]} if name == NOTEBOOKS[1] else {}


def _summarise(recipe: Recipe, runs: str | Path, seconds: dict[str, float]) -> RunSummary:
    from pipelines.experiments import evaluation

    stages = recipe_runs.read_stages(recipe, runs)
    return RunSummary(
        recipe.name,
        *(evaluation.read_report(Path(stages["scores"][label])) for label in ("before", "after")),
        seconds | {"total": round(sum(seconds.values()), 1)},
        stages["features"]["cache_uri"],
        stages["training"]["model_uri"],
        stages["training"]["digest"],
        stages["features"].get("rejected", []),
    )
