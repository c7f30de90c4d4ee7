"""`python -m pipelines …`: one thin sub-command per stage; the functions are those that the notebooks call."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from pipelines.cli import experiments, features, inference, stores, training, worker  # noqa: F401  they add their commands
from pipelines.cli.options import DryRun, Json, Overrides, RecipeName, Runs, _plan, _print, _recipe, app
from pipelines.infra import console
from pipelines.infra.errors import UNFINISHED, LabError, Unfinished
from pipelines.infra.parallel import distributed


@app.command()
def run(
    recipe: RecipeName = "tour", set_: Overrides = (), runs: Runs = "", dry_run: DryRun = False, as_json: Json = False
):
    """Execute the three notebooks in order by papermill.

    Example: python -m pipelines run --recipe tour --set training.steps=60
    """
    from pipelines.cli import notebooks
    from pipelines.infra import environment

    settings, overrides = _recipe(recipe, set_)
    if dry_run:
        return _plan(
            as_json,
            settings,
            environment.runs_folder(runs) / settings.name,
            f"execute {', '.join(notebooks.NOTEBOOKS)}",
        )
    summary = notebooks.run(settings, recipe, overrides, runs=runs, progress=not as_json)
    model = shlex.quote(summary["model_uri"])
    _print(as_json, summary, notebooks.in_words(summary) + f"\nNext: MODEL_URI={model} make app, then open its address")


@app.command()
def doctor(
    model: Annotated[str, typer.Option(help="Model for the forward pass.")] = "openai/whisper-tiny",
    as_json: Json = False,
):
    """Check this machine: Python, packages, device, disk, audio, Hub, and one real forward pass.

    Example: python -m pipelines doctor
    """
    from pipelines.cli import doctor as physician

    checks = physician.examine(model)
    wrong = [check for check in checks if check.state == "wrong"]
    lines = [
        f"{check.state:<6}{check.name:<18}{check.found}" + (f"\n{'':24}-> {check.mend}" if check.mend else "")
        for check in checks
    ]
    verdict = f"{len(wrong)} thing(s) to mend" if wrong else "ready. Next: make run"
    _print(as_json, {"checks": physician.as_dicts(checks), "ready": not wrong}, "\n".join([*lines, verdict]))
    if wrong:
        raise typer.Exit(1)


def main() -> None:
    """Run a command; what a user can mend is one line on standard error and exit code 1, or 75 where the same command
    is to be run again."""
    from pipelines.infra import environment

    environment.share_cores()
    console.configure() if distributed.is_main_process() else console.mute()
    try:
        app()
    except Unfinished as error:
        _fail(f"unfinished: {error}", UNFINISHED)
    except LabError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        if not error.filename:
            raise
        _fail(f"error: {error.filename}: {error.strerror}. Name another place, or make room there", 1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _fail(line: str, code: int) -> None:
    if distributed.claim_error_report():
        print(line, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
