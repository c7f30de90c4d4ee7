"""Transcripts as transformers' own pipeline writes them: `pipeline("automatic-speech-recognition", model)(audio)`.

With its default arguments the pipeline pads a clip to 30 s and searches with five beams, without timestamps, until no
better text can follow. Language and task are named, as a model card recommends. The pipeline decodes one clip at a
time; here a batch is decoded, and on a CPU the beams of a clip share its keys and values, which takes half the time.
The texts are the same: tests compare them with the pipeline's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.infra.errors import LabError
from pipelines.recipes import languages
from pipelines.whisper import decoding, greedy
from pipelines.whisper.tokens import prompt_ids

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

N_BEAMS = 5
MAX_NEW_TOKENS = 256
"""Defaults of transformers' pipeline for speech, `_default_generation_config`, where the model's settings name none."""
_USUAL_SETTINGS = frozenset(
    "alignment_heads begin_suppress_tokens bos_token_id decoder_start_token_id eos_token_id is_multilingual lang_to_id "
    "language max_initial_timestamp_index max_length no_timestamps_token_id num_beams pad_token_id prev_sot_token_id "
    "return_timestamps suppress_tokens task task_to_id transformers_version use_cache "
    "apply_spec_augment dropout median_filter_width".split()
)
"""Generation settings that `_search` respects, and those that do not change a text."""


def decode(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, features: torch.Tensor, language: str
) -> list[str]:
    """Return the pipeline's transcripts of windows of 30 s, `features` float [B, n_mels, 3000].

    Raises LabError for a model that transformers refuses to decode in this language.
    """
    import torch

    features, was_training = features.to(model.device, model.dtype), model.training
    model.eval()
    with torch.inference_mode():  # without autocast: the pipeline computes in the precision of the weights
        if _is_usual(model):
            tokens = _search(model, features, prompt_ids(processor, language))
            for row, ids in enumerate(tokens):
                if max(ids) > model.generation_config.no_timestamps_token_id:  # the pipeline goes on from a timestamp
                    (tokens[row],) = _generate(model, features[row : row + 1], language)
        else:
            tokens = _generate(model, features, language)
    model.train(was_training)
    return [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def decoding_facts(model: WhisperForConditionalGeneration) -> dict[str, Any]:
    """Return how the clips are decoded, with the fields of the lab's own decoding (hypotheses.decoding_facts)."""
    settings = _settings(model)
    return {
        "engine": f"transformers' pipeline {model.device.type} {str(model.dtype).removeprefix('torch.')}",
        "precision": str(model.dtype).removeprefix("torch."),
        "beam_size": settings.get("num_beams", N_BEAMS),
        "timestamps": bool(settings.get("return_timestamps")),
    }


def _settings(model: WhisperForConditionalGeneration) -> dict[str, Any]:
    """Return the generation settings that the model's folder names."""
    named = model.generation_config.to_diff_dict()
    return {name: value for name, value in named.items() if value is not None and value is not False}


def _is_usual(model: WhisperForConditionalGeneration) -> bool:
    """Return True if `_search` writes what `generate` would, and faster."""
    settings = _settings(model)
    return (
        greedy.runs_on(model)
        and settings.keys() <= _USUAL_SETTINGS
        and not settings.get("return_timestamps")
        and {"no_timestamps_token_id", "lang_to_id"} <= settings.keys()
        and settings.get("num_beams", N_BEAMS) > 1
    )


def _generate(model: WhisperForConditionalGeneration, features: torch.Tensor, language: str) -> list[list[int]]:
    """Return the token ids that transformers' `generate` writes, with the pipeline's defaults."""
    settings, defaults = _settings(model), {"num_beams": N_BEAMS}
    if not {"max_length", "max_new_tokens"} & settings.keys():  # as in Pipeline._prepare_generate_kwargs
        defaults["max_new_tokens"] = MAX_NEW_TOKENS
    added = {name: value for name, value in defaults.items() if name not in settings}
    try:
        return model.generate(features, language=language, task="transcribe", **added).tolist()
    except (ValueError, IndexError, TypeError) as error:  # a missing setting; a text without any token
        raise LabError(
            f"transformers' pipeline cannot decode this model in {languages.NAMES[language]}: "
            f"{' '.join(str(error).split())[:200]}. Complete its generation_config.json, or set "
            "evaluation.stock_pipeline=false"
        ) from None


