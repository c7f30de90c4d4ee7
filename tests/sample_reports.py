"""Write evaluation reports with chosen transcripts: utterances by several speakers, with given word errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines import recipes
from pipelines.experiments import evaluation
from pipelines.experiments.report.hypotheses import decoding_facts
from pipelines.infra import manifest
from pipelines.recipes import digest
from pipelines.speech import scoring, text
from pipelines.whisper.model import ModelRef

BASE = "openai/whisper-tiny @ 1a2b3c"
WORDS = "en två tre fyra fem sex sju åtta nio tio"


def rows(speakers: int = 12, each: int = 5) -> pd.DataFrame:
    """Return utterances of twelve words, `each` of every speaker; every second speaker is a woman."""
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
    """Return a function from a row to a hypothesis with `count` (or `count(row)`) substituted words."""

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
    engine: str = "",
) -> evaluation.EvalReport:
    """Write a sealed report below `runs/<name>/reports` and return it.

    `cache` is the digest of the training data, and of the evaluated data unless `scored` is given.
    """
    recipe = recipes.load("tour", {"training.seed": seed, **(settings or {})}).model_copy(update={"name": name})
    model = (
        digest({"recipe": recipe.settings(), "cache": cache, **({"fork": fork} if fork else {})}) if tuned else "1a2b3c"
    )
    folder = runs / name / ("train-" + model if tuned else "base")
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {}
    if tuned:
        (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
        (folder / "training.json").write_text(json.dumps({"best_step": 80, "seconds": 100.5 + seed}))
        data = {split: {"clips": n, "hours": n / 1000} for split, n in (("train", 960), ("test", 60))}
        metadata = {
            "digest": model,
            "base": BASE,
            "cache": cache,
            "data": data,
            "machine": "2 CPU threads",
            "fork": fork,
        }
    ref = ModelRef(
        f"{name}-{model}" if tuned else BASE.partition(" ")[0], folder, "folder", model, None, facts=metadata
    )
    table = rows() if table is None else table
    hypotheses = [(write or wrong(2))(row) for row in table.itertuples()]
    predictions = table.assign(hypothesis=hypotheses, wer=0.0)
    identity = {
        **recipe.settings("evaluation"),
        "model": model,
        "split": split,
        "cache": scored or cache,
        "context": "clip",
    }
    path = runs / name / "reports" / f"{split}-{digest(identity | {'set': evaluation.test_set(predictions)})}"
    path.mkdir(parents=True, exist_ok=True)
    predictions.to_csv(path / "predictions.csv", index=False)
    texts = [predictions[column].tolist() for column in ("reference", "hypothesis", "speaker")]
    manifest.seal(
        path,
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
        **({"decoding": decoding_facts(engine)} if engine else {}),
    )
    return evaluation.read_report(path)
