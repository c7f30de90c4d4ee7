"""A Hopsworks project as a store: files through the dataset API, models in the model registry.

`hopsworks://project/Resources/caches/tour`      a folder of the project's file system
`hopsworks://project/Models/whisper_sv[/3]`      a model in the registry; without a version, the newest that is whole

The client reads HOPSWORKS_HOST, HOPSWORKS_PORT and HOPSWORKS_API_KEY. The host's certificate is verified unless
HOPSWORKS_HOSTNAME_VERIFICATION=false says otherwise (the client's own default is not to).
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
from pipelines.infra.stores import sealed as sealed_folder

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


_URI = re.compile(r"hopsworks://([^/]+)/(.+?)/?")
_REGISTRY = "Models"
_TIMEOUT_S = (10.0, 120.0)
"""To connect, and between two blocks of an answer; the client itself waits for ever."""
_PAGE = 1000
_REGISTRATION_S = 60


class HopsworksPlace:
    """A folder of the project's file system (see sealed.Place)."""

    def __init__(self, files: Any, path: str):
        self.files, self.path = files, path.strip("/")
        self._folders: set[str] = set()

    def sizes(self) -> dict[str, int]:
        return {str(PurePosixPath(path).relative_to(self.path)): size for path, size in self._below(self.path)}

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """By reading it back: the cluster tells no digest."""
        digest = hashlib.sha256()
        with self.files.read_content(f"/{self.path}/{name}") as answer:
            for block in answer.iter_content(1 << 20):
                digest.update(block)
        return digest.hexdigest() == entry["sha256"]

    def read(self, name: str) -> bytes | None:
        try:
            with self.files.read_content(f"/{self.path}/{name}") as answer:
                return answer.content
        except Exception as error:
            if _is_absent(error):
                return None
            raise

    def put(self, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            parent = str(PurePosixPath(self.path, name).parent)
            self._make(parent)
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
        """Names of the folders directly below."""
        found = self._list(self.path)
        return [PurePosixPath(path).name for path in found if self.files.get(path)["attributes"].get("dir")]

    def _below(self, path: str) -> Iterator[tuple[str, int]]:
        for found in self._list(path):
            attributes = self.files.get(found)["attributes"]
            if attributes.get("dir"):
                yield from self._below(found)
            else:
                yield found, int(attributes["size"])

    def _list(self, path: str) -> list[str]:
        """Paths directly below `path`, relative to the project; empty where it is absent."""
        found: list[str] = []
        try:
            while page := self.files.list(path, offset=len(found), limit=_PAGE):
                found += [item.strip("/") for item in page]
                if len(page) < _PAGE:
                    break
        except Exception as error:
            if _is_absent(error):
                return []
            raise
        return found

    def _make(self, folder: str) -> None:
        """Make a folder and those above it. (`exists` of the client takes every refusal for an absence.)"""
        if folder in self._folders or folder in ("", "."):
            return
        try:
            self.files.get(folder)
        except Exception as error:
            if not _is_absent(error):
                raise
            self._make(str(PurePosixPath(folder).parent))
            self.files.mkdir(folder)
        self._folders.add(folder)


class HopsworksStore:
    """Sealed folders in a Hopsworks project, each at `hopsworks://project/path`."""

    def exists(self, uri: str) -> bool:
        with _project(uri) as (project, path):
            return sealed_folder.is_whole(_place(project.get_dataset_api(), path))

    def facts(self, uri: str) -> dict[str, Any] | None:
        with _project(uri) as (project, path):
            return sealed_folder.facts(_place(project.get_dataset_api(), path))

    def note(self, uri: str) -> dict[str, Any] | None:
        with _project(uri) as (project, path):
            return sealed_folder.note(_place(project.get_dataset_api(), path))

    def below(self, uri: str) -> list[str]:
        with _project(uri) as (project, path):
            names = HopsworksPlace(project.get_dataset_api(), path).folders()
            return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]

    def list(self, uri: str) -> list[str]:
        with _project(uri) as (project, path):
            files = project.get_dataset_api()
            names = sorted(HopsworksPlace(files, path).folders())
            return [
                f"{uri.rstrip('/')}/{name}" for name in names if sealed_folder.is_whole(_place(files, f"{path}/{name}"))
            ]

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        with _project(uri) as (project, path):
            return sealed_folder.fetch(_place(project.get_dataset_api(), path), uri, into)

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        """Publish a folder of the project, or below `Models/` a new version of a registered model."""
        manifest.require_whole(
            folder, "artefact", "Only finished artefacts are published: make it again", thorough=thorough
        )
        with _project(uri) as (project, path):
            if _is_registered(path):
                if manifest.read(folder).get("kind") != "model":
                    raise LabError(
                        f"{uri} is in the model registry, which takes models: give anything else a folder of its own, "
                        f"such as hopsworks://{_URI.fullmatch(uri)[1]}/Resources/{PurePosixPath(path).parts[1]}"
                    )
                return _register(project, folder, path, uri)
            sealed_folder.publish(folder, HopsworksPlace(project.get_dataset_api(), path), uri, thorough)
        return uri

    def remove(self, uri: str) -> None:
        with _project(uri) as (project, path):
            _place(project.get_dataset_api(), path).clear()


