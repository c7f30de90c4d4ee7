"""Transcripts to the token ids that the decoder is to produce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    import tokenizers
    from transformers import WhisperProcessor


_BLANK = "\u0120"
"""How a token of Whisper's byte-pair vocabulary writes the blank that it begins with."""


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


@dataclass(frozen=True)
class Spelling:
    """Token ids to text and words, by the tokenizer alone: it needs no transformers either."""

    tokenizer: tokenizers.Tokenizer

    @property
    def end(self) -> int:
        """The end token; all ids from here on are special ones and time stamps, and spell nothing."""
        return self.tokenizer.token_to_id("<|endoftext|>")

    def prompt(self, language: str) -> list[int]:
        """What `prompt_ids` gives. Raises LabError for a language that is not one of Whisper's."""
        return [_id_of(name, self.tokenizer.token_to_id(name), language) for name in _prompt(language)]

    def text(self, ids: Sequence[int]) -> str:
        """The transcript that `ids` spell, without blanks around it."""
        return self.tokenizer.decode([token for token in ids if token < self.end]).strip()

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of `text`, and which of them begin its words, as it is split at blanks."""
        ids: list[int] = []
        firsts: list[int] = []
        for word in text.split():
            firsts.append(len(ids))
            ids += self.tokenizer.encode(f" {word}", add_special_tokens=False).ids
        return ids, firsts

    def words(self, ids: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[str, float], ...]:
        """The words of `text(ids)`, as it is split at blanks, each with the sum of its tokens' `logprobs`."""
        end, groups = self.end, []
        for token, logprob in zip(ids, logprobs, strict=True):
            if token >= end:
                continue
            if not groups or self.tokenizer.id_to_token(token).startswith(_BLANK):
                groups.append(([], []))
            groups[-1][0].append(token)
            groups[-1][1].append(logprob)
        return tuple((part, sum(found)) for tokens, found in groups for part in self.tokenizer.decode(tokens).split())


def labeller(processor: WhisperProcessor, language: str) -> Labeller:
    """The Labeller of a model's processor. Raises LabError for a language that is not one of Whisper's."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())  # ours: nobody sets truncation on it
    own.no_truncation()
    own.no_padding()
    return Labeller(own, tuple(prompt_ids(processor, language)[1:]), (processor.tokenizer.eos_token_id,))


def prompt_ids(processor: WhisperProcessor, language: str) -> list[int]:
    """The decoder's first tokens: start of transcript, language, task, no timestamps."""
    tokenizer, names = processor.tokenizer, _prompt(language)
    ids = tokenizer.convert_tokens_to_ids(names)
    known = [None if token == tokenizer.unk_token_id else token for token in ids]
    return [_id_of(name, token, language) for name, token in zip(names, known, strict=True)]


def _prompt(language: str) -> list[str]:
    return ["<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]


def _id_of(name: str, token: int | None, language: str) -> int:
    if token is None:
        raise LabError(
            f"this model's tokenizer has no {name}: language {language!r} is not one of Whisper's, "
            "or the model is not multilingual"
        )
    return token
