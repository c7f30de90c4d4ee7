"""Pages of Ogg files (Vorbis, Opus, FLAC, Speex): chains of streams, damaged pages, and a missing end.

https://www.rfc-editor.org/rfc/rfc3533 describes the format. Every page has a checksum, and the last one of a stream is
marked: so damage and a file that was cut off are seen without decoding.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field

from pipelines.speech.decoders.content import Content, Layout, Piece
from pipelines.speech.decoders.waveform import Gap

MARKER = b"OggS"
_HEADER_BYTES = 27
_MAX_PAGE_BYTES = _HEADER_BYTES + 255 + 255 * 255
_FIRST, _LAST = 2, 4
"""Flags of a page."""
_OPUS_RATE_HZ = 48_000
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass
class _Link:
    """One link of a chain: pages of one or more streams that begin together."""

    start: int
    end: int = 0
    rate_hz: int = 0
    """0 if the codec is unknown, or if there are several streams."""
    serials: set[int] = field(default_factory=set)
    has_data: bool = False
    """Pages after the first ones of its streams were read."""
    granule: int = 0
    """Samples up to the end of the last page."""
    page_samples: int = 0
    """Samples of the last page."""
    has_end: bool = False
    damage: list[Gap] = field(default_factory=list)
    damage_at: int = 0
    """Offset of the first damage."""
    _open: Gap | None = None

    def add_damage(self, position: int) -> None:
        if not self._open:
            self._open = Gap(self.granule / self.rate_hz if self.rate_hz else 0.0)
            self.damage_at = self.damage_at or position

    def add(self, page: bytes, serial: int, end: int) -> None:
        """Add a page with a right checksum."""
        granule, self.end = int.from_bytes(page[6:14], "little", signed=True), end
        if page[5] & _FIRST:
            self.serials.add(serial)
            self.rate_hz = _rate_hz(page) if len(self.serials) == 1 else 0
            return
        self.has_data = True
        self.has_end |= bool(page[5] & _LAST)
        if granule < 0:  # no packet ends on this page
            return
        if self._open and self.rate_hz:
            end_s = max((granule - self.page_samples) / self.rate_hz, self._open.start_s)
            self.damage.append(Gap(self._open.start_s, end_s))
            self._open = None
        self.page_samples, self.granule = max(granule - self.granule, 0), granule

    def close(self) -> None:
        if self._open:
            self.damage.append(self._open)


def examine(content: Content) -> Layout | None:
    """Return the layout of an Ogg file: a piece for each link of a chain."""
    links = [link for link in _links(content) if link.serials]
    if not links:
        return None
    is_only = len(links) == 1
    pieces = tuple(_piece(link, is_only) for link in links)
    return Layout("ogg", pieces, only_ffmpeg=any(not link.rate_hz or link.damage for link in links))


def _piece(link: _Link, is_only: bool) -> Piece:
    parts = () if is_only else ((link.start, link.end),)
    return Piece(parts, gaps=tuple(link.damage), is_cut=bool(link.rate_hz) and not link.has_end)


def _links(content: Content) -> list[_Link]:
    links: list[_Link] = []
    position, chunk_start, chunk = 0, 0, b""
    while position < content.size:
        if position + _MAX_PAGE_BYTES > chunk_start + len(chunk) < content.size:
            chunk_start, chunk = position, content.read(position, 1 << 20)
        at = position - chunk_start
        n_bytes = _page_bytes(chunk, at)
        page = chunk[at : at + n_bytes]
        if n_bytes and len(page) == n_bytes and _has_right_checksum(page):
            is_first = bool(page[5] & _FIRST)
            if not links or (is_first and links[-1].has_data):
                links.append(_Link(position))
            links[-1].add(page, int.from_bytes(page[14:18], "little"), position + n_bytes)
            position += n_bytes
            continue
        if n_bytes and len(page) < n_bytes:  # the file ends within this page
            break
        following = content.find(MARKER, position + 1)
        if links and (following >= 0 or not content.is_zero(position)):
            links[-1].add_damage(position)
        if following < 0:
            break
        position = following
    for link in links:
        link.close()
    return links


def _page_bytes(chunk: bytes, at: int) -> int:
    """Return the size of the page at `at`; 0 if there is none."""
    if chunk[at : at + 5] != MARKER + b"\0" or at + _HEADER_BYTES > len(chunk):
        return 0
    n_segments = chunk[at + 26]
    sizes = chunk[at + _HEADER_BYTES : at + _HEADER_BYTES + n_segments]
    return _HEADER_BYTES + n_segments + sum(sizes)


def _has_right_checksum(page: bytes) -> bool:
    """Compute the CRC-32 of Ogg, which takes the bits of each byte in the other order than zlib's."""
    zeroed = page[:22] + bytes(4) + page[26:]
    reflected = zlib.crc32(zeroed.translate(_REVERSED_BITS), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return _reversed(reflected) == int.from_bytes(page[22:26], "little")


def _reversed(word: int) -> int:
    return int.from_bytes(word.to_bytes(4, "little").translate(_REVERSED_BITS), "big")


@functools.lru_cache(64)
def _rate_hz(page: bytes) -> int:
    """Return the rate of the times of a stream's pages by its first page; 0 for an unknown codec."""
    packet = page[_HEADER_BYTES + page[26] :]
    if packet[:8] == b"OpusHead":
        return _OPUS_RATE_HZ
    if packet[:7] == b"\x01vorbis":
        return int.from_bytes(packet[12:16], "little")
    if packet[:8] == b"Speex   ":
        return int.from_bytes(packet[36:40], "little")
    if packet[:5] == b"\x7fFLAC":
        return int.from_bytes(packet[27:30], "big") >> 4
    return 0
