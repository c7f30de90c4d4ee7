"""Data sets on the Hugging Face Hub, in Parquet: listed once, pinned to a commit, read in byte ranges, never stored.

    files = HubFiles("google/fleurs")       # main holds a loading script, so refs/convert/parquet is read
    files.open("sv_se/train/0000.parquet")  # random access: pyarrow requests the byte ranges that it needs

A request that fails for a temporary reason (429, 5xx, a lost connection, a response that is too short) is repeated, up
to TRIES times; any other error is one line. The server's own words are left out of messages: they may repeat a token.

`huggingface_hub.HfFileSystem` (2.4) was compared with `RangeFile` on a faulty server. It repeats 429 and lost
connections, and sends no token to another host. But it returns a short or a whole-file response as if it were the
requested range, quotes the server's words in errors, and lists the folder of each file again. So `RangeFile` stays.
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
from pipelines.infra.files import ReadOnlyFile
from pipelines.infra.stores import errors as store_errors

logger = logging.getLogger(__name__)

CONVERTED = "refs/convert/parquet"
"""Branch of the Parquet files that the Hub converts from other data sets."""
TRIES = 6
WAIT_S = 1.0
"""Wait before the second try; doubled for each further one."""
MAX_WAIT_S = 60.0
TIMEOUT_S = 30.0
"""A connection without data for this long counts as lost."""
_TEMPORARY = (408, 429, 500, 502, 503, 504)
_NAME = re.compile(r"(hub://)?(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")
DATASET_DEFAULTS = {"google/fleurs": {"text_column": "raw_transcription"}}
"""Settings of data sets with several text columns: FLEURS' `raw_transcription` has capitals and punctuation."""


