from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from log_recorder import record_log

from pipelines.features import pipeline as feature_pipeline
from pipelines.features.sources.synthetic.tour import TourSource
from pipelines.inference import subtitles
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import DamagedRecording
from pipelines.inference.windows import decoding as decoding_of_windows
from pipelines.infra.errors import LabError
from pipelines.speech import audio, repetition
from pipelines.speech.audio import AudioError, Waveform
from pipelines.speech.decoders import ffmpeg
from pipelines.speech.recordings import detection, segmentation
from pipelines.whisper import decoding, engines, tokens
from pipelines.whisper import log_mel as features
from pipelines.whisper import model as whisper_model
from pipelines.whisper.confidence import Calibration
from pipelines.whisper.decoding import Hypothesis
from pipelines.whisper.decoding_options import TEMPERATURES
from pipelines.whisper.engines.window_length import joined_window_s, longest_window_s, usual_window_s
from tests import toy_whisper
from tests.speech.recordings.test_segmentation import SECOND, spoken
from tests.speech.recordings.test_segmentation import Scripted as NotZero

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip_model(toy_model):
    """As a tuned model is: at the length of the clip."""
    return dataclasses.replace(whisper_model.resolve(str(toy_model)), context="clip")


@pytest.fixture(scope="module")
def toy(clip_model):
    return Transcriber(clip_model, engine="transformers", device="cpu", max_new_tokens=16)


@pytest.fixture(scope="module")
def stock(toy_model):
    """As a base model is: always 30 s."""
    return Transcriber(whisper_model.resolve(str(toy_model)), engine="transformers", device="cpu", max_new_tokens=16)


@pytest.mark.parametrize("engine", ["transformers", "onnx", "ctranslate2"])
def test_encoder_of_ten_seconds_decodes_windows_of_that_length(toy_model, tmp_path, monkeypatch, speech, engine):
    import torch
    from transformers import WhisperForConditionalGeneration

    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    folder = toy_whisper.shorten(Path(shutil.copytree(toy_model, tmp_path / "ten")), source=500)
    ten = Transcriber(whisper_model.resolve(str(folder)), engine=engine, device="cpu", max_new_tokens=8)
    assert ten.longest_s == 10.0
    decoded, decode = [], ten.loaded.decode
    monkeypatch.setattr(ten.loaded, "decode", lambda windows, *rest: decoded.append(windows) or decode(windows, *rest))
    transcript = ten.transcribe(Waveform(speech(25 * SECOND)))
    assert {windows.shape[-1] for windows in decoded} == {1000}
    assert len(transcript.segments) >= 2 and transcript.segments[-1].end_s == pytest.approx(25, abs=0.5)
    stock = WhisperForConditionalGeneration.from_pretrained(folder)  # as transformers decodes it
    features = torch.from_numpy(decoded[0][:1])
    ids = stock.generate(features, language="sv", task="transcribe", max_new_tokens=8)[0]
    if engine == "transformers":
        [hypothesis] = decode(decoded[0][:1])
        tokenizer = whisper_model.load_processor(ten.ref, "sv").tokenizer
        assert hypothesis.text.split() == tokenizer.decode(ids, skip_special_tokens=True).split()


@pytest.fixture(autouse=True)
def texts_of_any_length(monkeypatch):
    """Texts here are short for their speech, which otherwise leads to further passes (windows/test_decoding.py)."""
    monkeypatch.setattr(decoding_of_windows, "_USUAL_CHARS_PER_S", 0.0)


@pytest.fixture(autouse=True)
def without_silero(monkeypatch):
    """All sound is speech: the recordings of most tests are noise."""
    monkeypatch.setattr(detection, "is_packaged", lambda: False)


