"""Live transcription of open microphones."""

import threading
import time

import numpy as np
import pytest

from pipelines.inference.app import live
from pipelines.inference.app.i18n import ENGLISH
from pipelines.speech.audio import AudioError
from tests.inference.app.app_fakes import (
    SESSION_ID,
    create_chunk,
    create_chunks,
    expect_refusal,
    feedback_rows,
    refusal_reason,
    send_chunk,
)

gr = pytest.importorskip("gradio")
REFUSALS = ENGLISH["refused"]


def test_chunks_become_one_recording_without_seams(handlers, speech, all_is_speech):
    import soxr

    samples = soxr.resample(speech(3 * 16_000), 16_000, 48_000)
    *most, last = create_chunks(samples, 48_000)
    for one in most:
        partial, taken, ended = send_chunk(handlers, one)
        assert not ended
    assert partial.text == "Hej på dig."
    assert taken == 2.5 * 48_000
    assert send_chunk(handlers, last)[1:] == (len(samples), True)
    text, line, transcript = handlers.collect_live(SESSION_ID, "en")
    assert text == "Hej på dig."
    assert line.startswith("3.0 s of speech in ")
    assert transcript.recording.duration_s == pytest.approx(3.0, abs=0.01)
    whole = soxr.resample(samples, 48_000, 16_000)
    n = min(len(whole), len(transcript.recording.samples))
    assert np.abs(whole[:n] - transcript.recording.samples[:n]).max() < 1e-3, "no seam between two chunks"
    _, transcript = handlers.mark_right(transcript, "", True, "en")
    assert (handlers.service.log.parent / feedback_rows(handlers)[0]["audio"]).is_file()
    assert expect_refusal(handlers.collect_live, SESSION_ID, "en") == REFUSALS["no_recording"], "removed once collected"


def test_options_of_the_first_chunk_hold_for_the_session(handlers, speech):
    first = create_chunk(speech(8_000)) | {"options": ["Elsa bor i Åmål.", "Åmål, Bo", 5]}
    send_chunk(handlers, first)
    send_chunk(handlers, create_chunk(speech(8_000), 8_000, last=True))
    changes, greedy = handlers.service.transcriber.changes
    assert changes == {"prompt": "Elsa bor i Åmål.", "hotwords": ("Åmål", "Bo"), "beam_size": 5}
    assert greedy == {"beam_size": 1}, "words that may still change are decoded faster"
    assert handlers.collect_live(SESSION_ID, "en")[2].choices.hotwords == "Åmål, Bo"
    for options in (["a" * 2_001], ["", 5], ["", "", 99], [{}]):
        assert refusal_reason(handlers, create_chunk(speech(8_000)) | {"options": options}) == "options"
    for options in ("text", [1, 2, 3, 4]):
        assert refusal_reason(handlers, create_chunk(speech(8_000)) | {"options": options}) == "unreadable"


def test_lost_and_repeated_chunks_are_decoded_once(handlers, speech):
    samples = speech(2 * 16_000)
    for start, end, taken in [
        (8_000, 16_000, 0),  # the first chunk was lost
        (0, 8_000, 8_000),
        (0, 8_000, 8_000),  # the answer was lost
        (0, 12_000, 12_000),  # with more samples
        (20_000, 24_000, 12_000),
        (12_000, 24_000, 24_000),
    ]:
        assert send_chunk(handlers, create_chunk(samples[start:end], start))[1] == taken
    assert send_chunk(handlers, create_chunk(samples[28_000:], 28_000, last=True))[1:] == (24_000, False), "a gap"
    for _ in range(2):  # the answer to the last one was lost, too
        assert send_chunk(handlers, create_chunk(samples[24_000:], 24_000, last=True))[1:] == (32_000, True)
    transcript = handlers.collect_live(SESSION_ID, "en")[2]
    expected = np.round(samples * 32_768).clip(-32_768, 32_767) / 32_768
    np.testing.assert_allclose(transcript.recording.samples, expected, atol=1e-6)


