"""The page that a teacher grades from, as HTML and PDF: verdict, rubric, plan, figures, README, clips with sound."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipelines.course import experiment
from pipelines.course.project.rubric import Line, Missing, Project, demo_files, discussed_clips, without_clips
from pipelines.course.project.template import PAGE
from pipelines.experiments import figures
from pipelines.experiments.evaluation import EvalReport
from pipelines.experiments.report import clips
from pipelines.features.pipeline import SYNTHETIC
from pipelines.infra import manifest, plots
from pipelines.infra.errors import LabError
from pipelines.speech.alignment import marked

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "msedge")
_PDF_TIMEOUT_S = 60
_PICTURES = {".png": "png", ".jpg": "jpeg", ".gif": "gif"}
_MAX_PICTURE_BYTES = 2_000_000
"""Larger pictures of a demo are not embedded."""
_MAX_PICTURES = 4


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
    readme = {**project.readme, "errors": without_clips(project.readme.get("errors", ""))}
    page = environment.get_template("page.html").render(
        name=project.idea.name,
        lines=lines,
        n_met=sum(line.is_met for line in lines),
        plan={heading: to_html(text) for heading, text in project.plan.items()},
        plan_note=project.plan_note,
        readme={heading: to_html(text) for heading, text in readme.items()},
        pictures=_pictures(project),
        **_clips(project),
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


_LABELS = {"before": "before tuning", "after": "after tuning: idea, first seed"}
"""Reports in the order of the page."""


def _results(project: Project) -> dict[str, Any]:
    """Return scores, verdict, tables and pictures of the comparison; empty texts where there is none."""
    results: dict[str, Any] = {"scores": {}, "verdict": ""}
    try:
        results["scores"] = {
            label: str(project.scores[name].score) for name, label in _LABELS.items() if name in project.scores
        }
        comparison = project.comparison
    except (Missing, LabError):
        return results
    return {
        **results,
        "verdict": comparison.findings[1].verdict,
        "result": experiment.result(comparison),
        "changes": project.changes,
        "comparison": comparison.table().drop(columns="verdict").rename_axis(None).to_html(border=0),
        "costs": comparison.costs().rename_axis(None).to_html(border=0),
        "notes": comparison.notes(with_slices=False),
        "forest": _data_uri("png", plots.png(figures.forest(comparison.findings))),
        "speakers": _data_uri("png", plots.png(figures.paired_speakers(comparison.findings))),
    }


def _clips(project: Project) -> dict[str, Any]:
    """Return the discussed clips, and a line on those without sound.

    A clip is a dictionary: id, text, reference, sound (a data URI, or empty), and hypotheses as HTML by model.
    """
    discussed = discussed_clips(project)
    try:
        reports = _reports(project)
        rows = {label: _by_id(report) for label, report in reports.items()}
    except (Missing, LabError, KeyError):
        return {"clips": [], "sound_note": ""}
    *_, after = rows.values()
    ids = [name for name in discussed if name in after.index]
    sounds: dict[str, str] = {}
    reason = "the recordings are outside the project folder"
    if _may_embed(project):
        sounds, reason = clips.embedded(project.idea.source, project.idea.language, "test", ids)
    return {
        "clips": [
            {
                "id": name,
                "text": discussed[name],
                "reference": str(after.at[name, "reference"]),
                "hypotheses": {
                    label: marked(str(after.at[name, "reference"]), str(table.at[name, "hypothesis"]))
                    for label, table in rows.items()
                    if name in table.index
                },
                "sound": sounds.get(name, ""),
            }
            for name in ids
        ],
        "sound_note": f"Clips without sound: {reason}." if len(sounds) < len(ids) else "",
    }


def _reports(project: Project) -> dict[str, EvalReport]:
    """Return the reports whose transcripts are shown, by label; the tuned model of the idea is the last."""
    reports = {"before tuning": project.scores["before"]} if "before" in project.scores else {}
    try:
        reports |= {"baseline": project.comparison.baseline.reports[0]}
    except (Missing, LabError):
        pass
    return {**reports, "idea": project.scores["after"]}


def _by_id(report: EvalReport) -> Any:
    return report.predictions.astype({"id": str}).drop_duplicates("id").set_index("id")


def _pictures(project: Project) -> dict[str, str]:
    """Return the pictures that the section Demo names, as data URIs by name; large ones are left out."""
    names = [name for name in demo_files(project) if Path(name).suffix.lower() in _PICTURES]
    small = [name for name in names if (project.folder / name).stat().st_size <= _MAX_PICTURE_BYTES][:_MAX_PICTURES]
    return {
        name: _data_uri(_PICTURES[Path(name).suffix.lower()], (project.folder / name).read_bytes()) for name in small
    }


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _may_embed(project: Project) -> bool:
    """Return whether the sound comes from the project or is synthetic: no other file of this machine is embedded."""
    source = project.idea.source
    if source.kind in SYNTHETIC:
        return True
    folder = Path(source.path).expanduser() if source.kind == "folder" and source.path else None
    return bool(folder) and folder.resolve().is_relative_to(project.folder.resolve())
