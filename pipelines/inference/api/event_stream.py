"""A transcript as server-sent events, as OpenAI's clients read them (`stream=true`).

The status of the response is known only when the first segment is decoded or decoding has failed: until then an error
is an ordinary response. A later error is an event, which the clients raise. Decoding does not wait for a client that
reads slowly: its events are kept, which is at most the text of one recording.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from fastapi import Response

from pipelines.inference.api.queue import TranscriptionQueue
from pipelines.inference.api.responses import logprobs
from pipelines.inference.http.guard import Refusal
from pipelines.inference.transcript import Segment, Transcript
from pipelines.whisper import tokens

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

SENDING_S = 30.0
"""Time for the client to receive an event; one that does not read is disconnected."""
KEEP_ALIVE_S = 15.0
"""Time without events after which a comment is sent: proxies close connections that are silent."""
DEADLINE = "lab.deadline"
"""Key of a request's scope: the event loop's time at which the request ends."""
ENCODER_STATES_PER_S = 50
"""Audio tokens of a second, in the usage: states of Whisper's encoder."""

logger = logging.getLogger("uvicorn.error")


class _NotReading(Exception):
    """The client does not read its events."""


class EventStream(Response):
    """The response to a request with `stream=true`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        queue: TranscriptionQueue,
        upload: BinaryIO,
        request: Request,
        options: dict[str, Any],
        *,
        with_logprobs: bool = False,
    ):
        """`options` are those of TranscriptionQueue.transcribe."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.queue, self.with_logprobs, self.deadline = queue, with_logprobs, request.scope.get(DEADLINE)
        self._segments: asyncio.Queue[Segment | None] = asyncio.Queue()
        self._decoding = asyncio.ensure_future(
            queue.transcribe(upload, request, self._segments.put_nowait, **options),
        )
        self._decoding.add_done_callback(lambda _: self._segments.put_nowait(None))
        self._first: Segment | None = None

    async def start(self) -> EventStream:
        """Return self when the first segment is there or decoding has ended. Raises what decoding raises until then."""
        try:
            self._first = await self._segments.get()
            if self._first is None:
                self._decoding.result()
        except BaseException:
            self._decoding.cancel()
            raise
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self.deadline):
                async for event in self._events():
                    await _send(send, event)
            await _send(send, b"", more=False)
        except _NotReading:
            logger.warning("a client did not read its events for %g s and was disconnected", SENDING_S)
        except Exception as error:
            await _end_with_error(send, self._refusal(error))
        finally:
            self._decoding.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        segment, separator = self._first, ""
        while segment is not None:
            extra = self._logprobs([segment])
            yield _event("transcript.text.delta", delta=separator + segment.text, **extra)
            separator = " "
            while (segment := await self._next_segment()) is _NONE_YET:
                yield b": keep-alive\n\n"
        transcript = self._decoding.result()
        damage = {"damage": transcript.damage} if transcript.damage else {}
        extra = self._logprobs(transcript.segments)
        yield _event("transcript.text.done", text=transcript.text, **extra, **damage, usage=self._usage(transcript))

    def _logprobs(self, segments: Sequence[Segment]) -> dict[str, Any]:
        entries = [entry for segment in segments for entry in logprobs(segment)]
        return {"logprobs": entries} if self.with_logprobs else {}

    async def _next_segment(self) -> Segment | object | None:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                return await self._segments.get()
        except TimeoutError:
            return _NONE_YET

    def _usage(self, transcript: Transcript) -> dict[str, Any]:
        n_audio = math.ceil(transcript.audio_s * ENCODER_STATES_PER_S)
        n_text = len(tokens.token_ids(self.queue.transcriber.ref.folder, transcript.text))
        return {
            "type": "tokens",
            "input_tokens": n_audio,
            "input_token_details": {"audio_tokens": n_audio, "text_tokens": 0},
            "output_tokens": n_text,
            "total_tokens": n_audio + n_text,
        }

    def _refusal(self, error: Exception) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, TimeoutError):
            return Refusal(504, f"not done within {self.queue.limits.timeout_s:g} s", "timeout")
        logger.error("a stream failed", exc_info=error)
        return Refusal(500, "something went wrong on the server; see its log")


_NONE_YET = object()


def _event(kind: str, **fields: Any) -> bytes:
    return f"data: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    try:
        async with asyncio.timeout(SENDING_S):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise _NotReading from None


async def _end_with_error(send: Send, refusal: Refusal) -> None:
    event = f"data: {json.dumps({'error': refusal.as_dict()}, ensure_ascii=False)}\n\n"
    try:
        await _send(send, event.encode(), more=False)
    except _NotReading:
        logger.warning("a client did not read its events and was disconnected")
