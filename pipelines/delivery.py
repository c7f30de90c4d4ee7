"""Exports held against the model that they were made of, and the folder that a deployment needs.

table        WER of models and their exports on a split, paired differences, agreement, size, speed: one table
production   weights, tokenizer, settings, card and manifest in one folder, proved to be served in a fresh process
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import engines, experiments, export, lab, manifest, models, scoring
from pipelines.batches import padded_frames
from pipelines.cache import FeatureCache
from pipelines.engines import Engine
from pipelines.errors import LabError
from pipelines.evaluation import EvalReport
from pipelines.features import FULL_FRAMES
from pipelines.models import ModelRef
from pipelines.recipe import Recipe
from pipelines.scoring import Difference, Score
from pipelines.sources import espeak
from pipelines.training import card

TIMED_CLIPS = 40
"""Clips that are decoded one by one for their speed, spread over the split."""
_ROUNDS = 3
_SENTENCE = "Det här är ett prov på hur modellen hör."
_PATIENCE_S = 600


@dataclass(frozen=True)
class Row:
    """One model, or one export of it, on a split."""

    model: str
    """Name and revision; says which form."""
    form: str
    """One of export.FORMS; empty for the model itself."""
    folder: str
    engine: str
    """What decoded it for `ms`: engine, device, precision."""
    size_mb: float
    """All files of the folder that it is served from, in millions of bytes."""
    score: Score
    difference: Difference | None
    """WER less that of the model it was made of; of a further model, less that of the first; None for the first."""
    agreement: float | None
    """Share of clips with the very transcript of what it is held against, case and punctuation included."""
    first: Difference | None
    """WER less that of the first model of the table; None for that one."""
    ms: float
    """Milliseconds from the frames of a clip to its text, one clip at a time: the mean over clips of the fastest of
    three tries; all rows in turns."""

    def as_dict(self) -> dict[str, Any]:
        told = {**vars(self), "score": self.score.as_dict()}
        return told | {
            name: found.as_dict() if (found := getattr(self, name)) else None for name in ("difference", "first")
        }


def table(
    recipe: Recipe,
    cache: FeatureCache,
    uris: Sequence[str],
    forms: Sequence[str],
    *,
    split: str = "validation",
    runs: str | Path = "",
    threads: int = 0,
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Each of the models `uris`, and after it its exports in `forms`, scored and timed on a split of the cache.

    Scores are those of lab.evaluate: what was scored before is not decoded again, and a test split's are counted.
    Raises LabError for a form that is none of export.FORMS, and what `export.convert` raises.
    """
    places = [  # all of them first: what cannot be made shows before anything is scored
        (form, str(export.convert(models.resolve(uri, log=log), form, log=log)) if form else uri)
        for uri in uris
        for form in ("", *forms)
    ]
    reports = [lab.evaluate(recipe, cache, there, split, runs=runs, log=log) for _, there in places]
    refs = [models.resolve(there, log=log) for _, there in places]
    rows = cache.split(split)
    timed = rows[:: max(1, -(-len(rows) // TIMED_CLIPS))]
    speeds = _speeds(recipe, cache, refs, timed, threads, log)
    made, first, own = [], reports[0], reports[0]
    for (form, _), ref, report, (engine, ms) in zip(places, refs, reports, speeds, strict=True):
        own, against = (own, own) if form else (report, first)
        held: tuple[Any, ...] = (None, None, None)
        if report is not first:
            held = (*_compared(recipe, report, against), _compared(recipe, report, first)[0])
        size_mb = sum(path.stat().st_size for path in ref.folder.iterdir() if path.is_file()) / 1e6
        made.append(
            Row(report.model, form, str(ref.folder), engine, round(size_mb, 1), report.score, *held, round(ms, 1))
        )
    return made


def _compared(recipe: Recipe, report: EvalReport, other: EvalReport) -> tuple[Difference, float]:
    """The paired difference of two reports on one split, and the share of clips with the very same text."""
    ours, theirs = (experiments.ordered(one) for one in (report, other))
    edits = [scoring.count_edits(one["reference"].tolist(), one["hypothesis"].tolist()) for one in (ours, theirs)]
    draw = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    found = scoring.difference(*edits, ours["speaker"].tolist(), **draw)
    return found, float((ours["hypothesis"] == theirs["hypothesis"]).mean())


def in_words(rows: Sequence[Row]) -> str:
    """The table as lines of Markdown."""
    head = ["model", "form", "WER", "95 %", "ΔWER (95 %)", "same text", "ΔWER, first model (95 %)"]
    several = sum(not row.form for row in rows) > 1
    lines = [_line([*head[: None if several else -1], "MB", "ms a clip", "decoded by"])]
    lines.append(_line("---" for _ in lines[0].split(" | ")))
    for row in rows:
        cells = [row.model.partition(" @ ")[0].partition(" (")[0], row.form or "as it is", f"{row.score.wer:.3f}"]
        cells += ["{:.3f} to {:.3f}".format(*row.score.ci95), _told(row.difference)]
        cells += ["" if row.agreement is None else f"{row.agreement:.0%}"]
        cells += [_told(row.first)] if several else []
        lines.append(_line([*cells, f"{row.size_mb:.1f}", f"{row.ms:.0f}", row.engine]))
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _told(difference: Difference | None) -> str:
    return "" if difference is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(difference.delta, *difference.ci95)


def _speeds(
    recipe: Recipe,
    cache: FeatureCache,
    refs: Sequence[ModelRef],
    rows: np.ndarray,
    threads: int,
    log: Callable[[str], None],
) -> list[tuple[str, float]]:
    """Engine and milliseconds a clip of each model, all in turns on every clip, so that other load hits all alike."""
    log(f"timing {len(refs)} on {len(rows)} clips, {_ROUNDS} times in turns")
    opened = [_opened(recipe, ref, threads, log) for ref in refs]
    took = np.empty((_ROUNDS, len(rows), len(refs)))
    for round_ in range(-1, _ROUNDS):  # the first one only warms up
        for place, row in enumerate(rows if round_ >= 0 else rows[:2]):
            for which, (engine, ref) in enumerate(zip(opened, refs, strict=True)):
                window = _window(cache, int(row), ref)
                started = time.perf_counter()
                engine.hear(window)
                took[round_, place, which] = time.perf_counter() - started
    best = took.min(axis=0).mean(axis=0) * 1_000
    return [(engine.name, float(ms)) for engine, ms in zip(opened, best, strict=True)]


def _opened(recipe: Recipe, ref: ModelRef, threads: int, log: Callable[[str], None]) -> Engine:
    engine = "auto" if export.is_export(ref) else "transformers"
    most = recipe.evaluation.max_new_tokens
    return engines.open_engine(ref, recipe.language, engine, threads=threads, max_new_tokens=most, log=log)


def _window(cache: FeatureCache, row: int, ref: ModelRef) -> np.ndarray:
    """A clip as it is served: float32 [1, n_mels, T]."""
    log_mel = cache.log_mel(row)
    return log_mel.padded(padded_frames(len(log_mel.frames)) if ref.context == "clip" else FULL_FRAMES)[None]


# ---- production


@dataclass(frozen=True)
class Proof:
    """A fresh process that served a folder."""

    engine: str
    text: str
    """What it heard."""
    loading_s: float
    """From the start of the process to a loaded model."""
    elapsed_s: float
    """From recording to text, the first time."""
    memory_mb: float
    """The most that the process held; 0 where the system does not tell."""
    without: tuple[str, ...]
    """Packages that it could not import."""


def production(
    ref: ModelRef,
    form: str,
    folder: Path,
    *,
    language: str = "sv",
    recording: Path | None = None,
    log: Callable[[str], None] = print,
) -> Proof:
    """Make `folder`: what a deployment of `ref` in one of export.FORMS needs, and nothing else.

    Before it is put there, a fresh process serves it through the transcriber, on `recording` or a spoken sentence;
    where it needs no torch it cannot import any. Raises LabError where that fails, or `folder` is in use.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} must be empty or absent: name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".production-", dir=folder.parent) as place:
        made = export.convert(ref, form, to=Path(place) / "model", log=log)
        (made / card.FILE).write_text(_card(ref, form), "utf-8")
        facts = {name: value for name, value in manifest.read(made).items() if name != "files"}
        manifest.seal(made, **facts)
        spoken = recording or Path(place) / "sentence.wav"
        if recording is None:
            spoken.write_bytes(espeak.synthesise(_SENTENCE, "sv+f1", 160, 50))
        proof = prove(made, spoken, language)
        os.replace(made, folder)
    return proof


_SERVING = """
import json, pathlib, sys, time
started = time.monotonic()
folder, recording, language, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
from pipelines import models
from pipelines.transcriber import Transcriber
transcriber = Transcriber(models.resolve(folder), language, log=lambda line: None)
loaded = time.monotonic()
heard = transcriber.transcribe(recording)
status = pathlib.Path("/proc/self/status")  # what getrusage tells, a child inherits
peaks = [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line] if status.exists() else []
told = [transcriber.loaded.name, heard.text, loaded - started, heard.elapsed_s, int((peaks or [0])[0])]
print(json.dumps(told))
"""


def prove(folder: Path, recording: Path, language: str = "sv") -> Proof:
    """Serve a folder in a fresh process. LabError, with the last thing that it said, where it does not."""
    light = export.is_export(models.resolve(str(folder), log=lambda line: None))
    absent = ("torch", "transformers") if light else ()
    try:
        told = subprocess.run(
            [sys.executable, "-c", _SERVING, str(folder), str(recording), language, *absent],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise LabError(
            f"a fresh process did not serve the folder within {_PATIENCE_S:g} s, so it was not kept: try again on an "
            "idle machine"
        ) from None
    if told.returncode:
        said = (told.stderr.strip() or "nothing").splitlines()[-1]
        raise LabError(f"a fresh process could not serve the folder, so it was not kept: {said}")
    engine, text, loading_s, elapsed_s, peak_kib = json.loads(told.stdout.splitlines()[-1])
    return Proof(engine, text, round(loading_s, 2), round(elapsed_s, 2), round(peak_kib * 1024 / 1e6), absent)


def _card(ref: ModelRef, form: str) -> str:
    """A card: the front matter of the model's own but for its scores, and what this folder is."""
    from huggingface_hub import ModelCard, ModelCardData

    own = ref.folder / card.FILE
    front = ModelCard(own.read_text("utf-8")).data if own.is_file() else ModelCardData()
    front.eval_results = None
    name = card.base_of(ref).partition(" @ ")[0]
    return (
        f"---\n{front.to_yaml()}\n---\n\n# {name}, {form}\n\n"
        f"The weights of {name} @ {ref.revision} in the form {form}, with what serving them needs and nothing else:\n\n"
        "```bash\npython -m pipelines serve --model <this folder>\n```\n\nIts scores are not those of the model it was "
        "made of: `python -m pipelines export` holds the two against each other.\n"
    )
