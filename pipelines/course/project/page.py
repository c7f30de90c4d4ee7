"""The page that a teacher grades from: rubric, comparison, README, discussed clips with sound. HTML and PDF."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipelines.course.project.rubric import Line, Missing, Project, discussed_clips
from pipelines.course.project.template import PAGE, README
from pipelines.experiments import figures
from pipelines.experiments.report import clips
from pipelines.features.pipeline import SYNTHETIC
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "msedge")
_PDF_TIMEOUT_S = 60


def write(project: Project, lines: list[Line]) -> Path:
    """Write the page into the project folder and return its path.

    Texts of the student are escaped, and the page loads nothing from the network. Raises LabError if the folder cannot
    be written to.
    """
    import jinja2
    import mistune

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    to_html = mistune.create_markdown(escape=True, plugins=["table"])
    shown = {**project.plan, **project.readme}
    page = environment.get_template("page.html").render(
        name=project.idea.name,
        lines=lines,
        n_met=sum(line.is_met for line in lines),
        texts={heading: to_html(text) for heading, text in shown.items() if heading != "errors"},
        clips=_clips(project),
        readme=README,
        **_results(project),
    )
    path = project.folder / PAGE
    try:
        manifest.write_bytes(path, page.encode("utf-8", "replace"))  # replaces a link instead of following it
    except OSError as error:
        raise LabError(f"{path} cannot be written ({error.strerror}): check a copy of the folder") from None
    return path


def as_pdf(page: Path) -> Path | None:
    """Print the page with an installed Chromium or Chrome; None if there is none, or if it fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        return None
    path = page.with_suffix(".pdf")
    options = ["--headless", "--disable-gpu", "--no-pdf-header-footer", f"--print-to-pdf={path}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses to start as root with its sandbox
    try:
        subprocess.run(
            [browser, *options, page.resolve().as_uri()], capture_output=True, timeout=_PDF_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return path if path.is_file() else None


def _results(project: Project) -> dict[str, Any]:
    """Return the scores before and after, the comparison as tables, and its picture; empty if there is none."""
    empty: dict[str, Any] = {"scores": {}, "comparison": "", "changes": "", "costs": "", "forest": ""}
    try:
        empty["scores"] = {name: str(report.score) for name, report in project.scores.items()}
        comparison = project.comparison
    except (Missing, LabError):
        return empty
    file = io.BytesIO()
    figures.forest(comparison.findings).savefig(file, format="png", dpi=110, bbox_inches="tight")
    return {
        **empty,
        "comparison": comparison.table().to_html(border=0),
        "changes": comparison.changes().to_html(border=0),
        "costs": comparison.costs().to_html(border=0),
        "forest": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
    }


def _clips(project: Project) -> list[dict[str, str]]:
    """Return the discussed clips: id, reference, hypothesis, text, and sound (a data URI, or empty)."""
    discussed = discussed_clips(project)
    try:
        predictions = project.scores["after"].predictions
    except (Missing, LabError, KeyError):
        return []
    rows = predictions.astype({"id": str}).set_index("id")
    ids = [name for name in discussed if name in rows.index]
    sounds: dict[str, str] = {}
    if _may_embed(project):
        sounds, _ = clips.embedded(project.idea.source, project.idea.language, "test", ids)
    return [
        {
            "id": name,
            "reference": str(rows.at[name, "reference"]),
            "hypothesis": str(rows.at[name, "hypothesis"]),
            "text": discussed[name],
            "sound": sounds.get(name, ""),
        }
        for name in ids
    ]


def _may_embed(project: Project) -> bool:
    """Return whether the sound comes from the project or is synthetic: no other file of this machine is embedded."""
    source = project.idea.source
    if source.kind in SYNTHETIC:
        return True
    folder = Path(source.path).expanduser() if source.kind == "folder" and source.path else None
    return bool(folder) and folder.resolve().is_relative_to(project.folder.resolve())
