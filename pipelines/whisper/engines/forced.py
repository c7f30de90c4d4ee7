"""Score known lines of text against a window instead of decoding it, and time them by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipelines.whisper.batching import padded_frames
from pipelines.whisper.engines import word_timestamps
from pipelines.whisper.engines.transformers_engine import Transformers, cross_attention
from pipelines.whisper.log_mel import LogMel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ForcedLine:
    """A line in a window."""

    start_s: float
    """From the start of the window."""
    logprob: float
    """Mean natural logarithm of the probability of its tokens, given the lines before it."""
    lowest: float
    """The least of them: of a word that is not said. In the last line also of the end token: of a word too few."""


def force(engine: Transformers, log_mel: LogMel, lines: Sequence[str]) -> list[ForcedLine]:
    """Return the scores of lines that are spoken one after the other in a window.

    One pass of the decoder over all tokens, given the true ones before (teacher forcing), at the length of the window.
    Lines beyond the decoder's positions are left out at the end.
    """
    import torch

    prompt = engine.spelling.prompt(engine.options.language)
    longest = engine.model.config.max_target_positions - len(prompt) - 1
    features = log_mel.padded(padded_frames(len(log_mel.frames) + 1))[np.newaxis]
    encoded = engine.states.of(features)
    ids: list[int] = []
    firsts = []
    for line in lines:
        more = engine.spelling.ids(line, starts_with_space=bool(ids) or _starts_with_space(engine, encoded, prompt))[0]
        if not more or len(ids) + len(more) > longest:
            break
        firsts.append(len(ids))
        ids += more
    if not ids:
        return []
    weights = cross_attention(engine.model, encoded, [*prompt, *ids])
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt, *ids, engine.spelling.end]], device=engine.model.device)
        logits = engine.model(encoder_outputs=(encoded,), decoder_input_ids=tokens[:, :-1]).logits[0, len(prompt) - 1 :]
        chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[0, len(prompt) :, None])[:, 0]
    logprobs = np.split(chosen.cpu().numpy(), firsts[1:])
    starts = word_timestamps.word_starts(weights, len(prompt), len(log_mel.frames), firsts)
    return [
        ForcedLine(start, float(values.mean()), float(values.min()))
        for start, values in zip(starts, logprobs, strict=True)
    ]


def _starts_with_space(engine: Transformers, encoded: torch.Tensor, prompt: list[int]) -> bool:
    """Return whether the model writes a space before its first word: base models do, most tuned ones do not."""
    import torch

    with torch.inference_mode():
        tokens = torch.tensor([prompt], device=engine.model.device)
        logits = engine.model(encoder_outputs=(encoded,), decoder_input_ids=tokens).logits[0, -1]
    logits = logits[: engine.spelling.end].float().cpu().numpy()
    word_start_mask = engine.spelling.word_start_mask
    return bool(np.logaddexp.reduce(logits[word_start_mask]) >= np.logaddexp.reduce(logits[~word_start_mask]))
