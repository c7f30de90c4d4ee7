"""Files that hold more, less or other sound than they claim: nothing is lost without an error that says when."""

from __future__ import annotations

import shutil
import struct
import subprocess

import numpy as np
import pytest

from pipelines.speech import audio
from pipelines.speech.audio import AudioError, DamagedAudio, Gap
from pipelines.speech.decoders import containers, ffmpeg, mpeg_frames
from pipelines.speech.decoders.content import Content

SECOND = 16_000
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_ffmpeg)], ids=["libsndfile", "ffmpeg"])
def with_ffmpeg(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(ffmpeg, "is_installed", lambda: False)
    return request.param


@pytest.fixture(scope="module")
def sound(speech):
    """Four seconds of sound in which no part is like another."""
    rng = np.random.default_rng(0)
    return (0.7 * speech(4 * SECOND) + 0.05 * rng.standard_normal(4 * SECOND)).astype(np.float32)


def read(content: bytes, **options) -> tuple[np.ndarray, tuple[Gap, ...]]:
    """Return the samples of a recording, and its gaps."""
    blocks = [np.zeros(0, np.float32)]
    try:
        blocks.extend(audio.blocks(content, **options))
    except DamagedAudio as error:
        return np.concatenate(blocks), error.gaps
    return np.concatenate(blocks), ()


def lag_s(samples: np.ndarray, sound: np.ndarray, at_s: float) -> float:
    """Return by how much later than in `sound` the quarter of a second at `at_s` is heard in `samples`."""
    start, margin = int(at_s * SECOND), SECOND // 5
    wanted = sound[start : start + SECOND // 4]
    around = samples[start - margin : start + margin + len(wanted)]
    products = np.correlate(around, wanted, "valid")
    best = int(products.argmax())
    heard = around[best : best + len(wanted)]
    assert products[best] > 0.8 * np.linalg.norm(wanted) * np.linalg.norm(heard)
    return (best - margin) / SECOND


def without_xing(mp3: bytes) -> bytes:
    """Return an mp3 without its Xing or Info header, as an encoder writes it to a pipe."""
    frame = mpeg_frames.parse_mp3(mp3[:4])
    assert b"Xing" in mp3[: frame.n_bytes] or b"Info" in mp3[: frame.n_bytes]
    return mp3[frame.n_bytes :]


def with_xing_frames(mp3: bytes, change: int) -> bytes:
    """Return an mp3 whose header claims `change` frames more."""
    at = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
    return mp3[:at] + (int.from_bytes(mp3[at : at + 4], "big") + change).to_bytes(4, "big") + mp3[at + 4 :]


def frame_starts(mp3: bytes) -> list[int]:
    starts, at = [], 0
    while frame := mpeg_frames.parse_mp3(mp3[at : at + 4]):
        starts.append(at)
        at += frame.n_bytes
    return starts


# --- whole files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        without_xing,
        lambda mp3: with_xing_frames(mp3, -60),
        lambda mp3: b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + mp3 + b"TAG" + bytes(125),
        lambda mp3: without_xing(mp3) + bytes(500),
    ],
    ids=["no header", "too few frames", "tags", "padding"],
)
def test_mp3_is_read_to_its_end(encoded, sound, with_ffmpeg, change):
    samples, gaps = read(change(encoded(sound, format="MP3")))
    assert (len(samples) / SECOND, gaps) == (pytest.approx(4, abs=0.15), ())
    assert abs(lag_s(samples, sound, 3.0) - lag_s(samples, sound, 0.5)) < 0.001


@pytest.mark.parametrize("kind", ["MP3", "OGG", "FLAC", "WAV", "AIFF"])
def test_files_in_a_row_are_read_one_after_another(encoded, sound, with_ffmpeg, kind):
    second = encoded(sound[::2], 8_000, format=kind)
    samples, gaps = read(encoded(sound, format=kind) + second)
    assert (len(samples) / SECOND, gaps) == (pytest.approx(8, abs=0.15), ())
    assert abs(lag_s(samples[4 * SECOND :], sound, 2.0)) < 0.15


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_F000, 0x8000_0000, 16_000], ids=hex)
@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_wav_with_a_placeholder_as_size_is_whole(sound, tmp_path, with_ffmpeg, size, order):
    import soundfile

    soundfile.write(tmp_path / "a.wav", sound, SECOND, subtype="PCM_16", endian=order)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[40:44] = struct.pack("<I" if order == "LITTLE" else ">I", size)
    samples, gaps = read(bytes(content))
    assert (len(samples), gaps) == (4 * SECOND, ())
    assert np.abs(samples - sound).max() < 1e-4


def test_chunks_behind_the_sound_are_no_sound(encoded, sound, with_ffmpeg):
    whole = encoded(sound, subtype="PCM_16")
    for trailer in (b"LIST" + struct.pack("<I", 4_000) + b"a" * 4_000, bytes(5_000), b"ID3\4" + b"a" * 5_000):
        assert len(read(whole + trailer)[0]) == 4 * SECOND


