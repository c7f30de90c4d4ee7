"""The Hugging Face Hub as a store: data set repositories for caches, model repositories for weights, private.

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError, missing_package
from pipelines.infra.stores import dataset_card
from pipelines.infra.stores import errors as store_errors
from pipelines.infra.stores import sealed as sealed_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile


_URI = re.compile(r"hub://([\w.-]+)(?:/([\w.-]+)((?:/[\w.-]+)*))?(?:@([\w./-]+))?/?")
_TYPES = ("dataset", "model")
_OF_WEIGHTS = ("model", "checkpoint")
"""Kinds of artefacts that go to model repositories."""
_COMMIT_FILES = 200
"""Files in one commit: the Hub takes some hundreds, and a commit that fails is lost as a whole."""
_PUBLIC_ENDPOINT = "https://huggingface.co"


class HubPlace:
    """One repository, or a folder in it, at one revision (see sealed.Place)."""

    def __init__(self, api: HfApi, repo: str, kind: str, revision: str, folder: str = ""):
        self.api, self.repo, self.kind, self.revision = api, repo, kind, revision
        self.prefix = f"{folder}/" if folder else ""

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
            self._commit(
                [CommitOperationAdd(self.prefix + name, folder / name) for name in block], f"Add {len(block)} file(s)"
            )

    def get(self, name: str, path: Path) -> None:
        """The client resumes a download that was cut off in its folder beside `path`."""
        downloads = path.parent / ".hub"
        arrived = self.api.hf_hub_download(
            self.repo, self.prefix + name, repo_type=self.kind, revision=self.revision, local_dir=downloads
        )
        os.replace(arrived, path)

    def remove(self, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        self._commit([CommitOperationDelete(self.prefix + name) for name in names], f"Remove {len(names)} file(s)")

    def clear(self) -> None:
        """One commit, and the room of large files that nothing on the branch holds any more: history keeps it else.

        Older commits keep their names, and lose these files.
        """
        oids = {file.lfs.sha256 for file in self._tree().values() if file.lfs}
        self.remove([*self._tree()])
        held = {file.lfs.sha256 for file in self._listing() if file.lfs}
        unused = [
            file for file in self.api.list_lfs_files(self.repo, repo_type=self.kind) if file.file_oid in oids - held
        ]
        self.api.permanently_delete_lfs_files(self.repo, unused, rewrite_history=False, repo_type=self.kind)

    def folders(self) -> set[str]:
        """Names of the folders directly below."""
        return {name.partition("/")[0] for name in self._tree() if "/" in name}

    def _commit(self, operations: list[Any], message: str) -> None:
        self.__dict__.pop("_listed", None)
        self.api.create_commit(
            self.repo, operations, commit_message=message, repo_type=self.kind, revision=self.revision
        )

    def _tree(self) -> dict[str, RepoFile]:
        """Name to what the Hub tells of each file, listed once after every commit."""
        if "_listed" not in self.__dict__:
            self._listed = {
                file.path.removeprefix(self.prefix): file
                for file in self._listing()
                if file.path.startswith(self.prefix)
            }
        return self._listed

    def _listing(self) -> list[RepoFile]:
        """Every file of the repository."""
        found = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision, repo_type=self.kind)
        return [item for item in found if hasattr(item, "blob_id")]


class HubStore:
    """Sealed folders as Hub repositories, or folders in one, each at `hub://owner/name[/path][@revision]`."""

    def exists(self, uri: str) -> bool:
        return self.facts(uri) is not None

    def facts(self, uri: str) -> dict[str, Any] | None:
        with one_line(uri):
            place = _find(client(), uri)
            return None if place is None else sealed_folder.facts(place)

    def note(self, uri: str) -> dict[str, Any] | None:
        """Of both kinds of repository: what nobody's note is beside makes the whole nobody's."""
        with one_line(uri):
            told = [sealed_folder.note(place) for place in _places(client(), uri) if place.sizes()]
            return None if None in told else next(iter(told), {})

    def below(self, uri: str) -> list[str]:
        """Below `hub://owner/name`, the folders of the repository; below `hub://owner`, its repositories."""
        owner, name, _, _ = parts(uri)
        with one_line(uri):
            api = client()
            if name:
                found = {below for place in _places(api, uri) for below in place.folders()}
                return [f"{uri.rstrip('/')}/{below}" for below in sorted(found)]
            infos = [*api.list_datasets(author=owner), *api.list_models(author=owner)]
            return sorted({f"hub://{info.id}" for info in infos})

    def list(self, uri: str) -> list[str]:
        return [found for found in self.below(uri) if _is_whole_and_open(self, found)]

    def fetch(self, uri: str, *, into: Path | None = None) -> Path:
        with one_line(uri):
            place = _find(client(), uri)
            if place is None:
                raise LabError(
                    f"nothing finished at {uri}: the Hub has no such repository (or revision), or it is private. "
                    "Check the name; for a private one set HF_TOKEN"
                )
            return sealed_folder.fetch(place, uri, into)

    def publish(self, folder: Path, uri: str, *, thorough: bool = True) -> str:
        """Publish to the main branch of a repository that is made, private, where there is none.

        Returns the URI of the commit, which always means what was published now.
        """
        owner, name, path, revision = parts(uri)
        if not name or revision:
            raise LabError(f"artefacts are published to hub://owner/name[/path], got {uri}: leave out @revision")
        kind = "model" if (manifest.read(folder) or {}).get("kind") in _OF_WEIGHTS else "dataset"
        with one_line(uri):
            api, repo = client(), f"{owner}/{name}"
            api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
            _refuse_public(api, repo, kind, uri)
            place = HubPlace(api, repo, kind, "main", path)
            sealed_folder.publish(folder, place, uri, thorough)
            if not path:
                _put_card(place, folder)
            below = f"/{path}" if path else ""
            return f"hub://{repo}{below}@{api.repo_info(repo, repo_type=kind).sha}"

    def remove(self, uri: str) -> None:
        """Remove a folder of a repository; a repository itself is not removed by us."""
        *_, path, revision = parts(uri)
        if not path or revision:
            raise LabError(f"only hub://owner/name/path can be removed, got {uri}: remove a repository on its page")
        with one_line(uri):
            for place in _places(client(), uri):
                main = HubPlace(place.api, place.repo, place.kind, "main", path)
                if main.sizes():
                    main.clear()


def model_card(uri: str) -> Any:
    """What the head of a model's card tells (huggingface_hub.ModelCardData), without results that cannot be read."""
    owner, name, path, revision = parts(uri)
    with one_line(uri), tempfile.TemporaryDirectory() as folder:
        from huggingface_hub import ModelCard

        file = f"{path}/{dataset_card.NAME}" if path else dataset_card.NAME
        arrived = client().hf_hub_download(f"{owner}/{name}", file, revision=revision or None, local_dir=folder)
        return ModelCard.load(arrived, ignore_metadata_errors=True).data


