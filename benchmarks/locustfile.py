"""Users of the HTTP API and of the app's live microphone.

    CLIPS=folder locust -f benchmarks/locustfile.py --headless -u 10 -r 10 -t 30s --host http://127.0.0.1:8000

A user of the API sends one clip after another, the next as soon as it has the transcript. `CLIPS` is a folder of wav
files. With `APP`, the address of app.py, `MICROPHONES` users speak into its page instead, as static/microphone.js does:
some clips with pauses between them, at the pace of speech, and then the next talk. Each talk is a JSON line of the file
`TALKS`: `spoken_s`, `received_s`, `transcribed_s`, `late_s` (from the end of the talk to its transcript), `clips` (the
names of its clips), `text` and `error`. benchmarks/serving.py starts the servers and runs this file.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from locust import HttpUser, events, task

CLIPS = sorted(Path(os.environ.get("CLIPS", ".")).glob("*.wav"))
TOKEN = os.environ.get("LAB_API_TOKEN")
APP, MICROPHONES = os.environ.get("APP", ""), int(os.environ.get("MICROPHONES", "0"))
FEWEST_CLIPS, MOST_CLIPS = map(int, os.environ.get("CLIPS_PER_TALK", "5,20").split(","))
PAUSES_S = (0.5, 1.5)
RATE_HZ = 48_000
CHUNK_S, MAX_REQUEST_S = 0.5, 10.0
GIVE_UP_S = 300.0
"""Time after the end of a talk in which the server has to have received and transcribed the rest."""


@events.quitting.add_listener
def write_failures(environment: Any, **_: Any) -> None:
    """Write a JSON line for each kind of failure to the file `FAILURES`, if there is one."""
    lines = [
        {"route": one.name, "reason": str(one.error), "requests": one.occurrences}
        for one in environment.stats.errors.values()
    ]
    if os.environ.get("FAILURES"):
        Path(os.environ["FAILURES"]).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


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


class Microphone(HttpUser):
    """A visitor of the page with an open microphone."""

    abstract = not (APP and MICROPHONES)
    fixed_count = MICROPHONES

    @task
    def talk(self) -> None:
        clips = random.choices(CLIPS, k=random.randint(FEWEST_CLIPS, MOST_CLIPS))
        samples = _joined(clips)
        talk: dict[str, Any] = {"clips": [clip.stem for clip in clips], "spoken_s": len(samples) / RATE_HZ}
        talk |= {"received_s": 0.0, "transcribed_s": 0.0, "text": "", "error": ""}
        try:
            self._speak(samples, talk)
        except Exception as error:
            talk["error"] = f"{type(error).__name__}: {error}"[:200]
        with Path(os.environ["TALKS"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(talk, ensure_ascii=False) + "\n")

    def _speak(self, samples: np.ndarray, talk: dict[str, Any]) -> None:
        session_id, taken, ended, started = uuid.uuid4().hex, 0, False, time.monotonic()
        while not ended:
            elapsed_s = time.monotonic() - started
            if elapsed_s > talk["spoken_s"] + GIVE_UP_S:
                raise TimeoutError(f"{taken / RATE_HZ:.1f} s received, {GIVE_UP_S:g} s after the end of the talk")
            spoken = min(int(elapsed_s * RATE_HZ), len(samples))
            if spoken < len(samples) and spoken - taken < CHUNK_S * RATE_HZ:
                time.sleep(CHUNK_S - (spoken - taken) / RATE_HZ)
                continue
            end = min(spoken, taken + int(MAX_REQUEST_S * RATE_HZ))
            message = {"talk": session_id, "start": taken, "rate": RATE_HZ, "last": end == len(samples)}
            message["samples"] = base64.b64encode(samples[taken:end].tobytes()).decode()
            with self.client.post(f"{APP}/live", name="/live", json=message, catch_response=True) as response:
                answer = response.json() if response.content else {}
                if "taken" not in answer:  # the page sends the same samples again
                    response.failure(f"status {response.status_code}: {answer.get('reason', '')}")
                    time.sleep(1.0)
                    continue
            taken, ended = answer["taken"], answer["ended"]
            talk["received_s"] = taken / RATE_HZ
        talk["text"], line = self._collect(session_id)
        talk["transcribed_s"] = float(re.match(r"[\d.]+", line)[0])
        talk["late_s"] = round(time.monotonic() - started - talk["spoken_s"], 2)

    def _collect(self, session_id: str) -> tuple[str, str]:
        """Return the final transcript and the line below it, through Gradio's queue."""
        config = self.client.get(f"{APP}/config", name="/config").json()
        (event,) = (one["id"] for one in config["dependencies"] if one["api_name"] == "collect_live")
        visitor = uuid.uuid4().hex
        body = {"data": [session_id, "en"], "fn_index": event, "session_hash": visitor}
        join, data = "/gradio_api/queue/join", "/gradio_api/queue/data"
        self.client.post(APP + join, name=join, json=body).raise_for_status()
        with self.client.get(
            f"{APP}{data}?session_hash={visitor}", name=data, stream=True, catch_response=True
        ) as response:
            for line in response.iter_lines():
                message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise ValueError(f"no transcript: {message['output']}")
                    return tuple(message["output"]["data"][:2])
        raise ValueError("Gradio's queue ended without a transcript")


def _joined(clips: list[Path]) -> np.ndarray:
    """Return int16 [n] at RATE_HZ: the clips, each with a pause after it."""
    import soundfile
    import soxr

    parts = []
    for clip in clips:
        samples, rate_hz = soundfile.read(clip, dtype="float32")
        parts += [soxr.resample(samples, rate_hz, RATE_HZ), np.zeros(int(random.uniform(*PAUSES_S) * RATE_HZ))]
    return (np.concatenate(parts).clip(-1, 1) * 32_767).astype("<i2")
