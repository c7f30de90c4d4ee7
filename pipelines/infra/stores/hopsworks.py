"""A Hopsworks project as a store: files through the dataset API, models in the model registry.

`hopsworks://project/Resources/caches/tour`      a folder of the project's file system
`hopsworks://project/Models/whisper_sv[/3]`      a model in the registry; without a version, the newest complete one

The client reads HOPSWORKS_HOST, HOPSWORKS_PORT and HOPSWORKS_API_KEY. The host's certificate is verified unless
HOPSWORKS_HOSTNAME_VERIFICATION=false is set (the client's own default is not to verify it).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.stores import errors as store_errors
from pipelines.infra.stores import transfer
from pipelines.infra.stores.store import Store

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


_URI = re.compile(r"hopsworks://([^/]+)/(.+?)/?")
_REGISTRY = "Models"
_TIMEOUT_S = (10.0, 120.0)
"""Time-outs for connecting and for the next block of a response; the client itself sets none."""
_PAGE = 1000
"""Entries per request of a listing."""
_REGISTRATION_S = 60
"""Longest wait for a new model version to appear in the registry."""


class HopsworksFolder:
    """A RemoteFolder that is a folder of the project's file system."""

    def __init__(self, files: Any, path: str):
        self.files, self.path = files, path.strip("/")
        self._existing: set[str] = set()
        """Folders that exist, so that each is checked once."""

    def sizes(self) -> dict[str, int]:
        return {str(PurePosixPath(path).relative_to(self.path)): size for path, size in self._below(self.path)}

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """Read the file back: the cluster provides no digests."""
        digest = hashlib.sha256()
        with self.files.read_content(f"/{self.path}/{name}") as response:
            for block in response.iter_content(1 << 20):
                digest.update(block)
        return digest.hexdigest() == entry["sha256"]

    def read(self, name: str) -> bytes | None:
        try:
            with self.files.read_content(f"/{self.path}/{name}") as response:
                return response.content
        except Exception as error:
            if _is_absent(error):
                return None
            raise

    def put(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            parent = str(PurePosixPath(self.path, name).parent)
            self._create_folder(parent)
            self.files.upload(str(folder / name), parent, overwrite=True)

    def get(self, name: str, path: Path) -> None:
        self.files.download(f"{self.path}/{name}", local_path=str(path), overwrite=True)

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            self.files.remove(f"{self.path}/{name}")

    def clear(self) -> None:
        for path in (f"{self.path}/{manifest.MANIFEST}", self.path):
            try:
                self.files.remove(path)
            except Exception as error:
                if not _is_absent(error):
                    raise

    def folders(self) -> list[str]:
        paths = self._list(self.path)
        return sorted(PurePosixPath(path).name for path in paths if self.files.get(path)["attributes"].get("dir"))

    def subfolder(self, name: str) -> HopsworksFolder:
        return _artefact_folder(self.files, f"{self.path}/{name}")

    def _below(self, path: str) -> Iterator[tuple[str, int]]:
        """Yield path and size in bytes of each file below `path`."""
        for inner in self._list(path):
            attributes = self.files.get(inner)["attributes"]
            if attributes.get("dir"):
                yield from self._below(inner)
            else:
                yield inner, int(attributes["size"])

    def _list(self, path: str) -> list[str]:
        """Return the paths directly below `path`, relative to the project; empty if it does not exist."""
        paths: list[str] = []
        try:
            while page := self.files.list(path, offset=len(paths), limit=_PAGE):
                paths += [item.strip("/") for item in page]
                if len(page) < _PAGE:
                    break
        except Exception as error:
            if _is_absent(error):
                return []
            raise
        return paths

    def _create_folder(self, folder: str) -> None:
        """Create a folder and its parents. (The client's `exists` returns False for every error.)"""
        if folder in self._existing or folder in ("", "."):
            return
        try:
            self.files.get(folder)
        except Exception as error:
            if not _is_absent(error):
                raise
            self._create_folder(str(PurePosixPath(folder).parent))
            self.files.mkdir(folder)
        self._existing.add(folder)


class HopsworksStore(Store):
    """Sealed folders in a Hopsworks project: `hopsworks://project/path`."""

    @contextlib.contextmanager
    def open_folder(self, uri: str) -> Iterator[HopsworksFolder]:
        with _open_project(uri) as (project, path):
            yield _artefact_folder(project.get_dataset_api(), path)

    def list_folders(self, uri: str) -> list[str]:
        with _open_project(uri) as (project, path):
            folder = HopsworksFolder(project.get_dataset_api(), path)
            return [f"{uri.rstrip('/')}/{name}" for name in folder.folders()]

    def list(self, uri: str) -> list[str]:
        with _open_project(uri) as (project, path):
            folder = HopsworksFolder(project.get_dataset_api(), path)
            complete = [name for name in folder.folders() if transfer.is_complete(folder.subfolder(name))]
            return [f"{uri.rstrip('/')}/{name}" for name in complete]

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        """Publish a folder of the project, or below `Models/` a new version of a registered model."""
        manifest.require_complete(
            folder, "artefact", "Only finished artefacts are published: make it again", thorough=thorough
        )
        with _open_project(uri) as (project, path):
            if _is_in_registry(path):
                if manifest.read(folder).get("kind") != "model":
                    raise LabError(
                        f"{uri} is in the model registry, which takes models: give anything else another folder, "
                        f"such as hopsworks://{_URI.fullmatch(uri)[1]}/Resources/{PurePosixPath(path).parts[1]}"
                    )
                return _register(project, folder, path, uri)
            transfer.publish(folder, HopsworksFolder(project.get_dataset_api(), path), uri, thorough)
        return uri


def add_rows(uri: str, rows: pd.DataFrame, group: str) -> None:
    """Write one metadata row per clip of a published cache into the feature group `group` of the project of `uri`.

    `rows` has the columns id, split, text and duration_s. Needs Kafka or Arrow Flight on the cluster, and
    `hopsworks[python]`.
    """
    metadata = rows[["id", "split", "duration_s"]].assign(transcript=rows["text"], path=uri)
    with _open_project(uri) as (project, _):
        feature_group = project.get_feature_store().get_or_create_feature_group(
            name=group, version=1, primary_key=["path", "id"], description="one row per clip of a feature cache"
        )
        feature_group.insert(metadata)
    logger.info(f"{len(metadata)} rows in the feature group {group}")


def _register(project: Any, folder: Path, path: str, uri: str) -> str:
    """Register a new version and return its URI; return the newest version's URI if it is the same model.

    The client removes a version that it could not complete, so a second try starts from the beginning.
    """
    files, name = project.get_dataset_api(), PurePosixPath(path).parts[1]
    newest = _artefact_folder(files, f"{_REGISTRY}/{name}")
    if newest.read(manifest.MANIFEST) == (folder / manifest.MANIFEST).read_bytes() and transfer.is_complete(newest):
        logger.info(f"{uri} is there already, whole and the same")
        return f"{uri.split('/Models/')[0]}/{newest.path.removesuffix('/Files')}"
    score = (manifest.read(folder) or {}).get("test") or {}
    metrics = {f"test_{key}": score[key] for key in ("wer", "cer") if isinstance(score.get(key), int | float)}
    logger.info(f"registering the model {name} ...")
    with _muted_client():
        model = project.get_model_registry().python.create_model(name, metrics=metrics or None)
        saved = model.save(str(folder), await_registration=_REGISTRATION_S, keep_original_files=True)
    version = f"{_REGISTRY}/{name}/{saved.version}"
    remote = HopsworksFolder(files, f"{version}/Files")
    entries = manifest.verified(manifest.read(folder)["files"])
    differing = [name for name, entry in entries.items() if not remote.holds(name, folder / name, entry)]
    if differing:
        remote.remove([manifest.MANIFEST])
        raise LabError(f"{version} does not read back as it was published ({differing[0]} differs). Publish it again")
    return f"{uri.split('/Models/')[0]}/{version}"


def _artefact_folder(files: Any, path: str) -> HopsworksFolder:
    """Return the folder of an artefact: `path` itself, or the files of a registered model's version.

    Without a version, the newest complete one.
    """
    if not _is_in_registry(path):
        return HopsworksFolder(files, path)
    _, name, *version = PurePosixPath(path).parts
    if version:
        return HopsworksFolder(files, f"{_REGISTRY}/{name}/{version[0]}/Files")
    model = HopsworksFolder(files, path)
    numbers = sorted((int(number) for number in model.folders() if number.isdigit()), reverse=True)
    versions = (HopsworksFolder(files, f"{_REGISTRY}/{name}/{number}/Files") for number in numbers)
    return next(filter(transfer.is_complete, versions), model)


def _is_in_registry(path: str) -> bool:
    return PurePosixPath(path).parts[0] == _REGISTRY and len(PurePosixPath(path).parts) > 1


@contextlib.contextmanager
def _open_project(uri: str) -> Iterator[tuple[Any, str]]:
    """Log in, yield the project of a URI and the path in it, and log out. Any error becomes a LabError."""
    match = _URI.fullmatch(uri)
    if not match or {"..", "."} & set(match[2].split("/")):
        raise LabError(f"expected hopsworks://project/path such as hopsworks://demo/Resources/caches/tour, got {uri}")
    hopsworks = _client(uri)
    try:
        # a folder for each login: a logout of another process would remove the certificates
        with tempfile.TemporaryDirectory() as certificates:
            project = _login(hopsworks, match[1], certificates)
            try:
                yield project, match[2]
            finally:
                hopsworks.logout()
    except Exception as error:
        raise store_errors.explain(error, store="Hopsworks", uri=uri, credential="HOPSWORKS_API_KEY") from None


def _client(uri: str) -> Any:
    """Import hopsworks without the log handler that it adds to the root logger. Raises LabError without an API key."""
    if not (os.environ.get("HOPSWORKS_API_KEY") or "REST_ENDPOINT" in os.environ):
        raise LabError(
            f"{uri} needs an API key: set HOPSWORKS_API_KEY (and HOPSWORKS_HOST, HOPSWORKS_PORT for your own cluster)"
        )
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        import hopsworks
    except ImportError:
        raise missing_package("hopsworks", "hopsworks>=5", "hopsworks:// URIs") from None
    finally:
        root.handlers[:], root.level = handlers, level
    return hopsworks


def _login(hopsworks: Any, project: str, certificates: str) -> Any:
    with _muted_client():
        project = hopsworks.login(project=project, hostname_verification=True, cert_folder=certificates)
    _set_timeouts()
    _hide_progress_bars()
    return project


class _MutedStream:
    """Standard output without the lines of this thread: other threads keep printing."""

    def __init__(self, stream: Any):
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _muted_client() -> contextlib.redirect_stdout:
    """Return a context in which the client prints nothing: standard output is for `--json`."""
    return contextlib.redirect_stdout(_MutedStream(sys.stdout))


def _set_timeouts() -> None:
    """Add a time-out to every request of the client, which sets none: a silent cluster would block for ever."""
    from hopsworks_common import client
    from requests.adapters import HTTPAdapter

    class TimeoutAdapter(HTTPAdapter):
        def send(self, request, **settings):
            return super().send(request, **{**settings, "timeout": settings.get("timeout") or _TIMEOUT_S})

    client._get_instance()._session.mount("https://", TimeoutAdapter())


def _hide_progress_bars() -> None:
    """Hide the client's progress bars: it shows one per uploaded file, also in background threads."""
    import tqdm
    from hopsworks_common.core import dataset_api

    dataset_api.tqdm = functools.partial(tqdm.tqdm, disable=True)


def _is_absent(error: Exception) -> bool:
    """Return True for an error that means that a path does not exist: 404, or 400 with such a text."""
    status = store_errors.status_of(error)
    return status == 404 or (status == 400 and re.search(r"not found|not exist|no such", str(error), re.I) is not None)
