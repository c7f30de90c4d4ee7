"""Transcripts in the notebook."""

from pipelines.inference.transcript import Segment, Transcript, Word


def test_notebook_transcript_marks_unsure_words():
    from pipelines.inference import figures

    words = (Word("Hej", 0.93), Word("<b>dig", 0.21))
    fragment = figures.show_transcript(
        Transcript("Hej <b>dig", 3.0, 0.1, (Segment(61.5, 63.0, "Hej <b>dig", words),))
    ).data
    assert 'Hej <mark title="Confidence 21%">&lt;b&gt;dig</mark>' in fragment
    assert "1:01.5" in fragment
    assert "Confidence 57%" in fragment