class Scripted:
    """An engine that hears what it is told to, and notes what it was given."""

    name, n_mels, can_align = "scripted", 80, True

    def __init__(self, texts=None, logprob: float = -0.1, silent: float = 0.0, times: bool = True):
        self.times, self.timed = times, []
        self.texts = itertools.cycle(texts) if texts else (f"part {n}" for n in itertools.count())
        self.logprob, self.silent = logprob, silent
        self.shapes: list[tuple[int, ...]] = []
        self.temperatures: list[float] = []

    def log_mel(self, waveform):
        return features.extract_light(waveform)

    def decode(self, windows, options=None, temperature=0.0):
        self.shapes.append(windows.shape)
        self.temperatures.append(temperature)
        texts = [next(self.texts) for _ in windows]
        return [Hypothesis(t, self.logprob, 3, tuple((w, self.logprob) for w in t.split()), self.silent) for t in texts]

    def word_starts(self, windows, frames, texts):
        """A word a second; nothing for those that ask in vain."""
        self.timed.append((windows.shape, frames))
        return [[float(n) for n in range(len(text.split()))] if self.times else [] for text in texts]


@pytest.fixture
def scripted(clip_model, monkeypatch):
    """`scripted(engine, context_s=8.0)`: a Transcriber around a Scripted engine."""

    def make(engine, ref=None, **facts):
        monkeypatch.setattr(engines, "open_engine", lambda *args, **kw: engine)
        return Transcriber(ref or dataclasses.replace(clip_model, facts=facts))

    return make


# ---- one window


def test_window_with_too_much_text_is_noted(scripted, speech):
    class Cut(Scripted):
        def decode(self, windows, options=None, temperature=0.0):
            return [dataclasses.replace(one, tokens=224) for one in super().decode(windows, options, temperature)]

    lines = record_log()
    scripted(Cut(["Det blåser i dag."]), context_s=20.0).transcribe(Waveform(speech(12 * SECOND)))
    assert [line for line in lines if "a part of 12 s has more text than 224 tokens" in line]


def test_long_window_has_one_segment_per_sentence(scripted, speech):
    engine = Scripted(["Det blåser i dag. Kommer du? Ja visst, sa hon."])
    heard = scripted(engine, context_s=20.0).transcribe(Waveform(speech(12 * SECOND)))
    told = [(segment.start_s, segment.end_s, segment.text) for segment in heard.segments]
    assert told == [(0.0, 4.0, "Det blåser i dag."), (4.0, 6.0, "Kommer du?"), (6.0, 12.0, "Ja visst, sa hon.")]
    assert [len(segment.words) for segment in heard.segments] == [4, 2, 4]
    assert heard.text == "Det blåser i dag. Kommer du? Ja visst, sa hon."
    assert engine.timed == [((1, 80, 1_208), [1_202])]


@pytest.mark.parametrize(
    ("text", "seconds", "times"),
    [("En mening. En till.", 5, True), ("En enda mening, men lång.", 12, True), ("En mening. En till.", 12, False)],
)
def test_short_or_untimed_window_is_one_segment(scripted, speech, text, seconds, times):
    engine = Scripted([text], times=times)
    (segment,) = scripted(engine, context_s=20.0).transcribe(Waveform(speech(seconds * SECOND))).segments
    assert (segment.start_s, segment.end_s, segment.text) == (0.0, seconds, text)
    assert len(engine.timed) == (not times)


def test_window_length_follows_the_models_context(scripted, clip_model, speech):
    for context, frames in (("clip", 208), ("full", 3_000)):
        engine = Scripted()
        scripted(engine, dataclasses.replace(clip_model, context=context)).transcribe(Waveform(speech(2 * SECOND)))
        assert engine.shapes == [(1, 80, frames)]


def test_transcriber_matches_the_evaluation(toy, toy_cache, toy_settings, monkeypatch):
    """The same clips through the audio file and through the feature cache."""
    monkeypatch.setattr(repetition, "is_repeating", lambda *_: False)  # a toy's nonsense goes in circles
    rows = toy_cache.split("test")
    options = decoding.RowDecodingOptions("sv", 16, batch_frames=1)
    cached = decoding.decode_rows_to_text(toy.loaded.model, toy.loaded.processor, toy_cache, rows, options)
    plain = toy.with_options(timestamps=False, beam_size=1, temperatures=(0.0,), min_logprob=-100.0)
    heard = [plain.transcribe(clip.audio).text for clip in feature_pipeline.samples(toy_settings(), n=12)]
    # a toy writes timestamps within words, and these separate words in a transcript
    assert [text.replace(" ", "") for text in heard] == [text.replace(" ", "") for text in cached]
    assert len(set(heard)) > 3


