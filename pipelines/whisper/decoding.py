"""Decode batches of clips with transformers at the length of the clips instead of 30 s."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipelines.whisper import greedy
from pipelines.whisper.batching import Collator, sorted_batches
from pipelines.whisper.greedy import DecodedTokens
from pipelines.whisper.log_mel import FULL_FRAMES
from pipelines.whisper.tokens import prompt_ids, spelling_of

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, WhisperForConditionalGeneration, WhisperProcessor

    from pipelines.whisper.batching import ClipFeatures


_T = TypeVar("_T")


def _ignore(n: int) -> None:
    pass


@dataclass(frozen=True)
class RowDecodingOptions:
    """How the rows of a feature cache are decoded for scores: greedily and without timestamps.

    DecodingOptions are those of transcription.
    """

    language: str
    """Code of one of Whisper's languages, such as `sv`."""
    max_new_tokens: int
    """Longer transcripts are cut. The end token is counted, the prompt is not."""
    word_logprobs: bool = False
    """Fill `Hypothesis.words`."""
    full_context: bool = False
    """Pad every clip to 30 s instead of to the longest clip of its batch. Read by the functions that take rows."""
    batch_frames: int = 24_000
    """Log-mel frames of a batch, padding included. Read by the functions that take rows."""
    on_cut: Callable[[int], None] = field(default=_ignore, compare=False, repr=False)
    """Called with the number of transcripts of a batch that were cut. Read by `decode_to_text`."""


@dataclass(frozen=True)
class Hypothesis:
    """A decoded window: its transcript and the model's log-probabilities."""

    text: str
    logprob: float
    """Mean natural logarithm of the probability of its tokens, the end token included: `avg_logprob` in OpenAI's
    decoder. Suppressed tokens take no part in the softmax. At most 0."""
    tokens: int
    """Number of tokens in that mean; without an end token if the transcript was cut at `max_new_tokens`."""
    words: tuple[tuple[str, float], ...] = ()
    """The words of `text`, split at white space, each with the natural logarithm of its probability: the sum over its
    tokens. Empty unless `RowDecodingOptions.word_logprobs`."""
    no_speech: float = 0.0
    """Probability that the window holds no speech (see `no_speech_probabilities`)."""
    end_s: float | None = None
    """Where the text ends, from the start of the window; None if it is taken to last to the end of the window."""


