"""Write the page of an archive: one HTML file with its style, script and transcripts, which loads recordings only."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pipelines.inference.archive.transcripts import Line, clean
from pipelines.infra import manifest
from pipelines.infra.errors import LabError

_MARK = '<meta name="generator" content="swedish-whisper-lab archive">'
_ESCAPED = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Entry:
    """A recording of the archive."""

    name: str
    audio: Path | None
    """None if it was not kept: then it cannot be played."""
    lines: list[Line] = field(default_factory=list)
    offset_s: float = 0.0
    """Start of a part in its recording."""
    problem: str = ""
    """Why there is no transcript, or what is missing in it."""


def check_target(path: Path) -> None:
    """Raise LabError unless a page can be written to `path`: a new file, or an earlier archive."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise LabError(f"the archive is a page: name a file that ends in .html, got {path}")
    if path.is_dir() or (path.exists() and _MARK.encode() not in path.read_bytes()[:2_000]):
        raise LabError(f"{path} exists and is no archive of this command: name another file")


def write(path: Path, entries: Iterable[Entry], language: str = "sv") -> None:
    """Write the page. Recordings are named relative to its folder, so that both can be moved together."""
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(path, render(entries, path.absolute().parent, language).encode("utf-8", "replace"))


def render(entries: Iterable[Entry], folder: Path, language: str = "sv") -> str:
    """Return the page for `folder`.

    Names and texts are data: the script adds them as text. A content security policy allows this script and this style
    only, and no network access but for recordings beside the page.
    """
    here = Path(__file__).parent
    style, script = (here.joinpath(f"page.{suffix}").read_text("utf-8") for suffix in ("css", "js"))
    data = {"language": language, "recordings": [_fields(entry, folder) for entry in entries]}
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; media-src 'self' file:"
    parts = {
        "POLICY": policy + "; base-uri 'none'; form-action 'none'",
        "MARK": _MARK,
        "STYLE": style,
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_ESCAPED),
        "SCRIPT": script,
    }
    first, *others = here.joinpath("page.html").read_text("utf-8").split("{{")
    pieces = [piece.split("}}", 1) for piece in others]
    return first + "".join(parts[name.strip()] + text for name, text in pieces)


def audio_address(audio: Path, folder: Path) -> str:
    """Return the address of a recording relative to the folder of the page, encoded byte by byte."""
    try:
        relative = os.path.relpath(audio.absolute(), folder)
    except ValueError:  # another drive on Windows
        return audio.absolute().as_uri()
    return "./" + urllib.parse.quote(os.fsencode(PurePath(relative).as_posix()))


def _fields(entry: Entry, folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": clean(_printable(entry.name)),
        "lines": [_line(line, entry) for line in entry.lines],
    }
    if entry.audio is not None:
        fields["audio"] = audio_address(entry.audio, folder)
    if entry.problem:
        fields["problem"] = clean(_printable(entry.problem))
    return fields


def _line(line: Line, entry: Entry) -> list[Any]:
    """Return start, text, speaker, starts of words after it, and confidences as digits; times in 1/100 s."""
    start = _hundredths(line.start_s + entry.offset_s)
    starts = [max(_hundredths(time + entry.offset_s) - start, 0) for time in line.starts_s]
    digits = "".join(str(min(max(int(10 * value), 0), 9)) for value in line.confidences)
    fields: list[Any] = [start, line.text, line.speaker, starts, digits]
    while fields[-1] in ("", []):
        fields.pop()
    return fields


def _hundredths(time_s: float) -> int:
    return round(100 * time_s) if math.isfinite(time_s) and time_s > 0 else 0


def _printable(name: str) -> str:
    """Return a file name whose bytes may not be UTF-8 as text."""
    return os.fsencode(name).decode("utf-8", "replace") if any("\ud800" <= c <= "\udfff" for c in name) else name


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
