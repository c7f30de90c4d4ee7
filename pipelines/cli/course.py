"""Commands of the course: project new, train, check and pack."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli import progress
from pipelines.cli.options import DryRun, Json, parse_overrides, parse_seeds, print_plan, print_result
from pipelines.infra import console
from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from pipelines.course.project.rubric import Line

project = typer.Typer(
    no_args_is_help=True,
    help="Begin a student's project, and check it against the rubric.\n\n"
    "Example: python -m pipelines project new my-idea",
)


@project.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder; its name becomes the recipe's name.")],
    base: Annotated[str, typer.Option(help="Recipe of the lab to start from.")] = "tour",
    set_: Annotated[
        list[str],
        typer.Option("--set", "-s", metavar="NAME=VALUE", help="The change of the idea, if you know it already."),
    ] = (),
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Write a folder with two recipes, a plan and a README to fill in.

    Example: python -m pipelines project new my-idea --set augment.noise_share=0.5
    """
    from pipelines.course.project import template

    changes = parse_overrides(set_)
    if dry_run:
        template.require_new(folder, base, changes)
        return print_plan(as_json, f"begin a project that extends the recipe {base}", folder)
    files = template.create(folder, base, changes)
    lines = [f"{folder}:", *(f"  {file.name}" for file in files)]
    change = "" if changes else f", change one thing in {folder / template.IDEA}"
    train = shlex.join(["python", "-m", "pipelines", "project", "train", str(folder)])
    lines += [f"Next: fill in {folder / template.PLAN}{change}, then {train}"]
    print_result(as_json, {"folder": str(folder), "files": [file.name for file in files]}, "\n".join(lines))


@project.command()
def train(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Project folder.")],
    seeds: Annotated[str, typer.Option(metavar="SEED,SEED", help="Training seeds, at least two.")] = "42,43",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Train and score baseline and idea with each seed, and score the base model; skip what is finished.

    Example: python -m pipelines project train my-idea
    """
    from pipelines.course import experiment
    from pipelines.course.project import rubric, template, training

    planned = training.plan(rubric.open_folder(folder), parse_seeds(seeds))
    if dry_run:
        table = planned.experiment.table().to_string(index=False)
        return print_plan(as_json, f"train and score\n{table}", folder / "runs")
    if warning := planned.warning():
        print(warning, file=sys.stderr)
    erase = progress.ERASE_LINE if sys.stderr.isatty() and sys.stdout.isatty() else ""
    with console.rewritten(lambda line: erase + line), progress.follow("training", sys.stderr):
        comparison = planned.run()
    text = (
        f"{comparison}\n\nFor the section Result of {template.README}:\n"
        f"{planned.experiment.changed()} {experiment.summary(comparison)}\n"
        f"For a demo: MODEL_URI={shlex.quote(str(planned.model(comparison)))} make app\n"
        f"Next: write {folder / template.README}, then "
        + shlex.join(["python", "-m", "pipelines", "project", "check", str(folder)])
    )
    print_result(as_json, comparison.as_dict(), text)


@project.command()
def check(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="One project, or those of a class.")],
    table: Annotated[Path | None, typer.Option(help="Write one row per project to this csv file; replaces it.")] = None,
    as_json: Json = False,
):
    """Say what is missing for each line of the rubric, and write the page that a teacher grades from.

    Example: python -m pipelines project check my-idea
    """
    from pipelines.course.project import page, rubric
    from pipelines.course.project import table as tables

    rows, texts = [], []
    for folder in folders:
        try:
            checked, lines = rubric.check(folder)
            path = page.write(checked, lines)
        except LabError as error:
            if len(folders) == 1:
                raise
            rows.append(tables.row_of_error(folder, error))
            texts.append(f"{folder}: {error}")
            continue
        rows.append(tables.row(checked, lines))
        missing = [line.key for line in lines if not line.is_met]
        texts += [f"{folder}: {len(lines) - len(missing)} of {len(lines)} lines of the rubric are met"]
        if len(folders) == 1:
            texts += _details(lines, checked.plan_note)
            pdf = page.as_pdf(path)
            texts += [f"page {path}" + (f"\npdf  {pdf}" if pdf else "; print it from a browser for a PDF")]
            texts += [f"Next: {rubric.next_step(lines) or _pack_command(folder)}"]
        elif missing:
            texts[-1] += f"; missing: {', '.join(missing)}"
    if table:
        tables.write(table, rows)
        texts.append(f"Next: open {table}")
    print_result(as_json, {"projects": rows}, "\n".join(texts))


@project.command()
def pack(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Project folder.")],
    to: Annotated[Path | None, typer.Option(metavar="FILE.zip", help="New file; default: FOLDER.zip.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Write a zip file to hand in: all that `project check` reads, without weights and features.

    Example: python -m pipelines project pack my-idea
    """
    from pipelines.course.project import pack, rubric

    project = rubric.open_folder(folder)
    archive = to or folder.resolve().with_suffix(".zip")
    if dry_run:
        return print_plan(as_json, f"pack {len([*pack.files(project)])} files of {folder}", archive)
    size = pack.write(project, archive)
    text = f"{archive}: {size / 1e6:.1f} MB\nNext: hand it in; it holds the recordings that are in {folder}"
    print_result(as_json, {"archive": str(archive), "bytes": size}, text)


def _pack_command(folder: Path) -> str:
    return shlex.join(["python", "-m", "pipelines", "project", "pack", str(folder)])


def _details(lines: list[Line], note: str) -> list[str]:
    """Return each line of the rubric with what is missing, and a note."""
    texts = []
    for line in lines:
        texts.append(f"  [{'x' if line.is_met else ' '}] {line.title}")
        texts += [] if line.is_met else [f"      {line.missing}"]
    return texts + ([f"note: {note}"] if note else [])