def is_in_a_repository(uri: str) -> bool:
    """Whether `uri` names a folder in a repository: hub://owner/name/path."""
    return uri.startswith("hub://") and bool(parts(uri)[2])


def _find(api: HfApi, uri: str) -> HubPlace | None:
    """The repository of either kind that holds an artefact at `uri`; None where neither exists."""
    places = _places(api, uri)
    return next((place for place in places if manifest.MANIFEST in place.sizes()), places[0] if places else None)


def _places(api: HfApi, uri: str) -> list[HubPlace]:
    """The repositories of either kind that `uri` names, each at the commit that its revision means now.

    A revision is resolved once: what is listed, verified and downloaded is of one commit.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    owner, name, path, revision = parts(uri)
    if not name:
        raise LabError(f"{uri} is not an artefact: expected hub://owner/name[/path][@revision]")
    found = []
    for kind in _TYPES:
        try:
            info = api.repo_info(f"{owner}/{name}", repo_type=kind, revision=revision or None)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if store_errors.status_of(error) == 401 and api.token:
                raise  # the Hub answers so for a wrong token, too
            continue
        found.append(HubPlace(api, f"{owner}/{name}", kind, info.sha, path))
    return found


def _is_whole_and_open(store: HubStore, uri: str) -> bool:
    """Whether a listed repository holds a finished artefact; one that may be listed but not read does not."""
    with one_line(uri):
        try:
            place = _find(client(), uri)
            return place is not None and sealed_folder.is_whole(place)
        except Exception as error:
            if store_errors.status_of(error) in (403, 404):
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
    wanted = dataset_card.of_cache(folder, facts, lambda source: _licence(place.api, source)).encode()
    found = place.read(dataset_card.NAME)
    if found != wanted and (found is None or dataset_card.MARK.encode() in found):
        with tempfile.TemporaryDirectory() as aside:
            (Path(aside) / dataset_card.NAME).write_bytes(wanted)
            place.put(Path(aside), [dataset_card.NAME])


def _licence(api: HfApi, source: dict[str, Any]) -> str | None:
    """The licence of a source, by its identity; of a data set on the Hub what its own card says."""
    if source.get("kind") != "hub":
        return dataset_card.LICENCES.get(source.get("kind", ""))
    try:
        told = api.dataset_info(source["dataset"], revision=source["commit"]).card_data
    except Exception:  # a card is no reason to fail: the data set may be gone, or this token may not read it
        return None
    licence = told.get("license") if told else None
    return licence if isinstance(licence, str) else None


def parts(uri: str) -> tuple[str, str, str, str]:
    """Owner, name, path and revision of a URI; what it leaves out is empty."""
    found = _URI.fullmatch(uri)
    if not found or {"..", "."} & {*uri.partition("@")[0].split("/")}:
        raise LabError(f"expected hub://owner/name[/path][@revision], got {uri}")
    return found[1], found[2] or "", (found[3] or "").strip("/"), found[4] or ""


def client() -> HfApi:
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
        logging.getLogger(name).addFilter(store_errors.RedactingFilter())


def _git_sha1(path: Path) -> str:
    """The digest that git gives a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def one_line(uri: str) -> Iterator[None]:
    """Whatever the client raises becomes one line: its classes have changed with every release."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise missing_package("huggingface_hub", "huggingface_hub>=1.27", "hub:// URIs")
    try:
        with _no_bars():
            yield
    except Exception as error:
        raise store_errors.explain(error, store="the Hub", uri=uri, credential="HF_TOKEN") from None


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
