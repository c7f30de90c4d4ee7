"""Wrong transcripts that a reviewer finds per 100 clips listened to, on the planted faults, for several orders.

    python benchmarks/review.py [--model openai/whisper-tiny] [--clips 240] [--smoke]

The orders see audio, transcripts and what the model recognises. Only this script reads the truth, afterwards: the
column `planted` says whose transcript is wrong (label_swap, label_word). `estimate` is the share of errors found that
the review page would show after so many clips, and `found` the true one. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines import recipes
from pipelines.collection.review import queue, scores
from pipelines.experiments.fault_detection import GROSS, SUBTLE
from pipelines.features import derived, pipeline
from pipelines.infra import environment
from pipelines.whisper import model as whisper_model

LISTENED = (25, 50, 100, 150, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--clips", type=int, default=240, help="training clips of the planted corpus")
    parser.add_argument("--runs", default="", help="folder of the cache; default: the lab's")
    parser.add_argument("--smoke", action="store_true", help="48 clips, a few of validation and test")
    options = parser.parse_args()
    environment.share_cores()
    given = {"source.train": 48, "source.validation": 8, "source.test": 8, "model.base": options.model}
    recipe = recipes.load("planted-raw", given if options.smoke else {"source.train": options.clips})
    cache = pipeline.run(recipe, runs=options.runs)
    ref = whisper_model.resolve(options.model)
    settings = derived.resolve(recipe, cache).evaluation
    folder = environment.runs_folder(options.runs) / "label_errors"
    found = scores.score(cache, ref, recipe.language, settings, folder)
    kinds = cache.rows["planted"].to_numpy()[found.rows]
    wrong = np.isin(kinds, (GROSS, SUBTLE))
    swapped, by_word = int((kinds == GROSS).sum()), int((kinds == SUBTLE).sum())
    print(f"{len(wrong)} clips, {swapped + by_word} wrong: {swapped} swapped, {by_word} by a word")
    print(f"| order | {' | '.join(f'first {n}' for n in LISTENED)} | swapped in the first 50 |")
    print("|---|" + "---|" * (len(LISTENED) + 1))
    random = np.random.default_rng(7).permutation(len(wrong))
    orders = {
        "random": random,
        "CER": np.argsort(-found.cer, kind="stable"),
        "loss per token": np.argsort(-found.loss, kind="stable"),
        "gap (the page's)": np.argsort(-found.gap, kind="stable"),
    }
    result: dict[str, Any] = {"clips": len(wrong), "swapped": swapped, "by_word": by_word, "found": {}}
    for name, order in orders.items():
        counts = [int(wrong[order[:n]].sum()) for n in LISTENED]
        result["found"][name] = dict(zip(map(str, LISTENED), counts, strict=True))
        print(f"| {name} | {' | '.join(map(str, counts))} | {int((kinds[order[:50]] == GROSS).sum())} |")
    result["page"] = _follow(cache.rows["id"].to_numpy()[found.rows], found, wrong)
    print(json.dumps(result))


def _follow(ids: np.ndarray, found: scores.Suspicion, wrong: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Print and return what the page's queue finds and estimates if every decision is right."""
    followed = {}
    truth = dict(zip(ids, wrong, strict=True))
    items = [queue.Item(name, "x", "y", float(gap)) for name, gap in zip(ids, found.gap, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        reviewed = queue.Queue(items, Path(folder) / "corrections.csv", "model")
        print("\n| clips listened to | errors found | found | estimate |\n|---|---|---|---|")
        for n in range(1, min(LISTENED[-1], len(items)) + 1):
            item = reviewed.next("one")
            reviewed.decide(item.id, "reject" if truth[item.id] else "accept", "", "one")
            if n in LISTENED:
                at = reviewed.progress()
                followed[str(n)] = {"wrong": at.wrong, "estimate": at.share}
                estimate = "" if at.share is None else f"{at.share:.0%}"
                print(f"| {n} | {at.wrong} | {at.wrong / wrong.sum():.0%} | {estimate} |")
    return followed


if __name__ == "__main__":
    main()
