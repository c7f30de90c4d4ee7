"""Reports whose truth is known: sentences by speakers, and what a model is to have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.infra import manifest
from pipelines.recipes import digest
from pipelines.speech import scoring, text
from pipelines.whisper.model import ModelRef

BASE = "openai/whisper-tiny @ 1a2b3c"
WORDS = "en två tre fyra fem sex sju åtta nio tio"


def rows(speakers: int = 12, each: int = 5) -> pd.DataFrame:
    """Utterances of ten words: `each` by every speaker, of whom every second is a woman."""
    names = [(speaker, clip) for speaker in range(speakers) for clip in range(each)]
    return pd.DataFrame(
        {
            "id": [f"s{speaker:02}-{clip}" for speaker, clip in names],
            "speaker": [f"s{speaker:02}" for speaker, _ in names],
            "duration_s": 3.0,
            "gender": ["female" if speaker % 2 else "male" for speaker, _ in names],
            "reference": [f"{WORDS} {speaker} {clip}" for speaker, clip in names],
        }
    )


def wrong(count: Callable[[Any], int] | int) -> Callable[[Any], str]:
    """Writes the reference with so many of its words wrong, `count` or `count(row)`."""

    def write(row: Any) -> str:
        words = row.reference.split()
        n = count(row) if callable(count) else count
        return " ".join(["fel"] * n + words[n:])

    return write


def report(
    runs: Path,
    name: str = "raw",
    write: Callable[[Any], str] | None = None,
    *,
    seed: int = 42,
    settings: dict[str, Any] | None = None,
    table: pd.DataFrame | None = None,
    tuned: bool = True,
    split: str = "test",
    cache: str = "cache0000001",
    scored: str = "",
    fork: dict[str, Any] | None = None,
) -> evaluation.EvalReport:
    """A sealed report below `runs/<name>/reports`, as an evaluation leaves it.

    `cache` is the digest of what the model was trained on, and of what was scored unless `scored` names another.
    """
    told = recipes.load("tour", {"training.seed": seed, **(settings or {})}).model_copy(update={"name": name})
    model = (
        digest({"recipe": told.settings(), "cache": cache, **({"fork": fork} if fork else {})}) if tuned else "1a2b3c"
    )
    folder = runs / name / ("train-" + model if tuned else "base")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {}
    if tuned:
        (folder / "recipe.json").write_text(json.dumps(told.model_dump(mode="json")))
        (folder / "training.json").write_text(json.dumps({"best_step": 80, "seconds": 100.5 + seed}))
        data = {split: {"clips": n, "hours": n / 1000} for split, n in (("train", 960), ("test", 60))}
        facts = {"digest": model, "base": BASE, "cache": cache, "data": data, "machine": "2 CPU threads", "fork": fork}
    ref = ModelRef(f"{name}-{model}" if tuned else BASE.partition(" ")[0], folder, "folder", model, None, facts=facts)
    table = rows() if table is None else table
    written = [(write or wrong(2))(row) for row in table.itertuples()]
    predictions = table.assign(hypothesis=written, wer=0.0)
    identity = {
        **told.settings("evaluation"),
        "model": model,
        "split": split,
        "cache": scored or cache,
        "context": "clip",
    }
    place = runs / name / "reports" / f"{split}-{digest(identity | {'set': evaluation.test_set(predictions)})}"
    place.mkdir(parents=True, exist_ok=True)
    predictions.to_csv(place / "predictions.csv", index=False)
    texts = [predictions[column].tolist() for column in ("reference", "hypothesis", "speaker")]
    manifest.seal(
        place,
        kind="report",
        model=ref.title,
        split=split,
        identity=identity,
        score=scoring.score(*texts).as_dict(),
        raw=scoring.score(*texts, normalised=False).as_dict(),
        seconds=1.5,
        test_set=evaluation.test_set(predictions),
        normaliser=text.NORMALISER,
        lineage=evaluation.lineage(ref),
    )
    return evaluation.read_report(place)
