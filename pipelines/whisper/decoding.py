"""Batched generation at the length of the clips: what validation, evaluation and the transcriber decode with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipelines.whisper.batching import Collator, sorted_batches
from pipelines.whisper.tokens import Spelling, prompt_ids

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from pipelines.whisper.batching import ClipFeatures


_T = TypeVar("_T")


@dataclass(frozen=True)
class Heard:
    """A transcript and how sure the model was of it."""

    text: str
    logprob: float
    """Mean natural logarithm of the probability of its tokens, the end token among them; what Whisper's own decoder
    calls avg_logprob. Suppressed tokens have no share in the probabilities. 0 is certainty."""
    tokens: int
    """Over how many tokens; without the end token where the transcript was cut at `max_new_tokens`."""
    words: tuple[tuple[str, float], ...] = ()
    """The words of `text` as it is split at blanks, each with the natural logarithm of its probability: the sum over
    its tokens. Empty where nobody asked."""


def decode_rows(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: ClipFeatures,
    rows: np.ndarray,
    *,
    language: str,
    batch_frames: int,
    max_new_tokens: int,
    full_context: bool = False,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Transcripts of cache rows, in the order of `rows`; decoded longest first in batches of at most `batch_frames`."""
    told = {"language": language, "max_new_tokens": max_new_tokens}
    return by_batches(
        lambda features: decode(model, processor, features, **told), cache, rows, batch_frames, full_context, on_clips
    )


