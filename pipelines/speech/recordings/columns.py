"""The usual names of columns in tables of recordings, in lower case; the first that a table has is used."""

from __future__ import annotations

FILE = (
    *("path", "file_name", "file", "audio", "audio_filepath", "audio_path", "audio_file", "audio_filename"),
    *("filename", "filepath", "file_path", "wav", "wav_path", "wav_filename", "wav_file"),
)
"""`audio_filepath`: NeMo. `wav_filename`: DeepSpeech. `audio_file`: Common Voice Spontaneous Speech."""
TEXT = ("text", "sentence", "transcript", "transcription")
SPEAKER = ("speaker", "client_id", "speaker_id")
META = ("gender", "age", "accent")