def decode_rows(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: ClipFeatures,
    rows: np.ndarray,
    options: RowDecodingOptions,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[Hypothesis]:
    """Return the hypotheses of cache rows, in the order of `rows` (see `decode` and `decode_in_batches`)."""
    return decode_in_batches(
        lambda features: decode(model, processor, features, options), cache, rows, options, on_clips
    )


def decode_rows_to_text(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    cache: ClipFeatures,
    rows: np.ndarray,
    options: RowDecodingOptions,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Return the transcripts of cache rows, in the order of `rows` (see `decode_to_text` and `decode_in_batches`)."""
    return decode_in_batches(
        lambda features: decode_to_text(model, processor, features, options), cache, rows, options, on_clips
    )


def decode_in_batches(
    decode_batch: Callable[[torch.Tensor], list[_T]],
    cache: ClipFeatures,
    rows: np.ndarray,
    options: RowDecodingOptions,
    on_clips: Callable[[int], None] = lambda n: None,
) -> list[_T]:
    """Return the result of `decode_batch` for each of `rows`, in their order.

    Clips are decoded longest first, in batches float32 [B, n_mels, T] of at most `options.batch_frames` frames.
    `on_clips` is called with the number of clips after each batch.
    """
    collate = Collator(cache, full_context=options.full_context)
    lengths = np.array([len(cache.log_mel(row).frames) for row in rows])
    if options.full_context:
        lengths = np.full_like(lengths, FULL_FRAMES)
    results: dict[int, _T] = {}
    for batch in sorted_batches(lengths, options.batch_frames):
        features = collate([int(rows[i]) for i in batch])["input_features"]
        results |= zip(batch.tolist(), decode_batch(features), strict=True)
        on_clips(len(batch))
    return [results[i] for i in range(len(rows))]


def decode_to_text(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    features: torch.Tensor,
    options: RowDecodingOptions,
) -> list[str]:
    """Return the greedy transcripts of `features` float [B, n_mels, T], T even and at most 3000.

    Language and task are forced, timestamps are off, and the tokens that the model's generation settings suppress
    stay suppressed. The encoder runs once, at T frames; Whisper's own `generate` in transformers would pad to 30 s.
    """
    return decode_states_to_text(model, processor, encode(model, features), options)


def decode_states_to_text(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    encoded: torch.Tensor,
    options: RowDecodingOptions,
) -> list[str]:
    """Return the result of `decode_to_text` for windows that `encode` has encoded."""
    prompt = prompt_ids(processor, options.language)
    if greedy.runs_on(model):
        with inference(model):
            decoded = greedy.decode(model, encoded, prompt, options.max_new_tokens, _end_tokens(model))
        tokens = [one.ids for one in decoded]
    else:
        tokens = generate_from_states(model, encoded, prompt, options.max_new_tokens).tolist()
    options.on_cut(sum(set(ids).isdisjoint(_end_tokens(model)) for ids in tokens))
    return _texts(processor, tokens)


def decode(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    features: torch.Tensor,
    options: RowDecodingOptions,
) -> list[Hypothesis]:
    """Return the hypotheses of `features` float [B, n_mels, T]: the texts are those of `decode_to_text`."""
    prompt, encoded, ends = prompt_ids(processor, options.language), encode(model, features), _end_tokens(model)
    if greedy.runs_on(model):
        with inference(model):
            decoded = greedy.decode(
                model, encoded, prompt, options.max_new_tokens, ends, no_speech_token=no_speech_token(prompt)
            )
    else:
        decoded = _generate_scored(model, encoded, prompt, options)
    texts = _texts(processor, [one.ids for one in decoded])
    spelling = spelling_of(processor) if options.word_logprobs else None
    hypotheses = []
    for text, one in zip(texts, decoded, strict=True):
        words = spelling.words(*one.without(ends)) if spelling else ()
        hypotheses.append(Hypothesis(text, one.mean_logprob, len(one.ids), words, one.no_speech))
    return hypotheses


def _generate_scored(
    model: WhisperForConditionalGeneration, encoded: torch.Tensor, prompt: list[int], options: RowDecodingOptions
) -> list[DecodedTokens]:
    """Return the tokens of windows that `encode` has encoded, by the `generate` of transformers."""
    import torch

    steps: list[torch.Tensor] = []

    def record_logprobs(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        steps.append(logprobs.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0])
        return scores

    tokens = generate_from_states(model, encoded, prompt, options.max_new_tokens, record_logprobs)
    is_end = torch.isin(tokens, torch.tensor(_end_tokens(model), device=tokens.device))
    is_scored = is_end.cumsum(dim=-1) - is_end.int() == 0  # up to the first end token; the others are padding
    columns = tokens, torch.stack(steps, dim=-1), is_scored, no_speech_probabilities(model, encoded, prompt)
    return [
        DecodedTokens(ids[scored].tolist(), logprobs[scored].tolist(), no_speech)
        for ids, logprobs, scored, no_speech in zip(*columns, strict=True)
    ]


def no_speech_probabilities(
    model: WhisperForConditionalGeneration, encoded: torch.Tensor, prompt: list[int]
) -> list[float]:
    """Return the probability of no speech for each of the windows `encoded` float [B, T / 2, d_model].

    It is the probability of Whisper's no-speech token right after the start token, before language and task, as in
    openai/whisper, decoding.py. Fine-tuning on speech alone unlearns it.
    """
    import torch

    first = torch.full((len(encoded), 1), prompt[0], device=model.device)
    with inference(model):
        logits = model(encoder_outputs=(encoded,), decoder_input_ids=first).logits[:, 0]
    return torch.softmax(logits.float(), dim=-1)[:, no_speech_token(prompt)].tolist()


def no_speech_token(prompt: list[int]) -> int:
    """Return the id of <|nospeech|>, which older tokenizers call <|nocaptions|>: the one before <|notimestamps|>."""
    return prompt[-1] - 1


def _texts(processor: WhisperProcessor, tokens: list[list[int]]) -> list[str]:
    return [
        text.strip()
        for text in processor.tokenizer.batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    ]


def _end_tokens(model: WhisperForConditionalGeneration) -> list[int]:
    ends = model.generation_config.eos_token_id  # a list after training with transformers 5.15
    ends = model.config.eos_token_id if ends is None else ends
    return ends if isinstance(ends, list) else [ends]


def generate(
    model: WhisperForConditionalGeneration,
    features: torch.Tensor,
    prompt: list[int],
    max_new_tokens: int,
    process_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return token ids int64 [B, at most max_new_tokens], decoded greedily, padded with end tokens.

    `process_scores` is called before each token with the tokens so far int64 [B, n] and the scores of the next token
    float [B, vocabulary], suppressed tokens at minus infinity. It returns the scores to decode from.
    """
    return generate_from_states(model, encode(model, features), prompt, max_new_tokens, process_scores)


def encode(model: WhisperForConditionalGeneration, features: torch.Tensor) -> torch.Tensor:
    """Return the encoder's states float [B, T / 2, d_model] of `features` float [B, n_mels, T]."""
    import torch

    with inference(model):
        features = features.to(model.device, model.dtype)
        if greedy.runs_on(model) and features.shape[-1] == FULL_FRAMES:
            # one by one: the states of a window fit into the processor's cache, and the values are the same
            return torch.cat([model.model.encoder(window)[0] for window in features.split(1)])
        return model.model.encoder(features)[0]


def generate_from_states(
    model: WhisperForConditionalGeneration,
    encoded: torch.Tensor,
    prompt: list[int],
    max_new_tokens: int,
    process_scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the result of `generate` for windows that `encode` has encoded."""
    import torch
    from transformers import GenerationConfig, GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    saved = model.generation_config
    settings = GenerationConfig(
        max_length=min(len(prompt) + max_new_tokens, model.config.max_target_positions),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=_end_tokens(model),
        pad_token_id=_end_tokens(model)[0],
        decoder_start_token_id=prompt[0],
        suppress_tokens=saved.suppress_tokens,
        begin_suppress_tokens=saved.begin_suppress_tokens,
    )
    start = torch.tensor([prompt], device=model.device).expand(len(encoded), -1)
    with inference(model), _only_settings(model, settings):
        # not Whisper's own `generate`, which pads to 30 s and seeks through segments
        out = GenerationMixin.generate(
            model,
            encoder_outputs=BaseModelOutput(encoded),
            decoder_input_ids=start,
            attention_mask=torch.ones(encoded.shape[:2], device=model.device),
            decoder_attention_mask=torch.ones_like(start),
            generation_config=settings,
            logits_processor=[process_scores] if process_scores else None,
        )
    return out[:, len(prompt) :]


@contextlib.contextmanager
def _only_settings(model: WhisperForConditionalGeneration, settings: GenerationConfig) -> Iterator[None]:
    """Decode with `settings` alone: transformers would take a missing one from the model's, such as its penalties."""
    saved, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = saved


@contextlib.contextmanager
def inference(model: WhisperForConditionalGeneration) -> Iterator[None]:
    """Compute without gradients, in evaluation mode, in bfloat16 where that is used."""
    import torch

    was_training = model.training
    model.eval()
    with torch.inference_mode(), autocast(model):
        yield
    model.train(was_training)


def autocast(model: WhisperForConditionalGeneration) -> torch.autocast:
    """Return an autocast context: bfloat16 on GPUs that support it, at twice the speed and the same WER."""
    import torch

    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(model))


def uses_bfloat16(model: WhisperForConditionalGeneration) -> bool:
    """Return True if this model is decoded in bfloat16."""
    import torch

    return model.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def engine_name(model: WhisperForConditionalGeneration) -> str:
    """Return library, device and precision, such as `transformers cpu float32`."""
    return f"transformers {model.device.type} {'bfloat16' if uses_bfloat16(model) else 'float32'}"
