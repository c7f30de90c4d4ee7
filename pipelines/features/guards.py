"""Guard sets: their validation and test clips, and the check that training rows share nothing with them."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.features.cache import FeatureCache
from pipelines.features.curation import leaks
from pipelines.features.curation.held_out import CachedAudio
from pipelines.features.curation.leaks import AudioLeak, HeldOut, SentenceLeak, SpeakerLeak
from pipelines.features.sources import SPLITS, Example, NoAudio, NoTranscript, Source
from pipelines.infra.errors import LabError
from pipelines.recipes.base_settings import AUTO
from pipelines.recipes.data_settings import SourceSettings
from pipelines.recipes.settings import Recipe
from pipelines.speech import audio
from pipelines.speech.decoders.waveform import SAMPLE_RATE_HZ

logger = logging.getLogger(__name__)

JOIN = "1"
"""Version of the code that joins clips."""
GAP_S = 0.3
"""Silence between two joined clips."""
_SENTENCES = "sentences"
"""Column of a joined clip's sentences, one a line."""


def recipe_of(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe that a guard's clips are extracted, decoded and scored with."""
    guard = recipe.guards[name]
    return Recipe(
        name=f"{recipe.name[:38]}.{name}",
        language=guard.language or recipe.language,
        source=guard.source,
        model=recipe.model.model_copy(update={"adapter": ""}),
        features=recipe.features,
        evaluation=recipe.evaluation.model_copy(update={"max_new_tokens": AUTO, "stock_pipeline": False}),
    )


@dataclass(frozen=True)
class GuardSource:
    """The validation and test clips of a source, joined to recordings of up to `join_s` seconds if that is above 0."""

    source: Source
    join_s: float = 0.0

    def __post_init__(self):
        if not self.join_s and hasattr(self.source, "outline"):
            object.__setattr__(self, "outline", self._outline)

    def identity(self) -> dict[str, str]:
        """Return the identity of the source, with what is taken from it."""
        joined = {"join_s": f"{self.join_s:g}", "code.join": JOIN} if self.join_s else {}
        return {**self.source.identity(), "splits": "validation, test", **joined}

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """Yield the held-out examples among `splits`; joined ones in the order of their first clip's speaker."""
        held_out = tuple(split for split in leaks.HELD_OUT if split in splits)
        examples = self.source.examples(held_out) if held_out else iter(())
        return self._joined(examples) if self.join_s else examples

    def _outline(self) -> Iterator[Example]:
        return (example for example in self.source.outline() if example.split in leaks.HELD_OUT)

    def _joined(self, examples: Iterator[Example]) -> Iterator[Example]:
        """Yield joined clips; a clip that cannot be decoded or has no text stays as it is, so that it is rejected."""
        parts: dict[tuple[str, str], list[tuple[Example, np.ndarray]]] = {}
        n_joined = 0
        for example in examples:
            samples = _decoded(example)
            if samples is None:
                yield example
                continue
            waiting = parts.setdefault((example.split, example.speaker), [])
            length_s = sum(len(one) / SAMPLE_RATE_HZ + GAP_S for _, one in waiting) + len(samples) / SAMPLE_RATE_HZ
            if waiting and length_s > self.join_s:
                yield _join(waiting)
                waiting.clear()
            waiting.append((example, samples))
            n_joined += len(waiting) > 1
        if not n_joined:
            logger.info(
                f"note: join_s={self.join_s:g} joined no clips: no speaker of the guard has two that fit into this time"
            )
        for waiting in parts.values():
            if waiting:
                yield _join(waiting)


def _decoded(example: Example) -> np.ndarray | None:
    """Return the samples of an example, float32 [n] at 16 kHz; None if it has no usable audio or no text."""
    if isinstance(example.audio, NoAudio) or isinstance(example.text, NoTranscript) or not example.text.strip():
        return None
    try:
        return audio.decode(example.audio).samples
    except audio.AudioError:
        return None


def _join(parts: list[tuple[Example, np.ndarray]]) -> Example:
    """Return one example of consecutive clips of a speaker, as a wav file of float samples."""
    import soundfile

    silence, first = np.zeros(round(GAP_S * SAMPLE_RATE_HZ), np.float32), parts[0][0]
    pieces = [piece for _, samples in parts for piece in (silence, samples)][1:]
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(pieces), SAMPLE_RATE_HZ, format="WAV", subtype="FLOAT")
    texts = [example.text.strip() for example, _ in parts]
    meta = {**first.meta, _SENTENCES: "\n".join(texts)}
    return Example(f"{first.id}+{len(parts) - 1}", first.split, " ".join(texts), file.getvalue(), first.speaker, meta)


def refuse_leaks(recipe: Recipe, cache: FeatureCache, name: str, guard: FeatureCache) -> None:
    """Raise LabError with counts and first examples if training rows share audio, a sentence or a speaker with a guard.

    Speakers are compared only if both come from the same corpus: other corpora may use the same names for others.
    """
    if recipe.curation.leaks == "ignore":
        return
    held_out = _held_out(recipe, name, guard)
    training = CachedAudio(cache, {key.partition(":")[0] for key in held_out.audio})
    steps = [AudioLeak(held_out, training.key), SentenceLeak(held_out), SpeakerLeak(held_out)]
    found: dict[str, list[str]] = {}
    for example in training.examples():
        for step in steps if example.split == "train" else ():
            if detail := step.verdict(example):
                found.setdefault(step.name, []).append(f"{example.id}: {detail}")
                break
    if found:
        summary = "; ".join(f"{len(rows)} by {reason} ({rows[0]})" for reason, rows in found.items())
        raise LabError(
            f"training rows must share nothing with the guard {name}, got {sum(map(len, found.values()))} that do: "
            f"{summary}. Leave them out with curation.leaks=drop and curation.held_out={[str(guard.folder)]}, or take "
            "other clips for the guard"
        )


def _held_out(recipe: Recipe, name: str, guard: FeatureCache) -> HeldOut:
    held_out, clips = HeldOut(), CachedAudio(guard)
    same_corpus = _corpora(recipe.source) & _corpora(recipe.guards[name].source)
    columns = guard.rows[_SENTENCES].tolist() if _SENTENCES in guard.rows else [None] * len(guard.rows)
    for example, sentences in zip(clips.examples(), columns, strict=True):
        row = f"guard {name}, {example.split} row {example.id}"
        held_out.add(row, example.speaker if same_corpus else "", example.text, clips.key(example.id, thorough=True))
        for sentence in sentences.split("\n") if isinstance(sentences, str) else ():
            held_out.add(row, sentence=sentence)
    return held_out


def _corpora(source: SourceSettings) -> set[tuple[str, ...]]:
    """Return what names the corpora of a source: kind, path and data set."""
    kinds = {"planted": "tour"}  # the same speakers
    return {(kinds.get(part.kind, part.kind), part.path, part.dataset) for part in source.parts or (source,)}
