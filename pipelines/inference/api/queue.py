"""One decoding at a time: the model is not safe to call twice at once. A few requests wait, and nobody for ever."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from pipelines.inference.api.schemas import Refusal, refused
from pipelines.inference.transcriber import Transcriber, Transcript
from pipelines.speech.audio import AudioError

SLOWEST_BYTES_PER_S = 10_000
"""What a poor telephone line carries."""
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for, and how many may ask."""

    max_mb: float = 100.0
    """The body of a request, in millions of bytes."""
    max_duration_s: float = 3600.0
    """The recording in it."""
    timeout_s: float = 600.0
    """From the first byte of a request to its answer: sending it, waiting, decoding."""
    sending_s: float = 30.0
    """The body of a request may take so long to come, and a second more for every SLOWEST_BYTES_PER_S of it: who sends
    drop by drop holds a place that others could use."""
    queue: int = 16
    """Requests that may wait while one is decoded."""


class _Abandoned(Exception):
    """Nobody waits for this transcript any more."""


class Desk:
    """A transcriber, and the requests before it."""

    def __init__(self, transcriber: Transcriber, limits: Limits):
        self.transcriber, self.limits = transcriber, limits
        self.places = limits.queue + 1
        self.taken = 0
        self._last_s = 1.0
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decoding")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for the length of a request, from its first byte on. Raises Refusal (503) where all are taken."""
        if self.taken >= self.places:
            after_s = min(max(math.ceil(self._last_s), 1), _LONGEST_RETRY_S)
            headers = {"Retry-After": str(after_s)}
            raise Refusal(503, f"the server is busy: try again in {after_s} s", "busy", headers=headers)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def transcribe(
        self, upload: BinaryIO, receive: Callable[[], Awaitable[dict]], word_times: bool = False
    ) -> Transcript:
        """The transcript of `upload`, when its turn has come. Raises Refusal.

        `receive` is that of the request, whose body has been read: what it tells next is that the client has left.
        Where that happens, or this call is cancelled, the decoding ends before the next batch of windows, or the next
        try of a window; where ffmpeg reads, at the latest when its time for a block (audio.PATIENCE_S) is up.
        """
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        decoding = loop.run_in_executor(self._decoding, self._decode, upload, abandoned, word_times)
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({decoding, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                raise Refusal(400, "the client left")  # which nobody hears
            return decoding.result()
        except AudioError as error:
            raise refused(error) from None
        finally:
            abandoned.set()
            decoding.cancel()
            leaving.cancel()

    def close(self) -> None:
        """End when the decoding that runs does; what waits is dropped."""
        self._decoding.shutdown(wait=False, cancel_futures=True)

    def _decode(self, upload: BinaryIO, abandoned: threading.Event, word_times: bool) -> Transcript:
        def go_on(_: object) -> None:
            if abandoned.is_set():
                raise _Abandoned

        go_on(None)
        upload.seek(0)
        heard = self.transcriber.transcribe(
            upload.read(), self.limits.max_duration_s, on_audio=go_on, on_segment=go_on, word_times=word_times
        )
        self._last_s = heard.elapsed_s
        return heard


async def _left(receive: Callable[[], Awaitable[dict]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
