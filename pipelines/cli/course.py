"""Commands of the course: project new and project check."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import DryRun, Json, print_plan, print_result
from pipelines.infra.errors import LabError

project = typer.Typer(
    no_args_is_help=True,
    help="Begin a student's project, and check it against the rubric.\n\n"
    "Example: python -m pipelines project new my-idea",
)


@project.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder; its name becomes the recipe's name.")],
    base: Annotated[str, typer.Option(help="Shipped recipe to start from.")] = "tour",
    dry_run: DryRun = False,
    as_json: Json = False,
):
    """Write a folder with two recipes, a plan and a README to fill in.

    Example: python -m pipelines project new my-idea
    """
    from pipelines.course.project import template

    if dry_run:
        return print_plan(as_json, f"begin a project that extends the recipe {base}", folder)
    files = template.create(folder, base)
    lines = [f"{folder}:", *(f"  {file.name}" for file in files)]
    lines += [f"Next: fill in {folder / template.PLAN}, then change one thing in {folder / template.IDEA}"]
    print_result(as_json, {"folder": str(folder), "files": [file.name for file in files]}, "\n".join(lines))


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
    from pipelines.infra.tables import formulas

    rows, texts = [], []
    for folder in folders:
        try:
            checked, lines = rubric.check(folder)
            path = page.write(checked, lines)
        except LabError as error:
            if len(folders) == 1:
                raise
            rows.append({"project": str(folder), "met": 0, **dict.fromkeys(rubric.RULES, ""), "error": str(error)})
            texts.append(f"{folder}: {error}")
            continue
        pdf = page.as_pdf(path) if len(folders) == 1 else None
        met = sum(line.is_met for line in lines)
        states = {line.key: line.missing or "met" for line in lines}
        rows.append({"project": str(folder), "met": met, **states, "error": ""})
        texts += [f"{folder}: {met} of {len(lines)} lines of the rubric are met"]
        if len(folders) == 1:
            for line in lines:
                texts += [
                    f"  [{'x' if line.is_met else ' '}] {line.title}",
                    *([f"      {line.missing}"] * (not line.is_met)),
                ]
            texts += [f"page {path}" + (f"\npdf  {pdf}" if pdf else "; print it from a browser for a PDF")]
            first = next((line.missing for line in lines if not line.is_met), "")
            texts += [f"Next: {first or 'hand in the folder'}"]
    if table:
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["project", "met", *rubric.RULES, "error"])
            writer.writeheader()
            writer.writerows({name: formulas.encode_cell(cell) for name, cell in row.items()} for row in rows)
        texts.append(f"Next: open {table}")
    print_result(as_json, {"projects": rows}, "\n".join(texts))
