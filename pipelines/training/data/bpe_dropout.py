"""Write training labels with random merges left out (BPE-dropout, Provilkov et al. 2020).

The same text then has other tokens in each epoch, so rarer and shorter tokens are trained as well. tokenizers has this
dropout, too, but draws it from a generator that cannot be seeded: a resumed run would have other labels. Here seed,
epoch and row alone decide the draw.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from pipelines.features.clips import MAX_LABEL_TOKENS
from pipelines.recipes.settings import Recipe
from pipelines.whisper.tokens import Labeller, labeller

if TYPE_CHECKING:
    import tokenizers
    from transformers import WhisperProcessor

_STREAM = 40
"""Part of the seed, so that this draw differs from others with the same seed and epoch."""


def of_recipe(recipe: Recipe, processor: WhisperProcessor) -> MergeDropout | None:
    """Return the dropout of a recipe; None if it has none."""
    settings = recipe.training
    if not settings.bpe_dropout:
        return None
    return MergeDropout(labeller(processor, recipe.language), settings.bpe_dropout, settings.seed)


class MergeDropout:
    """Labellers whose tokenizer leaves out each possible merge with `probability`, by epoch and row."""

    def __init__(self, labeller: Labeller, probability: float, seed: int):
        self.labeller, self.probability, self.seed = labeller, probability, seed
        model = json.loads(labeller.tokenizer.to_str())["model"]
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def labels(self, transcript: str, epoch: int, row: int) -> list[int]:
        """Return the label ids of a clip; all merges are applied if the decoder has no room for more tokens."""
        ids = self.labeller_for(epoch, row)(transcript)
        return ids if len(ids) <= MAX_LABEL_TOKENS else self.labeller(transcript)

    def labeller_for(self, epoch: int, row: int) -> Labeller:
        """Return a labeller whose draws depend on the seed, `epoch` and `row` alone."""
        rng = np.random.default_rng([self.seed, epoch, row, _STREAM])
        return dataclasses.replace(self.labeller, tokenizer=_Sampled(self, rng))

    def tokens(self, word: str, rng: np.random.Generator) -> list[str]:
        """Return the tokens of a word, spelt in the byte-pair alphabet.

        Each round draws again which of the possible merges are left out, and applies the first of the others, until
        none is left: algorithm 1 of the paper.
        """
        tokens = list(word)
        while True:
            pairs = itertools.pairwise(tokens)
            possible = [(self.ranks[pair], at) for at, pair in enumerate(pairs) if pair in self.ranks]
            kept = [merge for merge, draw in zip(possible, rng.random(len(possible))) if draw >= self.probability]
            if not kept:
                return tokens
            _, at = min(kept)
            tokens[at : at + 2] = [tokens[at] + tokens[at + 1]]


@dataclass(frozen=True)
class _Sampled:
    """The part of tokenizers.Tokenizer that labels are written with."""

    merges: MergeDropout
    rng: np.random.Generator

    def encode(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        """Return an object with the `ids` of `text`."""
        tokenizer = self.merges.labeller.tokenizer
        return SimpleNamespace(
            ids=[
                tokenizer.token_to_id(token)
                for word in _words(tokenizer, text)
                for token in self.merges.tokens(word, self.rng)
            ]
        )


def _words(tokenizer: tokenizers.Tokenizer, text: str) -> Iterator[str]:
    """Yield the words of a text as the tokenizer splits them before it merges."""
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        yield word
