"""Users of the HTTP API: each sends one clip after another, the next as soon as it has the transcript.

    CLIPS=folder locust -f benchmarks/locustfile.py --headless -u 10 -r 10 -t 30s --host http://127.0.0.1:8000

`CLIPS` is a folder of audio files. benchmarks/serving.py starts a server and runs this file.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from locust import HttpUser, task

CLIPS = sorted(Path(os.environ.get("CLIPS", ".")).glob("*.wav"))
TOKEN = os.environ.get("LAB_API_TOKEN")


class Speaker(HttpUser):
    """A user who sends clips without a pause."""

    @task
    def transcribe(self) -> None:
        clip = random.choice(CLIPS)
        with self.client.post(
            "/v1/audio/transcriptions",
            files={"file": (clip.name, clip.read_bytes())},
            data={"model": "whisper-1"},
            headers={"Authorization": f"Bearer {TOKEN}"} if TOKEN else {},
            catch_response=True,
        ) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}")
            elif "text" not in response.json():
                response.failure("a response without a transcript")
