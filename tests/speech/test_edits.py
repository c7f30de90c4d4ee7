from __future__ import annotations

import numpy as np
import pytest

from pipelines.infra.errors import LabError
from pipelines.speech.edits import count_edits


def test_edits_are_counted_per_utterance():
    edits = count_edits(["a b c", "d"], ["a x c", "d e f"])
    assert edits.word_edits.tolist() == [1, 2]
    assert edits.words.tolist() == [3, 1]
    assert edits.word_edits.dtype == np.int64


def test_words_for_an_empty_reference_are_insertions():
    edits = count_edits(["a b", "", " "], ["a b", "x y", ""])
    assert edits.insertions.tolist() == edits.word_edits.tolist() == [0, 2, 0]
    assert (edits.words.tolist(), edits.char_edits.tolist()) == ([2, 0, 0], [0, 3, 0])


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([], [], "0 references"),
        (["a"], [], "1 references and 0 transcripts"),
        (["a"], ["a", "b"], "2 transcripts"),
        (["a", "?!"], ["a", "b"], "without a word"),
        ([""], ["a"], "without a word"),
    ],
)
def test_invalid_references_are_refused(references, hypotheses, message):
    with pytest.raises(LabError, match=message):
        count_edits(references, hypotheses)
