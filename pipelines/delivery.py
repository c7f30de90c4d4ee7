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
_CARD = "README.md"
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
    found: list[tuple[ModelRef, str, EvalReport]] = []
    for uri in uris:
        ref = models.resolve(uri, log=log)
        for form in ("", *forms):
            there = str(export.convert(ref, form, log=log)) if form else uri
            report = lab.evaluate(recipe, cache, there, split, runs=runs, log=log)
            found.append((models.resolve(there, log=log), form, report))
    rows = cache.split(split)
    timed = rows[:: max(1, -(-len(rows) // TIMED_CLIPS))]
    ms = _speeds(recipe, cache, [ref for ref, _, _ in found], timed, threads, log)
    made, own = [], found[0][2]
    for (ref, form, report), (engine, took) in zip(found, ms, strict=True):
        first = found[0][2]
        against = own if form else first
        own = own if form else report
        alone = report is first
        made.append(
            Row(
                report.model,
                form,
                str(ref.folder),
                engine,
                round(_bytes(ref) / 1e6, 1),
                report.score,
                None if alone else _difference(report, against, recipe),
                None if alone else _agreement(report, against),
                None if alone else _difference(report, first, recipe),
                round(took, 1),
            )
        )
    return made


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


def _difference(report: EvalReport, other: EvalReport, recipe: Recipe) -> Difference:
    ours, theirs = (experiments.ordered(one) for one in (report, other))
    edits = [scoring.count_edits(one["reference"].tolist(), one["hypothesis"].tolist()) for one in (ours, theirs)]
    draw = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    return scoring.difference(*edits, ours["speaker"].tolist(), **draw)


def _agreement(report: EvalReport, other: EvalReport) -> float:
    ours, theirs = (experiments.ordered(one)["hypothesis"] for one in (report, other))
    return float((ours == theirs).mean())


def _bytes(ref: ModelRef) -> int:
    """Of what is in the folder itself."""
    return sum(path.stat().st_size for path in ref.folder.iterdir() if path.is_file())


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
    """The most that the process held."""
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
        (made / _CARD).write_text(_card(ref, form), "utf-8")
        facts = {name: value for name, value in manifest.read(made).items() if name != "files"}
        manifest.seal(made, **facts)
        spoken = recording or Path(place) / "sentence.wav"
        if recording is None:
            spoken.write_bytes(espeak.synthesise(_SENTENCE, "sv+f1", 160, 50))
        proof = prove(made, spoken, language)
        os.replace(made, folder)
    return proof


_SERVING = """
import json, resource, sys, time
started = time.monotonic()
folder, recording, language, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
from pipelines import models
from pipelines.transcriber import Transcriber
transcriber = Transcriber(models.resolve(folder), language, log=lambda line: None)
loaded = time.monotonic()
heard = transcriber.transcribe(recording)
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
told = [transcriber.loaded.name, heard.text, loaded - started, heard.elapsed_s, most]
print(json.dumps(told))
"""


def prove(folder: Path, recording: Path, language: str = "sv") -> Proof:
    """Serve a folder in a fresh process. LabError, with the last thing that it said, where it does not."""
    light = export.is_export(models.resolve(str(folder), log=lambda line: None))
    absent = ("torch", "transformers") if light else ()
    told = subprocess.run(
        [sys.executable, "-c", _SERVING, str(folder), str(recording), language, *absent],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
    )
    if told.returncode:
        said = (told.stderr.strip() or "nothing").splitlines()[-1]
        raise LabError(f"a fresh process could not serve the folder, so it was not kept: {said}")
    engine, text, loading_s, elapsed_s, most = json.loads(told.stdout.splitlines()[-1])
    memory = most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6
    return Proof(engine, text, round(loading_s, 2), round(elapsed_s, 2), round(memory), absent)


def _card(ref: ModelRef, form: str) -> str:
    """A card: the front matter of the model's own but for its scores, and what this folder is."""
    import yaml

    own = ref.folder / _CARD
    parts = own.read_text("utf-8").split("---\n", 2) if own.is_file() else []
    front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else {}
    front.pop("model-index", None)
    name = card.base_of(ref).partition(" @ ")[0]
    return (
        f"---\n{yaml.safe_dump(front, allow_unicode=True, sort_keys=False)}---\n\n# {name}, {form}\n\n"
        f"The weights of {name} @ {ref.revision} in the form {form}, with what serving them needs and nothing else:\n\n"
        "```bash\npython -m pipelines serve --model <this folder>\n```\n\nIts scores are not those of the model it was "
        "made of: `python -m pipelines export` holds the two against each other.\n"
    )
