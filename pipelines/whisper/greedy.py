"""Decode greedily with the modules of transformers, without the overhead of its `generate`: for scores on a CPU.

The texts are those of `GenerationMixin.generate` in float32. It is faster because windows whose text has ended are no
longer computed, suppressed tokens are looked up once, and the probability of no speech comes from the same pass.
It works on weights in memory, so that training validates with it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration


@dataclass(frozen=True)
class DecodedTokens:
    """The tokens of one window."""

    ids: list[int]
    """Without the prompt; the last one is an end token unless the text was cut."""
    logprobs: list[float]
    """Natural logarithm of the probability of each token, suppressed tokens left out. Empty unless requested."""
    no_speech: float
    """Probability of no speech (decoding.no_speech_probabilities). 0 unless requested."""

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)

    def without(self, end_tokens: list[int]) -> tuple[list[int], list[float]]:
        """Return the ids and log-probabilities of the text alone."""
        n = len(self.ids) - (self.ids[-1] in end_tokens)
        return self.ids[:n], self.logprobs[:n]


def runs_on(model: WhisperForConditionalGeneration) -> bool:
    """Return True on a CPU. Elsewhere a step costs little, and looking which texts have ended costs more."""
    return model.device.type == "cpu"


def decode(
    model: WhisperForConditionalGeneration,
    encoded: torch.Tensor,
    prompt: list[int],
    max_new_tokens: int,
    end_tokens: list[int],
    no_speech_token: int | None = None,
) -> list[DecodedTokens]:
    """Return the texts of windows `encoded` float [B, T / 2, d_model], at most `max_new_tokens` tokens each.

    Tokens that the generation settings suppress are never written. Log-probabilities and the probability of no speech
    are computed if `no_speech_token` is given. Call it in evaluation mode and without gradients.
    """
    import torch

    decoder, scored = _Decoder(model, encoded), no_speech_token is not None
    ids: list[list[int]] = [[] for _ in encoded]
    logprobs: list[list[float]] = [[] for _ in encoded]
    states = decoder.append(torch.tensor([prompt]).expand(len(encoded), -1))
    no_speech = [0.0] * len(encoded)
    if scored:
        no_speech = torch.softmax(model.proj_out(states[:, 0]), dim=-1)[:, no_speech_token].tolist()
    rows = list(range(len(encoded)))  # the window of each row of the batch; -1 once its text has ended
    for step in range(min(max_new_tokens, model.config.max_target_positions - len(prompt))):
        scores = decoder.scores(states[:, -1], is_first=step == 0)
        highest, tokens = scores.max(dim=-1)
        values = (highest - scores.logsumexp(dim=-1)).tolist() if scored else [0.0] * len(rows)
        for position, (token, value) in enumerate(zip(tokens.tolist(), values, strict=True)):
            if (row := rows[position]) < 0:
                continue
            ids[row].append(token)
            logprobs[row].append(value)
            if token in end_tokens:
                rows[position] = -1
        running = [position for position, row in enumerate(rows) if row >= 0]
        if not running:
            break
        if 2 * len(running) <= len(rows):
            decoder.select(running)
            tokens, rows = tokens[running], [rows[position] for position in running]
        states = decoder.append(tokens[:, None])
    return [
        DecodedTokens(one, values if scored else [], silent)
        for one, values, silent in zip(ids, logprobs, no_speech, strict=True)
    ]


class _Decoder:
    """The decoder's keys and values for a batch of texts that grow together."""

    def __init__(self, model: WhisperForConditionalGeneration, encoded: torch.Tensor):
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        self.model, self.encoded = model, encoded
        self.past: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        settings, vocabulary = model.generation_config, range(model.config.vocab_size)
        self.suppressed, self.suppressed_first = (
            torch.tensor([token for token in tokens or [] if token in vocabulary], dtype=torch.int64)
            for tokens in (settings.suppress_tokens, settings.begin_suppress_tokens)
        )

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` int64 [B, n] and return the decoder's states float [B, n, d_model]."""
        return self.model.model.decoder(
            input_ids=tokens, encoder_hidden_states=self.encoded, past_key_values=self.past, use_cache=True
        ).last_hidden_state

    def scores(self, states: torch.Tensor, *, is_first: bool) -> torch.Tensor:
        """Return the scores float [B, vocabulary] of the next token, suppressed tokens at minus infinity."""
        scores = self.model.proj_out(states).float()
        scores[:, self.suppressed] = -float("inf")
        if is_first:
            scores[:, self.suppressed_first] = -float("inf")
        return scores

    def select(self, rows: list[int]) -> None:
        """Continue with the texts of these rows of the batch."""
        import torch

        indices = torch.tensor(rows)
        self.encoded = self.encoded[indices]
        for cache in (self.past.self_attention_cache, self.past.cross_attention_cache):
            cache.batch_select_indices(indices)
