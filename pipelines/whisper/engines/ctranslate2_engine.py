"""Decoding by CTranslate2: weights in eight bits on a CPU, in half precision on a GPU. No torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.tokens import Spelling

_PLACE_S = 0.02
"""One place of the encoder: two frames."""


class CTranslate2:
    """An exported folder (export.py), loaded. It takes windows of any even length, as the tuned weights do."""

    def __init__(self, folder: Path, language: str, device: str, compute_type: str, threads: int, max_new_tokens: int):
        import ctranslate2
        from tokenizers import Tokenizer

        self.spelling = Spelling(Tokenizer.from_file(str(folder / "tokenizer.json")))
        self.prompt = self.spelling.prompt(language)
        self.model = ctranslate2.models.Whisper(
            str(folder), device=device, compute_type=compute_type, intra_threads=threads
        )
        self.max_new_tokens = max_new_tokens
        self.name = f"ctranslate2 {device} {self.model.compute_type}"
        self.n_mels = self.model.n_mels
        self.can_align = bool(json.loads((folder / "config.json").read_text("utf-8")).get("alignment_heads"))

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def decode(self, windows: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Hypothesis]:
        import ctranslate2

        if temperature:
            ctranslate2.set_random_seed(seed)
        results = self._generate(
            windows,
            self.max_new_tokens,
            return_logits_vocab=True,
            sampling_topk=0 if temperature else 1,
            sampling_temperature=temperature or 1.0,
        )
        return [self._hypothesis(result) for result in results]

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        """By the heads of the decoder that follow the sound, and dynamic time warping: as OpenAI times words."""
        ids, firsts = self.spelling.ids(text)
        if not ids or not self.can_align:
            return []
        start = self.prompt[:-1]  # align adds the token for "no time stamps" by itself
        (told,) = self.model.align(_view(window[np.newaxis]), start, [ids], [frames])
        begins: dict[int, int] = {}
        for token, place in told.alignments:
            begins.setdefault(token, place)
        return [begins[token] * _PLACE_S for token in firsts] if all(token in begins for token in firsts) else []

    def no_speech(self, windows: np.ndarray) -> list[float]:
        return [result.no_speech_prob for result in self._generate(windows, 1, return_no_speech_prob=True)]

    def _generate(self, windows: np.ndarray, max_new_tokens: int, **how: Any) -> list[Any]:
        # CTranslate2 writes at most the half of max_length, and what the prompt but for its last token leaves of it
        most = max(2 * max_new_tokens, len(self.prompt) - 1 + max_new_tokens)
        return self.model.generate(_view(windows), [self.prompt] * len(windows), beam_size=1, max_length=most, **how)

    def _hypothesis(self, result: Any) -> Hypothesis:
        """The transcript with its probabilities: the logits of each token, the end token's among them, are at hand."""
        ids = list(result.sequences_ids[0])
        chosen = [*ids, self.spelling.end][: len(result.logits[0])]  # without an end token where it was cut
        if not chosen:
            return Hypothesis("", 0.0, 0)
        logprobs = [_logprob(np.array(view), token) for view, token in zip(result.logits[0], chosen, strict=True)]
        words = self.spelling.words(ids, logprobs[: len(ids)])
        return Hypothesis(self.spelling.text(ids), sum(logprobs) / len(logprobs), len(logprobs), words)


def _view(windows: np.ndarray) -> Any:
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(windows, dtype=np.float32))


def _logprob(logits: np.ndarray, token: int) -> float:
    """The log-probability of `token` by logits float [vocabulary]."""
    logits = logits.astype(np.float32, copy=False)
    most = logits.max()
    return float(logits[token] - most - np.log(np.exp(logits - most).sum(dtype=np.float64)))
