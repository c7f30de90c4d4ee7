"""Containers of uncompressed sound: wav, RF64, aiff, au and caf. Their headers state the number of bytes.

A program that writes to a pipe, or that was killed, leaves 0 or a placeholder there. The right number is then that of
the bytes which are there. A file that is shorter than it says was cut off.
"""

from __future__ import annotations

from typing import NamedTuple

from pipelines.speech.decoders.content import Content, Layout, Part, Piece

_MAX_CHUNKS = 1_000
_UNKNOWN_FROM = 0xFFFF_0000
_UNKNOWN = range(0x7FFF_0000, 0x8000_1001)
"""Sizes that stand for an unknown one, for example in the output of ffmpeg, SoX, arecord and eSpeak to a pipe."""
_MIN_SOUND_BYTES = 2_048
"""Fewer bytes behind the sound are not taken for sound."""


class _Chunk(NamedTuple):
    name: bytes
    start: int
    """Of its content."""
    size: int
    size_at: int
    """Offset of the field with its size."""


def examine(content: Content) -> Layout | None:
    """Return the layout of a file with uncompressed sound; None if it is of another kind."""
    head = content.read(0, 32)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return Layout("wav", tuple(_wav_pieces(content)))
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return Layout("aiff", tuple(_aiff_pieces(content)))
    if head[:4] == b"caff":
        sound = _find(content, 8, b"data", "big", width=8)
        return Layout("caf", (_piece(content, sound, "big", content.size, width=8),))
    if head[:4] in (b".snd", b"dns.") and len(head) >= 24:
        order = "big" if head[:4] == b".snd" else "little"
        start, size = int.from_bytes(head[4:8], order), int.from_bytes(head[8:12], order)
        return Layout("au", (_piece(content, _Chunk(b"data", start, size, 8), order, content.size),))
    return None


def _wav_pieces(content: Content) -> list[Piece]:
    """Return a piece for each wav file in a row of them."""
    pieces: list[Piece] = []
    start = 0
    while start < content.size and len(pieces) < _MAX_CHUNKS:
        head = content.read(start, 12)
        order = "big" if head[:4] == b"RIFX" else "little"
        sound = _find(content, start + 12, b"data", order)
        if sound and head[:4] in (b"RF64", b"BW64") and sound.size >= _UNKNOWN_FROM:
            sizes = _find(content, start + 12, b"ds64", order)
            if sizes:  # the size of the sound, which needs more than 32 bits, has its own chunk
                size = int.from_bytes(content.read(sizes.start + 8, 8), order)
                sound = sound._replace(size=size or sound.size)
        end = _next_file(content, sound) if sound else content.size
        pieces.append(_file_piece(content, sound, order, start, end))
        start = end
    return pieces


def _aiff_pieces(content: Content) -> list[Piece]:
    """Return a piece for each aiff file in a row of them."""
    pieces: list[Piece] = []
    start = 0
    while start < content.size and len(pieces) < _MAX_CHUNKS:
        end = start + 8 + int.from_bytes(content.read(start + 4, 4), "big")
        head = content.read(end, 12)
        if head[:4] != b"FORM" or head[8:12] not in (b"AIFF", b"AIFC"):
            end = content.size
        pieces.append(_file_piece(content, _find(content, start + 12, b"SSND", "big"), "big", start, end))
        start = end
    return pieces


def _file_piece(content: Content, sound: _Chunk | None, order: str, start: int, end: int) -> Piece:
    """Return the piece of the file from `start` to `end`, which may be one of several in a row."""
    piece = _piece(content, sound, order, end, first=start)
    if (start or end < content.size) and not piece.parts:
        return Piece(((start, end),), is_cut=piece.is_cut)
    return piece


def _next_file(content: Content, sound: _Chunk) -> int:
    """Return the offset of a wav file behind this sound; the end of the file if there is none."""
    for at in (sound.start + sound.size, sound.start + sound.size + sound.size % 2):
        head = content.read(at, 12) if at < content.size else b""
        if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
            return at
    return content.size


def _find(content: Content, at: int, name: bytes, order: str, width: int = 4) -> _Chunk | None:
    """Return the first chunk `name` from `at` on; None without one."""
    for _ in range(_MAX_CHUNKS):
        head = content.read(at, 4 + width)
        if len(head) < 4 + width:
            return None
        size = int.from_bytes(head[4:], order)
        if head[:4] == name:
            return _Chunk(name, at + 4 + width, size, at + 4)
        at += 4 + width + size + (size % 2 if width == 4 else 0)
    return None


def _piece(content: Content, sound: _Chunk | None, order: str, end: int, width: int = 4, first: int = 0) -> Piece:
    """Return the piece that ends at `end`, with a right size of its sound."""
    if sound is None:
        return Piece()
    available = end - sound.start
    largest = (1 << 8 * width) - 1
    is_unknown = sound.size in _UNKNOWN or (sound.size >= _UNKNOWN_FROM and (width == 4 or sound.size == largest))
    is_more = available - sound.size >= _MIN_SOUND_BYTES and not _is_trailer(content, sound, end, order, width)
    if sound.size > available and not is_unknown:
        parts = _patched(sound, min(available, largest), order, width, first, end) if width == 8 else ()
        return Piece(parts, is_cut=True)
    if is_more or (sound.size > available and width == 8):
        return Piece(_patched(sound, min(available, largest), order, width, first, end))
    return Piece()


def _is_trailer(content: Content, sound: _Chunk, end: int, order: str, width: int) -> bool:
    """Return whether other chunks, tags or zeros follow the sound up to `end`."""
    at = sound.start + sound.size + (sound.size % 2 if width == 4 else 0)
    if content.read(at, 3) in (b"ID3", b"TAG") or content.is_zero(at):
        return True
    for _ in range(_MAX_CHUNKS):
        head = content.read(at, 4 + width)
        if at >= end - 4 - width:
            return True
        if not all(32 <= byte < 127 for byte in head[:4]):
            return False
        at += 4 + width + int.from_bytes(head[4:], order)
        at += at % 2 if width == 4 else 0
        if at > end + 1:
            return False
    return False


def _patched(sound: _Chunk, size: int, order: str, width: int, first: int, end: int) -> tuple[Part, ...]:
    return ((first, sound.size_at), size.to_bytes(width, order), (sound.size_at + width, end))
