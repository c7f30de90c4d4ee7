"""Whisper models on the Hugging Face Hub: choose the files, download and verify them, repair a damaged copy.

Only the model's own files are fetched: not the checkpoints in its subfolders, nor weights in a second format. Its
settings come first, so that what is no Whisper is refused before its weights are fetched. A file's content is compared
with the digest that the Hub announces: sha256 of large files (LFS, Xet), git's sha1 of small ones. The Hub's cache on
this machine names each file after that digest, so that it is verified without the network, too.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import errors as store_errors
from pipelines.infra.stores import hub, hub_client
from pipelines.whisper.bases import kinds, weights

logger = logging.getLogger(__name__)

_SMALL = ("*.json", "*.txt", "README.md")
"""Names of a model's files beside its weights; README.md is listed in a fine-tuned model's manifest."""
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def required_files(names: Iterable[str], uri: str, adapter: dict[str, Any] | None = None) -> list[str]:
    """Return the files of a repository that the lab reads. Raises LabError if they are no model that it loads.

    `adapter`: the content of adapter_config.json, if there is one.
    """
    names = [*names]
    kinds.require_files(names, uri, adapter)
    return sorted({*_small_files(names), *weights.to_download(names)})


def _small_files(names: Iterable[str]) -> list[str]:
    """Return the files of a repository that the lab reads beside the weights."""
    return [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, one) for one in _SMALL)]


def cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the Hub's cache on this machine, or None if it is not there or not whole.

    Raises LabError if a file is damaged and the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        patterns = {"allow_patterns": list(_SMALL), "ignore_patterns": ["*/*"]}  # weights: see _has_weights
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, **patterns))
    except (LocalEntryNotFoundError, ValueError):
        return None
    if not _has_weights(folder):
        return None
    damaged = _damaged(folder, {})
    if damaged and not environment.hub_reachable():
        raise LabError(
            f"{damaged[0]} of {name} is damaged in {folder}, and {environment.hub_unreachable_reason()}: "
            "connect to the Hub, which has it, and run this again"
        )
    return None if damaged else folder


def download(name: str, revision: str | None) -> Path:
    """Download the files of a model that are missing or damaged; return its folder in the Hub's cache."""
    uri = f"hub://{name}" + (f"@{revision}" if revision else "")
    try:
        info = hub_client.client().model_info(name, revision=revision, files_metadata=True)
        announced = {file.rfilename: file for file in info.siblings or ()}
        small = {file: announced[file] for file in _small_files(announced)}
        folder = _fetch(name, revision, small, uri) if small else Path()
        files = required_files(announced, uri, manifest.read_json(folder / kinds.ADAPTER) if small else None)
        if config := manifest.read_json(folder / kinds.CONFIG):
            kinds.require_architecture(config, uri)
        logger.info(f"fetching {name} from {environment.hub_host()} ...")
        return _fetch(name, revision, {file: announced[file] for file in files}, uri)
    except Exception as error:  # a lost connection raises an exception of the HTTP client, which depends on its version
        if isinstance(error, LabError):
            raise
        raise store_errors.explain_hub(error, uri, f"{environment.hub_endpoint()}/{name}") or store_errors.explain(
            error, store="the Hub", uri=uri, credential="HF_TOKEN"
        ) from None


def _has_weights(folder: Path) -> bool:
    """Return True if a snapshot has a model's configuration and all of its weights."""
    names = {path.name for path in folder.iterdir()}
    chosen = weights.choose(names)
    try:
        return bool(chosen and kinds.CONFIG in names and weights.files(folder, chosen))
    except LabError:  # a shard is missing
        return False


def _fetch(name: str, revision: str | None, announced: dict[str, Any], uri: str) -> Path:
    """Download, verify, and download damaged files once more."""
    from huggingface_hub import snapshot_download

    for _ in range(2):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(announced)))
        damaged = _damaged(folder, announced)
        if not damaged:
            return folder
        logger.info(f"{damaged[0]} of {uri} is damaged here: it is fetched again")
        for file in damaged:
            Path(os.path.realpath(folder / file)).unlink(missing_ok=True)
            (folder / file).unlink(missing_ok=True)
    raise LabError(
        f"{damaged[0]} of {uri} arrived damaged twice (its digest is not the one that the Hub announces): "
        "run this again later, or name another revision"
    )


def _damaged(folder: Path, announced: dict[str, Any]) -> list[str]:
    """Return the files of a snapshot whose content has another digest than announced, or than their cached name."""
    damaged = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        blob = Path(os.path.realpath(path))
        expected = _announced_digest(announced.get(path.name)) or blob.name
        if _DIGEST.fullmatch(expected):
            digest = manifest.sha256_once(blob) if len(expected) == 64 else hub.git_sha1(blob)
            if digest != expected:
                damaged.append(path.name)
    return damaged


def _announced_digest(file: Any) -> str | None:
    """Return the sha256 of a large file or git's sha1 of a small one, from the Hub's record; None without one."""
    if file is None:
        return None
    return file.lfs.sha256 if file.lfs else file.blob_id
