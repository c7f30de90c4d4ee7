"""Transcripts to the token ids that the decoder is to produce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.errors import LabError

if TYPE_CHECKING:
    import tokenizers
    from transformers import WhisperProcessor


@dataclass(frozen=True)
class Labeller:
    """A clean transcript to its label ids: language, task, no timestamps, text, end.

    The start token is absent: the model puts it in front when it shifts the labels, and a second one, as the 2022
    collators leave it there under today's tokenizers, ruins the WER.

    It can be pickled, and needs no transformers: the processes that make shards start in half the time.
    """

    tokenizer: tokenizers.Tokenizer
    before: tuple[int, ...]
    after: tuple[int, ...]

    def __call__(self, transcript: str) -> list[int]:
        return [*self.before, *self.tokenizer.encode(transcript, add_special_tokens=False).ids, *self.after]


def labeller(processor: WhisperProcessor, language: str) -> Labeller:
    """The Labeller of a model's processor. Raises LabError for a language that is not one of Whisper's."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())  # ours: nobody sets truncation on it
    own.no_truncation()
    own.no_padding()
    return Labeller(own, tuple(prompt_ids(processor, language)[1:]), (processor.tokenizer.eos_token_id,))


def prompt_ids(processor: WhisperProcessor, language: str) -> list[int]:
    """The decoder's first tokens: start of transcript, language, task, no timestamps."""
    tokenizer = processor.tokenizer
    names = ["<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    for name, token in zip(names, ids, strict=True):
        if token is None or token == tokenizer.unk_token_id:
            raise LabError(
                f"this model's tokenizer has no {name}: language {language!r} is not one of Whisper's, "
                "or the model is not multilingual"
            )
    return ids
