"""`python -m pipelines …`: the command line. Its commands, in cli/, call the same functions as the notebooks."""

from __future__ import annotations

import sys

import typer

from pipelines.cli import (
    collection,
    course,
    doctor,
    experiments,
    features,
    inference,
    notebooks,
    serving,
    stores,
    training,
)
from pipelines.infra import console, environment
from pipelines.infra.errors import UNFINISHED, LabError, Unfinished, shortened
from pipelines.infra.parallel import distributed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune Whisper for Swedish: features, training, evaluation, transcription.",
)
for command in (
    notebooks.run,
    features.features,
    training.train,
    training.distill,
    training.merge,
    experiments.evaluate,
    experiments.compare,
    experiments.leaderboard,
    experiments.experiments,
    experiments.sweep,
    inference.transcribe,
    inference.archive,
    collection.record,
    collection.review,
    serving.serve,
    serving.worker,
    stores.publish,
    inference.publish_space,
    experiments.export,
    inference.production,
    stores.fetch,
    notebooks.notebooks,
    features.recipe,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(course.project, name="project")


def main() -> None:
    """Run a command and exit with its code; a process of a distributed run skips the interpreter's shutdown."""
    try:
        run_command()
    except SystemExit as end:
        distributed.exit_process(end.code)
        raise


def run_command() -> None:
    """Run a command. Print an error that the user can fix as one line on standard error and exit with code 1.

    The exit code is 75 if the same command continues the work.
    """
    environment.share_cores()
    console.configure()
    try:
        app()
    except Unfinished as error:
        _fail(f"unfinished: {error}", UNFINISHED)
    except LabError as error:
        _fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = environment.describe_disk_error(error)
        if not line:
            raise
        _fail(f"error: {line}", 1)


def _fail(line: str, code: int) -> None:
    if distributed.claim_error_report():
        print(shortened(line, console.MAX_LINE), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
