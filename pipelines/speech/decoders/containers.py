"""Examine a file: its kind, what its sizes claim, and the pieces that hold sound."""

from __future__ import annotations

import struct
from collections.abc import Callable

from pipelines.speech.decoders import flac, mpeg, mpeg_frames, ogg, pcm
from pipelines.speech.decoders.content import Content, Layout, Piece

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_W64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_FLV = b"FLV\x01"
_HEAD_BYTES = 65_536
_MAX_BOXES = 100_000
_MAX_FILES = 1_000
_TS_BYTES = 188
"""Size of the packets of an MPEG transport stream, each of which begins with _TS_SYNC."""
_TS_SYNC = b"\x47"


def examine(content: Content) -> Layout:
    """Return the layout of a file; for other kinds than the known ones that of a file which is decoded as it is."""
    start = _after_id3(content)
    head = content.read(start, 16)
    layout = None
    if head[:4] == ogg.MARKER:
        layout = ogg.examine(content)
    elif head[:4] == flac.MARKER:
        layout = flac.examine(content, start)
    elif mpeg_frames.parse_adts(head[:7]):
        layout = mpeg.examine_adts(content)
    elif start or mpeg_frames.parse_mp3(head[:4]):
        layout = mpeg.examine_mp3(content)
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"moof", b"styp"):
        layout = _mp4(content)
    elif head[:4] == _EBML:
        layout = Layout("matroska", _in_a_row(content, _EBML, _is_cut_matroska, _names_matroska), only_ffmpeg=True)
    elif head == _ASF:
        layout = Layout("asf", _in_a_row(content, _ASF, _is_cut_asf), only_ffmpeg=True)
    elif head[:4] == _FLV:
        layout = Layout("flv", _in_a_row(content, _FLV, _is_cut_flv, _is_flv_header), only_ffmpeg=True)
    elif all(content.read(n * _TS_BYTES, 1) == _TS_SYNC for n in range(3)):
        rest = content.size % _TS_BYTES
        is_cut = rest > 0 and content.read(content.size - rest, 1) == _TS_SYNC
        layout = Layout("mpegts", (Piece(is_cut=is_cut),), only_ffmpeg=True)
    elif head == _W64:
        is_cut = int.from_bytes(content.read(16, 8), "little") > content.size
        layout = Layout("w64", (Piece(is_cut=is_cut),))
    elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        is_cut = int.from_bytes(head[4:8], "little") + 8 > content.size
        layout = Layout("avi", (Piece(is_cut=is_cut),), only_ffmpeg=True)
    return layout or pcm.examine(content) or Layout()


def _after_id3(content: Content) -> int:
    """Return the offset behind the ID3v2 tags at the start; 0 if the file is nothing else."""
    position = 0
    while (head := content.read(position, 10))[:3] == b"ID3" and len(head) == 10:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position += 10 + size + (10 if head[5] & 0x10 else 0)
    return position if position < content.size else 0


def _in_a_row(
    content: Content,
    marker: bytes,
    is_cut: Callable[[Content, int, int], bool],
    is_header: Callable[[bytes], bool] = lambda head: True,
) -> tuple[Piece, ...]:
    """Return a piece for each of the files in a row, which all begin with `marker`."""
    starts, at = [0], content.find(marker, len(marker))
    while at >= 0 and len(starts) < _MAX_FILES:
        if is_header(content.read(at, 64)):
            starts.append(at)
        at = content.find(marker, at + len(marker))
    return _pieces(starts, content.size, lambda start, end: is_cut(content, start, end))


def _pieces(starts: list[int], size: int, is_cut: Callable[[int, int], bool]) -> tuple[Piece, ...]:
    spans = list(zip(starts, [*starts[1:], size], strict=True))
    return tuple(Piece((span,) if len(spans) > 1 else (), is_cut=is_cut(*span)) for span in spans)


def _names_matroska(head: bytes) -> bool:
    return b"webm" in head or b"matroska" in head


def _is_flv_header(head: bytes) -> bool:
    return head[5:9] == b"\0\0\0\x09"


def _mp4(content: Content) -> Layout:
    """Walk the boxes of mp4, m4a, mov and 3gp: one that is longer than the file was cut off.

    A second `ftyp` after the index is the start of another file.
    """
    position, starts, has_index, n_boxes = 0, [0], False, 0
    while position + 8 <= content.size and n_boxes < _MAX_BOXES:
        head = content.read(position, 16)
        size, name = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1 and len(head) == 16:
            size = int.from_bytes(head[8:16], "big")
        if name == b"ftyp" and has_index:
            starts.append(position)
            has_index = False
        has_index |= name == b"moov"
        n_boxes += 1
        if size < 8:  # 0: up to the end of the file
            position = content.size
            break
        position += size
    is_cut = position > content.size
    pieces = _pieces(starts, content.size, lambda start, end: is_cut and end == content.size)
    return Layout("mp4", pieces, only_ffmpeg=True)


def _is_cut_matroska(content: Content, start: int, end: int) -> bool:
    """Return whether the segment of a matroska or webm file is longer than the file; False if its size is unknown."""
    head = content.read(start, min(4_096, end - start))
    at = head.find(_SEGMENT)
    if at < 0 or at + 5 > len(head):
        return False
    n_bytes = 9 - head[at + 4].bit_length()
    field = head[at + 4 : at + 4 + n_bytes]
    size = int.from_bytes(field, "big") & ((1 << 7 * n_bytes) - 1)
    return size != (1 << 7 * n_bytes) - 1 and start + at + 4 + n_bytes + size > end


def _is_cut_asf(content: Content, start: int, end: int) -> bool:
    """Return whether a wma or asf file is shorter than its header says; False for a broadcast, which says nothing."""
    head = content.read(start, min(_HEAD_BYTES, end - start))
    at = head.find(_ASF_FILE)
    flags = int.from_bytes(head[at + 88 : at + 92], "little")
    return at >= 0 and not flags & 1 and int.from_bytes(head[at + 40 : at + 48], "little") > end - start


def _is_cut_flv(content: Content, start: int, end: int) -> bool:
    """Return whether an flv file is shorter than the `filesize` in its metadata."""
    head = content.read(start, min(_HEAD_BYTES, end - start))
    at = head.find(b"filesize\0")
    return 0 <= at < len(head) - 17 and struct.unpack(">d", head[at + 9 : at + 17])[0] > end - start
