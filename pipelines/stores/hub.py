"""The Hugging Face Hub as a store: data set repositories for caches, model repositories for models, private.

Files that the Hub keeps by content are uploaded first and committed afterwards, so what a failed try uploaded is not
uploaded again. Common Voice may not be re-hosted: a public data set repository is refused unless LAB_HUB_PUBLIC=1.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import environment, manifest
from pipelines.errors import LabError, missing_package
from pipelines.stores import card, faults, sealed

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_URI = re.compile(r"hub://([\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?/?")
_TYPES = ("dataset", "model")
_COMMIT_FILES = 200
"""Files in one commit: the Hub takes some hundreds, and a commit that fails is lost as a whole."""
_PUBLIC_ENDPOINT = "https://huggingface.co"


class HubPlace:
    """One repository at one revision (see sealed.Place)."""

    def __init__(self, api: HfApi, repo: str, kind: str, revision: str):
        self.api, self.repo, self.kind, self.revision = api, repo, kind, revision

    def sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self._tree().items()}

    def holds(self, name: str, local: Path, entry: dict[str, Any]) -> bool:
        """By the Hub's own digest: sha256 of large files, git's sha1 of small ones."""
        file = self._tree().get(name)
        if file is None:
            return False
        return file.lfs.sha256 == entry["sha256"] if file.lfs else file.blob_id == _git_sha1(local)

    def read(self, name: str) -> bytes | None:
        if name not in self._tree():
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            self.get(name, path)
            return path.read_bytes()

    def put(self, folder: Path, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationAdd

        for start in range(0, len(names), _COMMIT_FILES):
            block = names[start : start + _COMMIT_FILES]
            self._commit([CommitOperationAdd(name, folder / name) for name in block], f"Add {len(block)} file(s)")

    def get(self, name: str, path: Path) -> None:
        """The client resumes a download that was cut off in its folder beside `path`."""
        downloads = path.parent / ".hub"
        arrived = self.api.hf_hub_download(
            self.repo, name, repo_type=self.kind, revision=self.revision, local_dir=downloads
        )
        os.replace(arrived, path)

    def remove(self, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        self._commit([CommitOperationDelete(name) for name in names], f"Remove {len(names)} file(s)")

    def _commit(self, operations: list[Any], message: str) -> None:
        self.__dict__.pop("_listed", None)
        self.api.create_commit(
            self.repo, operations, commit_message=message, repo_type=self.kind, revision=self.revision
        )

    def _tree(self) -> dict[str, RepoFile]:
        """Name to what the Hub tells of each file, listed once after every commit."""
        if "_listed" not in self.__dict__:
            found = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision, repo_type=self.kind)
            self._listed = {item.path: item for item in found if hasattr(item, "blob_id")}
        return self._listed


class HubStore:
    """Sealed folders as Hub repositories, each at `hub://owner/name[@revision]`."""

    def exists(self, uri: str) -> bool:
        with _one_line(uri):
            place = _find(_api(), uri)
            return place is not None and sealed.is_whole(place)

    def list(self, uri: str) -> list[str]:
        """The finished artefacts of an owner: `hub://owner`."""
        owner, name, _ = _parts(uri)
        if name:
            return [uri] if self.exists(uri) else []
        with _one_line(uri):
            api = _api()
            infos = {"dataset": api.list_datasets(author=owner), "model": api.list_models(author=owner)}
            places = [HubPlace(api, info.id, kind, "main") for kind in _TYPES for info in infos[kind]]
            return sorted(f"hub://{place.repo}" for place in places if _is_whole_and_open(place))

    def fetch(self, uri: str, *, log: Callable[[str], None] = print) -> Path:
        with _one_line(uri):
            place = _find(_api(), uri)
            if place is None:
                raise LabError(
                    f"nothing finished at {uri}: the Hub has no such repository (or revision), or it is private. "
                    "Check the name; for a private one set HF_TOKEN"
                )
            return sealed.fetch(place, uri, log)

    def publish(self, folder: Path, uri: str, *, log: Callable[[str], None] = print) -> str:
        """Publish to the main branch of a repository that is made, private, where there is none.

        Returns the URI of the commit, which always means what was published now.
        """
        owner, name, revision = _parts(uri)
        if not name or revision:
            raise LabError(f"artefacts are published to hub://owner/name, got {uri}: leave out @revision")
        kind = "model" if (manifest.read(folder) or {}).get("kind") == "model" else "dataset"
        with _one_line(uri):
            api, repo = _api(), f"{owner}/{name}"
            api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
            _refuse_public(api, repo, kind, uri)
            place = HubPlace(api, repo, kind, "main")
            sealed.publish(folder, place, uri, log)
            _put_card(place, folder)
            return f"hub://{repo}@{api.repo_info(repo, repo_type=kind).sha}"


def _find(api: HfApi, uri: str) -> HubPlace | None:
    """The repository of either kind that holds an artefact, at the commit that its revision means now; None if absent.

    A revision is resolved once: what is listed, verified and downloaded is of one commit.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    owner, name, revision = _parts(uri)
    if not name:
        raise LabError(f"{uri} is not an artefact: expected hub://owner/name[@revision]")
    found = None
    for kind in _TYPES:
        try:
            info = api.repo_info(f"{owner}/{name}", repo_type=kind, revision=revision or None)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if faults.status_of(error) == 401 and api.token:
                raise  # the Hub answers so for a wrong token, too
            continue
        place = HubPlace(api, f"{owner}/{name}", kind, info.sha)
        if any(file.rfilename == manifest.MANIFEST for file in info.siblings or ()):
            return place
        found = found or place
    return found