@pytest.mark.parametrize(("kind", "field"), [("AU", (8, 4)), ("CAF", None)])
def test_au_and_caf_of_unknown_size_are_whole(encoded, sound, with_ffmpeg, kind, field):
    content = bytearray(encoded(sound, format=kind, subtype="PCM_16"))
    start, n_bytes = field or (content.rindex(b"data", 0, 8_000) + 4, 8)
    for size in (b"\xff" * n_bytes, bytes(n_bytes)):
        content[start : start + n_bytes] = size
        samples, gaps = read(bytes(content))
        assert (len(samples), gaps) == (4 * SECOND, ())


@pytest.mark.parametrize("total", [0, SECOND])
def test_flac_with_a_wrong_total_is_whole(encoded, sound, with_ffmpeg, total):
    content = bytearray(encoded(sound, format="FLAC"))
    content[21], content[22:26] = content[21] & 0xF0, struct.pack(">I", total)
    samples, gaps = read(bytes(content), max_duration_s=5)
    assert (len(samples), gaps) == (4 * SECOND, ())


# --- cut off ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3"])
def test_file_that_was_cut_off_is_damaged_at_its_end(encoded, sound, with_ffmpeg, kind):
    content = encoded(sound, format=kind)
    samples, (gap,) = read(content[: int(0.6 * len(content))])
    assert len(samples) / SECOND == pytest.approx(2.4, abs=0.45)
    assert (gap.start_s, gap.end_s) == (pytest.approx(len(samples) / SECOND, abs=0.3), None)
    with pytest.raises(AudioError, match="damaged: it cannot be read after 2.[0-9] s"):
        audio.decode(content[: int(0.6 * len(content))])


def test_ogg_without_its_last_page_is_damaged(encoded, speech, with_ffmpeg):
    content = encoded(speech(20 * SECOND), format="OGG")
    samples, (gap,) = read(content[: content.rindex(b"OggS")])
    assert gap == Gap(len(samples) / SECOND) or abs(gap.start_s - len(samples) / SECOND) < 0.1
    assert 5 < gap.start_s < 20 and gap.end_s is None


# --- damaged in the middle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_frames", [1, 8])
@pytest.mark.parametrize("what", ["overwritten", "missing"])
def test_times_are_right_after_damaged_mp3_frames(encoded, sound, with_ffmpeg, what, n_frames):
    content = encoded(sound, format="MP3")
    starts = frame_starts(content)
    first, end = starts[40], starts[40 + n_frames]
    junk = b"\0" * (end - first) if what == "overwritten" else b"\0" * 8
    samples, (gap,) = read(content[:first] + junk + content[end:])
    assert len(samples) / SECOND == pytest.approx(4, abs=0.1)
    assert (gap.start_s, gap.end_s) == (
        pytest.approx(39 * 0.036, abs=0.08),
        pytest.approx((39 + n_frames) * 0.036, abs=0.2),
    )
    assert abs(lag_s(samples, sound, 3.0) - lag_s(samples, sound, 0.5)) < (0.001 if what == "missing" else 0.15)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
def test_decoding_goes_on_after_damage(encoded, speech, kind):
    sound = speech(30 * SECOND) + 0.01 * np.random.default_rng(0).standard_normal(30 * SECOND).astype(np.float32)
    content = bytearray(encoded(sound, format=kind))
    middle = len(content) // 2
    content[middle : middle + 40] = np.random.default_rng(0).bytes(40)
    samples, (gap,) = read(bytes(content))
    assert len(samples) / SECOND == pytest.approx(30, abs=0.05)
    assert gap.start_s < 16 and gap.end_s is not None and gap.end_s < 20
    assert abs(lag_s(samples, sound, 25.0)) < 0.05


