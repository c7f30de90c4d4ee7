"""Groups of windows, and the words that two groups share."""

import numpy as np
import pytest

from pipelines.inference.windows.groups import EARLY_FRAMES, GROUP_FRAMES, Seams, groups
from pipelines.speech.audio import SAMPLE_RATE_HZ
from pipelines.speech.recordings.segmentation import Window
from tests.inference.windows.test_overlap import decoded, window

TEXTS = {0: "ett två", 10: "två tre fyra", 20: "fyra fem", 31: "sex", 40: "sex sju"}
"""What is written from each start: windows touch at 10, 20 and 40 s."""
ENDS = [10, 20, 30, 40, 50]


def parts_of(sizes: list[int]) -> list[str]:
    """Return the texts of the parts, decoded in groups of `sizes` windows."""
    windows = [window(start, end) for start, end in zip(TEXTS, ENDS, strict=True)]
    seams, texts, first = Seams(), [], 0
    for size in sizes:
        group = windows[first : first + size]
        following = windows[first + size] if first + size < len(windows) else None
        overlapped = seams.overlapped(group, following)
        assert [len(one.samples) // SAMPLE_RATE_HZ for one in overlapped] == [
            {0: 11, 10: 12, 20: 11, 31: 10, 40: 11}[one.start_s] for one in group
        ]
        parts = [[decoded(TEXTS[one.start_s], one.start_s)] for one in group]
        for shared in seams.share_words(group, parts, following, lambda part: []):
            texts += [part.accepted.hypothesis.text for part in shared]
        first += size
    return texts


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 3], [3, 2], [1, 4]])
def test_words_are_shared_across_groups_as_within(sizes):
    assert parts_of(sizes) == parts_of([5])


def test_early_groups_are_single_windows():
    windows = [Window(np.zeros(5 * SAMPLE_RATE_HZ, np.float32), 6.0 * n) for n in range(40)]
    assert [(len(group), following) for group, following in groups(windows, early=True)] == [
        (1, one) for one in [*windows[1:], None]
    ]
    sizes = [len(group) for group, _ in groups(windows, early=False)]
    assert sizes[0] == GROUP_FRAMES // 4 // EARLY_FRAMES and sum(sizes) == 40 and max(sizes) == 24
