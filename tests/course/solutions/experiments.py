import itertools
import math

import numpy as np


# task 1
def wer(reference, hypothesis):
    reference, hypothesis = reference.split(), hypothesis.split()
    edits = list(range(len(hypothesis) + 1))
    for row, word in enumerate(reference, 1):
        previous, edits[0] = edits[0], row
        for column, other in enumerate(hypothesis, 1):
            substituted = previous + (word != other)
            previous = edits[column]
            edits[column] = min(substituted, edits[column] + 1, edits[column - 1] + 1)
    return edits[-1] / len(reference)


# task 2
def corpus_wer(pairs):
    words = [len(reference.split()) for reference, _ in pairs]
    return sum(wer(*pair) * n for pair, n in zip(pairs, words)) / sum(words)


# task 3
def normalise(text):
    kept = "".join(character if character.isalnum() else " " for character in text.lower())
    return " ".join(kept.split())


# task 4
def bootstrap_interval(errors, words, speakers):
    random = np.random.default_rng(0)
    names = np.unique(speakers)
    sums = np.array([(errors[speakers == name].sum(), words[speakers == name].sum()) for name in names])
    draws = sums[random.integers(0, len(names), size=(10_000, len(names)))].sum(axis=1)
    return np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])


# task 5
def sign_flip_p(differences):
    observed = abs(sum(differences))
    flipped = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=len(differences))]
    return np.mean(np.array(flipped) >= observed - 1e-12)


# task 6
def holm(ps):
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        largest = max(largest, min(1.0, ps[index] * (len(ps) - rank)))
        corrected[index] = largest
    return corrected


# task 7
verdicts = {"A": "better", "B": "not shown", "C": "worse", "D": "not shown"}


# task 8
def speakers_needed(sd, difference):
    return math.ceil(((1.96 + 0.84) * sd / difference) ** 2)
