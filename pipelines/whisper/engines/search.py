"""Search for the transcripts of a batch of windows: greedy, sampled, or by beam search.

Every engine that computes the logits of the next token (`TextDecoder`) is searched by this code, so the same options
give the same text. CTranslate2 has its own search. The beam search here takes the same steps, and gives up texts that
are unlikely to become the best: their rows are not computed. So with beams CTranslate2 may write another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.engines.token_rules import TokenRules
from pipelines.whisper.log_mel import POSITION_S
from pipelines.whisper.tokens import Spelling

_BLOCK = 64
"""Logits are searched for the largest in blocks of this size."""
_MAX_BEHIND = 3.0
"""A text is not extended if its score is lower by more than this than the best one's of its beam, or than what it
needs at its length to be ranked with a finished text. Chosen on validation recordings with _SAME_TOKENS:
docs/benchmarks.md, 30 minutes."""
_SAME_TOKENS = 3
"""Of two texts of a beam that end in this many equal tokens only the better one is extended."""


class TextDecoder(Protocol):
    """A decoder with its states for a batch of windows, first with a row (text) for each window."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append `tokens` int64 [rows, n] and return the logits float32 [rows, vocabulary] of the next token."""

    def select(self, rows: np.ndarray) -> None:
        """Continue with the present `rows` int64, which may repeat, in the order of their windows.

        A window without rows is not needed again.
        """


@dataclass
class Text:
    """The tokens of a text, without prompt and end token, and their log-probabilities, end token included."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    no_speech: float = 0.0
    mean_logprob: float | None = None
    """Given by an engine whose `logprobs` are those of another pass; by default their mean."""

    @property
    def logprob(self) -> float:
        """Mean over the tokens, the end token included."""
        return sum(self.logprobs) / max(len(self.logprobs), 1) if self.mean_logprob is None else self.mean_logprob


class Prompt(NamedTuple):
    """The decoder's first tokens: up to the start token, and after it."""

    start: list[int]
    rest: list[int]

    def __len__(self) -> int:
        return len(self.start) + len(self.rest)


def search(
    decoder: TextDecoder, prompt: Prompt, n_windows: int, rules: TokenRules, options: DecodingOptions,
    temperature: float, max_tokens: int,
) -> list[Text]:  # fmt: skip
    """Return the best text of each window, of at most `max_tokens` tokens, the end token included.

    Beams are used at temperature 0 only; above it tokens are sampled.
    """
    after_start = decoder.step(np.tile(np.array(prompt.start, dtype=np.int64), (n_windows, 1)))
    # <|nospeech|> comes before <|notimestamps|>, which comes before the first timestamp
    no_speech = np.exp(after_start[:, rules.first_timestamp - 2] - _log_sum(after_start))
    logits = after_start  # an English-only model's prompt may end here
    if prompt.rest:
        logits = decoder.step(np.tile(np.array(prompt.rest, dtype=np.int64), (n_windows, 1)))
    if options.beam_size > 1 and not temperature:
        texts = _beams(decoder, logits, rules, options, max_tokens)
    else:
        texts = _greedy(decoder, logits, rules, temperature, np.random.default_rng(options.seed), max_tokens)
    for text, probability in zip(texts, no_speech.tolist(), strict=True):
        text.no_speech = probability
    return texts


def hypothesis(text: Text, spelling: Spelling, options: DecodingOptions) -> Hypothesis:
    """Return the hypothesis of a text that `search` returned."""
    ids, n_tokens = text.ids, len(text.logprobs)
    times = [n for n, token in enumerate(ids) if token >= spelling.first_timestamp] if options.timestamps else []
    if times and times[-1] > 0 and n_tokens == len(ids):  # cut: the sentence that was not finished is decoded again
        ids = ids[: times[-1] + 1]
        n_tokens = len(ids)
    is_closed = bool(times) and times[-1] == len(ids) - 1  # else the last sentence lasts to the end of the window
    end_s = (ids[-1] - spelling.first_timestamp) * POSITION_S if is_closed else None
    words = spelling.words(ids, text.logprobs[: len(ids)])
    return Hypothesis(spelling.text(ids), text.logprob, n_tokens, words, text.no_speech, end_s)


def likeliest_language(logits: np.ndarray, spelling: Spelling) -> str:
    """Return the code of the likeliest language from the logits float32 [vocabulary] after the start token."""
    ids = spelling.language_ids()
    return max(ids, key=lambda code: logits[ids[code]])