@dataclass
class _Window:
    """The texts of one window: token ids and scores, best first."""

    n_beams: int
    running: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    """Sum of log-probabilities and tokens of each text that is being extended."""
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    """Mean log-probability and tokens of the best texts that have ended."""
    rows: list[int] = field(default_factory=list)
    """Which text each of `running` extends."""
    is_done: bool = False

    def extend(self, candidates: list[tuple[float, int, int]], ends: list[int], *, is_last: bool) -> None:
        """Take the best extensions (score, text, token), best first, as GenerationMixin._beam_search does."""
        following, rows, length = [], [], len(self.running[0][1]) + 1
        for rank, (score, row, token) in enumerate(candidates):
            ids = [*self.running[row][1], token]
            if token not in ends and not is_last:
                following.append((score, ids))
                rows.append(row)
            elif rank < self.n_beams:
                self.ended.append((score / length, ids))
        self.ended = sorted(self.ended, key=lambda text: -text[0])[: self.n_beams]
        self.running, self.rows = following[: self.n_beams], rows[: self.n_beams]
        is_full = len(self.ended) == self.n_beams
        self.is_done = not following or (is_full and following[0][0] / length <= self.ended[-1][0])


def _search(model: WhisperForConditionalGeneration, features: torch.Tensor, prompt: list[int]) -> list[list[int]]:
    """Return the token ids of each window: the beam search of transformers, without early stopping."""
    import torch

    settings, decoder, ends = _settings(model), _Decoder(model, features), _end_tokens(model)
    n_beams, positions = settings.get("num_beams", N_BEAMS), model.config.max_target_positions
    limit = min(settings.get("max_length", MAX_NEW_TOKENS), positions - len(prompt))  # max_length counts no prompt
    suppressed, suppressed_first = (
        [token for token in settings.get(name) or [] if 0 <= token < model.config.vocab_size]
        for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    windows = [_Window(n_beams) for _ in features]
    running, logits = windows, decoder.step([prompt for _ in windows])
    for step in range(limit):
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        logprobs[:, suppressed] = -float("inf")
        if step == 0:
            logprobs[:, suppressed_first] = -float("inf")
        scores = torch.tensor([score for window in running for score, _ in window.running])
        totals = (logprobs + scores[:, None]).reshape(len(running), -1)
        best, indices = totals.topk((1 + len(ends)) * n_beams, dim=-1)
        for window, values, positions_of in zip(running, best.tolist(), indices.tolist(), strict=True):
            size = logprobs.shape[-1]
            options = [(value, *divmod(index, size)) for value, index in zip(values, positions_of, strict=True)]
            window.extend(options, ends, is_last=step == limit - 1)
        unfinished = [n for n, window in enumerate(running) if not window.is_done]
        if not unfinished:
            break
        n_texts = len(scores) // len(running)
        rows = [n * n_texts + row for n in unfinished for row in running[n].rows]
        running = [running[n] for n in unfinished]
        decoder.select(rows, unfinished)
        logits = decoder.step([ids[-1:] for window in running for _, ids in window.running])
    return [window.ended[0][1] for window in windows]


def _end_tokens(model: WhisperForConditionalGeneration) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


class _Decoder:
    """The decoder's keys and values for a batch of windows, with the same number of texts for each."""

    def __init__(self, model: WhisperForConditionalGeneration, features: torch.Tensor):
        from pipelines.whisper.export import onnx_modules

        self.decoder = onnx_modules.Decoder(model, int8=False)
        self.cross = onnx_modules.Encoder(model, int8=False).keys_and_values(decoding.encode(model, features))
        layout, n_windows = self.decoder.layout, len(features)
        empty = features.new_zeros(n_windows, layout.n_heads, layout.head_width, 0)
        self.past = [empty, empty.transpose(2, 3)] * (len(self.cross) // 2)

    def step(self, tokens: list[list[int]]) -> torch.Tensor:
        """Append `tokens` to the texts and return the logits float [texts, vocabulary] of the next token."""
        import torch

        texts = torch.arange(len(tokens))
        layout = (texts.reshape(len(self.cross[0]), -1), texts)
        logits, *present = self.decoder(torch.tensor(tokens), *layout, *self.past, *self.cross)
        self.past = present[: len(self.past)]
        return logits

    def select(self, rows: list[int], windows: list[int]) -> None:
        """Continue with the texts `rows`, which may repeat, of the windows `windows`."""
        self.past = [state[rows] for state in self.past]
        if len(windows) != len(self.cross[0]):
            self.cross = tuple(state[windows] for state in self.cross)