@dataclass(frozen=True)
class HubFiles:
    """The Parquet files of a data set: `owner/name`, with `revision` or as `hub://owner/name@revision`."""

    dataset: str
    revision: str = ""

    @property
    def where(self) -> str:
        return f"hub://{self._id}@{self._listing.commit[:12]}"

    def identity(self) -> dict[str, str]:
        """Return the data set and the commit of its revision."""
        return {"kind": "hub", "dataset": self._id, "commit": self._listing.commit}

    def names(self) -> list[str]:
        return sorted(self._listing.sizes)

    def declared(self) -> Declared:
        """Return the `configs` of the data set's card: configuration to split to files."""
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
            logger.info(f"hub://{self._id} has no Parquet on main: reading {CONVERTED}")
            listing = self._list(CONVERTED, listing)
        if not listing.sizes:
            raise LabError(
                f"hub://{self._id} holds no Parquet at {named or f'main, nor at {CONVERTED}'}"
                + (f", but the loading script {listing.script}, which is not run" if listing.script else "")
                + (f": try source.revision = {CONVERTED!r}" if named else ": name another data set")
            )
        logger.info(f"hub://{self._id}: revision {listing.revision} is commit {listing.commit}")
        return listing

    def _list(self, revision: str, default: _Listing | None = None) -> _Listing:
        """List the files at `revision`; return `default` if there is no such revision."""
        hub = _hub()
        api = hub.HfApi(endpoint=environment.hub_endpoint())
        try:
            info = self._retry(
                lambda: api.dataset_info(self._id, revision=revision, files_metadata=True, timeout=TIMEOUT_S),
                f"the list of its files at {revision}",
            )
        except _NoRevision:
            if default:
                return default
            raise LabError(f"hub://{self._id} has no revision {revision!r}: correct source.revision") from None
        files = {file.rfilename: file.size for file in info.siblings or ()}
        script = f"{self._id.rpartition('/')[2]}.py"
        sizes = {name: size or 0 for name, size in files.items() if name.endswith(".parquet")}
        declared = _declared((info.card_data or {}).get("configs"), sorted(sizes))
        digests = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id or "" for one in info.siblings or ()}
        return _Listing(revision, info.sha, sizes, digests, script if script in files else "", declared)

    def _fetch(self, url: str, name: str, start: int, stop: int) -> bytes:
        """Read the bytes from `start` to before `stop`, all of them."""
        listing = self._listing

        def request() -> bytes:
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            response = get_session().get(url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
            hf_raise_for_status(response)
            _check_file(response, listing.sizes[name], listing.digests[name])
            content = response.content if response.status_code == 206 else response.content[start:stop]
            if len(content) != stop - start:
                raise _TooShort(f"{len(content)} bytes instead of {stop - start}")
            return content

        return self._retry(request, name)

    def _retry(self, request: Callable[[], Any], what: str) -> Any:
        """Return the result of `request`, repeated after temporary errors. Raises LabError for any other error."""
        for tries in range(1, TRIES + 1):
            try:
                return request()
            except Exception as error:
                if not _is_temporary(error):
                    raise self._explain(error, what) from None
                wait_s, cause = _wait_s(error, tries), _describe(error)
            if tries < TRIES:
                logger.info(f"hub://{self._id}: {what}: {cause}; trying again in {wait_s:g} s ({tries} of {TRIES - 1})")
                time.sleep(wait_s)
        raise LabError(
            f"hub://{self._id}: {what} could not be read from {environment.hub_host()} in {TRIES} tries, "
            f"the last ended with {cause}: run this again later, what is done is kept"
        )

    def _explain(self, error: Exception, what: str) -> Exception:
        """Return the error for a request that is not repeated; an error that is not the Hub's as it is."""
        from huggingface_hub import errors

        page = f"{environment.hub_endpoint()}/datasets/{self._id}"
        if isinstance(error, errors.RevisionNotFoundError):
            return _NoRevision()
        if isinstance(error, errors.EntryNotFoundError):
            return LabError(f"hub://{self._id} lost the file {what}: run this again")
        if explained := store_errors.explain_hub(error, f"hub://{self._id}", page):
            return explained
        if isinstance(error, ValueError):
            return LabError(f"hub://{self._id}: {what} is not a response of a Hub: check HF_ENDPOINT ({page})")
        return error


@dataclass(frozen=True)
class _Listing:
    revision: str
    commit: str
    sizes: dict[str, int]
    """Parquet file to its size in bytes."""
    digests: dict[str, str]
    """File to the digest that the Hub announces: sha256 (LFS, Xet) or git's sha1; empty if it announces none."""
    script: str
    """The loading script, or empty."""
    declared: Declared


def _declared(configs: Any, names: list[str]) -> Declared:
    """Match the `configs` of a card with the files `names`; malformed parts of the card are ignored."""
    declared: dict[str, dict[str, list[str]]] = {}
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            patterns = _patterns(config.get("data_files"))
            files = {split: _matches(names, of) for split, of in patterns.items()}
            name = str(config.get("config_name", "default"))
            declared["" if name == "default" else name] = {split: of for split, of in files.items() if of}
    return {name: splits for name, splits in declared.items() if splits}


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Return split to patterns, from any form that the library datasets reads; without splits all is train."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    patterns: dict[str, list[str]] = {}
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, path = (item.get("split"), item.get("path")) if isinstance(item, dict) else ("train", item)
        paths = path if isinstance(path, list) else [path]
        patterns.setdefault(str(split), []).extend(one for one in paths if isinstance(one, str))
    return patterns


def _matches(names: list[str], patterns: list[str]) -> list[str]:
    from fsspec.utils import glob_translate

    expressions = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
    return [name for name in names if any(expression.match(name) for expression in expressions)]


def _check_file(response: Any, size: int, digest: str) -> None:
    """Raise _TooShort if a response is of a file with another size or digest than listed.

    The Hub's own response names the digest; that of the storage to which it redirects names another one.
    """
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == 206 and total.isdigit() and int(total) != size:
        raise _TooShort(f"a file of {total} bytes instead of {size}")
    first = [*response.history, response][0]
    etag = (first.headers.get("X-Linked-Etag") or first.headers.get("ETag", "")).removeprefix("W/").strip('"')
    if digest and len(etag) == len(digest) and etag != digest:
        raise _TooShort("a file with another digest than listed")


class _NoRevision(Exception):
    """The data set exists, but not this branch, tag or commit."""


class _TooShort(Exception):
    """A successful response with fewer bytes than requested, or of another file."""


class RangeFile(ReadOnlyFile):
    """A read-only file of `size` bytes, read by `fetch(start, stop)`: one request per read, no buffer."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int):
        super().__init__(size)
        self._fetch = fetch

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._position + size, self._size)
        content = self._fetch(self._position, stop) if self._position < stop else b""
        self._position += len(content)
        return content


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise missing_package("huggingface_hub", "huggingface_hub>=1.27", "reading from the Hub") from None
    return huggingface_hub


def _is_temporary(error: Exception) -> bool:
    """Return True if the request may succeed later: the server is busy or failed, or the connection was lost."""
    if isinstance(error, _TooShort | TimeoutError):
        return True
    if (status := store_errors.status_of(error)) is not None:
        return status in _TEMPORARY
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)  # httpx or httpx2, as the client has


def _wait_s(error: Exception, tries: int) -> float:
    """Return the wait that the server requests (Retry-After, or `RateLimit: "api";r=0;t=55`), else WAIT_S doubled
    for each try; at most MAX_WAIT_S.
    """
    headers = getattr(getattr(error, "response", None), "headers", {})
    seconds = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", ""))
    seconds = seconds or re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return min(float(seconds[1]) if seconds else WAIT_S * 2 ** (tries - 1), MAX_WAIT_S)


def _describe(error: Exception) -> str:
    if status := store_errors.status_of(error):
        return f"status {status}"
    return str(error) if isinstance(error, _TooShort) else type(error).__name__
