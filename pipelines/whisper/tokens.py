"""Convert transcripts to the token ids that the decoder is trained to write, and token ids to text and words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.whisper.bases import generation

if TYPE_CHECKING:
    import tokenizers
    from transformers import WhisperProcessor

    from pipelines.whisper.decoding_options import DecodingOptions


_SPACE = "\u0120"
"""How tokens of Whisper's byte-pair vocabulary spell a leading space (Ġ, as in GPT-2)."""
_CONTROL = re.compile(r"<\|.*\|>")
"""Names of control tokens and timestamps."""


@dataclass(frozen=True)
class Labeller:
    """Converts a clean transcript to label ids: language, task (unless English-only), no timestamps, text, end.

    The start token is left out: the model prepends it when it shifts the labels to the right. Labels that already have
    it teach the model to write a second one, which ruins the WER.

    Labellers can be pickled and do not import transformers, so the processes that write shards start in half the time.
    """

    tokenizer: tokenizers.Tokenizer
    """Reads any text as text (see `text_tokenizer`)."""
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def __call__(self, transcript: str) -> list[int]:
        return [*self.prefix, *self.tokenizer.encode(transcript, add_special_tokens=False).ids, *self.suffix]


@dataclass(frozen=True)
class Spelling:
    """Converts between token ids and text with the tokenizer alone, without transformers."""

    tokenizer: tokenizers.Tokenizer
    english_only: bool = False
    """Whether the model has no languages and tasks: its prompt names neither."""

    @property
    def end(self) -> int:
        """The end token. All larger ids are special tokens and timestamps, which spell nothing."""
        return self.tokenizer.token_to_id("<|endoftext|>")

    def prompt(self, language: str) -> list[int]:
        """Return the decoder's first tokens (see `prompt_ids`)."""
        names = _prompt_tokens(language, self.english_only)
        return [_require_id(name, self.tokenizer.token_to_id(name), language) for name in names]

    @property
    def first_timestamp(self) -> int:
        """The token <|0.00|>. Timestamps, 0.02 s apart, are the largest ids of the vocabulary."""
        return self.tokenizer.token_to_id("<|notimestamps|>") + 1

    def language_ids(self) -> dict[str, int]:
        """Return the code and token of each language of the vocabulary. Raises LabError for an English-only model."""
        ids = {code: self.tokenizer.token_to_id(f"<|{code}|>") for code in languages.NAMES}
        present = {code: token for code, token in ids.items() if token is not None}
        if self.english_only or len(present) < 2:
            raise LabError("this model knows one language only: name it instead of auto")
        return present

    def search_prompt(self, options: DecodingOptions, positions: int) -> tuple[list[int], list[int]]:
        """Return the decoder's first tokens up to the start token, and after it.

        A text prompt comes before the start token; its last tokens are kept, fewer than half of `positions`. Raises
        LabError for a language, a task or a suppressed token that the vocabulary lacks.
        """
        unknown = [token for token in options.suppress_tokens if token >= self.tokenizer.get_vocab_size()]
        if unknown:
            raise LabError(
                f"suppress_tokens must be below {self.tokenizer.get_vocab_size()}, the size of this model's "
                f"vocabulary, got {unknown[0]}"
            )
        start, *rest, no_timestamps = self.prompt(options.language)
        if options.task == "translate" and self.english_only:
            raise LabError("an English-only model does not translate: leave the task out, or name a multilingual model")
        if options.task == "translate":
            rest[1] = _require_id("<|translate|>", self.tokenizer.token_to_id("<|translate|>"), options.language)
        before = self.ids(options.prompt)[0][-(positions // 2 - 1) :] if options.prompt else []
        if before:
            before = [_require_id("<|startofprev|>", self.tokenizer.token_to_id("<|startofprev|>"), ""), *before]
        return [*before, start], [*rest, *([] if options.timestamps else [no_timestamps])]

    def text(self, ids: Sequence[int]) -> str:
        """Return the transcript without white space at its ends. Timestamps separate words."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if token < self.end:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        return " ".join(filter(None, (self.tokenizer.decode(run).strip() for run in runs)))

    def ids(self, text: str, starts_with_space: bool = True) -> tuple[list[int], list[int]]:
        """Return the tokens of `text`, and the index of the first token of each of its words.

        Every word follows a space. OpenAI's models write one before the first word too, and models that were tuned on
        single clips do not.
        """
        ids: list[int] = []
        firsts: list[int] = []
        for word in text.split():
            firsts.append(len(ids))
            spelled = f" {word}" if ids or starts_with_space else word
            ids += self._text_tokenizer.encode(spelled, add_special_tokens=False).ids
        return ids, firsts

    @cached_property
    def word_start_mask(self) -> np.ndarray:
        """Return which tokens begin with a space, bool [text tokens]."""
        return np.array([self.tokenizer.id_to_token(token).startswith(_SPACE) for token in range(self.end)])

    @cached_property
    def _text_tokenizer(self) -> tokenizers.Tokenizer:
        return text_tokenizer(self.tokenizer)

    def words(self, ids: Sequence[int], logprobs: Sequence[float]) -> tuple[tuple[str, float], ...]:
        """Return the words of `text(ids)`, split at white space, each with the sum of its tokens' `logprobs`."""
        groups: list[tuple[list[int], list[float]]] = []
        is_first = True
        for token, logprob in zip(ids, logprobs, strict=True):
            if token >= self.end:
                is_first = True
                continue
            if is_first or self.tokenizer.id_to_token(token).startswith(_SPACE):
                groups.append(([], []))
            is_first = False
            groups[-1][0].append(token)
            groups[-1][1].append(logprob)
        return tuple((word, sum(values)) for tokens, values in groups for word in self.tokenizer.decode(tokens).split())


def read_spelling(folder: Path) -> Spelling:
    """Return the Spelling of a model's folder. Raises LabError if its tokenizer.json is missing or damaged."""
    from tokenizers import Tokenizer

    try:
        return Spelling(Tokenizer.from_file(str(folder / "tokenizer.json")), generation.is_english_only_folder(folder))
    except Exception as error:  # the library raises plain Exception for all causes
        raise LabError(
            f"{folder} has no usable tokenizer.json ({' '.join(str(error).split())[:200]}): save the model's processor "
            "again, with save_pretrained"
        ) from None


@lru_cache(maxsize=4)
def _spelling_if_readable(folder: Path) -> Spelling | None:
    try:
        return read_spelling(folder)
    except LabError:
        return None


def token_ids(folder: Path, text: str) -> list[int]:
    """Return the tokens of a transcript for the model in `folder`; none if it has no readable tokenizer.json."""
    spelling = _spelling_if_readable(folder)
    return spelling.ids(text)[0] if spelling else []


def labeller(processor: WhisperProcessor, language: str) -> Labeller:
    """Return the Labeller of a model. Raises LabError if `language` is not one of Whisper's languages."""
    tokenizer = text_tokenizer(processor.tokenizer.backend_tokenizer)
    return Labeller(tokenizer, tuple(prompt_ids(processor, language)[1:]), (processor.tokenizer.eos_token_id,))


def text_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a copy that reads `<|endoftext|>`, `<|sv|>` and `<|0.00|>` in a text as the characters they are.

    Truncation and padding, which others may set on the original, are off.
    """
    from tokenizers import Tokenizer

    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if not _CONTROL.fullmatch(token["content"])]
    copy = Tokenizer.from_str(json.dumps(fields))
    copy.no_truncation()
    copy.no_padding()
    return copy


def only_language(folder: Path) -> str:
    """Return the language of a model that has only one, such as whisper-tiny.en; "" for the others."""
    if generation.is_english_only_folder(folder):
        return "en"
    spelling = _spelling_if_readable(folder)
    codes = [code for code in languages.NAMES if spelling and spelling.tokenizer.token_to_id(f"<|{code}|>") is not None]
    return codes[0] if len(codes) == 1 else ""


def check_language(folder: Path, language: str) -> None:
    """Raise LabError if the model in `folder` cannot be asked for `language`, without loading the model.

    A folder whose tokenizer cannot be read is left to the engine, which says what is wrong.
    """
    if spelling := _spelling_if_readable(folder):
        spelling.prompt(language)


def prompt_ids(processor: WhisperProcessor, language: str) -> list[int]:
    """Return the decoder's first tokens: start of transcript, language, task, no timestamps.

    An English-only model has no language and task. Raises LabError if `language` is not one of Whisper's languages.
    """
    tokenizer, names = processor.tokenizer, _prompt_tokens(language, is_english_only(processor))
    ids = tokenizer.convert_tokens_to_ids(names)
    ids = [None if token == tokenizer.unk_token_id else token for token in ids]
    return [_require_id(name, token, language) for name, token in zip(names, ids, strict=True)]


def is_english_only(processor: WhisperProcessor) -> bool:
    """Return True if `load_processor` loaded this for a model without languages and tasks."""
    return processor.tokenizer.language is None


def spelling_of(processor: WhisperProcessor) -> Spelling:
    """Return the Spelling of a processor that `load_processor` loaded."""
    return Spelling(processor.tokenizer.backend_tokenizer, is_english_only(processor))


def require_english(language: str, model: str = "this model") -> None:
    """Raise LabError unless `language` is the one that an English-only model knows."""
    if language != "en":
        raise LabError(
            f"{model} is English-only (such models end in .en): it has no tokens for language {language!r}. Name a "
            "multilingual model, such as openai/whisper-tiny, or take language en"
        )


def _prompt_tokens(language: str, english_only: bool) -> list[str]:
    if english_only:
        require_english(language)
        return ["<|startoftranscript|>", "<|notimestamps|>"]
    return ["<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>"]


def _require_id(name: str, token: int | None, language: str) -> int:
    if token is None:
        raise LabError(
            f"this model's tokenizer has no {name}: language {language!r} is not one of Whisper's, "
            "or the model is not multilingual"
        )
    return token
