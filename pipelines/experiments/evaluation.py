"""EvalReport: how a model does on a split, on whom, and where it fails. One sealed folder per evaluation.

<reports>/<split>-<digest>/
    predictions.csv   one row per utterance: the columns of EvalReport.predictions
    report.json       all that the page tells, for programs: report/__init__.py
    report.html       the page: one file, which opens without a network
    manifest.json     scores, identity, lineage; written last
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.experiments import report
from pipelines.experiments.report import clips
from pipelines.experiments.report import page as report_page
from pipelines.experiments.report import slices as report_slices
from pipelines.features.cache import FeatureCache
from pipelines.inference.feedback import _cleaned, wer
from pipelines.infra import environment, feedback_log, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.recipes import digest
from pipelines.recipes.settings import Recipe
from pipelines.speech import scoring, text
from pipelines.speech.scoring import Score
from pipelines.whisper import decoding, engines, export
from pipelines.whisper import lineage as whisper_lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding import DecodingOptions, Hypothesis
from pipelines.whisper.model import ModelRef

CODE = "2"
"""Version of the code that decodes and scores: raised whenever the same model and cache would give other figures."""
_WORST = ["reference", "hypothesis", "wer", "speaker"]


@dataclass(frozen=True)
class EvalReport:
    """One model on one split."""

    folder: Path
    model: str
    """Name and revision; says `q8` where the weights were dequantised."""
    split: str
    score: Score
    """Normalised: case and punctuation set aside."""
    raw: Score
    """As written."""
    predictions: pd.DataFrame
    """One row per utterance: id, speaker, duration_s, reference, hypothesis, wer, the slice columns (slices.COLUMNS),
    and snr_db, unseen_words, unseen_errors (report/slices.py), logprob and tokens (decoding.Hypothesis). Reports of
    older versions have fewer."""
    seconds: float
    """Wall-clock seconds of decoding; loading the model is not among them, except in reports of older versions."""
    test_set: str = ""
    """Digest of what was scored (`test_set`): two reports are comparable where it is the same. Empty in old reports."""
    normaliser: str = ""
    """Version of text.normalise behind `score`."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """What made the model (`lineage`)."""

    @property
    def page(self) -> Path | None:
        """The page that shows it all; None in old reports."""
        path = self.folder / "report.html"
        return path if path.is_file() else None

    def details(self) -> dict[str, Any]:
        """What report.json holds (report/__init__.py); empty in old reports."""
        path = self.folder / "report.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def slices(self) -> pd.DataFrame:
        """WER per value of each slice column: slice, value, wer, low, high (95 %), n, speakers."""
        return report_slices.table(self.predictions)

    def worst(self, n: int = 10) -> pd.DataFrame:
        """The `n` utterances with the most word errors for their length: reference, hypothesis, wer, speaker."""
        return self.predictions.nlargest(n, "wer")[_WORST].reset_index(drop=True)


def evaluate(
    recipe: Recipe,
    cache: FeatureCache,
    ref: ModelRef,
    split: str,
    reports: Path,
    *,
    on_start: Callable[[int], None] = lambda n: None,
    on_clips: Callable[[int], None] = lambda n: None,
) -> EvalReport:
    """Decode a split with the model and score it; an evaluation that was made before is read, not made again.

    A model tuned at clip length is decoded so; any other sees the full 30 s, as it was trained.
    """
    identity = {
        **recipe.settings("evaluation"),
        **whisper_model.identity(ref),
        "language": recipe.language,
        "split": split,
        "cache": cache.digest,
        "context": ref.context,
        "code.evaluation": CODE,
    }
    folder = reports / f"{split}-{digest(identity)}"
    if manifest.problem(folder) is None:
        return read_report(folder)
    rows = cache.split(split)
    if not len(rows):
        raise LabError(f"the cache {cache.folder} has no {split} clips to score")
    on_start(len(rows))
    heard, speed = _decode(recipe, cache, ref, rows, on_clips)
    return _write(folder, identity, ref, split, _predictions(cache, rows, heard), recipe, speed)


def read_report(folder: Path) -> EvalReport:
    """A report that was made before."""
    facts = manifest.require_whole(folder, "report", "Remove it and evaluate again")
    # a transcript such as 007 is no number
    texts = dict.fromkeys(("id", "speaker", "reference", "hypothesis", *report_slices.COLUMNS), str)
    predictions = pd.read_csv(folder / "predictions.csv", keep_default_na=False, dtype=texts)
    return EvalReport(
        folder,
        facts["model"],
        facts["split"],
        _score(facts["score"]),
        _score(facts["raw"]),
        predictions,
        facts["seconds"],
        facts.get("test_set", ""),
        facts.get("normaliser", ""),
        facts.get("lineage", {}),
    )


def test_set(predictions: pd.DataFrame) -> str:
    """Digest of the utterances that were scored: their ids and references, whatever their order. 16 hex digits."""
    rows = sorted(zip(predictions["id"].tolist(), predictions["reference"].tolist(), strict=True))
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def lineage(ref: ModelRef) -> dict[str, Any]:
    """What made a model: for one that the lab tuned `digest, base, cache, recipe, settings, seed, best_step,
    training_seconds, data, machine, versions` (`settings` is the whole recipe, nested), `fork` where it started
    from the weights of another run, and `teacher` where it was distilled; for any other `base` alone, and
    for an export `made_of`, too.
    """
    if not all((ref.folder / name).is_file() for name in ("recipe.json", "training.json")):
        made_of = {"made_of": f"{ref.name} @ {ref.revision}"} if "made_of" in ref.facts else {}
        return {"base": whisper_lineage.base_of(ref), **made_of}
    told, trained = (json.loads((ref.folder / name).read_text("utf-8")) for name in ("recipe.json", "training.json"))
    return {
        **{name: ref.facts.get(name) for name in ("digest", "base", "cache", "data", "machine", "versions")},
        "recipe": told["name"],
        "settings": told,
        "seed": told["training"]["seed"],
        "best_step": trained["best_step"],
        "training_seconds": trained["seconds"],
        **{name: ref.facts[name] for name in ("fork", "teacher") if ref.facts.get(name)},
    }


def _decode(
    recipe: Recipe, cache: FeatureCache, ref: ModelRef, rows: Any, on_clips: Callable[[int], None]
) -> tuple[list[Hypothesis], dict[str, Any]]:
    """What the model hears, and how fast: decoding_seconds (the model is loaded before), device, threads."""
    import torch

    here = environment.detect()
    if export.is_export(ref):
        return _decode_export(recipe, cache, ref, rows, on_clips)
    model, processor = whisper_model.load(ref, device=here.device), whisper_model.load_processor(ref, recipe.language)
    started = time.monotonic()
    hypotheses = decoding.decode_rows(model, processor, cache, rows, _decoding_options(recipe, ref), on_clips)
    seconds = max(round(time.monotonic() - started, 2), 0.01)
    return hypotheses, {"decoding_seconds": seconds, "device": here.device_name, "threads": torch.get_num_threads()}


def _decoding_options(recipe: Recipe, ref: ModelRef) -> DecodingOptions:
    """Return the recipe's decoding options; a model that was not tuned on short windows gets the full 30 s."""
    return DecodingOptions(
        recipe.language,
        recipe.evaluation.max_new_tokens,
        full_context=ref.context == "full",
        batch_frames=recipe.evaluation.batch_frames,
    )


