"""Decode with CTranslate2: int8 weights on a CPU, half precision on a GPU. Needs neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper import model_files
from pipelines.whisper.decoding import Hypothesis, RowDecodingOptions
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.tokens import read_spelling


class CTranslate2:
    """A loaded export. It takes windows of any even number of frames, as fine-tuned weights do."""

    def __init__(self, folder: Path, options: RowDecodingOptions, device: str, compute_type: str, threads: int):
        import ctranslate2

        self.spelling = read_spelling(folder)
        self.prompt = self.spelling.prompt(options.language)
        self.model = ctranslate2.models.Whisper(
            str(folder), device=device, compute_type=compute_type, intra_threads=threads
        )
        self.text_positions = model_files.text_positions(folder)
        self.max_new_tokens = min(options.max_new_tokens, self.text_positions - len(self.prompt))
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
            return_no_speech_prob=True,
            sampling_topk=0 if temperature else 1,
            sampling_temperature=temperature or 1.0,
        )
        return [self._hypothesis(result) for result in results]

    def word_starts(self, window: np.ndarray, frames: int, text: str) -> list[float]:
        ids, firsts = self.spelling.ids(text)
        if not ids or not self.can_align or len(self.prompt) + len(ids) > self.text_positions:
            return []
        prompt = self.prompt[:-1]  # align appends the token for "no timestamps"
        (result,) = self.model.align(_storage_view(window[np.newaxis]), prompt, [ids], [frames])
        positions: dict[int, int] = {}
        for token, position in result.alignments:
            positions.setdefault(token, position)
        if any(token not in positions for token in firsts):
            return []
        return [positions[token] * features.POSITION_S for token in firsts]

    def _generate(self, windows: np.ndarray, max_new_tokens: int, **options: Any) -> list[Any]:
        # CTranslate2 generates at most max_length / 2 tokens, and at most max_length with the prompt before its last
        max_length = max(2 * max_new_tokens, len(self.prompt) - 1 + max_new_tokens)
        prompts = [self.prompt] * len(windows)
        return self.model.generate(_storage_view(windows), prompts, beam_size=1, max_length=max_length, **options)

    def _hypothesis(self, result: Any) -> Hypothesis:
        """Return the hypothesis of a result with logits for each of its tokens, the end token included."""
        ids = list(result.sequences_ids[0])
        tokens = [*ids, self.spelling.end][: len(result.logits[0])]  # no end token if the text was cut
        if not tokens:
            return Hypothesis("", 0.0, 0, no_speech=result.no_speech_prob)
        logprobs = [_logprob(np.array(view), token) for view, token in zip(result.logits[0], tokens, strict=True)]
        words = self.spelling.words(ids, logprobs[: len(ids)])
        mean = sum(logprobs) / len(logprobs)
        return Hypothesis(self.spelling.text(ids), mean, len(logprobs), words, result.no_speech_prob)


def _storage_view(windows: np.ndarray) -> Any:
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(windows, dtype=np.float32))


def _logprob(logits: np.ndarray, token: int) -> float:
    """Return the log-probability of `token` under `logits` float [vocabulary]."""
    logits = logits.astype(np.float32, copy=False)
    largest = logits.max()
    return float(logits[token] - largest - np.log(np.exp(logits - largest).sum(dtype=np.float64)))
