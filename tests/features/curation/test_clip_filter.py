from __future__ import annotations

import numpy as np
import pytest

from pipelines.features.clips import MAX_LABEL_TOKENS, Clip, Rejected
from pipelines.features.curation.clip_filter import ClipFilter
from pipelines.features.sources import Example, NoTranscript


def tokenise(text: str) -> list[int]:
    """Return one token per word, after three and before one special token."""
    return [0, 1, 2, *range(10, 10 + len(text.split())), 3]


def clip_filter(**settings) -> ClipFilter:
    return ClipFilter(
        **{"tokenise": tokenise, "n_mels": 80, "min_duration_s": 0.1, "max_duration_s": 30.0, "min_peak": 1e-3}
        | settings
    )


@pytest.fixture
def clip(encoded, speech):
    """`clip(samples=..., rate_hz=..., subtype=..., **fields)` returns a valid example with these changes."""

    def make(samples=None, rate_hz: int = 16_000, subtype: str = "PCM_16", **fields) -> Example:
        sound = encoded(speech(16_000) if samples is None else samples, rate_hz, subtype=subtype)
        return Example(
            **{"id": "a", "split": "train", "text": "Hej på dig.", "audio": sound, "speaker": "anna"} | fields
        )

    return make


def rejection(example: Example, **settings) -> Rejected:
    with pytest.raises(Rejected) as error:
        clip_filter(**settings).create_clip(example)
    assert str(error.value) == f"{error.value.reason}: {error.value.detail}"
    assert "\n" not in str(error.value)
    return error.value


def test_valid_clip_passes(clip):
    example = clip(text=' "Hej  på dig." ')
    passed = clip_filter().create_clip(example)
    assert isinstance(passed, Clip)
    assert passed.example is example
    assert (passed.text, passed.labels, passed.duration_s) == ("Hej på dig.", [0, 1, 2, 10, 11, 12, 3], 1.0)
    assert passed.log_mel.frames.shape == (102, 80)


@pytest.mark.parametrize(
    ("samples", "rate_hz"),
    [
        (np.random.default_rng(0).uniform(-0.5, 0.5, (44_100, 2)), 44_100),
        (np.random.default_rng(0).uniform(-0.5, 0.5, 8_000), 8_000),
        (np.random.default_rng(0).uniform(-0.5, 0.5, 96_000), 96_000),
    ],
    ids=["stereo", "8 kHz", "96 kHz"],
)
def test_stereo_and_other_sample_rates_pass(clip, samples, rate_hz):
    assert clip_filter().create_clip(clip(samples, rate_hz)).duration_s == pytest.approx(1.0, abs=0.001)


def test_missing_file_is_rejected(clip, tmp_path):
    error = rejection(clip(audio=tmp_path / "gone.wav"))
    assert error.reason == "missing"
    assert "gone.wav" in error.detail


def test_empty_audio_is_rejected(clip, tmp_path):
    (tmp_path / "a.wav").touch()
    assert rejection(clip(audio=b"")).reason == rejection(clip(audio=tmp_path / "a.wav")).reason == "empty"
    assert rejection(clip(np.zeros(0))).reason == "empty"


def test_single_sample_lost_in_resampling_is_rejected(clip):
    assert rejection(clip(np.full(1, 0.5), 96_000), min_duration_s=0.0).reason == "empty"


def test_unreadable_audio_is_rejected(clip):
    assert rejection(clip(audio=b"no sound at all")).reason == "unreadable"


def test_short_clip_is_rejected(clip, speech):
    assert rejection(clip(speech(1_599))).reason == "too_short"
    assert clip_filter().create_clip(clip(speech(1_600))).duration_s == 0.1


def test_long_clip_is_rejected(clip, speech):
    assert rejection(clip(speech(480_001))).reason == "too_long"
    assert rejection(clip(speech(16_001)), max_duration_s=1.0).reason == "too_long"
    assert clip_filter().create_clip(clip(speech(480_000))).duration_s == 30.0


def test_silent_clip_is_rejected(clip, speech):
    error = rejection(clip(speech(16_000, peak=0.9e-3), subtype="FLOAT"))
    assert error.reason == "silent"
    assert "9.0e-04" in error.detail
    assert rejection(clip(np.zeros(16_000))).reason == "silent"
    assert clip_filter().create_clip(clip(speech(16_000, peak=1.1e-3), subtype="FLOAT"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e25], ids=str)
def test_nonfinite_samples_are_rejected(clip, value):
    """1e25 is finite, but its power is not."""
    assert rejection(clip(np.full(16_000, value), subtype="DOUBLE")).reason == "not_finite"


@pytest.mark.parametrize("text", ["", "  ", "?!… –", "\0\u200b", "❤\ufe0f"])
def test_transcript_without_letters_is_rejected(clip, text):
    assert rejection(clip(text=text)).reason == "no_text"


def test_empty_transcript_is_accepted_as_non_speech(clip):
    for samples in (None, np.zeros(16_000)):
        passed = clip_filter(non_speech=True).create_clip(clip(samples, text=" "))
        assert (passed.text, passed.labels) == ("", [0, 1, 2, 3])


@pytest.mark.parametrize("fields", [{"split": "test"}, {"text": "?!"}, {"text": NoTranscript()}], ids=str)
def test_other_clips_without_text_stay_rejected(clip, fields):
    assert rejection(clip(**{"text": ""} | fields), non_speech=True).reason == "no_text"


def test_silent_clip_with_text_stays_rejected(clip):
    assert rejection(clip(np.zeros(16_000)), non_speech=True).reason == "silent"


def test_label_over_448_tokens_is_rejected(clip):
    error = rejection(clip(text="ja " * (MAX_LABEL_TOKENS - 3)))
    assert error.reason == "long_label"
    assert "449 tokens" in error.detail
    assert len(clip_filter().create_clip(clip(text="ja " * (MAX_LABEL_TOKENS - 4))).labels) == MAX_LABEL_TOKENS == 448


@pytest.mark.parametrize("split", ["dev", "", "Train", "other"])
def test_unknown_split_is_rejected(clip, split):
    error = rejection(clip(split=split))
    assert error.reason == "unknown_split"
    assert repr(split) in error.detail


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_known_splits_pass(clip, split):
    assert clip_filter().create_clip(clip(split=split)).example.split == split


@pytest.mark.parametrize("word", ["NA", "nan", "NaN", "None", "null", " NULL "])
def test_word_for_a_missing_value_is_rejected(clip, word):
    rejected = rejection(clip(text=word))
    assert rejected.reason == "no_text"
    assert word.strip() in rejected.detail


@pytest.mark.parametrize("text", ["Nan", "Na", "nan.", "None of it"])
def test_text_like_a_missing_value_is_kept(clip, text):
    assert clip_filter().create_clip(clip(text=text)).text == text


def test_marks_are_removed_only_on_request(clip):
    text = "<|0.00|>[skratt] Hej &amp; hå.<|0.60|>"
    assert clip_filter().create_clip(clip(text=text)).text == "[skratt] Hej &amp; hå."
    assert clip_filter(remove_marks=True).create_clip(clip(text=text)).text == "Hej & hå."