def test_bytes_path_and_waveform_give_one_transcript(toy, speech, encoded, tmp_path):
    content = encoded(speech(3 * SECOND), subtype="FLOAT")
    (tmp_path / "clip.wav").write_bytes(content)
    recordings = [content, tmp_path / "clip.wav", str(tmp_path / "clip.wav"), Waveform(speech(3 * SECOND))]
    heard = [toy.transcribe(recording) for recording in recordings]
    assert len({transcript.text for transcript in heard}) == 1
    assert [transcript.audio_s for transcript in heard] == [3] * 4


def test_transcript_has_words_with_confidence(toy, speech):
    heard = toy.transcribe(Waveform(speech(3 * SECOND)))
    (segment,) = heard.segments
    assert (segment.start_s, segment.end_s) == (0.0, 3.0)
    assert [word.text for word in segment.words] == heard.text.split()
    assert all(0 <= word.confidence <= 1 for word in segment.words)
    assert heard.confidence == pytest.approx(segment.confidence)
    assert 0 < heard.elapsed_s < 60


def test_confidence_uses_the_models_calibration(scripted, speech):
    fitted = Calibration(2.0, -1.0, 500)
    told = [
        scripted(Scripted(["hej"], logprob=-0.7), **facts).transcribe(Waveform(speech(SECOND))).confidence
        for facts in ({}, {"confidence": fitted.as_dict()})
    ]
    assert told == pytest.approx([np.exp(-0.7), fitted(-0.7)])
    assert told[0] != pytest.approx(told[1], abs=0.1)


