"""Decoding by CTranslate2: weights in eight bits on a CPU, in half precision on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.decoding import Heard, words_of
from pipelines.labels import prompt_ids

if TYPE_CHECKING:
    from transformers import WhisperProcessor


class CTranslate2:
    """An exported folder (export.py), loaded. It takes windows of any even length, as the tuned weights do."""

    def __init__(
        self,
        folder: Path,
        processor: WhisperProcessor,
        language: str,
        device: str,
        compute_type: str,
        threads: int,
        max_new_tokens: int,
    ):
        import ctranslate2

        self.prompt = prompt_ids(processor, language)
        self.model = ctranslate2.models.Whisper(
            str(folder), device=device, compute_type=compute_type, intra_threads=threads
        )
        self.processor, self.max_new_tokens = processor, max_new_tokens
        self.name = f"ctranslate2 {device} {self.model.compute_type}"
        self.n_mels = self.model.n_mels

    def hear(self, features: np.ndarray, temperature: float = 0.0, seed: int = 0) -> list[Heard]:
        import ctranslate2

        if temperature:
            ctranslate2.set_random_seed(seed)
        results = self._generate(
            features,
            self.max_new_tokens,
            return_logits_vocab=True,
            sampling_topk=0 if temperature else 1,
            sampling_temperature=temperature or 1.0,
        )
        return [self._heard(result) for result in results]

    def no_speech(self, features: np.ndarray) -> list[float]:
        return [result.no_speech_prob for result in self._generate(features, 1, return_no_speech_prob=True)]

    def _generate(self, features: np.ndarray, max_new_tokens: int, **how: Any) -> list[Any]:
        import ctranslate2

        view = ctranslate2.StorageView.from_array(np.ascontiguousarray(features, dtype=np.float32))
        # CTranslate2 writes at most the half of max_length, and what the prompt but for its last token leaves of it
        most = max(2 * max_new_tokens, len(self.prompt) - 1 + max_new_tokens)
        return self.model.generate(view, [self.prompt] * len(features), beam_size=1, max_length=most, **how)

    def _heard(self, result: Any) -> Heard:
        """The transcript with its probabilities: the logits of each token, the end token's among them, are at hand."""
        import torch

        ids, end = list(result.sequences_ids[0]), self.processor.tokenizer.eos_token_id
        chosen = [*ids, end][: len(result.logits[0])]  # without an end token where it was cut
        if not chosen:
            return Heard("", 0.0, 0)
        logits = torch.from_numpy(np.stack([np.array(view) for view in result.logits[0]])).float()
        logprobs = (logits.gather(1, torch.tensor(chosen)[:, None])[:, 0] - logits.logsumexp(dim=1)).tolist()
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        words = words_of(self.processor, ids, logprobs[: len(ids)])
        return Heard(text.strip(), sum(logprobs) / len(logprobs), len(logprobs), words)
