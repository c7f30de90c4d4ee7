"""The exceptions for errors that a user can cause or fix."""

import errno
import re
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = (f"os error {errno.ENOSPC}", "No space left on device", "Disk quota exceeded")
_MIN_FREE_BYTES = 1_000_000
"""A disk with less free space counts as full."""
MAX_CHARACTERS, MAX_WORD = 2_000, 400
"""Most characters of an error, and of what it quotes without a space, such as an address."""
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")
UNFINISHED = 75
"""Exit code of an interrupted command that continues when it is run again: EX_TEMPFAIL of sysexits.h."""


def shortened(line: str, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a line without the middle of what is too long: it may quote somebody else's text, and ends with a remedy.

    Words have at most MAX_WORD characters, the line has `max_characters`.
    """
    if len(line) > MAX_WORD:
        line = _LONG_WORD.sub(lambda word: _without_middle(word[0], MAX_WORD), line)
    return _without_middle(line, max_characters)


def _without_middle(text: str, max_characters: int) -> str:
    if len(text) <= max_characters:
        return text
    note = f" ... ({len(text):,} characters) ... "
    n_last = max_characters // 4
    return f"{text[: max_characters - n_last - len(note)]}{note}{text[-n_last:]}"


class LabError(Exception):
    """An error as one line: what was expected, what was received, and what to do next.

    Commands print it without a traceback, and so do notebooks (console.show_errors_in_one_line).
    """

    def __str__(self) -> str:
        return shortened(super().__str__())


def missing_package(package: str, install: str, why: str) -> LabError:
    """Return the error for an optional package that is not installed.

    `install` is the exact requirement for pip; `why` names the feature that needs it.
    """
    return LabError(f"{why} needs the package {package}, which is not installed. Run: pip install '{install}'")


class Unfinished(LabError):
    """A run was interrupted: nothing is lost, and the same call continues it.

    Commands exit with the code UNFINISHED, so that a batch system can distinguish this from an error and restart them.
    """


def is_disk_full(error: BaseException, *folders: Path) -> bool:
    """Return True if a full disk, or a quota, caused the error.

    safetensors and pyarrow say so in their message only, and torch not at all: for other errors than those of Python,
    True if no space is left in one of `folders`.
    """
    while error is not None:
        text = str(error)[:10_000]
        if getattr(error, "errno", None) in _FULL or any(words in text for words in _FULL_TEXTS):
            return True
        if isinstance(error, RuntimeError) and any(_free_bytes(folder) < _MIN_FREE_BYTES for folder in folders):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_bytes(folder: Path) -> int:
    """Return the free space of the disk that a folder is on, or will be on."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
