"""Common Voice from Mozilla Data Collective: downloaded once by its own client, verified, then read as an archive.

    <cache folder>/mozilla/<dataset>/cv-corpus-….tar.gz          what was downloaded
                                     download.json               its size and sha256: written last, once they agree
                                     *.part, *.checksum          the client's, of a download that was cut: it goes on

You need an account, an API key in MDC_API_KEY (or in a `.env` file; on Colab: a secret of that name), and to have
agreed to the data set's terms on its page. With `download.json` in place neither key nor network are needed; remove
the folder to ask for a newer version. The client (datacollective 0.7) compares neither size nor checksum; here both
are.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock

from pipelines.features.sources import SPLITS, Example
from pipelines.features.sources.common_voice.release import CommonVoiceSource
from pipelines.infra import environment, manifest
from pipelines.infra.errors import LabError, missing_package

KEY = "MDC_API_KEY"
_PAGES = "https://mozilladatacollective.com"
_RECORD = "download.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class MozillaSource:
    """The data set `dataset` (id or slug), downloaded when it is first asked for anything; see CommonVoiceSource."""

    dataset: str
    language: str = "sv"
    pool: str = "train"
    seed: int = 7

    """Told once what each split holds."""

    def identity(self) -> dict[str, str]:
        """That of the archive: however it came here, the same release is the same corpus."""
        return self.corpus.identity()

    def examples(self, splits: tuple[str, ...] = SPLITS) -> Iterator[Example]:
        """The examples of these splits in the archive's order."""
        return self.corpus.examples(splits)

    def outline(self) -> Iterator[Example]:
        """The examples of all splits in the same order, without their audio."""
        return self.corpus.outline()

    @cached_property
    def corpus(self) -> CommonVoiceSource:
        """The archive."""
        return CommonVoiceSource(str(download(self.dataset)), self.language, self.pool, self.seed)