def test_invalid_recording_is_refused_with_a_reason(toy, speech, encoded, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio")
    for recording, reason in {
        tmp_path / "nowhere.wav": "missing",
        tmp_path / "empty.wav": "empty",
        tmp_path / "text.wav": "unreadable",
        b"": "empty",
        b"RIFF": "unreadable",
        encoded(np.zeros(0, dtype=np.float32)): "empty",
        encoded(np.full(SECOND, np.nan, dtype=np.float32), subtype="FLOAT"): "not_finite",
    }.items():
        with pytest.raises(AudioError) as caught:
            toy.transcribe(recording)
        assert caught.value.reason == reason
    for recording in (encoded(speech(3 * SECOND)), Waveform(speech(3 * SECOND))):
        with pytest.raises(AudioError) as caught:
            toy.transcribe(recording, max_duration_s=2)
        assert caught.value.reason == "too_long"
    for samples, reason in ((np.zeros(0), "empty"), (np.full(SECOND, np.inf), "not_finite")):
        with pytest.raises(AudioError) as caught:
            toy.transcribe(Waveform(samples.astype(np.float32)))
        assert caught.value.reason == reason


def test_an_unknown_language_is_one_line(toy_model):
    for engine in ("transformers", "ctranslate2"):
        with pytest.raises(LabError) as caught:
            Transcriber(whisper_model.resolve(str(toy_model)), "qq", engine=engine).transcribe(
                Waveform(np.ones(SECOND, np.float32))
            )
        assert "qq" in str(caught.value)
        assert "\n" not in str(caught.value)


# ---- silence


@pytest.fixture
def exact_detector(monkeypatch):
    """Speech is where samples are not zero."""
    monkeypatch.setattr(detection, "open_detector", NotZero)


@pytest.mark.parametrize("seconds", [0.01, 0.3, 1, 3.5, 27, 70])
def test_recording_without_speech_has_an_empty_transcript(scripted, exact_detector, seconds):
    engine = Scripted()
    silence = Waveform(np.zeros(int(seconds * SECOND), dtype=np.float32))
    heard = scripted(engine, context_s=10.0).transcribe(silence)
    assert (heard.text, heard.segments, engine.shapes) == ("", (), [])
    assert heard.audio_s == pytest.approx(seconds)


@pytest.mark.parametrize(("before", "after", "frames"), [(0.9, 0.9, 382), (5.0, 0.9, 312), (5.0, 5.0, 242)])
def test_short_silence_at_the_edges_is_decoded(scripted, exact_detector, before, after, frames):
    engine = Scripted(["hej"])
    samples = spoken(int((before + 2 + after) * SECOND), (before, before + 2))
    (segment,) = scripted(engine, context_s=20.0).transcribe(Waveform(samples)).segments
    assert abs(engine.shapes[0][2] - frames) <= 8
    assert (segment.start_s, segment.end_s) == pytest.approx((before - 0.2, before + 2.2), abs=0.04)


@pytest.mark.parametrize("context", ["clip", "full"])
def test_cue_is_where_the_speech_is(scripted, exact_detector, clip_model, context):
    model = scripted(Scripted(["Hej på dig."]), dataclasses.replace(clip_model, context=context))
    heard = model.transcribe(Waveform(spoken(27 * SECOND, (25.0, 26.5))), word_times=True)
    assert subtitles.srt(heard).startswith("1\n00:00:24,79")
    assert "\n00:00:24.79" in subtitles.vtt(heard)
    (segment,) = subtitles.as_dict(heard, "sv")["segments"]
    assert (segment["start"], segment["end"]) == pytest.approx((24.8, 26.7), abs=0.04)
    assert all(24.7 < word["start"] <= word["end"] < 26.8 for word in segment["words"])


def test_joined_window_has_a_segment_per_stretch(scripted, exact_detector, clip_model):
    engine = Scripted(["ett två tre", "fyra"])
    samples = spoken(60 * SECOND, (1.0, 2.0), (3.2, 4.2), (50.0, 51.0))
    heard = scripted(engine, dataclasses.replace(clip_model, context="full")).transcribe(Waveform(samples))
    assert [(round(s.start_s, 1), round(s.end_s, 1), s.text) for s in heard.segments] == [
        (0.8, 2.2, "ett två"), (3.0, 4.4, "tre"), (49.8, 51.2, "fyra")
    ]  # fmt: skip


def test_recording_as_long_as_a_window_is_not_cut(scripted, exact_detector):
    engine = Scripted()
    samples = spoken(int(3.7 * SECOND), (0, 3.7))
    scripted(engine, context_s=3.7).transcribe(Waveform(samples))
    assert [shape[0] for shape in engine.shapes] == [1]


# ---- long recordings


@pytest.mark.parametrize(
    ("context", "facts", "longest_s"),
    [
        ("full", {}, 30.0),
        ("full", {"context_s": 5.0}, 30.0),
        ("clip", {}, 30.0),
        ("clip", {"context_s": 7.5}, 7.5),
        ("clip", {"context_s": 0.8}, 2.0),
        ("clip", {"context_s": 99.0}, 30.0),
    ],
)
def test_longest_window_follows_the_manifest(clip_model, context, facts, longest_s):
    assert longest_window_s(dataclasses.replace(clip_model, context=context, facts=facts)) == longest_s


def test_segments_are_in_order_and_make_up_the_text(scripted, speech):
    engine = Scripted(["ett", "", "två", "tre"])
    heard = scripted(engine, context_s=10.0).transcribe(Waveform(speech(65 * SECOND)))
    assert heard.audio_s == 65
    assert heard.text == " ".join(segment.text for segment in heard.segments)
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(heard.segments))
    assert "" not in [segment.text for segment in heard.segments], "a window without words is no segment"
    # no window is longer than what the model was tuned to hear, and none was decoded twice
    assert max(shape[2] for shape in engine.shapes) <= 1_708  # 15 s, and a second of each neighbour
    n_windows = sum(shape[0] for shape in engine.shapes)
    assert 5 <= n_windows <= 8