def add_rows(uri: str, rows: pd.DataFrame, group: str) -> None:
    """Write one metadata row per clip of a published cache into the feature group `group` of the project of `uri`.

    `rows` has id, split, text and duration_s. Needs Kafka or Arrow Flight on the cluster, and `hopsworks[python]`.
    """
    named = rows[["id", "split", "duration_s"]].assign(transcript=rows["text"], path=uri)
    with _project(uri) as (project, _):
        features = project.get_feature_store().get_or_create_feature_group(
            name=group, version=1, primary_key=["path", "id"], description="one row per clip of a feature cache"
        )
        features.insert(named)
    logger.info(f"{len(named)} rows in the feature group {group}")


def _register(project: Any, folder: Path, path: str, uri: str) -> str:
    """A new version in the model registry; the version at hand where it is this very model.

    The client removes a version that it could not finish, so a second try begins anew.
    """
    files, name = project.get_dataset_api(), PurePosixPath(path).parts[1]
    newest = _place(files, f"{_REGISTRY}/{name}")
    if newest.read(manifest.MANIFEST) == (folder / manifest.MANIFEST).read_bytes() and sealed_folder.is_whole(newest):
        logger.info(f"{uri} is there already, whole and the same")
        return f"{uri.split('/Models/')[0]}/{newest.path.removesuffix('/Files')}"
    score = (manifest.read(folder) or {}).get("test") or {}
    metrics = {f"test_{key}": score[key] for key in ("wer", "cer") if isinstance(score.get(key), int | float)}
    logger.info(f"registering the model {name} ...")
    with _quiet():
        model = project.get_model_registry().python.create_model(name, metrics=metrics or None)
        saved = model.save(str(folder), await_registration=_REGISTRATION_S, keep_original_files=True)
    version = f"{_REGISTRY}/{name}/{saved.version}"
    place = HopsworksPlace(files, f"{version}/Files")
    wrong = [
        name for name, entry in manifest.read(folder)["files"].items() if not place.holds(name, folder / name, entry)
    ]
    if wrong:
        place.remove([manifest.MANIFEST])
        raise LabError(f"{version} does not read back as it was published ({wrong[0]} differs). Publish it again")
    return f"{uri.split('/Models/')[0]}/{version}"


def _place(files: Any, path: str) -> HopsworksPlace:
    """The folder of an artefact: that of the path itself, or the files of a registered model's version."""
    if not _is_registered(path):
        return HopsworksPlace(files, path)
    _, name, *version = PurePosixPath(path).parts
    if version:
        return HopsworksPlace(files, f"{_REGISTRY}/{name}/{version[0]}/Files")
    numbers = sorted((int(found) for found in HopsworksPlace(files, path).folders() if found.isdigit()), reverse=True)
    places = [HopsworksPlace(files, f"{_REGISTRY}/{name}/{number}/Files") for number in numbers]
    return next((place for place in places if sealed_folder.is_whole(place)), HopsworksPlace(files, path))


def _is_registered(path: str) -> bool:
    return PurePosixPath(path).parts[0] == _REGISTRY and len(PurePosixPath(path).parts) > 1


@contextlib.contextmanager
def _project(uri: str) -> Iterator[tuple[Any, str]]:
    """The project of a URI, logged in for as long as the block runs, and the path in it; any error as one line."""
    found = _URI.fullmatch(uri)
    if not found or {"..", "."} & set(found[2].split("/")):
        raise LabError(f"expected hopsworks://project/path such as hopsworks://demo/Resources/caches/tour, got {uri}")
    hopsworks = _client(uri)
    try:
        # of its own for every login: the certificates there are removed when another process logs out
        with tempfile.TemporaryDirectory() as certificates:
            project = _login(hopsworks, found[1], certificates)
            try:
                yield project, found[2]
            finally:
                hopsworks.logout()
    except Exception as error:
        raise store_errors.explain(error, store="Hopsworks", uri=uri, credential="HOPSWORKS_API_KEY") from None


def _client(uri: str) -> Any:
    """The module hopsworks, without the log handler that its import gives to the whole process."""
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
    with _quiet():
        connected = hopsworks.login(project=project, hostname_verification=True, cert_folder=certificates)
    _limit_waiting()
    _draw_no_bars()
    return connected


class _Muted:
    """Standard output without what this thread writes: others may be in the middle of a line."""

    def __init__(self, stream: Any):
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _quiet() -> contextlib.redirect_stdout:
    """What the client prints is kept from standard output, which belongs to `--json`."""
    return contextlib.redirect_stdout(_Muted(sys.stdout))


def _limit_waiting() -> None:
    """Give every request of the client a time-out: it sets none, and a silent cluster would hold us for ever."""
    from hopsworks_common import client
    from requests.adapters import HTTPAdapter

    class Impatient(HTTPAdapter):
        def send(self, request, **settings):
            return super().send(request, **{**settings, "timeout": settings.get("timeout") or _TIMEOUT_S})

    client._get_instance()._session.mount("https://", Impatient())


def _draw_no_bars() -> None:
    """The client draws a progress bar for every file that it sends, also where that goes on in the background."""
    import tqdm
    from hopsworks_common.core import dataset_api

    dataset_api.tqdm = functools.partial(tqdm.tqdm, disable=True)


def _is_absent(error: Exception) -> bool:
    """Whether the cluster says that a path is not there: 404, or 400 with words to that effect."""
    status = store_errors.status_of(error)
    return status == 404 or (status == 400 and re.search(r"not found|not exist|no such", str(error), re.I) is not None)
