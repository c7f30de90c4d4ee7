"""Groups of windows that are decoded together, and the words that two groups share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipelines.inference.windows import overlap
from pipelines.inference.windows.decoding import Decoded
from pipelines.inference.windows.overlap import FindStarts
from pipelines.speech.recordings.segmentation import Window
from pipelines.whisper.log_mel import HOP_SAMPLES

GROUP_FRAMES, EARLY_FRAMES = 12_000, 500
"""Windows are collected up to two minutes of speech, so that batches contain windows of similar length; up to five
seconds if each text is wanted as soon as possible."""


class Seams:
    """The overlaps of a recording whose windows are decoded in groups: the last window waits for the next group."""

    def __init__(self) -> None:
        self._last: list[Window] = []
        """The last window of the previous group if the next one continues its speech; else nothing."""
        self._parts: list[list[Decoded]] = []
        """The decoded parts of `_last`, which still share their words."""

    def overlapped(self, windows: Sequence[Window], following: Window | None) -> list[Window]:
        """Return the next group of windows with the overlaps in which they are decoded."""
        after = [] if following is None else [following]
        return overlap.overlapped([*self._last, *windows, *after])[len(self._last) : len(self._last) + len(windows)]

    def share_words(
        self, windows: Sequence[Window], decoded: list[list[Decoded]], following: Window | None, find_starts: FindStarts
    ) -> list[list[Decoded]]:
        """Return the parts up to this group whose words are final, in order."""
        shared = overlap.share_words([*self._last, *windows], [*self._parts, *decoded], find_starts)
        n_last = int(following is not None and overlap.touch(windows[-1], following))
        n_final = len(shared) - n_last
        self._last, self._parts = list(windows[-1:])[:n_last], shared[n_final:]
        return shared[:n_final]


def groups(windows: Iterable[Window], early: bool) -> Iterator[tuple[list[Window], Window | None]]:
    """Yield groups of windows, each with the window that follows it.

    The first group is a quarter of the others, so that a result appears soon. `early` makes all of them small.
    """
    largest = EARLY_FRAMES if early else GROUP_FRAMES
    group: list[Window] = []
    n_frames, limit = 0, largest // 4
    for window in windows:
        if n_frames >= limit and group:
            yield group, window
            group, n_frames, limit = [], 0, largest
        group.append(window)
        n_frames += len(window.samples) // HOP_SAMPLES
    if group:
        yield group, None
