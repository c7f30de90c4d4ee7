"""Decode with CTranslate2: int8 weights on a CPU, half precision on a GPU. Needs neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.infra.errors import LabError
from pipelines.speech.audio import Waveform
from pipelines.whisper import log_mel as features
from pipelines.whisper import model_files
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.engines import search
from pipelines.whisper.engines.encoder_states import EncoderStates
from pipelines.whisper.engines.search import Prompt, Text
from pipelines.whisper.engines.token_rules import MAX_FIRST_TIMESTAMP
from pipelines.whisper.log_mel import LogMel
from pipelines.whisper.tokens import read_spelling


class CTranslate2:
    """A loaded export. It takes windows of any even number of frames, as fine-tuned weights do."""

    def __init__(self, folder: Path, options: DecodingOptions, device: str, compute_type: str, threads: int):
        import ctranslate2

        self.spelling = read_spelling(folder)
        self.options = options
        self.prompt = self.spelling.prompt(options.language)
        self.model = ctranslate2.models.Whisper(
            str(folder), device=device, compute_type=compute_type, intra_threads=threads
        )
        self.states = EncoderStates(lambda windows: self.model.encode(_storage_view(windows)))
        self.text_positions = model_files.text_positions(folder)
        self.name = f"ctranslate2 {device} {self.model.compute_type}"
        self.n_mels = self.model.n_mels
        self.can_align = bool(json.loads((folder / "config.json").read_text("utf-8")).get("alignment_heads"))

    def check(self, options: DecodingOptions) -> None:
        if options.hotwords:
            raise LabError(
                "CTranslate2 cannot make hotwords more probable: take --engine onnx or transformers, or a prompt"
            )
        self.spelling.search_prompt(options, self.text_positions)

    def log_mel(self, waveform: Waveform) -> LogMel:
        return features.extract_light(waveform, self.n_mels)

    def decode(
        self, windows: np.ndarray, options: DecodingOptions | None = None, temperature: float = 0.0
    ) -> list[Hypothesis]:
        import ctranslate2

        options = options or self.options
        self.check(options)
        prompt = Prompt(*self.spelling.search_prompt(options, self.text_positions))
        max_tokens = min(options.max_new_tokens, self.text_positions - len(prompt))
        if temperature:
            ctranslate2.set_random_seed(options.seed)
        beam_size = 1 if temperature else options.beam_size
        encoded = self.states.of(windows)
        results = self.model.generate(
            encoded,
            [[*prompt.start, *prompt.rest]] * len(windows),
            beam_size=beam_size,
            patience=options.patience,
            length_penalty=options.length_penalty,
            # CTranslate2 writes at most max_length / 2 tokens, and at most max_length with the prompt before its last
            max_length=max(2 * max_tokens, len(prompt) - 1 + max_tokens),
            max_initial_timestamp_index=MAX_FIRST_TIMESTAMP,
            suppress_tokens=[-1, *options.suppress_tokens],
            return_logits_vocab=beam_size == 1,
            return_scores=True,
            return_no_speech_prob=True,
            sampling_topk=0 if temperature else 1,
            sampling_temperature=temperature or 1.0,
        )
        if beam_size == 1:
            texts = [self._text(result) for result in results]
        else:
            texts = self._beam_texts(encoded, windows.shape[-1], results, prompt, options)
            for text in texts:
                if len(text.ids) >= max_tokens:  # cut, as search.search marks it: without a value for the end token
                    text.logprobs = text.logprobs[: len(text.ids)]
        return [search.hypothesis(text, self.spelling, options) for text in texts]

    def detect_language(self, window: np.ndarray) -> str:
        if not self.model.is_multilingual:  # by the size of its vocabulary
            raise LabError("CTranslate2 takes this model for one of a single language: name it instead of auto")
        ((likeliest, *_),) = self.model.detect_language(_storage_view(window[np.newaxis]))
        return likeliest[0].strip("<|>")

    def word_starts(self, windows: np.ndarray, frames: Sequence[int], texts: Sequence[str]) -> list[list[float]]:
        spelled = [self.spelling.ids(text) for text in texts]
        longest = self.text_positions - len(self.prompt) - 1  # the end token has a position, too
        can_align = [self.can_align and 0 < len(ids) <= longest for ids, _ in spelled]
        if not any(can_align):
            return [[] for _ in texts]
        prompt = self.prompt[:-1]  # align appends the token for "no timestamps"
        # every window of the states takes part: one without a text to align is given any token
        ids = [ids if can else [0] for can, (ids, _) in zip(can_align, spelled, strict=True)]
        results = self.model.align(self.states.of(windows), prompt, ids, list(frames))
        return [
            _starts(result.alignments, firsts) if can else []
            for can, result, (_, firsts) in zip(can_align, results, spelled, strict=True)
        ]

    def _text(self, result: Any) -> Text:
        """Return the text of a result with logits for each of its tokens, the end token included."""
        ids = list(result.sequences_ids[0])
        tokens = [*ids, self.spelling.end][: len(result.logits[0])]  # no end token if the text was cut
        logprobs = [_logprob(np.array(view), token) for view, token in zip(result.logits[0], tokens, strict=True)]
        return Text(ids, logprobs, result.no_speech_prob)

    def _beam_texts(
        self, encoded: Any, n_frames: int, results: list[Any], prompt: Prompt, options: DecodingOptions
    ) -> list[Text]:
        """Return the texts of a beam search, whose results have no logits: `align` computes the probabilities."""
        texts = [[token for token in result.sequences_ids[0] if token < self.spelling.end] for result in results]
        no_timestamps = self.spelling.first_timestamp - 1  # align appends it
        aligned = self.model.align(
            encoded, [prompt.start[-1], *(token for token in prompt.rest if token != no_timestamps)], texts, n_frames
        )
        finished = []
        for result, text, alignment in zip(results, texts, aligned, strict=True):
            ids = list(result.sequences_ids[0])
            mean = result.scores[0] * max(len(ids), 1) ** options.length_penalty / (len(ids) + 1)
            probs = iter(alignment.text_token_probs[: len(text)])
            logprobs = [float(np.log(max(next(probs), 1e-9))) if token < self.spelling.end else mean for token in ids]
            finished.append(Text(ids, [*logprobs, mean], result.no_speech_prob, mean))
        return finished


def _starts(alignments: Sequence[tuple[int, int]], firsts: Sequence[int]) -> list[float]:
    """Return the start of each word in seconds from pairs of token and position; nothing if a token has none."""
    positions: dict[int, int] = {}
    for token, position in alignments:
        positions.setdefault(token, position)
    if any(token not in positions for token in firsts):
        return []
    return [positions[token] * features.POSITION_S for token in firsts]


def _storage_view(windows: np.ndarray) -> Any:
    import ctranslate2

    return ctranslate2.StorageView.from_array(np.ascontiguousarray(windows, dtype=np.float32))


def _logprob(logits: np.ndarray, token: int) -> float:
    """Return the log-probability of `token` under `logits` float [vocabulary]."""
    logits = logits.astype(np.float32, copy=False)
    largest = logits.max()
    return float(logits[token] - largest - np.log(np.exp(logits - largest).sum(dtype=np.float64)))