def hear_rows(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: ClipFeatures,
    rows: np.ndarray,
    *,
    language: str,
    batch_frames: int,
    max_new_tokens: int,
    full_context: bool = False,
    closely: bool = False,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[Heard]:
    """The transcripts of `decode_rows`, each with how sure the model was of it (see `hear`)."""
    told = {"language": language, "max_new_tokens": max_new_tokens, "closely": closely}
    return by_batches(
        lambda features: hear(model, processor, features, **told), cache, rows, batch_frames, full_context, on_clips
    )


def by_batches(
    decoded: Callable[[torch.Tensor], list[_T]],
    cache: ClipFeatures,
    rows: np.ndarray,
    batch_frames: int,
    full_context: bool,
    on_clips: Callable[[int], None],
) -> list[_T]:
    """What `decoded` makes of each row, in the order of `rows`; it is given batches float32 [B, n_mels, T]."""
    collate = Collator(cache, full_context=full_context)
    lengths = np.array([len(cache.log_mel(row).frames) for row in rows])
    found: dict[int, _T] = {}
    for batch in sorted_batches(np.full_like(lengths, 3_000) if full_context else lengths, batch_frames):
        features = collate([int(rows[i]) for i in batch])["input_features"]
        found |= zip(batch.tolist(), decoded(features), strict=True)
        on_clips(len(batch))
    return [found[i] for i in range(len(rows))]


def decode(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    features: torch.Tensor,
    *,
    language: str,
    max_new_tokens: int,
) -> list[str]:
    """Greedy transcripts of `features` float [B, n_mels, T], T even and at most 3000.

    Language and task are forced, timestamps are off, and the tokens that the model's generation settings suppress
    stay suppressed. The encoder runs once, at T frames; transformers' own Whisper `generate` would pad to 30 s.
    """
    return _texts(processor, generate(model, features, prompt_ids(processor, language), max_new_tokens))


def hear(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    features: torch.Tensor,
    *,
    language: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    closely: bool = False,
) -> list[Heard]:
    """What `decode` returns, each transcript with how sure the model was of it.

    Above a `temperature` of 0 tokens are drawn, with a generator that `seed` starts; the probabilities told are those
    at temperature 1. `closely` adds `words`.
    """
    import torch

    steps: list[torch.Tensor] = []
    draws = torch.Generator(device=model.device).manual_seed(seed)

    def watch(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        told = torch.log_softmax(scores.float(), dim=-1)
        if temperature:  # the largest of scores with Gumbel noise is a draw from their softmax
            noise = -torch.empty_like(told).exponential_(generator=draws).log_()
            scores = told + temperature * noise
        steps.append(told.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0])
        return scores

    prompt = prompt_ids(processor, language)
    tokens = generate(model, features, prompt, max_new_tokens, watch)
    ended = torch.isin(tokens, torch.tensor(_ends(model), device=tokens.device))
    own = ended.cumsum(dim=-1) - ended.int() == 0  # up to the first end token; the others are padding
    counts = own.sum(dim=-1)
    logprobs = torch.stack(steps, dim=-1)
    means = (logprobs * own).sum(dim=-1) / counts
    words = [()] * len(features)
    if closely:
        spoken, spelling = own & ~ended, Spelling(processor.tokenizer.backend_tokenizer)
        words = [
            spelling.words(ids[mask].tolist(), found[mask].tolist())
            for ids, found, mask in zip(tokens, logprobs, spoken, strict=True)
        ]
    return [
        Heard(*told) for told in zip(_texts(processor, tokens), means.tolist(), counts.tolist(), words, strict=True)
    ]


def no_speech(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, features: torch.Tensor, *, language: str
) -> list[float]:
    """The probability that each of `features` holds no speech: that of Whisper's token for it as the very first.

    OpenAI's decoder reads it there, before language and task are told. Tuning on speech alone unlearns it.
    """
    import torch

    start, *_, no_timestamps = prompt_ids(processor, language)
    token = no_timestamps - 1  # <|nospeech|>, which older tokenizers call <|nocaptions|>
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(model):
        first = torch.full((len(features), 1), start, device=model.device)
        logits = model(features.to(model.device, model.dtype), decoder_input_ids=first).logits[:, 0]
    model.train(was_training)
    return torch.softmax(logits.float(), dim=-1)[:, token].tolist()


def _texts(processor: WhisperProcessor, tokens: torch.Tensor) -> list[str]:
    return [
        text.strip()
        for text in processor.tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    ]


def _ends(model: WhisperForConditionalGeneration) -> list[int]:
    ends = model.generation_config.eos_token_id  # the trainer of transformers 5.15 makes a list of it
    return ends if isinstance(ends, list) else [ends]


def generate(
    model: WhisperForConditionalGeneration,
    features: torch.Tensor,
    prompt: list[int],
    max_new_tokens: int,
    watch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Token ids int64 [B, at most max_new_tokens], greedy, end tokens as padding.

    `watch` is called before each token with those so far and the scores of the next, float [B, vocabulary], suppressed
    ones at minus infinity; it returns the scores.
    """
    import torch
    from transformers import GenerationConfig, GenerationMixin

    known = model.generation_config
    settings = GenerationConfig(
        max_length=len(prompt) + max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=known.eos_token_id,
        pad_token_id=_ends(model)[0],
        decoder_start_token_id=prompt[0],
        suppress_tokens=known.suppress_tokens,
        begin_suppress_tokens=known.begin_suppress_tokens,
    )
    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(model):
        encoded = model.model.encoder(features.to(model.device, model.dtype))
        start = torch.tensor([prompt], device=model.device).expand(len(features), -1)
        # the general generation loop, not Whisper's override, which pads to 30 s and seeks through segments
        out = GenerationMixin.generate(
            model,
            encoder_outputs=encoded,
            decoder_input_ids=start,
            attention_mask=torch.ones(encoded[0].shape[:2], device=model.device),
            decoder_attention_mask=torch.ones_like(start),
            generation_config=settings,
            logits_processor=[watch] if watch else None,
        )
    model.train(was_training)
    return out[:, len(prompt) :]


def autocast(model: WhisperForConditionalGeneration) -> torch.autocast:
    """bfloat16 on GPUs that have it: twice the speed at no cost in WER worth naming; float32 elsewhere."""
    import torch

    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=in_bfloat16(model))


def in_bfloat16(model: WhisperForConditionalGeneration) -> bool:
    """Whether this model is decoded in bfloat16."""
    import torch

    return model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