def test_real_decoder_on_a_long_recording(toy):
    said = [audio.decode(example.audio).samples for example in TourSource(1, 1, 12).examples(("test",))]
    recording = np.concatenate([part for samples in said for part in (samples, np.zeros(2 * SECOND, np.float32))])
    assert len(recording) > 35 * SECOND
    windows = list(segmentation.windows([recording], detection.open_detector(), longest_s=30.0))
    heard = toy.transcribe(Waveform(recording))
    assert heard.segments
    assert {segment.start_s for segment in heard.segments} <= {round(window.start_s, 3) for window in windows}
    assert all(segment.text for segment in heard.segments)


def test_full_context_model_gets_joined_windows(scripted, clip_model, speech):
    engine = Scripted()
    heard = scripted(engine, dataclasses.replace(clip_model, context="full")).transcribe(Waveform(speech(100 * SECOND)))
    assert {shape[2] for shape in engine.shapes} == {3_000}
    assert len(heard.segments) in (4, 5)


def test_long_recording_needs_constant_memory(scripted):
    """Half an hour of noise, made block by block: what is held at any time is a few minutes."""
    import tracemalloc

    rng = np.random.default_rng(0)
    blocks = (rng.standard_normal(30 * SECOND, dtype=np.float32) for _ in range(60))
    engine = scripted(Scripted(), context_s=10.0)
    tracemalloc.start()
    n = sum(1 for _ in engine._decode_blocks(blocks))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 120 <= n <= 270
    minutes_at_once = peak / (60 * SECOND * 4)
    assert minutes_at_once < 18  # of 30; samples, frames and batches together


def test_callbacks_report_audio_and_segments(scripted, speech):
    read, segments = [], []
    heard = scripted(Scripted(), context_s=5.0).transcribe(
        Waveform(speech(70 * SECOND)), on_audio=read.append, on_segment=segments.append
    )
    assert read[-1] == 70
    assert {30, 60, 70} <= {*read} and read == sorted(read)
    assert tuple(segments) == heard.segments
    first = next(scripted(Scripted(), context_s=5.0).segments(Waveform(speech(70 * SECOND))))
    assert first.start_s == 0.0


class Enough(Exception):
    pass


@pytest.mark.parametrize("windows", ["many", "one"])
def test_callback_can_stop_between_two_batches(scripted, speech, windows):
    """A time-out has no other place to end it: 70 s are one group of windows, and a single window has no block after
    it."""
    engine = Scripted(["och då " * 20])  # would be tried at every temperature
    stop_after = 2

    def on_audio(seconds):
        if len(engine.shapes) == stop_after:
            raise Enough

    seconds = 70 if windows == "many" else 3
    with pytest.raises(Enough):
        scripted(engine, context_s=5.0).transcribe(Waveform(speech(seconds * SECOND)), on_audio=on_audio)
    assert len(engine.shapes) == stop_after


# ---- times of words


@pytest.mark.parametrize("seconds", [3, 12])
def test_word_times_are_added_on_request(scripted, speech, seconds):
    engine = Scripted(["Det blåser. Kommer du?"])
    heard = scripted(engine, context_s=20.0).transcribe(Waveform(speech(seconds * SECOND)), word_times=True)
    words = [(word.text, word.start_s, word.end_s) for segment in heard.segments for word in segment.words]
    ends = [1, 2, 3, seconds]
    assert words == list(zip(["Det", "blåser.", "Kommer", "du?"], [0, 1, 2, 3], ends))
    assert len(heard.segments) == (2 if seconds == 12 else 1)
    untimed = scripted(engine, context_s=20.0).transcribe(Waveform(speech(3 * SECOND)))
    assert {(word.start_s, word.end_s) for word in untimed.segments[0].words} == {(None, None)}


def test_untimed_words_divide_the_segment_by_characters(scripted, speech):
    engine = Scripted(["a bcdefg"], times=False)
    heard = scripted(engine, context_s=20.0).transcribe(Waveform(speech(3 * SECOND)), word_times=True)
    assert [(word.start_s, word.end_s) for word in heard.segments[0].words] == [(0.0, 0.667), (0.667, 3.0)]


def test_model_without_alignment_heads_is_refused(scripted, speech):
    engine = Scripted()
    engine.can_align = False
    with pytest.raises(LabError, match="does not support word times"):
        scripted(engine).transcribe(Waveform(speech(SECOND)), word_times=True)


