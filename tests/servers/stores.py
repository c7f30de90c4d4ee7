"""Fixtures with one store each: the real client against a loopback server or a folder that the test can change."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from pipelines.infra import stores
from pipelines.infra.stores import drive, local
from servers.hopsworks import Hopsworks, self_signed
from servers.hub import Hub, Repo


@dataclasses.dataclass
class Bench:
    """A store, and access to its remote files."""

    name: str
    parent: str
    """URI below which artefacts are published."""
    files: Callable[[str], dict[str, bytes]]
    """Function from an artefact's name to its remote files."""
    write: Callable[[str, str, bytes | None], None]
    """Write or (content None) remove a remote file without the store: artefact, file, content."""
    uploads: Callable[[], int]
    """Function that returns the number of uploaded files."""
    server: Hub | Hopsworks | None = None
    secret: str = "hf_never"
    credential: str = ""

    def uri(self, name: str) -> str:
        return f"{self.parent}/{name}"

    @property
    def store(self) -> stores.Store:
        return stores.open_store(self.parent)

    def exists(self, name: str) -> bool:
        return self.store.exists(self.uri(name))

    def fetch(self, name: str) -> Path:
        return self.store.fetch(self.uri(name))

    def publish(self, folder: Path, name: str) -> str:
        return self.store.publish(folder, self.uri(name))


@pytest.fixture
def no_waiting(monkeypatch):
    """Let the clients retry without pauses."""
    import hsml.engine.model_engine
    import huggingface_hub.file_download
    import huggingface_hub.utils._http
    from hopsworks_common.core import dataset_api

    for module in (
        huggingface_hub.utils._http,
        huggingface_hub.file_download,
        dataset_api,
        hsml.engine.model_engine,
    ):
        still = types.SimpleNamespace(**{**vars(module.time), "sleep": lambda s: None})
        monkeypatch.setattr(module, "time", still)


@pytest.fixture
def hub_server(monkeypatch, tmp_path, no_waiting):
    import huggingface_hub

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)  # it calls the public Hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    yield server
    server.close()
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[str, str]:
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def cluster(monkeypatch, tmp_path, certificate, no_waiting):
    server = Hopsworks(certificate)
    monkeypatch.setenv("HOPSWORKS_HOST", "127.0.0.1")
    monkeypatch.setenv("HOPSWORKS_PORT", str(server.port))
    monkeypatch.setenv("HOPSWORKS_API_KEY", server.key)
    monkeypatch.setenv("HOPSWORKS_TRUST_STORE_PATH", certificate[0])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("HOPSWORKS_PROJECT", "HOPSWORKS_ENGINE", "HOPSWORKS_HOSTNAME_VERIFICATION", "REST_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


def folder_bench(name: str, root: Path, monkeypatch) -> Bench:
    sent = []
    copy = local.LocalFolder.copy

    def counted(self, source: Path, target: Path) -> None:
        copy(self, source, target)
        sent.extend([target] if target.is_relative_to(root) else [])

    monkeypatch.setattr(local.LocalFolder, "copy", counted)

    def files(artefact: str) -> dict[str, bytes]:
        return contents(root / artefact)

    def write(artefact: str, file: str, content: bytes | None) -> None:
        path = root / artefact / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if content is None else path.write_bytes(content)

    return Bench(name, str(root), files, write, lambda: len(sent))


@pytest.fixture
def local_bench(tmp_path, monkeypatch) -> Bench:
    return folder_bench("local", tmp_path / "shelf", monkeypatch)


@pytest.fixture
def drive_bench(tmp_path, monkeypatch) -> Bench:
    root = tmp_path / "mount" / "MyDrive" / "lab"
    root.parent.mkdir(parents=True)
    monkeypatch.setenv("LAB_DRIVE", str(tmp_path / "mount"))
    monkeypatch.setattr(drive.time, "sleep", lambda seconds: None)
    return folder_bench("drive", root, monkeypatch)


@pytest.fixture
def hub_bench(hub_server) -> Bench:
    server = hub_server

    def repository(artefact: str) -> tuple[dict[str, bytes], str]:
        """Return the files of the model or dataset repository, and the folder in it."""
        name, _, folder = artefact.partition("/")
        kind = "model" if ("model", f"lab/{name}") in server.repos else "dataset"
        if (kind, f"lab/{name}") not in server.repos:
            server.repos[kind, f"lab/{name}"] = Repo(private=True, commits={"0" * 40: {}})
        return server.files(kind, f"lab/{name}"), f"{folder}/" if folder else ""

    def write(artefact: str, file: str, content: bytes | None) -> None:
        files, folder = repository(artefact)
        files.pop(folder + file) if content is None else files.__setitem__(folder + file, content)

    def files(artefact: str) -> dict[str, bytes]:
        stored, folder = repository(artefact)
        named = {name.removeprefix(folder): content for name, content in stored.items() if name.startswith(folder)}
        return {name: content for name, content in named.items() if name != ".gitattributes"}

    return Bench("hub", "hub://lab", files, write, lambda: len(server.uploads), server, server.token, "HF_TOKEN")


@pytest.fixture
def hopsworks_bench(cluster) -> Bench:
    def files(artefact: str) -> dict[str, bytes]:
        root = f"Resources/caches/{artefact}/"
        return {name.removeprefix(root): content for name, content in cluster.files.items() if name.startswith(root)}

    def write(artefact: str, file: str, content: bytes | None) -> None:
        path = f"Resources/caches/{artefact}/{file}"
        cluster.files.pop(path) if content is None else cluster.files.__setitem__(path, content)
        cluster.folders |= {str(folder) for folder in PurePosixPath(path).parents} - {"."}

    parent = "hopsworks://demo/Resources/caches"
    sent = cluster.uploads
    return Bench("hopsworks", parent, files, write, lambda: len(sent), cluster, cluster.key, "HOPSWORKS_API_KEY")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
