"""Words that a model invents for sounds without speech, and very short words that it keeps.

    python benchmarks/non_speech.py                       whisper-tiny, with and without the speech detector
    python benchmarks/non_speech.py --model runs/tour/train-…/model
    python benchmarks/non_speech.py --smoke               a few sounds, to check that it runs

The 60 sounds and 40 words are generated (sounds.py). Each is transcribed alone, by the engine that `auto` selects, once
with the detector and once as if everything were speech. The words are transcribed at their own level and at a peak of
-45 dBFS. A word is kept if its transcript is not empty, whether right or wrong.

The last line is one JSON object. `with_detector` and `without_detector` have `invented_words` (in all sounds),
`sounds_with_words`, `words_kept` and `quiet_words_kept`; `sounds` and `words` are the numbers of both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import sounds
from benchmarks.sounds import Sound
from pipelines.inference import detection
from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.speech.audio import Waveform
from pipelines.whisper import model as whisper_model

QUIET_DBFS = -45


class Everything(detection.AnySound):
    """A detector to which everything is speech, silence too."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        return np.ones(len(samples) // detection.CHUNK_SAMPLES, dtype=np.float32)


def main() -> None:
    options = _options()
    transcriber = Transcriber(whisper_model.resolve(options.model), engine=options.engine)
    noises, words = sounds.non_speech(), sounds.short_words()
    if options.smoke:
        noises, words = noises[1:40:8], words[:4:2]
    result: dict[str, Any] = {"model": transcriber.ref.title, "engine": transcriber.loaded.name}
    result |= {"sounds": len(noises), "words": len(words)}
    open_detector = detection.open_detector
    for name, opened in (("with_detector", open_detector), ("without_detector", Everything)):
        detection.open_detector = opened
        result[name] = measure(transcriber, noises, words)
        print(f"{name}: {result[name]}", flush=True)
    print(json.dumps(result))


def measure(transcriber: Transcriber, noises: list[Sound], words: list[Sound]) -> dict[str, int]:
    """Transcribe every sound and word, and count."""
    invented = {sound.name: transcriber.transcribe(Waveform(sound.samples)).text for sound in noises}
    for name, text in invented.items():
        if text:
            print(f"  {name}: {text[:60]!r}")
    quiet = [Sound(word.name, sounds.at_peak(word.samples, QUIET_DBFS)) for word in words]
    return {
        "invented_words": sum(len(text.split()) for text in invented.values()),
        "sounds_with_words": sum(map(bool, invented.values())),
        "words_kept": _kept(transcriber, words),
        "quiet_words_kept": _kept(transcriber, quiet),
    }


def _kept(transcriber: Transcriber, words: list[Sound]) -> int:
    return sum(bool(transcriber.transcribe(Waveform(word.samples)).text) for word in words)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few sounds, to check that it runs")
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--engine", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    environment.share_cores()
    main()
