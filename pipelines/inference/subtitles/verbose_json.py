"""The verbose JSON of OpenAI's API, with confidences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.inference.transcript import Segment, Transcript
from pipelines.recipes import languages
from pipelines.speech import repetition
from pipelines.whisper import tokens


def as_dict(
    transcript: Transcript, language: str, word_times: bool = False, model: Path | None = None
) -> dict[str, Any]:
    """Return the verbose JSON of OpenAI's API, with confidences; `language` is Whisper's code.

    A language that was detected replaces it.

    The tokens are those of the tokenizer in the folder `model`; without one there are none.

    As in Whisper's own results, the texts of segments and of their words begin with a space, and segments have `words`
    only if these have times. With `word_times` there is a list of all words even if it is empty. Where the speakers are
    known, segments and words have a `speaker`.
    """
    segments = [_segment_fields(number, segment, model) for number, segment in enumerate(transcript.segments)]
    fields = {
        "task": "transcribe",
        "language": languages.NAMES.get(transcript.language or language, language),
        "duration": round(transcript.audio_s, 3),
        "text": transcript.text,
        "confidence": round(transcript.confidence, 4),
        **({"damage": transcript.damage} if transcript.damage else {}),
        "segments": segments,
    }
    if word_times or any("words" in segment for segment in segments):
        fields["words"] = [
            {**word, "word": word["word"].strip(), **_speaker(segment)}
            for segment, entry in zip(transcript.segments, segments, strict=True)
            for word in entry.get("words", ())
        ]
    return fields


def _segment_fields(number: int, segment: Segment, model: Path | None) -> dict[str, Any]:
    confidences = [round(word.confidence, 4) for word in segment.words]
    fields = {
        "id": number,
        "seek": round(segment.start_s * 100),
        "start": segment.start_s,
        "end": segment.end_s,
        "text": f" {segment.text}",
        **_speaker(segment),
        "tokens": tokens.token_ids(model, segment.text) if model else [],
        "temperature": segment.temperature,
        "avg_logprob": round(segment.logprob, 4),
        "compression_ratio": round(repetition.compression_ratio(segment.text), 4),
        "no_speech_prob": float(f"{segment.no_speech:.4g}"),
        "confidence": round(segment.confidence, 4),
        "word_confidences": confidences,
    }
    if segment.words and segment.words[0].start_s is not None:
        fields["words"] = [
            {"word": f" {word.text}", "start": word.start_s, "end": word.end_s, "probability": confidence}
            for word, confidence in zip(segment.words, confidences, strict=True)
        ]
    return fields


def _speaker(segment: Segment) -> dict[str, str]:
    return {"speaker": segment.speaker} if segment.speaker else {}


def verbose_json(transcript: Transcript, language: str = "sv", model: Path | None = None) -> str:
    """Return `as_dict` as JSON text."""
    return json.dumps(as_dict(transcript, language, model=model), ensure_ascii=False, indent=1) + "\n"
