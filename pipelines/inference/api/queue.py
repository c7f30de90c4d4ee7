"""The queue of the API: one recording is decoded at a time, since a model must not be called twice at once."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from pipelines.inference.api.schemas import audio_refusal
from pipelines.inference.channels import ChannelTranscriber
from pipelines.inference.http.guard import Refusal, wait_for_disconnect
from pipelines.inference.http.rate_limits import BUDGET, ClientBudget
from pipelines.inference.transcriber import Transcriber
from pipelines.inference.transcript import DamagedRecording, Segment, Transcript
from pipelines.infra.errors import LabError
from pipelines.speech.audio import AudioError

if TYPE_CHECKING:
    from starlette.requests import Request

    from pipelines.infra.downloads.download import Limits as DownloadLimits

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
    live_sessions: int = 8
    """WebSockets that may be open at the same time; they take no place in the queue."""
    downloads: DownloadLimits | None = None
    """Of recordings that requests name by their address; None: no address is fetched."""


class _Abandoned(Exception):
    """The client of this transcript has disconnected."""


@dataclass
class _Job:
    """A recording that is decoded in the thread of the queue."""

    transcriber: Transcriber
    budget: ClientBudget
    on_segment: Callable[[Segment], None]
    options: dict[str, Any]
    channel_names: tuple[str, ...] | None
    abandoned: threading.Event = field(default_factory=threading.Event)
    charged_s: float = 0.0

    def check(self) -> None:
        """Raise _Abandoned if the client has disconnected."""
        if self.abandoned.is_set():
            raise _Abandoned

    def receive_audio(self, seconds: float) -> None:
        """Charge the client for what was read since the last call."""
        self.check()
        self.budget.charge(seconds - self.charged_s)
        self.charged_s = seconds

    def receive_segment(self, segment: Segment) -> None:
        self.check()
        self.on_segment(segment)


class TranscriptionQueue:
    """A transcriber and the requests that wait for it."""

    def __init__(self, transcriber: Transcriber, limits: Limits):
        self.transcriber, self.limits = transcriber, limits
        self.n_slots = limits.queue + 1
        self.n_taken = 0
        self._last_elapsed_s = 1.0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="decoding")
        self.live_executor = ThreadPoolExecutor(1, thread_name_prefix="live")
        """Decodes the windows of live sessions between the batches of recordings: Transcriber has a lock."""

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
        self,
        upload: BinaryIO,
        request: Request,
        on_segment: Callable[[Segment], None] = lambda segment: None,
        channel_names: tuple[str, ...] | None = None,
        transcriber: Transcriber | None = None,
        **options: Any,
    ) -> Transcript:
        """Return the transcript of `upload` when its turn has come. Raises Refusal.

        That of a damaged recording holds what can be read; its `damage` says what is lost. `on_segment` is called in
        the event loop. `transcriber` is one of Transcriber.with_options; `channel_names` are those of
        ChannelTranscriber, None: channels are mixed; `options` are those of Transcriber.transcribe.

        The body of `request` has been read: it next reports that the client has disconnected. In that case, or if this
        call is cancelled, decoding stops before the next batch of windows or the next attempt at a window; while ffmpeg
        reads, after its time for a block (ffmpeg.TIMEOUT_S) at the latest. The client's address is charged for the
        audio that is read.
        """
        loop = asyncio.get_running_loop()
        job = _Job(
            transcriber=transcriber or self.transcriber,
            budget=request.scope[BUDGET],
            on_segment=lambda segment: loop.call_soon_threadsafe(on_segment, segment),
            options=options,
            channel_names=channel_names,
        )
        decoding = loop.run_in_executor(self._executor, self._decode, upload, job)
        disconnect = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait({decoding, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not decoding.done():
                raise Refusal(400, "the client disconnected")
            return decoding.result()
        except AudioError as error:
            raise audio_refusal(error) from None
        except LabError as error:  # of an option that the engine or the model lacks
            raise Refusal(400, str(error), "unsupported_value") from None
        finally:
            job.abandoned.set()
            decoding.cancel()
            disconnect.cancel()

    def close(self) -> None:
        """Stop after the current decoding; waiting requests are dropped."""
        for executor in (self._executor, self.live_executor):
            executor.shutdown(wait=False, cancel_futures=True)

    def _decode(self, upload: BinaryIO, job: _Job) -> Transcript:
        job.check()
        upload.seek(0)
        callbacks = {"on_audio": job.receive_audio, "on_segment": job.receive_segment}
        is_split = job.channel_names is not None
        transcriber = ChannelTranscriber(job.transcriber, job.channel_names) if is_split else job.transcriber
        try:
            transcript = transcriber.transcribe(upload.read(), self.limits.max_duration_s, **callbacks, **job.options)
        except DamagedRecording as error:
            if not error.transcript.audio_s:
                raise
            transcript = error.transcript
        self._last_elapsed_s = transcript.elapsed_s
        return transcript
