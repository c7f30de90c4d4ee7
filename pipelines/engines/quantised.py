"""Decoding by CTranslate2: weights in eight bits on a CPU, in half precision on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.labels import prompt_ids

if TYPE_CHECKING:
    from transformers import WhisperProcessor


class CTranslate2:
    """An exported folder (export.py), loaded."""

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

        self.model = ctranslate2.models.Whisper(
            str(folder), device=device, compute_type=compute_type, intra_threads=threads
        )
        self.processor, self.prompt = processor, prompt_ids(processor, language)
        self.max_new_tokens = max_new_tokens
        self.name = f"ctranslate2 {device} {self.model.compute_type}"
        self.n_mels = self.model.n_mels
