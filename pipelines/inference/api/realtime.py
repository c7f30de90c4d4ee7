"""Live transcription over a WebSocket, with the events of OpenAI's realtime transcription API.

The client appends PCM audio. A detector finds its turns (turns.py), or the client commits them itself. Each turn is an
item with deltas and, at its end, the whole text. Turns are transcribed by one task while another reads the socket, so a
message is not read before there is room for the audio of the last one: a client that sends faster has to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect

from pipelines.inference.api.model_names import ModelNames
from pipelines.inference.api.queue import TranscriptionQueue
from pipelines.inference.api.realtime_messages import (
    CLIENT_EVENTS,
    MIN_COMMIT_S,
    Item,
    SessionSettings,
    check_query,
    nothing_to_commit,
    parse_message,
    transcription_failure,
)
from pipelines.inference.api.responses import logprobs
from pipelines.inference.http.guard import KEY_PROTOCOL, Refusal, header
from pipelines.inference.http.rate_limits import BUDGET
from pipelines.inference.transcript import Segment
from pipelines.inference.turns import AudioDecoder, Mark, TurnCutter, TurnEvent
from pipelines.speech.audio import SAMPLE_RATE_HZ, Waveform

PATH = "/v1/realtime"
MAX_BUFFER_S = 300.0
"""Longest audio that a client without turn detection may append before it commits."""
SESSION_S = 3_600.0
IDLE_S = 300.0
"""Time without a message and without work after which a session ends."""
SENDING_S = 30.0
"""Time for the client to receive an event."""
_MAX_JOBS = 4
"""Windows that may wait to be transcribed before the next message is read."""


def add_realtime(api: FastAPI, queue: TranscriptionQueue, names: ModelNames) -> None:
    """Add the WebSocket to `api`."""
    n_open = 0

    @api.websocket(PATH)
    async def realtime(socket: WebSocket) -> None:
        nonlocal n_open
        try:
            check_query(socket.query_params, names)
            if n_open >= queue.limits.live_sessions:
                raise Refusal(503, f"{n_open} live sessions are open: try again later", "busy")
        except Refusal as refusal:
            await socket.send_denial_response(refusal.response())
            return
        offered = [name for name in socket.scope["subprotocols"] if not name.startswith(KEY_PROTOCOL)]
        n_open += 1
        try:
            await socket.accept("realtime" if "realtime" in offered else next(iter(offered), None))
            await Session(socket, queue, names).run()
        finally:
            n_open -= 1


class _Closed(Exception):
    """The session has ended, or its client does not read."""


class _Abandoned(Exception):
    """The client has disconnected."""


@dataclass(frozen=True)
class _Job:
    """A part of an item to transcribe; without `decode` it ends the item."""

    item: Item
    decode: Callable[[], Sequence[Segment]] | None = None


class Session:
    """One client's connection."""

    def __init__(self, socket: WebSocket, queue: TranscriptionQueue, names: ModelNames):
        self.socket, self.queue, self.names = socket, queue, names
        self.transcriber, self.budget = queue.transcriber, socket.scope[BUDGET]
        self.is_old = "realtime=v1" in header(socket.scope, "openai-beta") or (
            "openai-beta.realtime-v1" in socket.scope["subprotocols"]
        )
        self.settings = replace(SessionSettings(), model=names.served)
        self.id, self.expires_at = f"sess_{secrets.token_hex(10)}", time.time() + SESSION_S
        self._n_samples = 0
        """Samples received, at 16 kHz."""
        self._cutter, self._decoder = self._new_cutter(), self._new_decoder()
        self._buffer: list[np.ndarray] = []
        """Samples that the client has not committed yet, without turn detection."""
        self._item: Item | None = None
        """The open turn."""
        self._last_item_id: str | None = None
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue(_MAX_JOBS)
        self._is_working = False
        self._abandoned = threading.Event()

    async def run(self) -> None:
        """Serve the client until it disconnects or does not read, is idle, or the session is too old."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._work())
                await self._read()
        except* (_Closed, WebSocketDisconnect):
            pass
        finally:
            self._abandoned.set()

    # ---- messages

    async def _read(self) -> None:
        await self._send(f"{self._prefix}.created", session=self._session())
        try:
            async with asyncio.timeout(SESSION_S):
                while True:
                    await self._handle(await self._receive())
        except TimeoutError:
            await self._end(f"a session lasts at most {SESSION_S / 60:g} minutes", "session_expired")

    async def _receive(self) -> str | bytes:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    message = await self.socket.receive()
            except TimeoutError:
                if self._is_working or not self._jobs.empty():
                    continue
                await self._end(f"nothing was received for {IDLE_S:g} s", "idle_timeout")
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1000))
            return message.get("text") or message.get("bytes") or ""

    async def _handle(self, message: str | bytes) -> None:
        """Do what a message asks for; answer a bad one with an error event."""
        event: dict[str, Any] = {}
        try:
            event = parse_message(message)
            match event["type"]:
                case "input_audio_buffer.append":
                    await self._append(event)
                case "input_audio_buffer.commit":
                    await self._commit()
                case "input_audio_buffer.clear":
                    await self._clear()
                case "session.update" | "transcription_session.update":
                    await self._update(event)
                case _:
                    raise Refusal(400, f"unknown event: this server takes {', '.join(CLIENT_EVENTS)}", "unknown_event")
        except Refusal as refusal:
            event_id = event.get("event_id")
            error = {**refusal.as_dict(), "event_id": event_id if isinstance(event_id, str) else None}
            await self._send("error", error=error)
            if refusal.status_code == 429:
                await self._close(1013)

    async def _append(self, event: dict[str, Any]) -> None:
        self.budget.check()
        try:
            samples = await asyncio.to_thread(self._decoder.decode, event.get("audio"))
        except ValueError as error:
            raise Refusal(400, f"audio {error}", "invalid_value", param="audio") from None
        self._n_samples += len(samples)
        self.budget.charge(len(samples) / SAMPLE_RATE_HZ)
        if self._cutter is not None:
            await self._report(await asyncio.to_thread(self._cutter.feed, samples))
            return
        if sum(map(len, self._buffer)) + len(samples) > MAX_BUFFER_S * SAMPLE_RATE_HZ:
            raise Refusal(400, f"commit after at most {MAX_BUFFER_S:g} s of audio", "input_audio_buffer_full")
        self._buffer.append(samples)

    async def _commit(self) -> None:
        if self._cutter is not None:
            if not (events := await asyncio.to_thread(self._finish_turn)):
                raise nothing_to_commit(0.0)
            return await self._report(events)
        samples = np.concatenate([*self._buffer, self._decoder.flush()])
        self._buffer = [samples]
        if len(samples) < MIN_COMMIT_S * SAMPLE_RATE_HZ:
            raise nothing_to_commit(len(samples) / SAMPLE_RATE_HZ)
        self._buffer = []
        item = Item(audio_s=len(samples) / SAMPLE_RATE_HZ)

        transcriber = self.settings.configure(self.transcriber)

        def decode() -> Sequence[Segment]:
            return transcriber.transcribe(Waveform(samples), on_audio=lambda _: self._stop_if_abandoned()).segments

        await self._announce_item(item)
        await self._jobs.put(_Job(item, decode))
        await self._jobs.put(_Job(item))

    async def _clear(self) -> None:
        self._decoder, self._buffer = self._new_decoder(), []
        if self._cutter is not None:
            self._cutter.clear()
        if self._item is not None:  # its windows so far are transcribed
            await self._jobs.put(_Job(self._item))
            self._item = None
        await self._send("input_audio_buffer.cleared")

    async def _update(self, event: dict[str, Any]) -> None:
        settings = self.settings.updated(event.get("session"), self.names, self.transcriber)
        if (settings.encoding, settings.rate_hz, settings.turns) != (
            self.settings.encoding, self.settings.rate_hz, self.settings.turns
        ):  # fmt: skip
            await self._end_audio()
            self.settings = settings
            self._cutter, self._decoder = self._new_cutter(), self._new_decoder()
        self.settings = settings
        kind = event["type"].removesuffix(".update")
        await self._send(f"{kind}.updated", session=self._session())

    async def _end_audio(self) -> None:
        """Commit the audio so far: the next has other settings."""
        if self._cutter is not None:
            await self._report(await asyncio.to_thread(self._finish_turn))
        else:
            with contextlib.suppress(Refusal):  # less than can be committed
                await self._commit()
            self._buffer = []

    # ---- audio

    def _new_cutter(self) -> TurnCutter | None:
        turns = self.settings.turns
        return TurnCutter(self.transcriber, turns, self._n_samples) if turns else None

    def _new_decoder(self) -> AudioDecoder:
        return AudioDecoder(self.settings.encoding, self.settings.rate_hz)

    def _finish_turn(self) -> list[TurnEvent]:
        return [*self._cutter.feed(self._decoder.flush()), *self._cutter.finish()]

    async def _report(self, events: list[TurnEvent]) -> None:
        """Tell the client of its turns, and let their windows be transcribed."""
        for event in events:
            time_ms = round(event.time_s * 1000)
            if event.mark is Mark.STARTED:
                self._item = Item()
                await self._send("input_audio_buffer.speech_started", item_id=self._item.id, audio_start_ms=time_ms)
            elif event.mark is Mark.WINDOW:
                self._item.audio_s += event.window.end_s - event.window.start_s
                await self._jobs.put(_Job(self._item, self._decode_window(event)))
            else:
                item, self._item = self._item, None
                await self._send("input_audio_buffer.speech_stopped", item_id=item.id, audio_end_ms=time_ms)
                await self._announce_item(item)
                await self._jobs.put(_Job(item))

    def _decode_window(self, event: TurnEvent) -> Callable[[], Sequence[Segment]]:
        transcriber = self.settings.configure(self.transcriber)
        return lambda: transcriber.decode_windows([event.window], self._stop_if_abandoned)

    def _stop_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise _Abandoned

    # ---- transcripts

    async def _work(self) -> None:
        """Transcribe the jobs one after another."""
        while True:
            job = await self._jobs.get()
            self._is_working = True
            await (self._complete(job.item) if job.decode is None else self._transcribe(job))
            self._is_working = False

    async def _transcribe(self, job: _Job) -> None:
        loop = asyncio.get_running_loop()
        try:
            segments = await loop.run_in_executor(self.queue.live_executor, job.decode)
        except Exception as error:
            if self._abandoned.is_set():
                raise _Closed from None
            job.item.failure = transcription_failure(error)
            return
        for segment in segments:
            delta = f" {segment.text}" if job.item.texts else segment.text
            job.item.texts.append(segment.text)
            job.item.logprobs += logprobs(segment)
            await self._send_of(job.item, "delta", delta=delta, **self._logprobs(logprobs(segment)))

    async def _complete(self, item: Item) -> None:
        if item.failure:
            return await self._send_of(item, "failed", error=item.failure.as_dict())
        usage = {"type": "duration", "seconds": round(item.audio_s, 3)}
        extra = {"usage": usage, **self._logprobs(item.logprobs)}
        return await self._send_of(item, "completed", transcript=" ".join(item.texts), **extra)

    def _logprobs(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": entries} if self.settings.with_logprobs else {}

    async def _announce_item(self, item: Item) -> None:
        previous, self._last_item_id = self._last_item_id, item.id
        await self._send("input_audio_buffer.committed", item_id=item.id, previous_item_id=previous)
        content = [{"type": "input_audio", "transcript": None}]
        message = {"id": item.id, "object": "realtime.item", "type": "message", "status": "completed", "role": "user"}
        names = ("created",) if self.is_old else ("added", "done")
        for name in names:
            fields = {"item": {**message, "content": content}, "previous_item_id": previous}
            await self._send(f"conversation.item.{name}", **fields)

    # ---- sending

    @property
    def _prefix(self) -> str:
        return "transcription_session" if self.is_old else "session"

    def _session(self) -> dict[str, Any]:
        return {"id": self.id, "expires_at": int(self.expires_at), **self.settings.as_dict(self.is_old)}

    async def _send_of(self, item: Item, kind: str, **fields: Any) -> None:
        name = f"conversation.item.input_audio_transcription.{kind}"
        await self._send(name, item_id=item.id, content_index=0, **fields)

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": f"event_{secrets.token_hex(10)}", **fields}
        try:
            async with asyncio.timeout(SENDING_S):
                await self.socket.send_text(json.dumps(event, ensure_ascii=False))
        except TimeoutError:
            raise _Closed from None

    async def _end(self, message: str, code: str) -> None:
        await self._send("error", error={**Refusal(408, message, code).as_dict(), "event_id": None})
        await self._close(1000)

    async def _close(self, code: int) -> None:
        await self.socket.close(code)
        raise _Closed
