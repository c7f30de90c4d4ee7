"""Words that a model invents for sounds without speech, and very short words that it keeps.

    python benchmarks/non_speech.py                       whisper-tiny, with and without Silero's detector
    python benchmarks/non_speech.py --model runs/tour/train-…/model
    python benchmarks/non_speech.py --smoke               a few sounds, to check that it runs

The 60 sounds and 40 words are generated (sounds.py). Each is transcribed alone, by the engine that `auto` selects, once
with Silero and once as on a machine without it: then everything but silence is decoded, and the model's own no-speech
token decides. The words are transcribed at their own level and at a peak of -45 dBFS. A word is kept if its transcript
is not empty, whether right or wrong.

The last line is one JSON object. `with_silero` and `without_silero` have `invented_words` (in all sounds),
`sounds_with_words`, `words_kept` and `quiet_words_kept`; `sounds` and `words` are the numbers of both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import sounds
from benchmarks.sounds import Sound
from pipelines.inference.transcriber import Transcriber
from pipelines.infra import environment
from pipelines.speech.audio import Waveform
from pipelines.speech.recordings import detection
from pipelines.whisper import model as whisper_model

QUIET_DBFS = -45


def main() -> None:
    options = _options()
    ref = whisper_model.resolve(options.model)
    noises, words = sounds.non_speech(), sounds.short_words()
    if options.smoke:
        noises, words = noises[1:40:8], words[:4:2]
    result: dict[str, Any] = {"model": ref.title, "sounds": len(noises), "words": len(words)}
    if not detection.is_packaged():
        sys.exit("this benchmark needs Silero: pip install 'silero-vad>=6.2.2' 'onnxruntime>=1.20'")
    for name, is_packaged in (("with_silero", True), ("without_silero", False)):
        detection.is_packaged = lambda answer=is_packaged: answer
        transcriber = Transcriber(ref, engine=options.engine)
        result["engine"] = transcriber.loaded.name
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