def language_probabilities(logits: np.ndarray, spelling: Spelling) -> dict[str, float]:
    """Return the probability of each language from the logits float32 [vocabulary] after the start token."""
    ids = spelling.language_ids()
    values = logits[[*ids.values()]]
    return dict(zip(ids, np.exp(values - np.logaddexp.reduce(values)).tolist(), strict=True))


def _greedy(
    decoder: TextDecoder, logits: np.ndarray, rules: TokenRules, temperature: float, rng: np.random.Generator,
    max_tokens: int,
) -> list[Text]:  # fmt: skip
    """Return texts of the likeliest tokens, or of sampled ones; rows whose text has ended are left out."""
    texts = [Text() for _ in logits]
    rows = np.arange(len(logits))  # the window of each row; -1 once its text has ended
    for _ in range(max_tokens):
        rules.suppress(logits, [texts[row].ids for row in rows])
        log_sums = _log_sum(logits)
        scores = _boosted(logits, rules, [texts[row].ids for row in rows])
        if temperature:  # the argmax of scores plus Gumbel noise is a sample from their softmax
            scores = scores + temperature * rng.gumbel(size=scores.shape)
        tokens = scores.argmax(axis=-1)
        logprobs = logits[np.arange(len(tokens)), tokens] - log_sums
        for row, token, logprob in zip(rows.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            if row >= 0:
                texts[row].logprobs.append(logprob)
                if token != rules.end:
                    texts[row].ids.append(token)
        rows[tokens == rules.end] = -1
        running = np.flatnonzero(rows >= 0)
        if not len(running):
            break
        if 2 * len(running) <= len(rows):  # stop computing rows whose text has ended
            decoder.select(running)
            tokens, rows = tokens[running], rows[running]
        logits = decoder.step(tokens[:, None])
    return texts


class _Candidate(NamedTuple):
    """A text that is extended by a token."""

    score: float
    """Log-probabilities of its tokens and boosts of hotwords."""
    row: int
    token: int
    logprob: float


@dataclass
class _Beam:
    """A text that is being extended."""

    text: Text
    score: float = 0.0

    def extended(self, candidate: _Candidate, end: int) -> _Beam:
        ids = self.text.ids if candidate.token == end else [*self.text.ids, candidate.token]
        return _Beam(Text(ids, [*self.text.logprobs, candidate.logprob]), candidate.score)


def _beams(
    decoder: TextDecoder, logits: np.ndarray, rules: TokenRules, options: DecodingOptions, max_tokens: int
) -> list[Text]:
    """Return the best finished text of each window."""
    size, enough = options.beam_size, max(1, round(options.beam_size * options.patience))
    finished: list[list[_Beam]] = [[] for _ in logits]
    running = {window: [_Beam(Text())] for window in range(len(logits))}
    for step in range(max_tokens):
        candidates = _candidates(logits, list(running.values()), rules, 2 * size)
        is_last, tokens, rows, first_row = step == max_tokens - 1, [], [], 0
        for of_window, (window, beams) in zip(candidates, list(running.items()), strict=True):
            if not rules.hotwords.children:  # the score of a hotword that is being spelled may be taken back
                lowest = _lowest_score(of_window, finished[window], step + 1, options.length_penalty)
                of_window = _promising(of_window, beams, lowest, rules.end)
            following, spare = [], iter([c for c in of_window[size:] if c.token != rules.end])
            for candidate in of_window[:size]:
                if candidate.token == rules.end or is_last:
                    finished[window].append(beams[candidate.row].extended(candidate, rules.end))
                    candidate = next(spare, None)
                if candidate is not None:
                    following.append(candidate)
            if len(finished[window]) >= enough or not following or is_last:
                finished[window] = finished[window] or beams  # nothing may follow: the texts end here
                del running[window]
            else:
                tokens += [candidate.token for candidate in following]
                rows += [first_row + candidate.row for candidate in following]
                running[window] = [beams[candidate.row].extended(candidate, rules.end) for candidate in following]
            first_row += len(beams)
        if not running:
            break
        decoder.select(np.array(rows))
        logits = decoder.step(np.array(tokens, dtype=np.int64)[:, None])
    return [_best(beams, options.length_penalty) for beams in finished]


def _lowest_score(candidates: list[_Candidate], finished: list[_Beam], length: int, length_penalty: float) -> float:
    """Return the lowest score with which a text of `length` tokens is extended.

    Of texts of other lengths, the finished ones, not the scores are compared but the ranks, which the length penalty
    gives: a score is a sum over tokens, and a text that ends early has a high one.
    """
    needed = [_ranking(beam, length_penalty) * max(length, 1) ** length_penalty for beam in finished]
    return max([*(candidate.score for candidate in candidates[:1]), *needed], default=0.0) - _MAX_BEHIND


def _promising(candidates: list[_Candidate], beams: list[_Beam], lowest_score: float, end: int) -> list[_Candidate]:
    """Return the candidates of a window that may still become its text; they come and are returned best first.

    Left out is a candidate whose score is below `lowest_score`, and one that ends in the same tokens as a better one:
    what follows is about as probable for both. One of the two may be a token ahead.
    """
    promising: list[_Candidate] = []
    endings: dict[tuple[int, ...], float] = {}
    earlier_endings: set[tuple[int, ...]] = set()
    for candidate in candidates:
        if candidate.score < lowest_score:
            break
        beam = beams[candidate.row]
        if candidate.token != end and len(beam.text.ids) >= _SAME_TOKENS:
            last = (*beam.text.ids[-_SAME_TOKENS:], candidate.token)
            ending, earlier = last[1:], last[:-1]
            if ending in endings or ending in earlier_endings or endings.get(earlier, -np.inf) >= beam.score:
                continue
            endings[ending] = candidate.score
            earlier_endings.add(earlier)  # their score was higher than that of any later candidate
        promising.append(candidate)
    return promising


def _candidates(
    logits: np.ndarray, running: Sequence[list[_Beam]], rules: TokenRules, n: int
) -> list[list[_Candidate]]:
    """Return the `n` best extensions of the beams of each window, the best first."""
    beams = [beam for window in running for beam in window]
    texts = [beam.text.ids for beam in beams]
    rules.suppress(logits, texts)
    log_sums = _log_sum(logits)
    boosted = _boosted(logits, rules, texts)
    tokens = _largest(boosted, n)  # within a row, scores are in the order of the logits
    added = np.array([beam.score for beam in beams]) - log_sums
    scores = np.take_along_axis(boosted, tokens, axis=-1) + added[:, None]
    results, first = [], 0
    for window in running:
        rows = slice(first, first + len(window))
        values = scores[rows]
        candidates = []
        for index in np.argsort(-values, axis=None, kind="stable")[:n].tolist():
            row, column = divmod(index, values.shape[1])
            token = int(tokens[first + row, column])
            logprob = float(logits[first + row, token] - log_sums[first + row])
            candidates.append(_Candidate(float(values[row, column]), row, token, logprob))
        results.append([candidate for candidate in candidates if candidate.score > -np.inf])
        first += len(window)
    return results


def _boosted(logits: np.ndarray, rules: TokenRules, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the logits with the boosts of hotwords."""
    if not rules.hotwords.children:
        return logits
    scores = logits.copy()
    for row, text in zip(scores, texts, strict=True):
        general, tokens = rules.boosts(text)
        ids = list(tokens)
        before = row[ids]
        row += general
        row[ids] = before + np.array(list(tokens.values()), dtype=row.dtype)
    return scores


def _best(beams: list[_Beam], length_penalty: float) -> Text:
    return max(beams, key=lambda beam: _ranking(beam, length_penalty)).text


def _ranking(beam: _Beam, length_penalty: float) -> float:
    return beam.score / max(len(beam.text.ids), 1) ** length_penalty


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Return the positions int64 [rows, n] of the `n` largest of `values` float [rows, size], in any order.

    The `n` largest values lie in the `n` blocks with the largest maxima, so that only these are sorted. A block's
    values are `n_blocks` apart: maxima of whole vectors are computed faster than those of neighbours.
    """
    rows, size = values.shape
    n_blocks = size // _BLOCK
    if size <= 4 * n * _BLOCK:
        return np.argpartition(-values, min(n, size - 1), axis=-1)[:, :n]
    maxima = values[:, : n_blocks * _BLOCK].reshape(rows, _BLOCK, n_blocks).max(axis=1)
    blocks = np.argpartition(-maxima, n, axis=-1)[:, :n]
    inside = (blocks[:, :, None] + n_blocks * np.arange(_BLOCK)).reshape(rows, -1)
    positions = np.concatenate([inside, np.tile(np.arange(n_blocks * _BLOCK, size), (rows, 1))], axis=1)
    order = np.argpartition(-np.take_along_axis(values, positions, axis=-1), n, axis=-1)[:, :n]
    return np.take_along_axis(positions, order, axis=-1)


def _log_sum(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the sum of exponentials of each row; 0 for a row without any possible token."""
    largest = logits.max(axis=-1)
    largest = np.where(np.isfinite(largest), largest, np.float32(0))
    total = np.exp(logits - largest[:, None]).sum(axis=-1)
    return largest + np.log(np.where(total > 0, total, np.float32(1)))