def test_failed_decoding_loses_no_audio(handlers, speech, monkeypatch, all_is_speech):
    fake, fails, windows = handlers.service.transcriber, [], []
    real = fake.decode_windows

    def fail_every_other_call(requested):
        fails.append(1)
        if len(fails) % 2:
            raise RuntimeError("the engine failed")
        windows.extend(requested)
        return real(requested)

    monkeypatch.setattr(fake, "longest_s", 1.0)
    monkeypatch.setattr(fake, "decode_windows", fail_every_other_call)
    samples, taken, ended, tries = speech(5 * 16_000), 0, False, 0
    while not ended and (tries := tries + 1) < 100:
        end = taken + 8_000
        try:
            _, taken, ended = send_chunk(handlers, create_chunk(samples[taken:end], taken, last=end >= len(samples)))
        except RuntimeError:
            pass
    transcript = handlers.collect_live(SESSION_ID, "en")[2]
    assert transcript.audio_s == pytest.approx(5.0, abs=0.01)
    finished = {round(segment.start_s, 2): segment.end_s for segment in transcript.segments}
    assert len(finished) == len(transcript.segments), "no segment twice"
    assert sum(segment.end_s - segment.start_s for segment in transcript.segments) == pytest.approx(5.0, abs=0.2)


def test_two_sessions_are_separate(handlers, speech):
    for one, other in zip(
        create_chunks(speech(16_000)), create_chunks(speech(16_000, seed=1), session_id="b" * 16), strict=True
    ):
        send_chunk(handlers, one)
        send_chunk(handlers, other)
    mine, theirs = (
        handlers.collect_live(session_id, "en")[2].recording.samples for session_id in (SESSION_ID, "b" * 16)
    )
    assert not np.allclose(mine, theirs)


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        "AAAA",
        {"rate": 48_000},
        {"rate": "48000", "samples": "AAAA"},
        {"rate": True, "samples": "AAAA"},
        {"rate": 10**9, "samples": "AAAA"},
        {"rate": 48_000, "samples": "no base64!"},
        {"rate": 48_000, "samples": "A" * 1_600_004},
        {"rate": 8_000, "samples": "A" * 400_000},
        {"rate": 8_000, "samples": "AAAA", "start": -1},
        {"rate": 8_000, "samples": "AAAA", "start": 0.5},
        {"rate": 8_000, "samples": "AAAA", "talk": "short"},
        {"rate": 8_000, "samples": "AAAA", "talk": "a" * 100},
    ],
    ids=str,
)
def test_invalid_chunk_is_refused(handlers, message):
    if isinstance(message, dict):
        message = {"talk": SESSION_ID, "start": 0, **message}
    assert refusal_reason(handlers, message) == "unreadable"


def test_changed_sample_rate_is_refused(handlers, speech):
    send_chunk(handlers, create_chunk(speech(16_000)))
    assert refusal_reason(handlers, create_chunk(speech(16_000), 16_000, 44_100)) == "unreadable"


def test_empty_or_silent_session_is_refused(handlers):
    assert refusal_reason(handlers, create_chunk([], last=True)) == "no_recording"
    *most, last = create_chunks(np.zeros(48_000, np.float32))
    for one in most:
        send_chunk(handlers, one)
    assert [refusal_reason(handlers, last) for _ in range(2)] == ["silent"] * 2


def test_page_is_cleared_only_if_the_microphone_opened(handlers):
    opened, refused = handlers.open_microphone(True), handlers.open_microphone(False)
    assert opened[:3] == ("", "", None)
    assert len(refused) == len(opened)
    assert all(one == gr.skip() for one in refused)


def test_long_session_is_not_retained_and_is_limited(handlers, monkeypatch, speech):
    monkeypatch.setattr(live, "MAX_RETAINED_S", 1.0)
    monkeypatch.setattr(live, "MAX_DURATION_S", 2.0)
    for one in create_chunks(speech(int(1.9 * 16_000))):
        send_chunk(handlers, one)
    assert handlers.collect_live(SESSION_ID, "en")[2].recording is None
    *first, last = create_chunks(speech(int(2.2 * 16_000)))
    for one in first:
        send_chunk(handlers, one)
    assert refusal_reason(handlers, last) == "too_long"
    assert send_chunk(handlers, create_chunk([], 32_000, last=True))[1:] == (32_000, True)
    transcript = handlers.collect_live(SESSION_ID, "en")[2]
    assert transcript.audio_s == pytest.approx(2.0, abs=0.01), "a refused chunk loses no earlier audio"


