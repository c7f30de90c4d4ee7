"""Data sets on the Hugging Face Hub, in Parquet: listed once, pinned to a commit, read in ranges and never stored.

    files = HubFiles("google/fleurs")       # main holds a script, so refs/convert/parquet is taken, and told
    files.open("sv_se/train/0000.parquet")  # random access: pyarrow asks for the byte ranges that it needs

A question that fails in passing (429, 5xx, a connection that is cut, an answer that is too short) is put again, up to
TRIES times; everything else is one line. What the server wrote never reaches a message: it might repeat a token.
"""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.features.sources.parquet.layout import Declared
from pipelines.infra import environment
from pipelines.infra.errors import LabError, missing_package

logger = logging.getLogger(__name__)

CONVERTED = "refs/convert/parquet"
"""The branch on which the Hub keeps the Parquet that it made of other data sets."""
TRIES = 6
WAIT_S = 1.0
"""Before the second try; doubled for each further one."""
MAX_WAIT_S = 60.0
TIMEOUT_S = 30.0
"""Silence after which a connection counts as cut."""
_PASSING = (408, 429, 500, 502, 503, 504)
_NAME = re.compile(r"(hub://)?(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")
KNOWN = {"google/fleurs": {"text_column": "raw_transcription"}}
"""Settings of data sets that leave a choice: FLEURS' `raw_transcription` has capitals and punctuation."""