def _is_whole_and_open(place: HubPlace) -> bool:
    """Whether a listed repository holds a finished artefact; one that may be listed but not read does not."""
    try:
        return sealed.is_whole(place)
    except Exception as error:
        if faults.status_of(error) in (403, 404):
            return False
        raise


def _refuse_public(api: HfApi, repo: str, kind: str, uri: str) -> None:
    if (
        kind == "dataset"
        and os.environ.get("LAB_HUB_PUBLIC") != "1"
        and not api.repo_info(repo, repo_type=kind).private
    ):
        raise LabError(
            f"{uri} is a public data set, and features of Common Voice may not be re-hosted. Make it private, "
            "or set LAB_HUB_PUBLIC=1 if the recordings are yours to publish"
        )


def _put_card(place: HubPlace, folder: Path) -> None:
    """Write the card of a feature cache, or bring it up to date; a card that a person wrote stays."""
    facts = manifest.read(folder) or {}
    if place.kind != "dataset" or not {"identity", "counts"} <= facts.keys():
        return
    wanted = card.of_cache(folder, facts, lambda source: _licence(place.api, source)).encode()
    found = place.read(card.NAME)
    if found != wanted and (found is None or card.MARK.encode() in found):
        with tempfile.TemporaryDirectory() as aside:
            (Path(aside) / card.NAME).write_bytes(wanted)
            place.put(Path(aside), [card.NAME])


def _licence(api: HfApi, source: dict[str, Any]) -> str | None:
    """The licence of a source, by its identity; of a data set on the Hub what its own card says."""
    if source.get("kind") != "hub":
        return card.LICENCES.get(source.get("kind", ""))
    try:
        told = api.dataset_info(source["dataset"], revision=source["commit"]).card_data
    except Exception:  # a card is no reason to fail: the data set may be gone, or this token may not read it
        return None
    licence = told.get("license") if told else None
    return licence if isinstance(licence, str) else None


def _parts(uri: str) -> tuple[str, str, str]:
    """Owner, name and revision of a URI; what it leaves out is empty."""
    found = _URI.fullmatch(uri)
    if not found:
        raise LabError(f"expected hub://owner/name[@revision], got {uri}")
    return found[1], found[2] or "", found[3] or ""


def _api() -> HfApi:
    """The Hub's client for the endpoint of now, with the token of HF_TOKEN or of `hf auth login`."""
    import huggingface_hub

    if environment.hub_endpoint() != _PUBLIC_ENDPOINT:
        # other endpoints speak plain LFS; the client reads the variable when it is imported, which it has been by now
        huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    _keep_secrets_from_logs()
    return huggingface_hub.HfApi(endpoint=environment.hub_endpoint(), token=huggingface_hub.get_token() or False)


@functools.cache
def _keep_secrets_from_logs() -> None:
    """The client logs the addresses that it retries, and those of uploads are signed."""
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "httpx", "httpx2"):
        logging.getLogger(name).addFilter(faults.RedactingFilter())


def _git_sha1(path: Path) -> str:
    """The digest that git gives a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _one_line(uri: str) -> Iterator[None]:
    """Whatever the client raises becomes one line: its classes have changed with every release."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise missing_package("huggingface_hub", "huggingface_hub>=1.27", "hub:// URIs")
    try:
        with _no_bars():
            yield
    except Exception as error:
        raise faults.explain(error, store="the Hub", uri=uri, credential="HF_TOKEN") from None


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The client draws a progress bar for every file, of which a cache has hundreds."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