def test_unused_session_expires(handlers, monkeypatch, speech):
    send_chunk(handlers, create_chunk(speech(8_000)))
    handlers.live_sessions.remove_expired()
    assert send_chunk(handlers, create_chunk(speech(8_000), 8_000))[1] == 16_000
    monkeypatch.setattr(live, "EXPIRY_S", -1.0)
    handlers.live_sessions.remove_expired()
    assert send_chunk(handlers, create_chunk(speech(8_000), 16_000))[1] == 0, "the page must send everything again"


def test_only_idle_sessions_are_evicted(handlers, monkeypatch, speech):
    monkeypatch.setattr(live, "MAX_SESSIONS", 2)
    first, other, third = "a" * 16, "b" * 16, "c" * 16
    send_chunk(handlers, create_chunk(speech(8_000), session_id=first))
    send_chunk(handlers, create_chunk(speech(8_000), session_id=other))
    for n in range(3):
        assert refusal_reason(handlers, create_chunk(speech(1), session_id=f"another-session-{n:03}")) == "busy"
    assert send_chunk(handlers, create_chunk(speech(8_000), 8_000, session_id=first))[1] == 16_000
    monkeypatch.setattr(live, "IDLE_S", -1.0)
    assert send_chunk(handlers, create_chunk(speech(8_000), 8_000, session_id=third))[1] == 0
    assert set(handlers.live_sessions._sessions) == {first, other}, "a session that begins with a gap is not stored"
    assert send_chunk(handlers, create_chunk(speech(8_000), session_id=third))[1] == 8_000
    assert send_chunk(handlers, create_chunk(speech(8_000), 16_000, session_id=first))[1] == 24_000
    assert send_chunk(handlers, create_chunk(speech(8_000), 8_000, session_id=other))[1] == 0, "idle longest"


def test_session_with_a_waiting_chunk_is_not_evicted(handlers, monkeypatch, speech):
    monkeypatch.setattr(live, "MAX_SESSIONS", 1)
    monkeypatch.setattr(live, "IDLE_S", -1.0)
    monkeypatch.setattr(live, "EXPIRY_S", -1.0)
    received = []
    with handlers.service.turn():
        waits = threading.Thread(target=lambda: received.append(send_chunk(handlers, create_chunk(speech(8_000)))[1]))
        waits.start()
        while len(handlers.service.queue) < 2:
            time.sleep(0.01)
        assert refusal_reason(handlers, create_chunk(speech(8_000))) == "busy"
        assert refusal_reason(handlers, create_chunk(speech(8_000), session_id="b" * 16)) == "busy", "not evicted"
        handlers.live_sessions.remove_expired()
    waits.join(10)
    assert received == [8_000]
    assert send_chunk(handlers, create_chunk(speech(8_000), 8_000))[1] == 16_000


def test_chunk_of_a_disconnected_client_is_not_decoded(handlers, speech):
    message = live.parse_chunk(create_chunk(speech(8_000)))
    with pytest.raises(AudioError, match="busy"):
        handlers.live_sessions.receive(message, lambda: True)
    assert handlers.live_sessions.receive(message)[1] == 8_000
    assert send_chunk(handlers, create_chunk([], 4_000))[1] == 8_000


def test_one_timer_removes_expired_sessions(handlers, speech, monkeypatch):
    started = []

    class Timer:
        def __init__(self, seconds, call):
            self.call = call

        def start(self):
            started.append(self.call)
            time.sleep(0.05)  # long enough for the other threads to arrive

    monkeypatch.setattr(live.threading, "Timer", Timer)
    together = threading.Barrier(8)

    def begin(n):
        together.wait(10)
        with handlers.live_sessions._exclusive(
            live.parse_chunk(create_chunk(speech(1), session_id=f"another-session-{n:03}"))
        ):
            pass

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    handlers.live_sessions.remove_expired()
    assert len(started) == 1
    started[0]()
    assert len(started) == 2, "repeated while there is a session"
    monkeypatch.setattr(live, "EXPIRY_S", -1.0)
    started[1]()
    assert len(started) == 2
    send_chunk(handlers, create_chunk(speech(1)))
    assert len(started) == 3
