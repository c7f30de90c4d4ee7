"""Transcripts and plots in the notebook."""

import numpy as np
import pytest

from pipelines.features.pipeline import samples
from pipelines.inference import figures
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import Segment, Transcript, Word
from pipelines.whisper import model as whisper_model


@pytest.fixture(scope="module", params=["transformers", "onnx"])
def transcriber(toy_model, request):
    return Transcriber(whisper_model.resolve(str(toy_model)), "sv", engine=request.param, max_new_tokens=6)


@pytest.fixture(scope="module")
def example(toy_settings):
    (first,) = samples(toy_settings(), 1)
    return first


def test_attention_has_a_row_for_each_token_and_the_end(transcriber, example):
    upper, lower = figures.attention(transcriber, example).axes
    (image,) = lower.images
    labels = [label.get_text() for label in lower.get_yticklabels()]
    assert labels[-1] == "(end)" and len(labels) == len(image.get_array()) > 1
    assert upper.get_xlim() == lower.get_xlim()
    positions = lower.lines[0].get_xdata()
    assert (np.diff(positions) >= 0).all(), "words are written in the order in which they were said"


def test_attention_is_left_out_without_alignment_heads(transcriber, example, monkeypatch, capsys):
    monkeypatch.setattr(transcriber.loaded, "can_align", False)
    assert figures.attention(transcriber, example) is None
    assert capsys.readouterr().out.startswith("This part is left out: ")


def test_compared_transcripts_have_marks(transcriber, example):
    shown = figures.compare_transcripts([example], {"toy": transcriber}).data
    assert "<mark style=" in shown, "a toy writes no sentence right"


def test_notebook_transcript_marks_unsure_words():
    words = (Word("Hej", 0.93), Word("<b>dig", 0.21))
    fragment = figures.show_transcript(
        Transcript("Hej <b>dig", 3.0, 0.1, (Segment(61.5, 63.0, "Hej <b>dig", words),))
    ).data
    assert 'Hej <mark title="Confidence 21%">&lt;b&gt;dig</mark>' in fragment
    assert "<style>.unsure mark {" in fragment, "marks of other tables keep their look"
    assert "1:01.5" in fragment
    assert "Confidence 57%" in fragment
