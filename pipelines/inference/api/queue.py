"""The queue of the API: one recording is decoded at a time, since a model must not be called twice at once."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.inference.api.schemas import audio_refusal
from pipelines.inference.http.guard import Refusal, wait_for_disconnect
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import DamagedRecording, Transcript
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    from starlette.types import Receive

_MAX_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on one request and on the number of requests."""

    max_mb: float = 100.0
    """Size of a request's body, in millions of bytes."""
    max_duration_s: float = 3600.0
    """Duration of the recording."""
    timeout_s: float = 600.0
    """Time from the first byte of a request to its response: sending, waiting and decoding."""
    sending_s: float = 30.0
    """Time for the body to arrive, plus one second per http.guard.MIN_BYTES_PER_S: a slow sender occupies a slot."""
    queue: int = 16
    """Requests that may wait while one is decoded."""


class _Abandoned(Exception):
    """The client of this transcript has disconnected."""


class TranscriptionQueue:
    """A transcriber and the requests that wait for it."""

    def __init__(self, transcriber: Transcriber, limits: Limits):
        self.transcriber, self.limits = transcriber, limits
        self.n_slots = limits.queue + 1
        self.n_taken = 0
        self._last_elapsed_s = 1.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decoding")

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Occupy a slot for the duration of a request. Raises Refusal (503) if all are taken."""
        if self.n_taken >= self.n_slots:
            retry_s = min(max(math.ceil(self._last_elapsed_s), 1), _MAX_RETRY_S)
            headers = {"Retry-After": str(retry_s)}
            raise Refusal(503, f"the server is busy: try again in {retry_s} s", "busy", headers=headers)
        self.n_taken += 1
        try:
            yield
        finally:
            self.n_taken -= 1

    async def transcribe(
        self, upload: BinaryIO, receive: Receive, word_times: bool = False, track: int = 0
    ) -> Transcript:
        """Return the transcript of `upload` when its turn has come. Raises Refusal.

        That of a damaged recording holds what can be read; its `damage` says what is lost.

        `receive` is that of the request, whose body has been read: it next reports that the client has disconnected.
        In that case, or if this call is cancelled, decoding stops before the next batch of windows or the next attempt
        at a window; while ffmpeg reads, after its time for a block (ffmpeg.TIMEOUT_S) at the latest.
        """
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        decoding = loop.run_in_executor(
            self._executor, self._decode, upload, abandoned, {"word_times": word_times, "track": track}
        )
        disconnect = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait({decoding, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                raise Refusal(400, "the client disconnected")
            return decoding.result()
        except AudioError as error:
            raise audio_refusal(error) from None
        finally:
            abandoned.set()
            decoding.cancel()
            disconnect.cancel()

    def close(self) -> None:
        """Stop after the current decoding; waiting requests are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _decode(self, upload: BinaryIO, abandoned: threading.Event, options: dict[str, Any]) -> Transcript:
        def stop_if_abandoned(_: object) -> None:
            if abandoned.is_set():
                raise _Abandoned

        stop_if_abandoned(None)
        upload.seek(0)
        callbacks = {"on_audio": stop_if_abandoned, "on_segment": stop_if_abandoned}
        try:
            transcript = self.transcriber.transcribe(upload.read(), self.limits.max_duration_s, **callbacks, **options)
        except DamagedRecording as error:
            if not error.transcript.audio_s:
                raise
            transcript = error.transcript
        self._last_elapsed_s = transcript.elapsed_s
        return transcript