def _decode_export(
    recipe: Recipe, cache: FeatureCache, ref: ModelRef, rows: Any, on_clips: Callable[[int], None]
) -> tuple[list[Hypothesis], dict[str, Any]]:
    """The same of an export, by the engine that reads it."""
    engine = engines.open_engine(ref, recipe.language, max_new_tokens=recipe.evaluation.max_new_tokens)
    started = time.monotonic()
    options = _decoding_options(recipe, ref)
    hypotheses = decoding.decode_in_batches(
        lambda features: engine.decode(features.numpy()), cache, rows, options, on_clips
    )
    seconds = max(round(time.monotonic() - started, 2), 0.01)
    return hypotheses, {"decoding_seconds": seconds, "device": engine.name, "threads": process_pool.cores()}


def _predictions(cache: FeatureCache, rows: Any, heard: list[Hypothesis]) -> pd.DataFrame:
    table = cache.rows.iloc[rows].reset_index(drop=True)
    told = [name for name in report_slices.TOLD if name in table]
    predictions = (
        table[["id", "speaker", "duration_s"]].join(table[told].fillna("")).join(report_slices.columns(cache, rows))
    )
    predictions = predictions.assign(
        reference=table["text"],
        hypothesis=[one.text for one in heard],
        logprob=[round(one.logprob, 5) for one in heard],
        tokens=[one.tokens for one in heard],
    )
    edits = scoring.count_edits(predictions["reference"].tolist(), predictions["hypothesis"].tolist())
    lost = report_slices.unseen_errors(report.alignments(predictions), report_slices.vocabulary(cache))
    return predictions.assign(wer=(edits.word_edits / edits.words).round(4), unseen_errors=lost)