def download(dataset: str, folder: Path | None = None) -> Path:
    """The archive of a data set in `folder` (default: the lab's cache folder); a whole one is not fetched again.

    A download that was cut goes on where it was. Raises LabError, each in one line: package or key missing, key wrong,
    terms not agreed to, no such data set, disk full, download cut, size or checksum other than announced.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", dataset):
        raise LabError(f"source.dataset must be an id or slug such as cmqintw0q00xwnr07mjjzpe61, got {dataset[:60]!a}")
    folder = folder or environment.cache_folder() / "mozilla" / dataset
    return _at_hand(folder) or _fetched(_client(), dataset, folder)


def _fetched(client: ModuleType, dataset: str, folder: Path) -> Path:
    with _key() as key, _named(dataset, key):
        details = client.get_dataset_details(dataset)
        name = _bare_name(details.filename)
        folder.mkdir(parents=True, exist_ok=True)
        archive, part = folder / name, folder / f"{name}.part"
        size = int(details.sizeBytes or 0)
        with _only_downloader(folder):
            _mend_part(archive, part, size)
            _make_room(folder, archive, part, size)
            with contextlib.redirect_stdout(sys.stderr):  # its progress bar: standard output is for results
                client.download_dataset(dataset, str(folder))
            return _accept(archive, part, size, details.checksum)


def _only_downloader(folder: Path) -> filelock.FileLock:
    try:
        return filelock.FileLock(folder / ".lock", timeout=0).acquire()
    except filelock.Timeout:
        raise LabError(
            f"another process is downloading to {folder} right now: wait for it, then run this again"
        ) from None


def _at_hand(folder: Path) -> Path | None:
    """The archive that an earlier run verified, if it is still that file; one of another time is read to see to it."""
    try:
        record = json.loads((folder / _RECORD).read_text("utf-8"))
        archive = folder / record["file"]
        stat = archive.stat()
        same = stat.st_size == record["bytes"] and (
            stat.st_mtime_ns == record["mtime_ns"] or manifest.sha256(archive) == record["sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return archive if same else None


def _accept(archive: Path, part: Path, size: int, checksum: str | None) -> Path:
    """Compare size and checksum with what was announced, and note that they agree."""
    found = archive.stat().st_size
    if size and found < size:  # closed early without a word: keep it as the part that the client goes on from
        os.replace(archive, part)
        if checksum:
            archive.with_name(f"{archive.name}.checksum").write_text(checksum)
        raise LabError(_cut(archive.name, f"{found}", f"{size} bytes", bool(checksum)))
    sha256, announced = manifest.sha256(archive), (checksum or "").lower().removeprefix("sha256:")
    comparable = bool(re.fullmatch(r"[0-9a-f]{64}", announced))
    if (size and found != size) or (comparable and sha256 != announced):
        archive.unlink()
        what = f"sha256 {announced[:12]}…, got {sha256[:12]}…" if comparable else f"{size} bytes, got {found}"
        raise LabError(f"{archive.name} must have {what}: it was removed, run the same command again")
    record = {"file": archive.name, "bytes": found, "sha256": sha256, "mtime_ns": archive.stat().st_mtime_ns}
    manifest.write_json(archive.with_name(_RECORD), {**record, "checksum_compared": comparable})
    return archive


def _mend_part(archive: Path, part: Path, size: int) -> None:
    """Take what the client would stumble over: a part that is complete already, or larger than the whole."""
    if part.is_file() and not archive.exists() and 0 < size <= part.stat().st_size:
        os.replace(part, archive)  # the size and the checksum are compared next


def _make_room(folder: Path, archive: Path, part: Path, size: int) -> None:
    there = sum(path.stat().st_size for path in (archive, part) if path.is_file())
    free = shutil.disk_usage(folder).free
    if size - there > free:
        raise LabError(_no_room(archive.name, size - there, free))


@contextlib.contextmanager
def _key() -> Iterator[str]:
    """The API key, in the environment for as long as the client needs it there."""
    before = os.environ.get(KEY)
    key = (before or _colab_secret() or "").strip()
    if not key:
        raise LabError(
            f"Mozilla Data Collective needs an API key in {KEY} (on Colab: a secret of that name that this notebook "
            f"may read), got none: make one at {_PAGES}/api-reference"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise LabError(f"{KEY} must be one word of ASCII letters, got blanks or other letters in it: copy it again")
    os.environ[KEY] = key
    try:
        yield key
    finally:
        os.environ.pop(KEY, None)
        if before is not None:
            os.environ[KEY] = before


def _colab_secret() -> str | None:
    if environment.host() != "colab":
        return None
    try:
        from google.colab import userdata  # exists on Colab alone

        return userdata.get(KEY)
    except Exception:  # no such secret, no permission, no browser: Colab has an exception for each
        return None


def _client() -> ModuleType:
    try:
        import datacollective
    except ImportError:
        raise missing_package("datacollective", "datacollective>=0.6.4", "source.kind = 'mozilla'") from None
    return datacollective


@contextlib.contextmanager
def _named(dataset: str, key: str) -> Iterator[None]:
    """Turn what the client raises into one line. Its own words stay out: they can hold signed addresses."""
    from datacollective.errors import DownloadError

    try:
        yield
    except DownloadError as error:
        raise _broken(error) from None
    except (OSError, RuntimeError, ValueError, ArithmeticError, TypeError, AttributeError) as error:
        raise LabError(_in_one_line(error, dataset, key)) from None


def _broken(error: Any) -> BaseException:
    """The LabError for a download that ended early, by its cause; the key that was pressed, where it was that."""
    cause, there, whole = error.__cause__, error.total_downloaded_bytes, error.total_archive_bytes
    if isinstance(cause, KeyboardInterrupt):
        return KeyboardInterrupt()
    if isinstance(cause, OSError) and cause.errno in _FULL:
        return LabError(f"{_disk(cause)} (at {there} of {whole})")
    return LabError(_cut("the archive", there, whole, bool(error.checksum), f" ({type(cause).__name__})"))


def _in_one_line(error: Exception, dataset: str, key: str) -> str:
    import requests
    from datacollective.errors import AuthenticationError, RateLimitError

    page = f"{_PAGES}/datasets/{dataset}"
    if isinstance(error, requests.RequestException):
        return _answered(error, page)
    if isinstance(error, OSError) and error.errno is not None:  # the client's own have no number
        return _disk(error)
    if isinstance(error, AuthenticationError):
        return (
            f"Mozilla Data Collective must accept the key in {KEY}, got 401 (wrong, expired or revoked): "
            f"make a new one at {_PAGES}/api-reference"
        )
    if isinstance(error, RateLimitError):
        return "Mozilla Data Collective says: too many requests (429). Wait some minutes, run the same command again"
    if isinstance(error, FileNotFoundError):
        return f"source.dataset must be at Mozilla Data Collective, got {dataset!r}: there is no {page}. Correct it"
    if isinstance(error, PermissionError):
        return (
            f"Mozilla Data Collective refuses this data set to this key (403): agree to its terms at {page}, "
            f"then run the same command again{_reason(error, key)}"
        )
    return (
        f"Mozilla Data Collective must answer as datacollective 0.7 knows it, got {type(error).__name__}: "
        "run: pip install -U datacollective"
    )


def _answered(error: Any, page: str) -> str:
    if error.response is None:
        return f"Mozilla Data Collective must answer, got {type(error).__name__}: check the network, run it again"
    status = error.response.status_code
    does = "it has to be bought there" if status == 402 else "run the same command again later"
    return f"Mozilla Data Collective must hand out {page}, got HTTP {status}: {does}"


def _disk(error: OSError) -> str:
    where = environment.cache_folder()
    if error.errno in _FULL:
        return f"the disk of {where} is full: make room, run the same command again"
    return f"the download must be written below {where}, got: {error.strerror}. Set LAB_CACHE to another folder"


def _reason(error: Exception, key: str) -> str:
    """What the server said, in parentheses: the words behind the client's dash, without addresses and key."""
    said = str(error).partition(" — ")[2].replace(key, "…")
    said = re.sub(r"\S*://\S*", "…", " ".join(said.split()))[:200]
    return f" (it says: {said})" if said else ""


def _cut(name: str, there: str, whole: str, resumable: bool, why: str = "") -> str:
    goes = "goes on from there" if resumable else "starts over"
    return f"the download of {name} was cut at {there} of {whole}{why}: run the same command again, it {goes}"


def _no_room(name: str, needed: int, free: int) -> str:
    return (
        f"{name} needs {needed / 1e9:.2f} GB in {environment.cache_folder()}, which has {free / 1e9:.2f} GB free: "
        "make room, or set LAB_CACHE to a folder on a larger disk"
    )


def _bare_name(name: str | None) -> str:
    """The archive's file name, if it is nothing else: the client would follow a path out of the folder."""
    if not name or name in (_RECORD,) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,200}", name):
        raise LabError(
            f"Mozilla Data Collective must name an archive, got {str(name)[:80]!a}: "
            "check source.dataset, it must be a Common Voice data set"
        )
    return name
