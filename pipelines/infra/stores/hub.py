"""The Hugging Face Hub as a store: private data set repositories for caches, model repositories for weights.

Large files are uploaded first and committed afterwards; a repeated upload skips files that the Hub has. Common Voice
may not be re-hosted: a public data set repository is refused unless LAB_HUB_PUBLIC=1.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.stores import errors as store_errors
from pipelines.infra.stores import transfer
from pipelines.infra.stores.hub_client import client, explained_errors, parse_uri
from pipelines.infra.stores.store import Store

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_REPO_TYPES = ("dataset", "model")
_MODEL_KINDS = ("model", "checkpoint")
"""Kinds of artefacts that are stored in model repositories."""
_COMMIT_FILES = 200
"""Files per commit: the Hub accepts some hundreds, and a failed commit is lost as a whole."""


class HubFolder:
    """A RemoteFolder that is a repository, or a folder in one, at one revision."""

    def __init__(self, api: HfApi, repo: str, repo_type: str, revision: str, path: str = ""):
        self.api, self.repo, self.repo_type, self.revision = api, repo, repo_type, revision
        self.prefix = f"{path}/" if path else ""
        self._listed: dict[str, RepoFile] | None = None

    def sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self._files().items()}

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """Compare with the Hub's own digest: sha256 of large files, git's sha1 of small ones."""
        file = self._files().get(name)
        if file is None:
            return False
        return file.lfs.sha256 == entry["sha256"] if file.lfs else file.blob_id == git_sha1(local)

    def read(self, name: str) -> bytes | None:
        if name not in self._files():
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            self.get(name, path)
            return path.read_bytes()

    def put(self, folder: Path, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationAdd

        for start in range(0, len(names), _COMMIT_FILES):
            block = names[start : start + _COMMIT_FILES]
            operations = [CommitOperationAdd(self.prefix + name, folder / name) for name in block]
            self._commit(operations, f"Add {len(block)} file(s)")

    def get(self, name: str, path: Path) -> None:
        """Download one file; the client resumes an interrupted download in its folder beside `path`."""
        downloads = path.parent / ".hub"
        file = self.api.hf_hub_download(
            self.repo, self.prefix + name, repo_type=self.repo_type, revision=self.revision, local_dir=downloads
        )
        os.replace(file, path)

    def remove(self, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        self._commit([CommitOperationDelete(self.prefix + name) for name in names], f"Remove {len(names)} file(s)")

    def clear(self) -> None:
        """Remove all files in one commit, and free the space of large files that the branch no longer has.

        Older commits still list these files, but cannot be downloaded completely any more.
        """
        removed = {file.lfs.sha256 for file in self._files().values() if file.lfs}
        self.remove([*self._files()])
        unused = removed - {file.lfs.sha256 for file in self._list_repository() if file.lfs}
        stored = self.api.list_lfs_files(self.repo, repo_type=self.repo_type)
        self.api.permanently_delete_lfs_files(
            self.repo,
            [file for file in stored if file.file_oid in unused],
            rewrite_history=False,
            repo_type=self.repo_type,
        )

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._files() if "/" in name})

    def subfolder(self, name: str) -> HubFolder:
        return HubFolder(self.api, self.repo, self.repo_type, self.revision, self.prefix + name)

    def _commit(self, operations: list[Any], message: str) -> None:
        self._listed = None
        self.api.create_commit(
            self.repo, operations, commit_message=message, repo_type=self.repo_type, revision=self.revision
        )

    def _files(self) -> dict[str, RepoFile]:
        """Return name to the Hub's record of each file, listed once after each commit."""
        if self._listed is None:
            files = [file for file in self._list_repository() if file.path.startswith(self.prefix)]
            self._listed = {file.path.removeprefix(self.prefix): file for file in files}
        return self._listed

    def _list_repository(self) -> list[RepoFile]:
        items = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision, repo_type=self.repo_type)
        return [item for item in items if hasattr(item, "blob_id")]


