"""WER of models on single clips and on windows of joined clips, on the test split of one cache.

    python benchmarks/windows.py --cache runs/features/tour-... runs/tour/train-.../model openai/whisper-tiny

clips      as `python -m pipelines evaluate` scores them: at clip length for models tuned at clip length, else at 30 s
windows    each speaker's clips joined up to 30 s (training/data/packing.py), decoded at 30 s
           without timestamps, one transcript each

Both scores are normalised WER with 95 % intervals over speakers. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from pipelines.features import cache
from pipelines.features.cache import FeatureCache
from pipelines.infra import environment
from pipelines.speech import scoring
from pipelines.speech.scoring import Score
from pipelines.training.data import packing
from pipelines.training.data.packing import Window
from pipelines.whisper import decoding
from pipelines.whisper import model as whisper_model
from pipelines.whisper.batching import Collator
from pipelines.whisper.decoding import RowDecodingOptions
from pipelines.whisper.model import ModelRef

BATCH_FRAMES = 24_000
MAX_NEW_TOKENS = 440
"""The number of positions of the decoder, without the prompt."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", required=True, help="a feature cache with a test split")
    parser.add_argument("--language", default="sv")
    parser.add_argument("models", nargs="+", help="model URIs")
    options = parser.parse_args(arguments)
    opened, results = cache.open_cache(Path(options.cache)), {}
    for uri in options.models:
        ref = whisper_model.resolve(uri)
        scores = {"clips": clips(opened, ref, options.language), "windows": joined(opened, ref, options.language)}
        for name, score in scores.items():
            print(f"{ref.title}  {name:<8} {score}", flush=True)
        results[ref.title] = {name: score.as_dict() for name, score in scores.items()}
    print(json.dumps(results))


def clips(opened: FeatureCache, ref: ModelRef, language: str) -> Score:
    """Score the test clips one by one."""
    rows = opened.split("test")
    options = RowDecodingOptions(language, 128, full_context=ref.context == "full", batch_frames=BATCH_FRAMES)
    hypotheses = decoding.decode_rows_to_text(
        whisper_model.load(ref, device=environment.detect().device),
        whisper_model.load_processor(ref, language),
        opened,
        rows,
        options,
    )
    table = opened.rows.iloc[rows]
    return scoring.score(table["text"].tolist(), hypotheses, table["speaker"].tolist())


def joined(opened: FeatureCache, ref: ModelRef, language: str) -> Score:
    """Score the test clips of each speaker, joined to windows."""
    model, processor = (
        whisper_model.load(ref, device=environment.detect().device),
        whisper_model.load_processor(ref, language),
    )
    groups = speakers_windows(opened)
    collate = packing.WindowCollator(Collator(opened), processor, language)
    hypotheses, size = [], BATCH_FRAMES // 3_000
    for start in range(0, len(groups), size):
        features = collate([Window(group) for group in groups[start : start + size]])["input_features"]
        hypotheses += decoding.decode_to_text(model, processor, features, RowDecodingOptions(language, MAX_NEW_TOKENS))
    tables = [opened.rows.iloc[group] for group in groups]
    references = [" ".join(rows["text"]) for rows in tables]
    return scoring.score(references, hypotheses, [rows["speaker"].iloc[0] for rows in tables])


def speakers_windows(opened: FeatureCache) -> list[list[int]]:
    """Return the rows of the test split, one list per window: as many clips of one speaker as fit."""
    speakers, groups = opened.rows["speaker"], []
    for speaker in sorted(set(speakers[opened.split("test")])):
        rows = [row for row in opened.split("test") if speakers[row] == speaker]
        while rows:
            count = packing.count_within_30_s([len(opened.log_mel(row).frames) for row in rows])
            groups.append(rows[:count])
            rows = rows[count:]
    return groups


if __name__ == "__main__":
    main()
