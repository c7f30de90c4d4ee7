"""A small corpus with one clip for each known fault, and what curation finds of it: notebook 01.

The clips are spoken by eSpeak NG on this machine. Nothing is kept: the corpus and its cache are in a temporary folder.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import recipes
from pipelines.features import pipeline
from pipelines.features.sources.synthetic import espeak, planted
from pipelines.infra import console
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio, audio_uri

CURATION = {
    "leaks": "drop",
    "unique_sentences": True,
    "unique_audio": True,
    "min_level_dbfs": -40,
    "max_clipped_share": 0.02,
    "min_chars_per_s": 4,
    "max_chars_per_s": 22,
    "max_silence_share": 0.5,
    "min_snr_db": 12,
}
"""The settings of `[curation]` that look for all these faults."""
_RATE_WPM, _PITCH = 150, 50
_HELD_OUT = (
    ("validation", "Sparven byggde sitt bo under takpannan.", "v-1", "sv+f1"),
    ("test", "Fyren blinkade genom den täta dimman.", "t-1", "sv+m3"),
)
_CLEAN = (
    ("Bussen till sjukhuset går var tionde minut.", "sv+f4"),
    ("Vi ställde cyklarna bakom ladugården.", "sv+m1"),
    ("Hon köpte nybakat bröd på torget.", "sv+f5"),
    ("Mötet börjar klockan halv nio.", "sv+m4"),
    ("Katten sover hela dagen i fönstret.", "sv+m5"),
    ("  Brevet ska  skickas före fredag. ", "sv+f4"),
)


@dataclass(frozen=True)
class PlantedClip:
    """One training clip: what is wrong with it, and what the corpus holds of it."""

    fault: str
    """What was done to it; empty for a clean clip."""
    transcript: str
    speaker: str
    samples: np.ndarray | None = field(repr=False)
    """float [n] at 16 kHz; None: the file is missing."""
    is_broken: bool = False
    """Whether the file holds a text instead of audio."""


def clips() -> list[PlantedClip]:
    """Return the training clips of the corpus, the clean ones first."""
    clean = [PlantedClip("", text, variant, _speech(text.strip(), variant)) for text, variant in _CLEAN]
    return [*clean, *_faulty(clean)]


def _faulty(clean: list[PlantedClip]) -> list[PlantedClip]:
    _, test_sentence, test_speaker, test_variant = _HELD_OUT[1]
    random = np.random.default_rng(3)
    changes: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray | None]]] = {
        "the file is missing": ("Barnen åkte skridskor på sjön.", lambda samples: None),
        "no transcript": ("", lambda samples: samples),
        "too short": ("Ja.", lambda samples: samples[:80]),
        "too long": ("Glöm inte att vattna blommorna.", lambda samples: np.tile(samples, 20)),
        "digital silence": ("Tåget stannar inte i Alvesta.", np.zeros_like),
        "very quiet": ("Soppan behöver mer salt.", lambda samples: 0.002 * samples),
        "clipped": ("Grannen spelar fiol om kvällarna.", planted.clip),
        "noise": ("Isen bar hela vägen ut.", lambda samples: planted.add_noise(samples, random)),
        "silence around it": ("Duken är struken.", lambda samples: np.pad(samples, 2 * len(samples) // 3)),
        "cut recording": (
            "Läraren samlade in alla uppsatser före lunch.",
            lambda samples: samples[: len(samples) // 3],
        ),
        "by a test speaker": ("Hunden gräver i rabatten.", lambda samples: samples),
    }
    changed = [
        PlantedClip(
            fault, text, test_speaker if fault.startswith("by a test") else "sv+m7", change(_by_default_voice(text))
        )
        for fault, (text, change) in changes.items()
    ]
    long_sentence = "Posten kommer sent idag eftersom vägen är stängd."
    return [
        *changed,
        PlantedClip(
            "the file holds a text", "Bilen startade inte.", "sv+m7", _by_default_voice("Bilen startade inte."), True
        ),
        PlantedClip("cut transcript", "Posten.", "sv+m7", _by_default_voice(long_sentence)),
        PlantedClip("a sentence of the test", test_sentence.lower(), "sv+m7", _speech(test_sentence, "sv+m7")),
        PlantedClip("a recording of the test", "Fyren blinkade.", "sv+m7", _speech(test_sentence, test_variant)),
        PlantedClip("the same sentence twice", clean[0].transcript, "sv+f4", _speech(clean[0].transcript, "sv+f5")),
        PlantedClip("the same recording twice", "Vi ställde cyklarna.", "sv+m7", clean[1].samples),
        PlantedClip(
            "another clip's transcript",
            "Hon läser en bok om rymden.",
            "sv+m7",
            _by_default_voice("Han ska måla staketet."),
        ),
    ]


def curate(recipe: Recipe) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Write the corpus, run the feature pipeline on it, and return the curation steps and the faulty clips.

    `recipe` gives the base model, whose tokenizer is used, and the language. A row of the first list is one of
    FeatureCache.curation. A row of the second has `sound` (an HTML player), `transcript`, `fault`, `found by` (empty if
    no step did), `detail`.
    """
    planted_clips = clips()
    with tempfile.TemporaryDirectory() as folder, console.silenced():
        corpus = Path(folder) / "corpus"
        _write(planted_clips, corpus)
        curated = recipes.load(
            "own",
            {
                "name": "faults",
                "language": recipe.language,
                "model.base": recipe.model.base,
                "source": {"kind": "folder", "path": str(corpus)},
                "features": {"max_rejected_share": 1.0, "workers": 1},
                "curation": CURATION,
            },
        )
        cache = pipeline.run(curated, runs=Path(folder) / "runs")
        steps, rejected = cache.curation, cache.rejected.set_index("id")
        del cache  # its files are removed with the folder
    rows = []
    for name, clip in zip(_names(planted_clips), planted_clips, strict=True):
        reason, detail = rejected.loc[name, ["reason", "detail"]] if name in rejected.index else ("", "")
        if clip.fault or reason:
            sound = "" if clip.samples is None or clip.is_broken else audio_uri.player(_wav(clip.samples))
            cells = {"sound": sound, "transcript": clip.transcript, "fault": clip.fault}
            rows.append({**cells, "found by": reason, "detail": detail})
    return steps, rows


def _names(planted_clips: list[PlantedClip]) -> list[str]:
    """Return the ids of the clips: the names of their files without the suffix."""
    return [f"clip-{number:02}" for number in range(1, len(planted_clips) + 1)]


def _write(planted_clips: list[PlantedClip], corpus: Path) -> None:
    corpus.mkdir()
    rows = [("path", "text", "split", "speaker")]
    for split, text, speaker, variant in _HELD_OUT:
        (corpus / f"{split}.wav").write_bytes(_wav(_speech(text, variant)))
        rows.append((f"{split}.wav", text, split, speaker))
    for name, clip in zip(_names(planted_clips), planted_clips, strict=True):
        if clip.samples is not None:
            content = b"This is a text." if clip.is_broken else _wav(clip.samples)
            (corpus / f"{name}.wav").write_bytes(content)
        rows.append((f"{name}.wav", clip.transcript, "train", clip.speaker))
    with (corpus / "transcripts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _by_default_voice(text: str) -> np.ndarray:
    return _speech(text or "Ingen har skrivit vad jag säger.", "sv+m7")


def _speech(text: str, variant: str) -> np.ndarray:
    return audio.decode(espeak.synthesise(text, variant, _RATE_WPM, _PITCH)).samples


def _wav(samples: np.ndarray) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, audio.SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()