@dataclass(frozen=True)
class HubFiles:
    """The Parquet files of a data set: `owner/name`, with `revision` or as `hub://owner/name@revision`."""

    dataset: str
    revision: str = ""

    @property
    def where(self) -> str:
        return f"hub://{self._id}@{self._listing.commit[:12]}"

    def identity(self) -> dict[str, str]:
        """The data set and the commit that its revision is today."""
        return {"kind": "hub", "dataset": self._id, "commit": self._listing.commit}

    def names(self) -> list[str]:
        return sorted(self._listing.sizes)

    def declared(self) -> Declared:
        """What the head of the data set's card says: `configs`, with a pattern of files for each split."""
        return self._listing.declared

    def open(self, name: str) -> io.BufferedIOBase:
        listing = self._listing
        url = _hub().hf_hub_url(
            self._id, name, repo_type="dataset", revision=listing.commit, endpoint=environment.hub_endpoint()
        )
        return RangeFile(lambda start, stop: self._fetch(url, name, start, stop), listing.sizes[name])

    @property
    def _id(self) -> str:
        return self._named["id"]

    @cached_property
    def _named(self) -> dict[str, str]:
        match = _NAME.fullmatch(self.dataset.strip())
        if not match:
            raise LabError(f"source.path must be a data set's owner/name, got {self.dataset!r}: correct it")
        if self.revision and match["revision"] not in (None, self.revision):
            raise LabError(f"source.path names {match['revision']!r}, source.revision {self.revision!r}: keep one")
        return {"id": match["id"], "revision": self.revision or match["revision"] or ""}

    @cached_property
    def _listing(self) -> _Listing:
        named = self._named["revision"]
        listing = self._list(named or "main")
        if not listing.sizes and not named:
            logger.info(f"hub://{self._id} has no Parquet on main: looking at {CONVERTED}")
            listing = self._list(CONVERTED, listing)
        if not listing.sizes:
            raise LabError(
                f"hub://{self._id} holds no Parquet at {named or f'main, nor at {CONVERTED}'}"
                + (f", but the loading script {listing.script}, which is not run" if listing.script else "")
                + (f": try source.revision = {CONVERTED!r}" if named else ": name another data set")
            )
        logger.info(f"hub://{self._id}: revision {listing.revision} is commit {listing.commit}")
        return listing

    def _list(self, revision: str, otherwise: _Listing | None = None) -> _Listing:
        """The files at `revision`; `otherwise` is returned where there is no such revision."""
        hub = _hub()
        api = hub.HfApi(endpoint=environment.hub_endpoint())
        try:
            info = self._asked(
                lambda: api.dataset_info(self._id, revision=revision, files_metadata=True, timeout=TIMEOUT_S),
                f"the list of its files at {revision}",
            )
        except _NoRevision:
            if otherwise:
                return otherwise
            raise LabError(f"hub://{self._id} has no revision {revision!r}: correct source.revision") from None
        files = {file.rfilename: file.size for file in info.siblings or ()}
        script = f"{self._id.rpartition('/')[2]}.py"
        sizes = {name: size or 0 for name, size in files.items() if name.endswith(".parquet")}
        declared = _declared((info.card_data or {}).get("configs"), sorted(sizes))
        return _Listing(revision, info.sha, sizes, script if script in files else "", declared)

    def _fetch(self, url: str, name: str, start: int, stop: int) -> bytes:
        """Bytes from `start` to before `stop`, all of them."""

        def ask() -> bytes:
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            answer = get_session().get(url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
            hf_raise_for_status(answer)
            content = answer.content if answer.status_code == 206 else answer.content[start:stop]
            if len(content) != stop - start:
                raise _CutShort(f"{len(content)} bytes instead of {stop - start}")
            return content

        return self._asked(ask, name)

    def _asked(self, ask: Callable[[], Any], what: str) -> Any:
        """What `ask` returns, asked again where it fails in passing. Raises LabError for a refusal."""
        for tried in range(1, TRIES + 1):
            try:
                return ask()
            except Exception as error:
                passing, wait_s = _passes(error), _wait_s(error, tried)
                if not passing:
                    raise self._refusal(error, what) from None
                told = _in_words(error)
            if tried < TRIES:
                logger.info(f"hub://{self._id}: {what}: {told}; trying again in {wait_s:g} s ({tried} of {TRIES - 1})")
                time.sleep(wait_s)
        raise LabError(
            f"hub://{self._id}: {what} could not be read from {environment.hub_host()} in {TRIES} tries, "
            f"the last ended with {told}: run this again later, what is done is kept"
        )

    def _refusal(self, error: Exception, what: str) -> Exception:
        """The line for what another try would not mend; other errors, which are ours, as they are."""
        from huggingface_hub import errors

        page = f"{environment.hub_endpoint()}/datasets/{self._id}"
        lines = {
            errors.GatedRepoError: f"is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account",
            errors.RepositoryNotFoundError: "does not exist, or is private: check owner/name, or set HF_TOKEN",
            errors.DisabledRepoError: "was disabled by the Hub: name another data set",
            errors.EntryNotFoundError: f"lost the file {what}: run this again",
            errors.OfflineModeIsEnabled: "cannot be asked for while HF_HUB_OFFLINE is set: unset it",
        }
        if isinstance(error, errors.RevisionNotFoundError):
            return _NoRevision()
        for kind, line in lines.items():
            if isinstance(error, kind):
                return LabError(f"hub://{self._id} {line}")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None and isinstance(error, ValueError):
            return LabError(f"hub://{self._id}: {what} came as no Hub writes it: check HF_ENDPOINT ({page})")
        if status is None:
            return error
        mend = "set HF_TOKEN to a valid token, or unset it" if status == 401 else "check the data set's page"
        return LabError(f"hub://{self._id}: the Hub refused {what} with status {status}: {mend}")


@dataclass(frozen=True)
class _Listing:
    revision: str
    commit: str
    sizes: dict[str, int]
    """Parquet file to its size in bytes."""
    script: str
    """The loading script, where there is one."""
    declared: Declared


def _declared(configs: Any, names: list[str]) -> Declared:
    """The `configs` of a card, with those of the files `names` that its patterns fit; whatever is odd in it is left."""
    found: dict[str, dict[str, list[str]]] = {}
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            patterns = _patterns(config.get("data_files"))
            files = {split: _fitting(names, of) for split, of in patterns.items()}
            name = str(config.get("config_name", "default"))
            found["" if name == "default" else name] = {split: of for split, of in files.items() if of}
    return {name: splits for name, splits in found.items() if splits}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split to patterns, of every form that the library datasets reads; without splits all is train."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    told: dict[str, list[str]] = {}
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, path = (item.get("split"), item.get("path")) if isinstance(item, dict) else ("train", item)
        paths = path if isinstance(path, list) else [path]
        told.setdefault(str(split), []).extend(one for one in paths if isinstance(one, str))
    return told


def _fitting(names: list[str], patterns: list[str]) -> list[str]:
    from fsspec.utils import glob_translate

    fits = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
    return [name for name in names if any(fit.match(name) for fit in fits)]


class _NoRevision(Exception):
    """The data set is there, the branch, tag or commit is not."""


class _CutShort(Exception):
    """An answer that ended well, with fewer bytes than were asked for."""


class RangeFile(io.RawIOBase):
    """A read-only file of `size` bytes behind `fetch(start, stop)`: one question for each read, nothing kept."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int):
        self._fetch, self._size, self._at = fetch, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        content = self._fetch(self._at, stop) if self._at < stop else b""
        self._at += len(content)
        return content


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise missing_package("huggingface_hub", "huggingface_hub>=1.27", "reading from the Hub") from None
    return huggingface_hub


def _passes(error: Exception) -> bool:
    """Whether another try may mend it: the server was busy or broken, or the connection was."""
    if isinstance(error, _CutShort | TimeoutError):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _PASSING
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)  # httpx or httpx2, as the client has


def _wait_s(error: Exception, tried: int) -> float:
    """What the server asks for (Retry-After, or `RateLimit: "api";r=0;t=55`), else WAIT_S doubled for each try.

    At most MAX_WAIT_S.
    """
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    asked = asked or re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return min(float(asked[1]) if asked else WAIT_S * 2 ** (tried - 1), MAX_WAIT_S)


def _in_words(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"status {status}" if status else str(error) if isinstance(error, _CutShort) else type(error).__name__