def encode(sound: np.ndarray, path, *options: str) -> bytes:
    """Encode with ffmpeg and return the file."""
    command = ["ffmpeg", "-v", "error", "-f", "f32le", "-ar", "16000", "-ac", "1", "-i", "-"]
    subprocess.run([*command, *options, path], input=sound.tobytes(), check=True)
    return path.read_bytes()


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.m4a", "a.aac", "a.ts"])
def test_times_are_right_after_damaged_aac(sound, tmp_path, name):
    whole = encode(sound, tmp_path / name, "-c:a", "aac")
    content = bytearray(whole)
    middle = len(content) // 2
    content[middle : middle + 1_200] = bytes(1_200)
    samples, gaps = read(bytes(content))
    assert len(gaps) == 1 and 1.4 < gaps[0].start_s < 2.6 and gaps[0].end_s < 3
    assert len(samples) == pytest.approx(len(read(whole)[0]), abs=SECOND // 8)
    assert abs(lag_s(samples, sound, 3.2) - lag_s(read(whole)[0], sound, 3.2)) < 0.13


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.webm", "a.wma", "a.flv", "a.m4a"])
def test_formats_of_ffmpeg_that_were_cut_off_are_damaged(sound, tmp_path, name):
    whole = encode(sound, tmp_path / name, *(["-ar", "44100"] if name == "a.flv" else []))
    assert read(whole)[1] == ()
    content = whole[: int(0.6 * len(whole))]
    if name == "a.m4a":
        with pytest.raises(AudioError, match="damaged: it is cut off, and its index"):
            read(content)
    else:
        samples, (gap,) = read(content)
        assert (gap.start_s, gap.end_s) == (pytest.approx(len(samples) / SECOND, abs=0.1), None)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.wma", "a.flv"])
def test_files_of_ffmpeg_in_a_row_are_read_in_turn(sound, tmp_path, name):
    one = encode(sound, tmp_path / name, *(["-ar", "44100"] if name == "a.flv" else []))
    samples, gaps = read(one + one)
    assert (len(samples), gaps) == (2 * len(read(one)[0]), ())
    assert abs(lag_s(samples[len(samples) // 2 :], sound, 2.0)) < 0.07
    samples, gaps = read(one + one[: 200 if name != "a.m4a" else len(one) // 2])
    assert len(samples) >= 4 * SECOND and gaps[0].start_s == pytest.approx(4, abs=0.2)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.ts", "a.wma"])
def test_packets_that_ffmpeg_drops_silently_are_gaps(sound, tmp_path, name):
    content = encode(sound, tmp_path / name)
    middle = len(content) // 2
    samples, (gap,) = read(content[:middle] + bytes(3_000) + content[middle + 3_000 :])
    assert len(samples) / SECOND == pytest.approx(4, abs=0.15)
    assert 1 < gap.start_s < gap.end_s < 3


# --- videos -----------------------------------------------------------------------------------------------------------


@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_that_begins_late_keeps_its_times(sound, tmp_path, name):
    picture = ["-itsoffset", "0", "-f", "lavfi", "-i", "color=size=16x16:rate=5:duration=6"]
    encode(sound, tmp_path / "a.wav")
    command = ["ffmpeg", "-v", "error", *picture, "-itsoffset", "1.5", "-i", tmp_path / "a.wav", "-c:a", "aac"]
    subprocess.run([*command, tmp_path / name], check=True)
    samples, gaps = read((tmp_path / name).read_bytes())
    assert (len(samples) / SECOND, gaps) == (pytest.approx(5.5, abs=0.1), ())
    assert abs(lag_s(samples[round(1.5 * SECOND) :], sound, 2.0)) < 0.07


@needs_ffmpeg
def test_track_of_a_video_is_selected(sound, tmp_path, caplog):
    quiet = encode(0.01 * sound, tmp_path / "a.wav"), encode(sound, tmp_path / "b.wav")
    assert all(quiet)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-i", tmp_path / "b.wav", "-map", "0", "-map", "1"]
    subprocess.run([*command, tmp_path / "two.mka"], check=True)
    peaks = [np.abs(read(tmp_path / "two.mka", track=track)[0]).max() for track in (1, 2)]
    assert peaks[0] < 0.02 < 0.5 < peaks[1]
    assert not caplog.records
    assert np.abs(audio.decode(tmp_path / "two.mka").samples).max() == pytest.approx(peaks[0])
    assert "2 audio tracks" in caplog.text
    with pytest.raises(AudioError, match="no_track: there is no audio track 3, the file has 2"):
        read(tmp_path / "two.mka", track=3)


def test_formats_of_ffmpeg_without_it_are_rejected_by_name(monkeypatch):
    monkeypatch.setattr(ffmpeg, "is_installed", lambda: False)
    with pytest.raises(AudioError, match="unreadable: .* ffmpeg, .*, is not installed: install it"):
        audio.decode(b"\0\0\0\x18ftypM4A " + bytes(100))


def test_damage_is_described_in_one_line():
    gaps = [Gap(9.0), Gap(1.0, 1.02), Gap(1.2, 1.5), Gap(4.0, 4.0)]
    assert str(DamagedAudio(gaps)) == "damaged: it cannot be read from 1.0 to 1.5 s, at 4.0 s and after 9.0 s"
    many = DamagedAudio([Gap(float(n), n + 0.1) for n in range(9)])
    assert many.detail.endswith("from 3.0 to 3.1 s and at 5 more places")


@pytest.mark.parametrize(
    "content", [b"\xff\xfb\x90\xc4" * 300, b"ID3\4\0\0\0\0\x7f\x7f", b"OggS" * 50, b"fLaC" + bytes(99)]
)
def test_any_bytes_have_a_layout(content):
    assert containers.examine(Content(content, None, len(content))).pieces