# ---- what is not believed


def test_repeating_text_is_decoded_at_higher_temperature(scripted, speech):
    engine = Scripted(["och då " * 20, "och då " * 20, "det var allt"])
    heard = scripted(engine).transcribe(Waveform(speech(2 * SECOND)))
    assert engine.temperatures == [0.0, 0.2, 0.4]
    assert heard.text == "det var allt"
    assert heard.segments[0].temperature == 0.4
    calm = scripted(Scripted(["det var allt"])).transcribe(Waveform(speech(2 * SECOND)))
    assert calm.segments[0].temperature == 0.0


def test_text_that_always_repeats_is_cut(scripted, speech):
    engine = Scripted(["hej då " + "och sen " * 20])
    heard = scripted(engine).transcribe(Waveform(speech(2 * SECOND)))
    assert engine.temperatures == [*TEMPERATURES]
    assert heard.text == "hej då och sen"
    assert [word.text for word in heard.segments[0].words] == ["hej", "då", "och", "sen"]


def test_unsure_text_is_kept_if_silero_finds_speech(scripted, speech, monkeypatch):
    monkeypatch.setattr(detection, "is_packaged", lambda: True)
    monkeypatch.setattr(detection, "open_detector", NotZero)
    heard = scripted(Scripted(["ja"], -1.5, 0.9)).transcribe(Waveform(speech(SECOND // 2)))
    assert heard.text == "ja"


@pytest.mark.parametrize(("logprob", "silent", "text"), [(-1.5, 0.9, ""), (-1.5, 0.3, "tack"), (-0.5, 0.9, "tack")])
def test_unsure_text_without_speech_is_dropped(scripted, speech, logprob, silent, text):
    heard = scripted(Scripted(["tack"], logprob, silent)).transcribe(Waveform(speech(2 * SECOND)))
    assert heard.text == text
    assert len(heard.segments) == bool(text)
    assert [segment.no_speech for segment in heard.segments] == [silent] * bool(text)


# ---- reading


needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None and not os.environ.get("CI"), reason="ffmpeg is not installed"
)
"""Where all is to be tested, its absence is a failure."""


@pytest.mark.parametrize("rate_hz", [16_000, 8_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_blocks_equal_the_decoded_file(encoded, speech, rate_hz, channels):
    samples = np.stack([speech(7 * rate_hz, seed) for seed in range(channels)], axis=1)
    content = encoded(samples, rate_hz, subtype="FLOAT")
    whole = audio.decode(content).samples
    blocks = np.concatenate(list(audio.blocks(content, block_s=1.0)))
    assert len(blocks) == len(whole)
    assert np.abs(blocks - whole).max() < 1e-4


def test_wrong_header_duration_is_still_too_long(encoded, speech):
    with pytest.raises(AudioError) as caught:
        list(audio.blocks(encoded(speech(9 * SECOND)), max_duration_s=5))
    assert caught.value.reason == "too_long"


@needs_ffmpeg
def test_audio_track_of_a_video_is_transcribed(encoded, speech, tmp_path, toy):
    (tmp_path / "a.wav").write_bytes(encoded(speech(3 * SECOND)))
    video = tmp_path / "film.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "color=c=blue:s=64x64:d=3", "-i", tmp_path / "a.wav"]
    subprocess.run([*command, "-c:a", "aac", "-shortest", video], check=True)
    for source in (video, video.read_bytes()):
        heard = toy.transcribe(source)
        assert heard.audio_s == pytest.approx(3, abs=0.2)
    with pytest.raises(AudioError):
        list(audio.blocks(video, max_duration_s=1))


@needs_ffmpeg
@pytest.mark.parametrize(
    "hostile", ["#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "ffconcat version 1.0\nfile a.wav\n"]
)
def test_playlist_of_other_files_is_not_followed(tmp_path, hostile, encoded, speech):
    (tmp_path / "a.wav").write_bytes(encoded(speech(SECOND)))
    path = tmp_path / "list.m3u8"
    path.write_text(hostile)
    with pytest.raises(AudioError) as caught:
        list(audio.blocks(path))
    assert caught.value.reason == "unreadable"


def test_video_without_ffmpeg_is_refused_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    path = tmp_path / "film.mp4"
    path.write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(100))
    with pytest.raises(AudioError) as caught:
        list(audio.blocks(path))
    assert caught.value.reason == "unreadable"
    assert "ffmpeg" in str(caught.value)


def damaged_flac(encoded, speech, seconds: int = 100, at: float = 0.7) -> bytes:
    """Cannot be read after some `at` of it."""
    content = encoded(speech(seconds * SECOND), format="FLAC")
    place = int(at * len(content))
    return content[:place] + bytes(20_000) + content[place + 20_000 :]


@pytest.mark.parametrize("with_ffmpeg", [False, pytest.param(True, marks=needs_ffmpeg)])
@pytest.mark.parametrize("as_file", [False, True])
def test_damaged_recording_is_transcribed_with_its_damage(
    scripted, encoded, speech, tmp_path, monkeypatch, with_ffmpeg, as_file
):
    if not with_ffmpeg:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    recording = damaged_flac(encoded, speech)
    if as_file:
        (tmp_path / "a.flac").write_bytes(recording)
        recording = tmp_path / "a.flac"
    message = "from 69.. to 7... s$" if with_ffmpeg else "after (69|70).. s; ffmpeg, .* is not installed$"
    samples = []
    with pytest.raises(AudioError, match=f"^damaged: it cannot be read {message}"):
        samples.extend(audio.blocks(recording))
    audio_s = sum(map(len, samples)) / SECOND
    assert audio_s == (100 if with_ffmpeg else pytest.approx(70, abs=3))
    with pytest.raises(DamagedRecording) as caught:
        scripted(Scripted(), context_s=10.0).transcribe(recording)
    assert (caught.value.reason, caught.value.transcript.audio_s) == ("damaged", audio_s)
    assert caught.value.transcript.segments[-1].end_s == audio_s
    segments = []
    with pytest.raises(AudioError, match="damaged"):
        segments.extend(scripted(Scripted(), context_s=10.0).segments(recording))
    assert tuple(segments) == caught.value.transcript.segments


@needs_ffmpeg
def test_truncated_upload_is_damaged(encoded, speech, tmp_path):
    (tmp_path / "a.wav").write_bytes(encoded(speech(60 * SECOND)))
    whole = tmp_path / "a.m4a"
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", "-movflags", "+faststart", whole]
    subprocess.run(command, check=True)
    assert sum(map(len, audio.blocks(whole))) == pytest.approx(60 * SECOND, abs=0.2 * SECOND)
    half = whole.read_bytes()[: whole.stat().st_size // 2]
    heard = []
    with pytest.raises(AudioError, match="damaged: it cannot be read after"):
        heard.extend(audio.blocks(half))
    assert 20 * SECOND < sum(map(len, heard)) < 40 * SECOND


FFMPEG = """#!/bin/sh
cat {header}
dd if=/dev/zero bs=64000 count=31 2>/dev/null
{then}
"""
"""Gives 31 s of silence as wav."""


@pytest.mark.parametrize("then", ["exec sleep 60", "exit 3"])
@pytest.mark.parametrize("first", ["", "exit 3"])
def test_hanging_or_failing_ffmpeg_ends_the_recording(tmp_path, monkeypatch, encoded, then, first):
    (tmp_path / "header").write_bytes(encoded(np.zeros(1, np.float32), subtype="FLOAT")[:-4])
    script = FFMPEG.replace("cat", f"{first}\ncat").format(then=then, header=tmp_path / "header")
    (tmp_path / "ffmpeg").write_text(script)
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(ffmpeg, "TIMEOUT_S", 1.0)
    blocks = audio.blocks(b"a film, perhaps" * 9)
    if not first:
        assert len(next(blocks)) == 30 * SECOND
        assert len(next(blocks)) == SECOND
    with pytest.raises(AudioError, match="unreadable: neither" if first else "damaged: it cannot be read after 31.0 s"):
        next(blocks)


@needs_ffmpeg
def test_input_of_ffmpeg_is_an_unnamed_file(encoded, speech, tmp_path, monkeypatch):
    """What has a name stays, where the process is killed."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no files without a name")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recording = damaged_flac(encoded, speech, 20, 0.3)
    blocks = audio.blocks(recording)
    assert len(next(blocks)) and len(next(blocks))  # the second is from ffmpeg
    assert not list(tmp_path.iterdir())
    monkeypatch.delattr(os, "memfd_create")  # as on macOS
    named = audio.blocks(recording)
    assert len(next(named)) == len(next(audio.blocks(recording))) and len(next(named))
    named.close()
    assert not list(tmp_path.iterdir())


def test_auto_is_the_language_that_a_model_was_tuned_for(scripted, monkeypatch):
    engine = Scripted()
    engine.check = lambda options: None
    monkeypatch.setattr(whisper_model, "language_of", lambda ref, default: "fi")
    assert scripted(engine).with_options(language="auto").language == "fi"


def test_other_language_than_the_tuned_one_is_warned_of(scripted, monkeypatch):
    engine = Scripted()
    engine.check = lambda options: None
    monkeypatch.setattr(whisper_model, "language_of", lambda ref, default: "fi")
    transcriber, lines = scripted(engine), record_log()
    assert transcriber.with_options(language="Finnish", beam_size=2).language == "fi" and not lines
    assert transcriber.with_options(language="sv-SE").language == "sv"
    (warning,) = lines
    assert "was trained for fi: its transcripts in sv may be poor" in warning


@pytest.mark.parametrize("language", ["", "auto", "English"])
def test_english_only_model_transcribes_english(scripted, monkeypatch, language):
    engine = Scripted()
    engine.check = lambda options: None
    monkeypatch.setattr(whisper_model, "language_of", lambda ref, default: default)
    monkeypatch.setattr(tokens, "only_language", lambda folder: "en")
    transcriber, lines = scripted(engine), record_log()
    assert transcriber.language == "en"
    assert transcriber.with_options(language=language).language == "en"
    assert len(lines) == (language == "auto")
    assert all("knows English only: no language is detected" in line for line in lines)
    with pytest.raises(LabError, match="knows English only, got Swedish: take a multilingual model"):
        transcriber.with_options(language="sv")


def test_detected_language_is_in_the_transcript(toy, speech, monkeypatch):
    monkeypatch.setattr(toy.loaded, "detect_language", lambda window: "da")
    auto = toy.with_options(language="auto")
    transcript = auto.transcribe(Waveform(speech(3 * SECOND)))
    assert transcript.language == "da"
    assert subtitles.as_dict(transcript, auto.language)["language"] == "danish"
    assert toy.transcribe(Waveform(speech(3 * SECOND))).language == ""


def test_usual_window_is_no_longer_than_the_encoder(toy_model, tmp_path):
    tuned = {"context": "clip", "facts": {"context_s": 4.0}}
    folder = toy_whisper.shorten(Path(shutil.copytree(toy_model, tmp_path / "ten")), source=500)
    ten, thirty = (whisper_model.resolve(str(path)) for path in (folder, toy_model))
    assert usual_window_s(dataclasses.replace(thirty, **tuned)) == 15.0
    assert usual_window_s(dataclasses.replace(ten, **tuned)) == 10.0


def test_windows_of_tuned_models_are_joined_less_than_they_may_last(toy_model):
    """Joined stretches are short, for speed; a stretch without pauses keeps the usual window."""
    plain = whisper_model.resolve(str(toy_model))
    tuned = dataclasses.replace(plain, context="clip", facts={"context_s": 4.0})
    words = dataclasses.replace(plain, context="clip", facts={"context_s": 2.0})
    assert [joined_window_s(ref) for ref in (plain, tuned, words)] == [30.0, 6.0, 2.0]
    assert [usual_window_s(ref) for ref in (plain, tuned, words)] == [30.0, 15.0, 2.0]