class HubStore(Store):
    """Sealed folders as Hub repositories or folders in one: `hub://owner/name[/path][@revision]`."""

    @contextlib.contextmanager
    def open_folder(self, uri: str) -> Iterator[HubFolder]:
        with explained_errors(uri):
            folder = _find_artefact(client(), uri)
            if folder is None:
                raise LabError(
                    f"nothing finished at {uri}: the Hub has no such repository (or revision), or it is private. "
                    "Check the name; for a private one set HF_TOKEN"
                )
            yield folder

    def metadata(self, uri: str) -> dict[str, Any] | None:
        with explained_errors(uri):
            folder = _find_artefact(client(), uri)
            return None if folder is None else transfer.metadata(folder)

    def run_record(self, uri: str) -> dict[str, Any] | None:
        """Return the record of the repository of either type; None if one of them has files but no record."""
        with explained_errors(uri):
            records = [transfer.run_record(folder) for folder in _repositories(client(), uri) if folder.sizes()]
            return None if None in records else next(iter(records), {})

    def list_folders(self, uri: str) -> list[str]:
        """Return the folders of the repository `hub://owner/name`, or the repositories of `hub://owner`."""
        owner, name, _, _ = parse_uri(uri)
        with explained_errors(uri):
            api = client()
            if name:
                names = {name for folder in _repositories(api, uri) for name in folder.folders()}
                return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]
            infos = [*api.list_datasets(author=owner), *api.list_models(author=owner)]
            return sorted({f"hub://{info.id}" for info in infos})

    def list(self, uri: str) -> list[str]:
        return [folder for folder in self.list_folders(uri) if _is_complete_and_readable(folder)]

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        """Publish to the main branch; a new repository is created private.

        Returns the URI of the commit, which stays valid when a newer version is published.
        """
        owner, name, path, revision = parse_uri(uri)
        if not name or revision:
            raise LabError(f"artefacts are published to hub://owner/name[/path], got {uri}: leave out @revision")
        repo_type = "model" if (manifest.read(folder) or {}).get("kind") in _MODEL_KINDS else "dataset"
        with explained_errors(uri):
            api, repo = client(), f"{owner}/{name}"
            api.create_repo(repo, repo_type=repo_type, private=True, exist_ok=True)
            _refuse_public_dataset(api, repo, repo_type, uri)
            remote = HubFolder(api, repo, repo_type, "main", path)
            transfer.publish(folder, remote, uri, thorough)
            below = f"/{path}" if path else ""
            return f"hub://{repo}{below}@{api.repo_info(repo, repo_type=repo_type).sha}"

    def remove(self, uri: str) -> None:
        """Remove a folder of a repository. Raises LabError for a whole repository, which is never removed."""
        *_, path, revision = parse_uri(uri)
        if not path or revision:
            raise LabError(f"only hub://owner/name/path can be removed, got {uri}: remove a repository on its page")
        with explained_errors(uri):
            for folder in _repositories(client(), uri):
                main = HubFolder(folder.api, folder.repo, folder.repo_type, "main", path)
                if main.sizes():
                    main.clear()


def _find_artefact(api: HfApi, uri: str) -> HubFolder | None:
    """Return the repository, of either type, with an artefact at `uri`; the first one if neither has; else None."""
    folders = _repositories(api, uri)
    return next((folder for folder in folders if manifest.MANIFEST in folder.sizes()), folders[0] if folders else None)


def _repositories(api: HfApi, uri: str) -> list[HubFolder]:
    """Return the existing repositories of either type at `uri`, each at the commit of its revision.

    The revision is resolved once, so that listing, verification and download see one commit.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    owner, name, path, revision = parse_uri(uri)
    if not name:
        raise LabError(f"{uri} is not an artefact: expected hub://owner/name[/path][@revision]")
    folders = []
    for repo_type in _REPO_TYPES:
        try:
            info = api.repo_info(f"{owner}/{name}", repo_type=repo_type, revision=revision or None)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if store_errors.status_of(error) == 401 and api.token:
                raise  # the Hub's response to a wrong token is the same
            continue
        folders.append(HubFolder(api, f"{owner}/{name}", repo_type, info.sha, path))
    return folders


def _is_complete_and_readable(uri: str) -> bool:
    """Return True if a listed repository holds a finished artefact; False if this token may list but not read it."""
    with explained_errors(uri):
        try:
            folder = _find_artefact(client(), uri)
            return folder is not None and transfer.is_complete(folder)
        except Exception as error:
            if store_errors.status_of(error) in (403, 404):
                return False
            raise


def _refuse_public_dataset(api: HfApi, repo: str, repo_type: str, uri: str) -> None:
    if repo_type != "dataset" or os.environ.get("LAB_HUB_PUBLIC") == "1":
        return
    if not api.repo_info(repo, repo_type=repo_type).private:
        raise LabError(
            f"{uri} is a public data set, and features of Common Voice may not be re-hosted. Make it private, "
            "or set LAB_HUB_PUBLIC=1 if the recordings are yours to publish"
        )


def git_sha1(path: Path) -> str:
    """Return the digest that git computes for a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