def _write(
    folder: Path,
    identity: dict[str, Any],
    ref: ModelRef,
    split: str,
    predictions: pd.DataFrame,
    recipe: Recipe,
    speed: dict[str, Any],
) -> EvalReport:
    texts = predictions["reference"].tolist(), predictions["hypothesis"].tolist(), predictions["speaker"].tolist()
    settings = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    told = {
        "model": whisper_lineage.base_of(ref),
        "quantisation": ref.quantisation,
        "split": split,
        "score": scoring.score(*texts, **settings).as_dict(),
        "raw": scoring.score(*texts, normalised=False, **settings).as_dict(),
        "test_set": test_set(predictions),
        "normaliser": text.NORMALISER,
        "lineage": lineage(ref),
    }
    folder.mkdir(parents=True, exist_ok=True)
    predictions.to_csv(folder / "predictions.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    facts = report.facts(predictions, {**told, "language": recipe.language}, speed)
    manifest.write_json(folder / "report.json", facts)
    sounds = clips.embedded(recipe.source, recipe.language, split, [worst["id"] for worst in facts["worst"]])
    (folder / "report.html").write_text(report_page.render(facts, predictions["wer"], *sounds), "utf-8")
    manifest.seal(folder, kind="report", identity=identity, seconds=speed["decoding_seconds"], **told)
    return read_report(folder)


def _score(facts: dict[str, Any]) -> Score:
    return Score(**{name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()})


def write_log(log: Path, report: EvalReport, now: datetime | None = None) -> None:
    """Write the transcripts of a report as a log of its own, as if a listener had judged them against the references.

    `audio` is the clip's id in its source; `flag` is right where no word differs. An existing `log` is replaced whole,
    unless it holds what listeners said: LabError then.
    """
    refuse_listeners(log)
    stamp = (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds")
    csv_log = feedback_log.open_log(log)
    lines = [csv_log.header_line()]
    for told in report.predictions.itertuples():
        error = wer(told.reference, told.hypothesis)
        row = {
            "audio": told.id,
            "output": _cleaned("output", told.hypothesis),
            "flag": "right" if float(error or 1) == 0 else "wrong",
            "username": "",
            "timestamp": stamp,
            "reference": told.reference,
            "wer": error,
            "model": report.model,
        }
        lines.append(csv_log.line(row))
    aside = log.with_name(f".{log.name}.partial")
    aside.write_bytes(b"".join(lines))
    os.replace(aside, log)


def refuse_listeners(log: Path) -> None:
    """LabError where `log` is anything but a log that `write_log` wrote: what people said is never replaced."""
    if log.is_file() and any(
        row["username"] or row["audio"].startswith(("audio/",)) or not row["audio"] for row in feedback_log.read(log)
    ):
        raise LabError(f"{log} holds what listeners said and is not replaced: name another file")
    if not log.absolute().parent.is_dir():
        raise LabError(f"there is no folder {log.parent} to write {log.name} into: make it, or name another file")
