"""Find the audio files of a folder; the same rules for features and transcription."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

AUDIO_SUFFIXES = (
    *(
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".aif",
        ".aiff",
        ".aifc",
        ".au",
        ".snd",
        ".caf",
        ".w64",
        ".rf64",
    ),
    *(".m4a", ".m4b", ".aac", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".webm", ".weba", ".mkv", ".mka", ".avi", ".flv"),
    *(".wma", ".wmv", ".asf", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".mp2", ".ac3", ".eac3", ".amr", ".spx", ".ogv"),
)
"""Suffixes of recordings. Those that libsndfile cannot read need ffmpeg: without it they are rejected with a reason."""
_COMPANIONS = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".parquet",
    ".xlsx",
    ".srt",
    ".vtt",
    ".md",
    ".lab",
    ".textgrid",
)
"""Suffixes of transcripts, tables and subtitles, which are expected beside recordings."""


@dataclass
class AudioFolder:
    """The result of `find_audio`."""

    files: list[Path] = field(default_factory=list)
    """Audio files, sorted."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason to the paths, relative to the folder, that were skipped for it."""

    def describe_skipped(self) -> str:
        """Return numbers, reasons and an example each; "" if nothing was skipped."""
        return "; ".join(f"{len(paths)} {reason} (such as {paths[0]})" for reason, paths in self.skipped.items())


def find_audio(folder: Path) -> AudioFolder:
    """Return the audio files in `folder` and its subfolders.

    Hidden files and folders are skipped, such as .ipynb_checkpoints and the ._ files of macOS; links to folders too.
    """
    result = AudioFolder()
    for parent, folders, names in os.walk(folder):
        directory = Path(parent)
        for name in [*folders]:
            reason = _reason_to_skip(directory / name)
            if reason:
                folders.remove(name)
                _skip(result, reason, (directory / name).relative_to(folder))
        for name in names:
            path = directory / name
            reason = "hidden" if name.startswith(".") else "" if path.is_file() else "not a file"
            if not reason and path.suffix.lower() in AUDIO_SUFFIXES:
                result.files.append(path)
            elif reason or path.suffix.lower() not in _COMPANIONS:
                _skip(
                    result, reason or f"not audio by its suffix {path.suffix.lower()}".strip(), path.relative_to(folder)
                )
    result.files.sort()
    return AudioFolder(result.files, {reason: sorted(paths) for reason, paths in sorted(result.skipped.items())})


def _reason_to_skip(folder: Path) -> str:
    return "hidden" if folder.name.startswith(".") else "a link to a folder" if folder.is_symlink() else ""


def _skip(result: AudioFolder, reason: str, path: Path) -> None:
    result.skipped.setdefault(reason, []).append(path.as_posix())
