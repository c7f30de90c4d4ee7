"""FLAC files: the number of samples that the header claims, and the number that the last frame shows.

https://www.rfc-editor.org/rfc/rfc9639 describes the format.
"""

from __future__ import annotations

import functools

from pipelines.speech.decoders.content import Content, Layout, Piece

MARKER = b"fLaC"
_STREAM_START = MARKER + b"\0\0\0\x22"
"""The marker and the header of the STREAMINFO block, if another block follows it."""
_HEAD_BYTES = 42
_TAIL_BYTES = 1 << 17
_MAX_HEADER_BYTES = 16
_MAX_STREAMS = 1_000


def examine(content: Content, start: int) -> Layout:
    """Return the layout of the FLAC file that begins at `start`; several files in a row are several pieces."""
    starts = [start]
    while len(starts) < _MAX_STREAMS and (at := content.find(_STREAM_START, starts[-1] + _HEAD_BYTES)) >= 0:
        starts.append(at)
    ends = [*starts[1:], content.size]
    is_plain = len(starts) == 1 and not start
    return Layout("flac", tuple(_piece(content, *span, is_plain) for span in zip(starts, ends, strict=True)))


def _piece(content: Content, start: int, end: int, is_plain: bool) -> Piece:
    head = content.read(start, _HEAD_BYTES)
    if len(head) < _HEAD_BYTES:
        return Piece(is_cut=True)
    claimed, rate_hz = int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF, int.from_bytes(head[18:21], "big") >> 4
    counts = _counts(content, start + _HEAD_BYTES, end, int.from_bytes(head[10:12], "big"))
    n_samples = claimed if not counts or (claimed and claimed in counts) else counts[0]
    duration_s = n_samples / rate_hz if rate_hz and n_samples else None
    is_cut = claimed > n_samples
    if n_samples == claimed:
        return Piece(() if is_plain else ((start, end),), duration_s)
    number = int.from_bytes(head[21:26], "big") >> 36 << 36 | n_samples
    return Piece(((start, start + 21), number.to_bytes(5, "big"), (start + 26, end)), duration_s, is_cut=is_cut)


def _counts(content: Content, start: int, end: int, block_samples: int) -> list[int]:
    """Return the number of samples up to the end of each frame near the end, the last frame first."""
    tail_start = max(end - _TAIL_BYTES, start)
    tail = content.read(tail_start, end - tail_start)
    counts = []
    at = tail.rfind(b"\xff")
    while at >= 0 and len(counts) < 3:
        if (count := _samples_up_to(tail[at : at + _MAX_HEADER_BYTES], block_samples)) is not None:
            counts.append(count)
        at = tail.rfind(b"\xff", 0, at)
    return counts


def _samples_up_to(header: bytes, block_samples: int) -> int | None:
    """Return the number of samples up to the end of the frame with this header; None if it is not a header."""
    if len(header) < 6 or header[1] & 0xFE != 0xF8 or header[2] >> 4 == 0 or header[2] & 15 == 15 or header[3] & 1:
        return None
    n_more = max(8 - (header[4] ^ 0xFF).bit_length(), 0)  # leading ones of the coded number
    if n_more == 1 or n_more > 7:
        return None
    n_number = max(n_more, 1)
    number = header[4] & (0xFF >> (n_more + 1)) if n_more else header[4]
    for byte in header[5 : 4 + n_number]:
        number = number << 6 | byte & 0x3F
    at, code, rate = 4 + n_number, header[2] >> 4, header[2] & 15
    extra = {6: 1, 7: 2}.get(code, 0)
    n_samples = int.from_bytes(header[at : at + extra], "big") + 1 if extra else _block_samples(code)
    at += extra + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if at >= len(header) or _crc8(header[:at]) != header[at]:
        return None
    return (number if header[1] & 1 else number * block_samples) + n_samples


def _block_samples(code: int) -> int:
    return 192 if code == 1 else 576 << code - 2 if code <= 5 else 256 << code - 8


def _crc8(data: bytes) -> int:
    return functools.reduce(lambda crc, byte: _crc8_of(crc ^ byte), data, 0)


@functools.cache
def _crc8_of(byte: int) -> int:
    """Return the CRC of one byte, with the polynomial x^8 + x^2 + x + 1."""
    for _ in range(8):
        byte = byte << 1 ^ (0x107 if byte & 0x80 else 0)
    return byte
