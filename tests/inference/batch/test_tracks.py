from __future__ import annotations

import pytest

from pipelines.inference.batch import tracks
from pipelines.inference.transcript import DamagedRecording, Segment, Transcript
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError


class TwoTracks:
    """A transcriber of a recording with two tracks; the second is damaged."""

    def transcribe(self, recording, track=0):
        if track > 2:
            raise AudioError("no_track", "there is no audio track 3, the file has 2")
        starts = (0.0, 5.0) if track < 2 else (2.0,)
        segments = tuple(Segment(start, start + 1, f"{track}-{start:g}") for start in starts)
        transcript = Transcript(" ".join(segment.text for segment in segments), 5.0 + track, 0.1, segments)
        if track == 2:
            raise DamagedRecording(AudioError("damaged", "it cannot be read after 7.0 s"), transcript)
        return transcript


def test_all_tracks_are_in_order_of_time():
    with pytest.raises(DamagedRecording, match="after 7.0 s .track 2.") as caught:
        tracks.transcribe(TwoTracks(), b"", tracks.ALL)
    assert (caught.value.transcript.text, caught.value.transcript.audio_s) == ("1-0 2-2 1-5", 7.0)


def test_one_track_is_passed_on():
    assert tracks.transcribe(TwoTracks(), b"", tracks.parse("1")).text == "1-0 1-5"
    assert tracks.transcribe(TwoTracks(), b"", tracks.parse("")).text == "0-0 0-5"
    with pytest.raises(AudioError, match="no_track"):
        tracks.transcribe(TwoTracks(), b"", 3)
    with pytest.raises(LabError, match="--track takes 1, 2, ... or all, got 'two'"):
        tracks.parse("two")
