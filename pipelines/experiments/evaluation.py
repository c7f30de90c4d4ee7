"""Evaluate a model on a split of a feature cache. The result is a folder with scores, transcripts and a report page.

<reports>/<split>-<digest>/
    predictions.csv   one row per utterance: the columns of EvalReport.predictions
    stock.csv         transcripts of transformers' pipeline, if it was scored: report/stock.py
    report.json       the content of the page for programs: report/__init__.py
    report.html       the page: one file that needs no network
    manifest.json     scores, identity, lineage; written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipelines.experiments import report
from pipelines.experiments.report import clips, guards, hypotheses, predictions_file, stock
from pipelines.experiments.report import page as report_page
from pipelines.experiments.report import slices as report_slices
from pipelines.experiments.report.guards import GuardScore
from pipelines.experiments.report.hypotheses import Decoded
from pipelines.experiments.report.stock import StockFigure
from pipelines.features import derived
from pipelines.features.cache import FeatureCache
from pipelines.features.curation import leaks
from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.recipes import digest
from pipelines.recipes.settings import Recipe
from pipelines.speech import intervals, scoring, text
from pipelines.speech.scoring import Score
from pipelines.whisper import lineage as whisper_lineage
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.model import ModelRef

CODE = "2"
"""Version of the code that decodes and scores: raised when the same model and cache would give other scores."""
_WORST = ["reference", "hypothesis", "wer", "speaker"]


@dataclass(frozen=True)
class EvalReport:
    """Scores and transcripts of one model on one split."""

    folder: Path
    model: str
    """Name and revision, with `q8` if the weights were dequantised."""
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
    """Wall-clock seconds of decoding, without loading the model (reports of older versions include it)."""
    test_set: str = ""
    """Digest of the scored utterances (`test_set`); equal digests mean comparable reports. Empty in old reports."""
    normaliser: str = ""
    """Version of text.normalise behind `score`."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Origin of the model (`lineage`)."""
    caveats: tuple[str, ...] = ()
    """What the scores and intervals do not say, one sentence each."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """Engine, precision and search that wrote the transcripts (hypotheses.decoding_facts); empty in old reports."""
    guards: tuple[GuardScore, ...] = ()
    """Scores of the recipe's guard sets, of a tuned model."""
    stock: StockFigure | None = None
    """The same model in transformers' pipeline; None if that was not scored."""

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluate --json` prints."""
        return {
            "model": self.model,
            "split": self.split,
            "score": self.score.as_dict(),
            "raw": self.raw.as_dict(),
            "caveats": list(self.caveats),
            "decoding": self.decoding,
            **({"guards": [guard.as_dict() for guard in self.guards]} if self.guards else {}),
            "stock": self.stock and stock.facts(self.stock),
            "report": str(self.folder),
            "page": str(self.page),
        }

    def __str__(self) -> str:
        notes = "".join(f"\nnote: {caveat}" for caveat in self.caveats)
        scores = f"  normalised  {self.score}\n  as written  {self.raw}"
        decoded = f"\ndecoded by {hypotheses.describe(self.decoding)}" if self.decoding else ""
        guarded = f"\n{guards.describe(self.guards)}" if self.guards else ""
        compared = f"\n{self.stock.comparison}" if self.stock else ""
        return f"{self.model} on {self.split}\n{scores}{decoded}{compared}{notes}{guarded}\nreport {self.folder}"

    @property
    def page(self) -> Path | None:
        """Path of the report page; None in old reports."""
        path = self.folder / "report.html"
        return path if path.is_file() else None

    def details(self) -> dict[str, Any]:
        """Return the content of report.json (report/__init__.py); empty for old reports."""
        path = self.folder / "report.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def slices(self) -> pd.DataFrame:
        """Return WER per value of each slice column: slice, value, wer, low, high (95 %), n, speakers, over."""
        return report_slices.table(self.predictions)

    def worst(self, n: int = 10) -> pd.DataFrame:
        """Return the `n` utterances with the highest WER: reference, hypothesis, wer, speaker."""
        return self.predictions.nlargest(n, "wer")[_WORST].reset_index(drop=True)


def evaluate(
    recipe: Recipe,
    cache: FeatureCache,
    ref: ModelRef,
    split: str,
    reports: Path,
    *,
    earlier: Iterable[Path] = (),
    on_clips: Callable[[int], None] = lambda n: None,
) -> EvalReport:
    """Decode a split with the model and score it. An existing report of the same evaluation is read instead, and what
    `evaluation.stock_pipeline` asks for is added to it.

    A model that was tuned at clip length is decoded at clip length; other models get the full 30 s window. Nothing is
    decoded if one of the reports `earlier` has the transcripts of the same model, decoded from the same features with
    the same settings. `on_clips` is called with the clips of each batch that is decoded.
    """
    settings = recipe.settings("evaluation")
    if recipe.evaluation.beam_size == 1:  # reports from before this setting was added are of greedy decoding
        del settings["evaluation.beam_size"]
    del settings["evaluation.stock_pipeline"]  # a second figure, which is added to a report
    identity = {
        **settings,
        **whisper_model.identity(ref),
        "language": recipe.language,
        "split": split,
        "cache": cache.digest,
        "context": ref.context,
        "code.evaluation": CODE,
    }
    folder, rows = reports / f"{split}-{digest(identity)}", cache.split(split)
    n_stock = stock.n_clips(recipe.evaluation.stock_pipeline, ref, len(rows))
    if manifest.problem(folder) is None:
        report = read_report(folder)
        if n_stock <= len(report.stock.hypotheses if report.stock else ()):
            return report
        return _add_stock(
            report, stock.score_clips(recipe, cache, ref, (rows, report.predictions), n_stock, folder), recipe
        )
    if not len(rows):
        raise LabError(f"the cache {cache.folder} has no {split} clips to score")
    same = hypotheses.earlier_report(earlier, identity, cache, rows)
    decoded = hypotheses.of_report(same) if same else hypotheses.decode(recipe, cache, ref, rows, on_clips)
    predictions = _predictions(cache, rows, decoded.hypotheses)
    second = stock.score_clips(recipe, cache, ref, (rows, predictions), n_stock, same) if n_stock else None
    return _write(folder, identity, ref, cache, _Scored(decoded, predictions, second), recipe)


def read_report(folder: Path) -> EvalReport:
    """Load a finished report. Raise LabError if the folder is incomplete."""
    facts = manifest.require_complete(folder, "report", "Remove it and evaluate again")
    predictions = predictions_file.read(folder)
    score = _score(facts["score"], predictions)
    return EvalReport(
        folder,
        facts["model"],
        facts["split"],
        score,
        _score(facts["raw"], predictions),
        predictions,
        facts["seconds"],
        facts.get("test_set", ""),
        facts.get("normaliser", ""),
        facts.get("lineage", {}),
        tuple(facts.get("caveats", _caveats(score))),
        facts.get("decoding", {}),
        tuple(map(GuardScore.of, facts.get("guards", ()))),
        stock.read(folder, facts.get("stock")),
    )


def add_guards(report: EvalReport, scores: Iterable[GuardScore], recipe: Recipe) -> EvalReport:
    """Add the scores of guard sets to a report: its page, report.json and manifest. The same scores change nothing."""
    fields = [guard.as_dict() for guard in scores]
    if fields == [guard.as_dict() for guard in report.guards]:
        return report
    facts = {**report.details(), "guards": fields}
    manifest.replace(report.folder, "report.html", _page(facts, report.predictions, recipe, report.split).encode())
    manifest.replace(report.folder, "report.json", json.dumps(facts, ensure_ascii=False).encode(), guards=fields)
    return read_report(report.folder)


def _page(facts: dict[str, Any], predictions: pd.DataFrame, recipe: Recipe, split: str) -> str:
    sounds = clips.embedded(recipe.source, recipe.language, split, [worst["id"] for worst in facts["worst"]])
    return report_page.render(facts, predictions["wer"], *sounds)


def test_set(predictions: pd.DataFrame) -> str:
    """Return the digest of the scored ids and references, independent of their order: 16 hex digits."""
    rows = sorted(zip(predictions["id"].tolist(), predictions["reference"].tolist(), strict=True))
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def lineage(ref: ModelRef) -> dict[str, Any]:
    """Return the origin of a model.

    A model tuned by the lab has `digest, base, cache, recipe, settings, seed, best_step, training_seconds, data,
    machine, versions` (`settings` is the complete recipe, nested), `fork` if it started from the weights of another
    run, `teacher` if it was distilled, `merge` if it is a mixture, and `pseudo_labels` if a model wrote some of its
    training transcripts. Any other model has only `base`; an export also
    has `made_of`.
    """
    if not all((ref.folder / name).is_file() for name in ("recipe.json", "training.json")):
        source = {"made_of": f"{ref.name} @ {ref.revision}"} if "made_of" in ref.facts else {}
        return {"base": whisper_lineage.base_of(ref), **source}
    recipe, training = (json.loads((ref.folder / name).read_text("utf-8")) for name in ("recipe.json", "training.json"))
    return {
        **{name: ref.facts.get(name) for name in ("digest", "base", "cache", "data", "machine", "versions")},
        "recipe": recipe["name"],
        "settings": recipe,
        "seed": recipe["training"]["seed"],
        "best_step": training["best_step"],
        "training_seconds": training["seconds"],
        **{name: ref.facts[name] for name in ("fork", "teacher", "merge", "pseudo_labels") if ref.facts.get(name)},
    }


def _predictions(cache: FeatureCache, rows: Any, decoded: list[Hypothesis]) -> pd.DataFrame:
    table = cache.rows.iloc[rows].reset_index(drop=True)
    metadata = [name for name in report_slices.METADATA if name in table]
    predictions = table[["id", "speaker", "duration_s"]].join(table[metadata].fillna(""))
    predictions = predictions.join(report_slices.columns(cache, rows)).assign(
        reference=table["text"],
        hypothesis=[one.text for one in decoded],
        logprob=[round(one.logprob, 5) for one in decoded],
        tokens=[one.tokens for one in decoded],
    )
    edits = scoring.count_edits(predictions["reference"].tolist(), predictions["hypothesis"].tolist())
    lost = report_slices.unseen_errors(report.alignments(predictions), report_slices.vocabulary(cache))
    return predictions.assign(wer=(edits.word_edits / edits.words).round(4), unseen_errors=lost)


class _Scored(NamedTuple):
    decoded: Decoded
    predictions: pd.DataFrame
    stock: StockFigure | None


def _write(
    folder: Path, identity: dict[str, Any], ref: ModelRef, cache: FeatureCache, scored: _Scored, recipe: Recipe
) -> EvalReport:
    split, origin, predictions, decoded = identity["split"], lineage(ref), scored.predictions, scored.decoded
    texts = predictions["reference"].tolist(), predictions["hypothesis"].tolist(), predictions["speaker"].tolist()
    settings = {"samples": recipe.evaluation.bootstrap_samples, "seed": recipe.evaluation.seed}
    score = scoring.score(*texts, **settings)
    caveats = [
        *_caveats(score),
        *_shared_speakers(cache, origin, split),
        *_cut(predictions, cache, split, recipe.evaluation.max_new_tokens),
    ]
    fields = {
        "model": whisper_lineage.base_of(ref),
        "quantisation": ref.quantisation,
        "split": split,
        "score": score.as_dict(),
        "caveats": caveats,
        "raw": scoring.score(*texts, normalised=False, **settings).as_dict(),
        "test_set": test_set(predictions),
        "normaliser": text.NORMALISER,
        "lineage": origin,
        "decoding": decoded.decoding,
        **({"stock": stock.facts(scored.stock)} if scored.stock else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    predictions_file.write(folder, predictions)
    if scored.stock:
        (folder / stock.FILE).write_bytes(stock.content(predictions, scored.stock.hypotheses))
    facts = report.facts(predictions, {**fields, "language": recipe.language}, decoded.speed)
    manifest.write_json(folder / "report.json", facts)
    (folder / "report.html").write_text(_page(facts, predictions, recipe, split), "utf-8")
    made = {
        "made": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "features": hypotheses.features_digest(cache, cache.split(split)),
    }
    manifest.seal(folder, kind="report", identity=identity, seconds=decoded.speed["decoding_seconds"], **fields, **made)
    return read_report(folder)


def _add_stock(report: EvalReport, figure: StockFigure | None, recipe: Recipe) -> EvalReport:
    """Add a score in the stock pipeline to a finished report, which stays valid at every moment; None adds nothing."""
    if figure is None:
        return report
    folder, fields, details = report.folder, stock.facts(figure), report.details()
    manifest.replace(folder, stock.FILE, stock.content(report.predictions, figure.hypotheses))
    if "over" in details.get("score", {}):  # pages of earlier versions cannot be written again
        details = {**details, "stock": fields}
        manifest.replace(folder, "report.html", _page(details, report.predictions, recipe, report.split).encode())
        manifest.replace(folder, "report.json", json.dumps(details, ensure_ascii=False).encode())
    manifest.amend(folder, stock=fields)
    return read_report(folder)


def _score(facts: dict[str, Any], predictions: pd.DataFrame) -> Score:
    """Return a stored score. Older ones counted every clip of an unknown speaker as a speaker: their intervals are new.

    An old score keeps its intervals if all its speakers are known, and more than one.
    """
    score = Score(**{name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()})
    speakers = predictions["speaker"].tolist()
    _, units = intervals.group(speakers, len(speakers))
    if "over" in facts or (units.over == intervals.SPEAKERS and units.speakers == score.speakers):
        return score
    texts = predictions["reference"].tolist(), predictions["hypothesis"].tolist()
    again = scoring.score(*texts, speakers, normalised=score.normalised)
    changed = {name: getattr(again, name) for name in ("ci95", "cer_ci95", "speakers", "over")}
    return replace(score, **changed)


def _caveats(score: Score) -> list[str]:
    return [score.units.caveat] if score.units.caveat else []


def _cut(predictions: pd.DataFrame, cache: FeatureCache, split: str, limit: int) -> list[str]:
    """Return how many references and hypotheses are longer than the `limit` of tokens that the decoder may write."""
    n_cut = int((predictions["tokens"] >= limit).sum())
    notes = derived.cut_references(cache, split, limit), derived.cut_hypotheses(n_cut, split)
    return [note for note in notes if note]


def _shared_speakers(cache: FeatureCache, origin: dict[str, Any], split: str) -> list[str]:
    """Return what the scores of a model mean if the scored clips are by speakers that it was trained on."""
    if origin.get("cache") != cache.digest:
        return []
    note = leaks.shared_speakers(cache.rows, split)
    return [note] if note else []
