"""Recordings whose channels hold one speaker each."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.inference import channels, subtitles
from pipelines.inference.batch import job as batch_job
from pipelines.inference.batch import run as batch_run
from pipelines.inference.channels import ChannelTranscriber
from pipelines.inference.transcript import DamagedRecording, Segment, Transcript, Word
from pipelines.infra.errors import LabError
from pipelines.speech import audio
from pipelines.speech.audio import AudioError, DamagedAudio
from pipelines.whisper.decoding_options import DecodingOptions
from pipelines.whisper.model import ModelRef

SECOND = 16_000


class LoudSeconds:
    """Transcribes each second with sound as a segment: the tenths of its peak, such as `s3`."""

    times_words = True

    def __init__(self, most: int = 1_000):
        self.ref, self.language, self.options = ModelRef("fake", Path(), "folder", "r1"), "sv", DecodingOptions()
        self.loaded, self.most, self.calls = SimpleNamespace(name="stub cpu"), most, 0

    def transcribe(self, recording, max_duration_s=float("inf"), word_times=False, track=0, **callbacks):
        if self.calls == self.most:
            raise KeyboardInterrupt
        self.calls += 1
        blocks, damage = [], None
        try:
            is_decoded = isinstance(recording, audio.Waveform)
            blocks.extend([recording.samples] if is_decoded else audio.blocks(recording, max_duration_s, track=track))
        except DamagedAudio as error:
            damage = error
        samples = np.concatenate(blocks)
        callbacks.get("on_audio", print)(len(samples) / SECOND)
        segments = []
        for start in range(0, len(samples) // SECOND):
            if peak := round(10 * np.abs(samples[start * SECOND : (start + 1) * SECOND]).max()):
                times = (float(start), start + 1.0) if word_times else ()
                segments.append(Segment(start, start + 1, f"s{peak}", (Word(f"s{peak}", 0.5, *times),)))
        text = " ".join(segment.text for segment in segments)
        transcript = Transcript(text, len(samples) / SECOND, 0.1, tuple(segments), damage.detail if damage else "")
        if damage:
            raise DamagedRecording(damage, transcript)
        return transcript


@pytest.fixture(scope="module")
def interview(encoded):
    """Return `interview(*speakers)`: a wav file; the peak of each second of each channel is a digit, in tenths."""

    def make(*speakers: str) -> bytes:
        rng = np.random.default_rng(0)
        columns = [np.repeat([int(digit) / 10 for digit in one], SECOND) for one in speakers]
        signs = rng.choice([-1.0, 1.0], (len(columns[0]), len(columns)))
        return encoded((np.stack(columns, axis=1) * signs).astype(np.float32), subtype="FLOAT")

    return make


def test_channels_are_merged_by_time_with_their_names(interview):
    shares, segments = [], []
    recording = interview("30050", "02406")
    transcript = ChannelTranscriber(LoudSeconds()).transcribe(
        recording, on_audio=shares.append, on_segment=segments.append, word_times=True
    )
    assert transcript.text == "Left: s3\nRight: s2 s4\nLeft: s5\nRight: s6"
    assert (transcript.audio_s, transcript.plain_text) == (5.0, "s3 s2 s4 s5 s6")
    assert [one.start_s for one in segments] == [0, 1, 2, 3, 4]
    assert tuple(segments) == transcript.segments
    assert shares[-2:] == [2.5, 5.0]
    words = subtitles.as_dict(transcript, "sv")["words"]
    assert [(word["speaker"], word["start"]) for word in words][:2] == [("Left", 0.0), ("Right", 1.0)]
    assert all(f"{one.speaker}: " in subtitles.srt(transcript) for one in segments)


def test_names_are_given_or_numbered(interview):
    def split(recording, names=()):
        return ChannelTranscriber(LoudSeconds(), names).transcribe(recording)

    assert split(interview("30", "02"), ("Anna", "Erik")).text == "Anna: s3\nErik: s2"
    assert split(interview("300", "020", "004")).text == "Channel 1: s3\nChannel 2: s2\nChannel 3: s4"
    with pytest.raises(AudioError, match="2 names for 3 channels: give 3, or none"):
        split(interview("300", "020", "004"), ("Anna", "Erik"))


def test_same_sound_in_all_channels_is_transcribed_once(interview, encoded):
    mono = np.repeat(np.float32([0.3, 0, 0.2]), SECOND) * np.tile(np.float32([-1, 1]), 3 * SECOND // 2)
    for sound in (mono, np.stack([mono, mono], axis=1), np.stack([mono, -0.8 * mono], axis=1)):
        transcriber = LoudSeconds()
        transcript = ChannelTranscriber(transcriber, ("Anna", "Erik")).transcribe(encoded(sound))
        assert (transcript.text, transcript.has_speakers, transcriber.calls) == ("s3 s2", False, 1)
    assert ChannelTranscriber(LoudSeconds()).transcribe(audio.decode(encoded(mono))).text == "s3 s2"


def test_damaged_recording_keeps_both_speakers(interview):
    recording = interview("30200", "04000")
    with pytest.raises(DamagedRecording, match="after 2.5 s") as caught:
        ChannelTranscriber(LoudSeconds()).transcribe(recording[: len(recording) // 2])
    assert caught.value.transcript.text == "Left: s3\nRight: s4"
    assert "after 2.5 s" in caught.value.transcript.damage


def test_silent_channel_has_no_segments(interview):
    assert ChannelTranscriber(LoudSeconds()).transcribe(interview("303", "000")).text == "Left: s3 s3"
    assert ChannelTranscriber(LoudSeconds()).transcribe(interview("000", "000")).text == ""


@pytest.mark.parametrize(
    ("mode", "names", "complaint"),
    [
        ("both", "", "channels takes mix or split, got 'both'"),
        ("mix", "Anna,Erik", "channel names need channels split"),
        ("split", "Anna,,Erik", "1 to 40 characters, separated by commas"),
        ("split", "Anna," + "E" * 41, "1 to 40 characters"),
        ("split", "Anna, Anna", "each channel needs another name"),
        ("split", "An\x1bna,Erik", "1 to 40 characters"),
    ],
)
def test_invalid_options_of_channels_are_one_line(mode, names, complaint):
    with pytest.raises(LabError, match=complaint):
        channels.parse_mode(mode, names)


def test_names_of_corrected_lines_are_removed():
    segments = (Segment(0, 1, "Hej", speaker="Anna"), Segment(1, 2, "Ja", speaker="Erik"))
    assert channels.without_speakers("Anna: Hej: du\nErik:  Ja \n\nOlle: Nej", segments) == "Hej: du Ja Olle: Nej"
    assert channels.without_speakers("Anna: Hej\n", (Segment(0, 1, "Hej"),)) == "Anna: Hej\n"


# ---- tables


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_speakers_and_a_score_without_them(interview, tmp_path):
    (tmp_path / "a.wav").write_bytes(interview("30050", "02406"))
    (tmp_path / "b.wav").write_bytes(interview("345"))
    (tmp_path / "t.csv").write_text(
        "audio,text,start,end\na.wav,s3 s2 s4 s5 s6,,\nb.wav,s3 s4 s5,,\na.wav,s2 s4 s5,1,4\n"
    )
    job = replace(batch_job.plan([tmp_path / "t.csv"], formats=["srt", "tsv"]), split_channels=True)
    with pytest.raises(KeyboardInterrupt):
        batch_run.run(job, LoudSeconds(most=3))
    for other in ({"split_channels": False}, {"channel_names": ("Anna", "Erik")}):
        with pytest.raises(LabError, match="was started with another channels"):
            batch_run.run(replace(job, **other), LoudSeconds())
    summary = batch_run.run(job, LoudSeconds()).summary
    table = rows(job.out)
    assert [row["transcript"] for row in table] == [
        "Left: s3\nRight: s2 s4\nLeft: s5\nRight: s6",
        "s3 s4 s5",
        "Right: s2 s4\nLeft: s5",
    ]
    assert (summary.errors, summary.score["wer"]) == (0, 0.0)
    assert (tmp_path / "a.srt").read_text("utf-8").startswith("1\n00:00:00,000 --> 00:00:01,000\nLeft: s3\n\n2\n")
    assert (tmp_path / "a.tsv").read_text("utf-8").splitlines()[1] == "0\t1000\ts3\tLeft"
    with pytest.raises(LabError, match="another channels"):
        batch_run.run(replace(job, split_channels=False), LoudSeconds())


def test_wrong_number_of_names_is_an_error_of_the_row(interview, tmp_path):
    for name, speakers in (("a", ("30", "02")), ("b", ("3",)), ("c", ("300", "020", "004"))):
        (tmp_path / f"{name}.wav").write_bytes(interview(*speakers))
    job = replace(batch_job.plan([tmp_path]), split_channels=True, channel_names=("Anna", "Erik"))
    assert batch_run.run(job, LoudSeconds()).summary.errors == 1
    job.out.unlink()
    job = replace(
        batch_job.plan([tmp_path / "a.wav", tmp_path / "c.wav"]), split_channels=True, channel_names=("A", "B")
    )
    text = str(batch_run.run(job, LoudSeconds()))
    assert f"{tmp_path / 'a.wav'}:\n  A: s3\n  B: s2\n" in text
    assert text.endswith("channel_names: 2 names for 3 channels: give 3, or none")
