"""Write the corpus of the experiment with aligned recordings (docs/experiments/aligned).

    python benchmarks/aligned_data.py [--to runs/aligned-data] [--clips 900] [--recordings 6]

recordings   the tour's training clips, joined to long recordings with the faulty subtitles of benchmarks/alignment.py
true         the clips that the default aligner cuts from them, with what is spoken there in place of the subtitles
held-out     validation and test

The last line is one JSON object:

clips            clips that the aligner cuts
wrong            those with another text than what is spoken
without_speech   those in which no sentence lies; they are left out of `true`
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import alignment
from benchmarks.pseudo_data import TEST, VALIDATION, write_table
from pipelines.features.sources import Example, PartExample
from pipelines.features.sources.aligned.source import AlignedSource
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.infra import environment
from pipelines.speech import audio

SEED = 29


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--to", type=Path, default=Path("runs/aligned-data"), help="folder to write to")
    parser.add_argument("--clips", type=int, default=900, help="training clips")
    parser.add_argument("--recordings", type=int, default=6)
    options = parser.parse_args()
    environment.share_cores()
    source = TourSource(options.clips, VALIDATION, TEST)
    write_table(options.to / "held-out", list(source.examples(("validation", "test"))))
    sentences = write_recordings(options.to / "recordings" / "train", source, options.recordings)
    aligned = [one for one in AlignedSource(str(options.to / "recordings")).examples() if isinstance(one, PartExample)]
    true = [_with_true_text(one, sentences) for one in aligned]
    write_table(options.to / "true", [one for one in true if one.text])
    n_wrong = sum(one.text != same.text for one, same in zip(aligned, true, strict=True))
    print(json.dumps({"clips": len(aligned), "wrong": n_wrong, "without_speech": sum(not one.text for one in true)}))


def write_recordings(folder: Path, source: TourSource, n: int) -> dict[str, list[alignment.Sentence]]:
    """Join the training clips to `n` recordings with subtitles; return what is spoken in each file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    examples = list(source.examples(("train",)))
    rng.shuffle(examples)
    vocabulary = sorted({word for one in examples for word in one.text.split()})
    sentences = {}
    for number in range(1, n + 1):
        stem, sounds = folder / f"recording-{number}", _sounds(examples[number - 1 :: n])
        sentences[f"{stem.name}.flac"], _ = alignment.write_joined(stem, sounds, vocabulary, rng, SEED + number)
    return sentences


def _sounds(examples: list[Example]) -> Iterator[tuple[np.ndarray, str]]:
    for one in examples:
        yield audio.decode(one.audio).samples, one.text


def _with_true_text(clip: PartExample, sentences: dict[str, list[alignment.Sentence]]) -> Example:
    inside = alignment.sentences_in(sentences[clip.file.name], clip.excerpt.start_s, clip.excerpt.end_s)
    text = " ".join(one.text for one in inside)
    return Example(clip.id, clip.split, text, clip.audio, clip.speaker, {"gender": ""})


if __name__ == "__main__":
    main()
