"""Headers of the frames of mp3 (MPEG audio, layer III) and of AAC with ADTS headers."""

from __future__ import annotations

import functools
from typing import NamedTuple

HEADER_BYTES = 7
"""Size of an ADTS header; that of mp3 has 4 bytes."""
_LAYER_3_KBPS = {
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_AAC_RATES_HZ = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)


class Frame(NamedTuple):
    """The header of a frame."""

    n_bytes: int
    key: tuple[int, ...]
    """Equal for all frames of a stream: version, rate, mono or not."""
    n_samples: int
    rate_hz: int
    kbps: int = 0


@functools.lru_cache(4_096)
def parse_mp3(header: bytes) -> Frame | None:
    """Return the frame of layer III that begins with these 4 bytes, or None."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return None
    version, bitrate, rate, padding = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return None
    is_mono, rate_hz = header[3] >> 6 == 3, _RATES_HZ[version][rate]
    kbps = _LAYER_3_KBPS[1 if version == 3 else 2][bitrate]
    n_samples = 1_152 if version == 3 else 576
    return Frame(n_samples // 8 * kbps * 1_000 // rate_hz + padding, (version, rate, is_mono), n_samples, rate_hz, kbps)


@functools.lru_cache(4_096)
def parse_adts(header: bytes) -> Frame | None:
    """Return the AAC frame that begins with these 7 bytes, or None."""
    if len(header) < HEADER_BYTES or header[0] != 0xFF or header[1] & 0xF6 != 0xF0:
        return None
    rate, channels = header[2] >> 2 & 15, (header[2] & 1) << 2 | header[3] >> 6
    n_bytes = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    if rate >= len(_AAC_RATES_HZ) or n_bytes <= HEADER_BYTES:
        return None
    return Frame(n_bytes, (header[2] >> 6, rate, channels), 1_024 * ((header[6] & 3) + 1), _AAC_RATES_HZ[rate])


def tag_offset(head: bytes) -> int:
    """Return the offset of the Xing or Info header in a frame, by MPEG version and number of channels."""
    is_mono = head[3] >> 6 == 3
    return (21 if is_mono else 36) if head[1] >> 3 & 3 == 3 else (13 if is_mono else 21)


def is_tag(head: bytes) -> bool:
    frame = parse_mp3(head[:4])
    return bool(frame) and head[tag_offset(head) :][:4] in (b"Xing", b"Info")
