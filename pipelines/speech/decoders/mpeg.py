"""Frames of mp3 (MPEG audio) and of AAC with ADTS headers, the two formats that are only a row of frames.

A file may hold other things than its header says: frames behind its claimed end, a second file behind the first, and
damaged frames. So the frames are counted, and a file that does not fit its header becomes pieces with right headers. In
place of a damaged frame they hold a silent one, so that times after it stay right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.speech.decoders.content import CHUNK_BYTES, Content, Layout, Part, Piece
from pipelines.speech.decoders.mpeg_frames import HEADER_BYTES, Frame, is_tag, parse_adts, parse_mp3, tag_offset
from pipelines.speech.decoders.waveform import Gap

_AAC_SILENCE = {1: bytes.fromhex("00c800802380"), 2: bytes.fromhex("21004902900219002380")}
"""An AAC-LC frame of silence by number of channels."""
_TAG_BYTES = 200
"""A frame's first bytes that hold a Xing, Info or VBRI header."""
_PADDING_BYTES = 4_096
"""Longer rows of zeros at the end are lost sound."""
_TRIMMED_FRAMES = 4
"""The most that a decoder trims: delay of the encoder and padding of the last frame."""


@dataclass
class _Stream:
    """A row of frames with one key, as the walk finds them."""

    header: bytes
    frame: Frame
    claimed_frames: int | None = None
    """By its Xing or Info header."""
    tag: tuple[int, int] | None = None
    """Position of that header's frame."""
    parts: list[Part] = field(default_factory=list)
    n_frames: int = 0
    """Silent ones included."""
    n_bytes: int = 0
    n_good: int = 0
    """Bytes and number of the frames in the file."""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """Number of frames before the lost ones, and number of lost frames."""
    before_s: float = 0.0
    is_vbr: bool = False
    is_cut: bool = False

    @property
    def frame_s(self) -> float:
        return self.frame.n_samples / self.frame.rate_hz

    def add(self, start: int, end: int, n_frames: int) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, tuple) and last[1] == start:
            self.parts[-1] = (last[0], end)
        elif end > start:
            self.parts.append((start, end))
        self.n_frames, self.n_good, self.n_bytes = (
            self.n_frames + n_frames,
            self.n_good + n_frames,
            self.n_bytes + end - start,
        )

    def add_silence(self, n_bytes: int, silence: bytes) -> None:
        """Put silent frames in place of `n_bytes` of lost frames."""
        mean_bytes = self.n_bytes / self.n_good if self.n_good else self.frame.n_bytes
        n_lost = max(round(n_bytes / mean_bytes), 1)
        self.lost.append((self.n_frames, n_lost))
        if silence:
            self.parts.append(silence * n_lost)
            self.n_frames += n_lost

    def lengthen_loss(self, claimed_frames: int) -> None:
        """Put all frames that are missing in the place of the only damage."""
        n_more, at = claimed_frames - self.n_frames, next(n for n, part in enumerate(self.parts) if type(part) is bytes)
        if n_more > 0:
            (n_before, n_lost), silence = self.lost[0], self.parts[at]
            self.parts[at] = silence + silence[: len(silence) // n_lost] * n_more
            self.lost, self.n_frames = [(n_before, n_lost + n_more)], claimed_frames


class _Walk:
    """The streams of a file, in order."""

    def __init__(self, content: Content, parse: Callable[[bytes], Frame | None]):
        self.content, self.parse = content, parse
        self.is_mp3 = parse is parse_mp3
        self.n_header = 4 if self.is_mp3 else HEADER_BYTES
        self.streams: list[_Stream] = []
        self.end = content.size
        if content.read(content.size - 128, 3) == b"TAG":
            self.end -= 128
        self._run(self._skip_tags(0))

    def _run(self, position: int) -> None:
        while position < self.end:
            position = self._walk_frames(position)
            if position >= self.end:
                return
            if self.is_mp3 and is_tag(self.content.read(position, _TAG_BYTES)):
                position = self._start_stream(position)
                continue
            after_tags = self._skip_tags(position)
            if after_tags == position and self._is_truncated_frame(position):
                self.streams[-1].is_cut = True
                return
            position = self._resume(after_tags)

    def _walk_frames(self, position: int) -> int:
        """Follow frames from `position` on; return the position of what is no whole frame of this stream."""
        stream = self.streams[-1] if self.streams else None
        key, kbps = (stream.frame.key, stream.frame.kbps) if stream else ((), 0)
        parse, n_header, end = self.parse, self.n_header, self.end
        while position < end:
            chunk = self.content.read(position, CHUNK_BYTES)
            tags, at, n_frames, last = self._tag_offsets(chunk), 0, 0, len(chunk) - _TAG_BYTES
            is_last_chunk = position + len(chunk) >= self.content.size
            while at < last or is_last_chunk:
                frame = parse(chunk[at : at + n_header])
                if frame is None or frame.key != key or position + at + frame.n_bytes > end or at in tags:
                    break
                if frame.kbps != kbps:
                    stream.is_vbr = True
                at += frame.n_bytes
                n_frames += 1
            if stream:
                stream.add(position, position + at, n_frames)
            position += at
            if at < last or is_last_chunk:
                return position
        return position

    def _tag_offsets(self, chunk: bytes) -> set[int]:
        """Return the offsets of frames in `chunk` that are Xing or Info headers instead of sound."""
        offsets: set[int] = set()
        for name in (b"Xing", b"Info") if self.is_mp3 else ():
            at = chunk.find(name)
            while at >= 0:
                offsets |= {at - n for n in (36, 21, 13) if at >= n}
                at = chunk.find(name, at + 4)
        return {at for at in offsets if is_tag(chunk[at : at + _TAG_BYTES])}

    def _start_stream(self, position: int) -> int:
        """Start a stream with the Xing or Info header at `position`; return the position of its first frame."""
        head = self.content.read(position, _TAG_BYTES)
        frame = parse_mp3(head[:4])
        stream = _Stream(head[:4], frame, tag=(position, position + frame.n_bytes))
        offset = tag_offset(head)
        if head[offset + 7] & 1:
            stream.claimed_frames = int.from_bytes(head[offset + 8 : offset + 12], "big")
        self.streams.append(stream)
        following = self.parse(self.content.read(position + frame.n_bytes, 4))
        if following:
            stream.frame = following._replace(key=frame.key)
        return position + frame.n_bytes

    def _skip_tags(self, position: int) -> int:
        """Return the position after ID3 and APE tags."""
        while True:
            head = self.content.read(position, 32)
            if head[:3] == b"ID3" and len(head) >= 10:
                size = functools.reduce(lambda total, byte: total << 7 | byte & 0x7F, head[6:10], 0)
                position += 10 + size + (10 if head[5] & 0x10 else 0)
            elif head[:3] == b"TAG":
                position += 128
            elif head[:8] == b"APETAGEX":
                position += 32 + int.from_bytes(head[12:16], "little") * bool(head[23] & 0x20)
            elif head[:11] == b"LYRICSBEGIN":
                return self.end
            else:
                return position

    def _is_truncated_frame(self, position: int) -> bool:
        """Return whether the file ends within the frame at `position`."""
        frame = self.parse(self.content.read(position, self.n_header))
        return bool(self.streams and frame and frame.key == self.streams[-1].frame.key) and (
            position + frame.n_bytes > self.end
        )

    def _resume(self, position: int) -> int:
        """Find the next frame; record what lies before it as lost. Return its position, or the end."""
        frame_start = self._next_frame(position)
        stream = self.streams[-1] if self.streams else None
        if frame_start is None:
            is_padding = self.end - position <= _PADDING_BYTES and self.content.is_zero(position)
            if stream and not is_padding and self.end - position > 2 * max(stream.frame.n_bytes, 512):
                stream.is_cut = True
            return self.end
        header = self.content.read(frame_start, self.n_header)
        frame, is_header = self.parse(header), self.is_mp3 and is_tag(self.content.read(frame_start, _TAG_BYTES))
        lost = frame_start - position
        if stream and frame.key == stream.frame.key and not is_header:
            if lost:
                stream.add_silence(lost, self._silent_frame(header, frame))
        elif not is_header:
            before_s = lost / frame.n_bytes * frame.n_samples / frame.rate_hz if stream and lost else 0.0
            self.streams.append(_Stream(header, frame, before_s=before_s))
        elif stream and lost:
            stream.add_silence(lost, self._silent_frame(stream.header, stream.frame))
        return frame_start

    def _next_frame(self, position: int) -> int | None:
        """Return the position of the next frame that is followed by another of its kind, or ends the file."""
        n_needed = 2 if self.streams else 3
        for offset, chunk in self.content.chunks(position, overlap=8_192):
            at = chunk.find(0xFF)
            while 0 <= at < len(chunk) - self.n_header:
                if self._is_row(offset + at, chunk[at : at + self.n_header], n_needed):
                    return offset + at
                at = chunk.find(0xFF, at + 1)
        return None

    def _is_row(self, position: int, header: bytes, n_needed: int) -> bool:
        frame, first = self.parse(header), None
        for _ in range(n_needed):
            if frame is None or (first and frame.key != first.key):
                return False
            first, position = first or frame, position + frame.n_bytes
            if position == self.end:
                return True
            frame = self.parse(self.content.read(position, self.n_header))
        return True

    def _silent_frame(self, header: bytes, frame: Frame) -> bytes:
        if self.is_mp3:
            head = bytes((0xFF, header[1] | 1, header[2] & 0xFD, header[3]))
            return head + bytes(parse_mp3(head).n_bytes - 4)
        payload = _AAC_SILENCE.get(frame.key[2])
        if payload is None or frame.key[0] != 1:  # not AAC-LC: no silent frame is known
            return b""
        n_bytes = HEADER_BYTES + len(payload)
        head = bytearray((0xFF, header[1] | 1, *header[2:7]))
        head[3] = head[3] & 0xFC | n_bytes >> 11
        head[4], head[5], head[6] = n_bytes >> 3 & 0xFF, (n_bytes & 7) << 5 | 0x1F, 0xFC
        return bytes(head) + payload


def examine_mp3(content: Content) -> Layout | None:
    """Return the layout of an mp3 file; None if it is not one."""
    streams = _Walk(content, parse_mp3).streams
    if not streams or (len(streams) == 1 and not streams[0].n_frames and not streams[0].tag):
        return None
    return Layout("mp3", tuple(_mp3_piece(content, stream, len(streams) == 1) for stream in streams))


def _mp3_piece(content: Content, stream: _Stream, is_only: bool) -> Piece:
    claimed = stream.claimed_frames
    if claimed and len(stream.lost) == 1 and not stream.is_cut:
        stream.lengthen_loss(claimed)
    gaps = tuple(Gap(n * stream.frame_s, (n + n_lost) * stream.frame_s) for n, n_lost in stream.lost)
    fields = {
        "duration_s": stream.n_frames * stream.frame_s,
        "tolerance_s": _TRIMMED_FRAMES * stream.frame_s,
        "gaps": gaps,
        "before_s": stream.before_s,
        "is_cut": stream.is_cut or (claimed is not None and claimed > stream.n_frames + 1),
    }
    is_right = stream.n_frames - 1 <= claimed <= stream.n_frames if claimed is not None else not stream.is_vbr
    if is_right and is_only and not gaps:
        return Piece(**fields)
    header: Part = stream.tag if is_right and stream.tag and not gaps else _info_frame(content, stream)
    return Piece((header, *stream.parts), **fields)


def _info_frame(content: Content, stream: _Stream) -> bytes:
    """Return a frame with an Info header that claims the frames of a stream: mpg123 reads as many."""
    n_bytes = sum(len(part) if isinstance(part, bytes) else part[1] - part[0] for part in stream.parts)
    if stream.tag:
        tag = bytearray(content.read(stream.tag[0], stream.tag[1] - stream.tag[0]))
        offset = tag_offset(tag)
        if tag[offset + 7] & 3 == 3 and len(tag) >= offset + 16:
            tag[offset + 8 : offset + 12] = stream.n_frames.to_bytes(4, "big")
            tag[offset + 12 : offset + 16] = (n_bytes + len(tag)).to_bytes(4, "big")
            return bytes(tag)
    head = bytearray((0xFF, stream.header[1] | 1, stream.header[2] & 0x0D, stream.header[3]))
    while True:  # the lowest bitrate whose frame has room
        head[2] += 0x10
        offset = tag_offset(head)
        if (size := parse_mp3(bytes(head)).n_bytes) >= offset + 56:
            break
    fields = b"Info\0\0\0\x03" + stream.n_frames.to_bytes(4, "big") + (n_bytes + size).to_bytes(4, "big")
    return bytes(head) + bytes(offset - 4) + fields + bytes(size - offset - len(fields))


def examine_adts(content: Content) -> Layout | None:
    """Return the layout of an AAC file with ADTS headers; None if it is not one."""
    streams = _Walk(content, parse_adts).streams
    if not streams or streams[0].n_frames < 2:
        return None
    pieces = []
    for stream in streams:
        gaps = tuple(Gap(n * stream.frame_s, (n + lost) * stream.frame_s) for n, lost in stream.lost)
        parts = tuple(stream.parts) if gaps or len(streams) > 1 else ()
        pieces.append(Piece(parts, gaps=gaps, is_cut=stream.is_cut, before_s=stream.before_s))
    return Layout("adts", tuple(pieces), only_ffmpeg=True)
