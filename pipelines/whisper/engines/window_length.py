"""Length of the windows in which a model decodes recordings."""

from __future__ import annotations

from pipelines.whisper import model_files
from pipelines.whisper.model import ModelRef

_TUNED_S, _MIN_SENTENCE_S = 15.0, 3.0
"""Window for models that were tuned on clips; those of shorter clips, such as single words, keep their own."""
_TUNED_JOINED_S = 6.0
"""Length up to which short stretches of speech are joined to a window, for models that were tuned on clips."""
_MIN_CONTEXT_S = 2.0
"""Shortest context of a model; one tuned on single words can still decode a short sentence."""


def longest_window_s(ref: ModelRef) -> float:
    """Return the longest window that the model was tuned on, as recorded in its manifest.

    For other models it is the window of the encoder: 30 s, unless config.json has another `max_source_positions`.
    """
    full_s = model_files.source_frames(ref.folder) / 100
    context_s = ref.facts.get("context_s") if ref.context == "clip" else None
    return min(max(float(context_s), _MIN_CONTEXT_S), full_s) if context_s else full_s


def usual_window_s(ref: ModelRef) -> float:
    """Return the window that suits a model for long recordings and, uncut, for short ones.

    Tuned models take windows of 15 s: on eight minutes, one tuned on sentences of up to 4 s has a WER of 0.242 in
    windows of 5 s and of 0.233 in those of 15 s, one tuned with windows 0.190 in those of 15 s and 0.218 in 30 s.
    """
    longest_s = longest_window_s(ref)
    if ref.context != "clip" or longest_s < _MIN_SENTENCE_S:
        return longest_s
    return min(_TUNED_S, model_files.source_frames(ref.folder) / 100)


def joined_window_s(ref: ModelRef) -> float:
    """Return the length up to which stretches of speech are joined to one window of a long recording.

    The encoder computes the attention between all moments of a window, so that short windows take less time: with
    the tour's model 6 s take 0.7 times the time of 15 s, at about the same WER (docs/benchmarks.md, 30 minutes). An
    untuned model pads each window to 30 s: for it they are as full as possible.
    """
    usual_s = usual_window_s(ref)
    return min(_TUNED_JOINED_S, usual_s) if ref.context == "clip" else usual_s
