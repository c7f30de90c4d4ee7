"""Show how far recordings are aligned. Worker processes append to the journals of windows, so these are read for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipelines.features.sources import journal as journals
from pipelines.infra import console, progress_file


@contextlib.contextmanager
def show(what: str, recordings: Sequence[Path], journal_of: Callable[[Path], Path]) -> Iterator[Callable[[], object]]:
    """Yield a function to call when a recording is finished; show these, and the time up to which others are decoded.

    `what` names the task in a progress file, which gets a line every few seconds if its text changes.
    """
    paths = {path: journal_of(path) for path in recordings}
    stop = threading.Event()

    def watch() -> None:
        last = ""
        while not stop.wait(progress_file.INTERVAL_S):
            line = f"{what}: {bar.n}/{len(paths)} recordings{_decoding(paths)}"
            if line != last:
                progress_file.append(last := line)

    with console.progress_bar(desc=what, total=len(paths), unit="recording") as bar:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield bar.update
        finally:
            stop.set()
            thread.join()


def _decoding(paths: dict[Path, Path]) -> str:
    """Return the names and times of recordings whose windows are being decoded."""
    ends_s = {path.name: journals.decoded_s(journal) for path, journal in paths.items()}
    return "".join(f", {name} decoded to {_clock(end_s)}" for name, end_s in ends_s.items() if end_s)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
