"""Decode with transformers on any torch device: CPU, CUDA, MPS, ZeroGPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.speech.audio import Waveform
from pipelines.whisper import decoding
from pipelines.whisper import log_mel as features
from pipelines.whisper import model as whisper_model
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.engines import search, word_timestamps
from pipelines.whisper.engines.encoder_states import EncoderStates
from pipelines.whisper.engines.search import Prompt
from pipelines.whisper.engines.token_rules import TokenRules
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.model import ModelRef
from pipelines.whisper.tokens import spelling_of

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration


def alignment_heads(model: WhisperForConditionalGeneration) -> list[tuple[int, int]]:
    """Return layer and number of the decoder's alignment heads; none if the generation settings name none."""
    heads, config = getattr(model.generation_config, "alignment_heads", None) or [], model.config
    return [(n, head) for n, head in heads if n < config.decoder_layers and head < config.decoder_attention_heads]


def cross_attention(model: WhisperForConditionalGeneration, encoded: torch.Tensor, tokens: list[int]) -> np.ndarray:
    """Return the attention of `tokens` to one window, float32 [alignment heads, len(tokens), T / 2].

    `encoded`: the window's states float [1, T / 2, d_model]. Fast attention returns no weights, so they are computed
    again from the queries and keys of the layers.
    """
    import torch

    heads, states, hooks = alignment_heads(model), {}, []
    layers = model.model.decoder.layers
    for n in {layer for layer, _ in heads}:
        attention = layers[n].encoder_attn
        for name in ("q_proj", "k_proj"):

            def keep(module: Any, inputs: Any, output: torch.Tensor, key: tuple[int, str] = (n, name)) -> None:
                states[key] = output[0].float()

            hooks.append(getattr(attention, name).register_forward_hook(keep))
    try:
        with torch.inference_mode(), decoding.autocast(model):
            model(
                encoder_outputs=(encoded,),
                decoder_input_ids=torch.tensor([tokens], device=model.device),
            )
    finally:
        for hook in hooks:
            hook.remove()
    width = model.config.d_model // model.config.decoder_attention_heads
    weights = []
    for n, head in heads:
        queries, keys = (states[n, name][:, head * width : (head + 1) * width] for name in ("q_proj", "k_proj"))
        weights.append(torch.softmax(queries @ keys.T * width**-0.5, dim=-1))
    return torch.stack(weights).cpu().numpy()


class Transformers:
    """A loaded model in float32, with bfloat16 autocast on GPUs that support it."""

    def __init__(self, ref: ModelRef, options: DecodingOptions, device: str, threads: int):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model = whisper_model.load(ref, device=device).eval()
        self.processor = whisper_model.load_processor(ref, options.language)
        self.options = options
        self.name = decoding.engine_name(self.model)
        self.n_mels = self.model.config.num_mel_bins
        self.spelling = spelling_of(self.processor)
        self.can_align = bool(alignment_heads(self.model))
        self.states = EncoderStates(lambda windows: decoding.encode(self.model, torch.from_numpy(windows)))
        if "spaces" in sys.modules:  # Hugging Face ZeroGPU attaches a GPU for the length of a decorated call
            on_gpu = sys.modules["spaces"].GPU
            self.decode, self.word_starts = on_gpu(self.decode), on_gpu(self.word_starts)

    def check(self, options: DecodingOptions) -> None:
        self.spelling.search_prompt(options, self.model.config.max_target_positions)

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract(waveform, self.n_mels)

    def decode(
        self, windows: np.ndarray, options: DecodingOptions | None = None, temperature: float = 0.0
    ) -> list[Hypothesis]:
        options, positions = options or self.options, self.model.config.max_target_positions
        prompt = Prompt(*self.spelling.search_prompt(options, positions))
        saved = self.model.generation_config
        rules = TokenRules.of(self.spelling, options, saved.suppress_tokens or [], saved.begin_suppress_tokens or [])
        max_tokens = min(options.max_new_tokens, positions - len(prompt))
        decoder = _Decoder(self.model, self.states.of(windows))
        texts = search.search(decoder, prompt, len(windows), rules, options, temperature, max_tokens)
        return [search.hypothesis(text, self.spelling, options) for text in texts]

    def detect_language(self, window: np.ndarray) -> str:
        return search.likeliest_language(self._first_logits(window), self.spelling)

    def language_probabilities(self, window: np.ndarray) -> dict[str, float]:
        """Return the probability of each language for the features of a window, float32 [n_mels, T]."""
        return search.language_probabilities(self._first_logits(window), self.spelling)

    def _first_logits(self, window: np.ndarray) -> np.ndarray:
        import torch

        encoded = decoding.encode(self.model, torch.from_numpy(window[np.newaxis]))
        start = np.array([self.spelling.prompt(self.options.language)[:1]], dtype=np.int64)
        return _Decoder(self.model, encoded).step(start)[0]

    def word_starts(self, windows: np.ndarray, frames: Sequence[int], texts: Sequence[str]) -> list[list[float]]:
        prompt = self.spelling.prompt(self.options.language)
        longest = self.model.config.max_target_positions - len(prompt)
        starts = []
        for n, text in enumerate(texts):
            ids, firsts = self.spelling.ids(text)
            if self.can_align and 0 < len(ids) <= longest:
                weights = cross_attention(self.model, self.states.of(windows)[n : n + 1], [*prompt, *ids])
                starts.append(word_timestamps.word_starts(weights, len(prompt), frames[n], firsts))
            else:
                starts.append([])
        return starts

    def attention(self, window: np.ndarray, n_frames: int, text: str) -> np.ndarray:
        """Return the attention with which each token of `text`, and the end, is written (AttentiveEngine)."""
        prompt, (ids, _) = self.spelling.prompt(self.options.language), self.spelling.ids(text)
        weights = cross_attention(self.model, self.states.of(window[np.newaxis]), [*prompt, *ids])
        return word_timestamps.attention_of_text(weights, len(prompt), n_frames)


class _Decoder:
    """The decoder's cache for a batch of texts that grow (search.TextDecoder)."""

    def __init__(self, model: WhisperForConditionalGeneration, encoded: torch.Tensor):
        from transformers import DynamicCache, EncoderDecoderCache

        self.model, self.encoded = model, encoded
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        with decoding.inference(self.model):
            ids = torch.from_numpy(tokens).to(self.model.device)
            states = self.model.model.decoder(
                ids, encoder_hidden_states=self.encoded, past_key_values=self.cache, use_cache=True
            )
            logits = self.model.proj_out(states.last_hidden_state[:, -1])
        return logits.float().cpu().numpy()

    def select(self, rows: np.ndarray) -> None:
        import torch

        if np.array_equal(rows, np.arange(len(self.encoded))):
            return
        positions = torch.from_numpy(rows).to(self.model.device)
        with decoding.inference(self.model):
            self.encoded = self.encoded[positions]  # a row for each text: rows follow the order of their windows
            self.cache.batch_select_indices(positions)
