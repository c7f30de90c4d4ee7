"""A share of the training clips joined to windows of 30 s, which is what Whisper hears of a long recording.

A model that is tuned on clips alone, at their length, unlearns to fill a whole window. So a share of the clips of every
epoch, drawn anew, is joined, one clip after another, up to 30 s and heard in the full 30 s context. Their transcripts
are joined with spaces, or each stands between Whisper's timestamps.

The cache keeps log-mels and no waveforms, so it is log-mels that are joined. That is what the extractor makes of the
joined recordings, each padded with silence to whole frames, but for the frames whose 25 ms reach over a border: the
last of a clip and the first two of the next. The extractor's clamp, 80 dB below the loudest frame, is laid over the
whole window anew, which is exact: no clip's own clamp was higher.

What it does to the tour (whisper-tiny, 200 steps, one run each; normalised WER on the test split, 95 % intervals over
16 speakers; windows are one speaker's clips, 20 s on average; benchmarks/windows.py):

    window_share    single clips              windows
    0               0.250 (0.211 to 0.292)    0.820 (0.721 to 0.900)
    0.2             0.239 (0.197 to 0.282)    0.234 (0.191 to 0.283)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.features.clips import MAX_LABEL_TOKENS
from pipelines.whisper.batching import BucketSampler, ClipDataset, Collator, bucketed
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel, pad_value
from pipelines.whisper.tokens import Labeller, labeller

if TYPE_CHECKING:
    import torch
    from transformers import WhisperProcessor


FRAMES_PER_TIMESTAMP = 2
"""Timestamp tokens are 20 ms apart, frames 10 ms."""
_STREAM = 30
"""Sets this draw apart from that of the buckets, which have the same seed and epoch."""


class WindowSampler(BucketSampler):
    """Batches of clips, and batches of windows, each window a list of clips; in random order.

    `share` of the clips is dealt to windows of some 30 s; what goes beyond 30 s is left to a later epoch (see
    WindowCollator). A batch of windows holds about as much speech as one of clips, and one window at the least.
    Seed and epoch alone decide the draw, and every epoch has the same number of batches. With `drawn`, clips are
    (epoch, index), as augmentation.DrawnSampler has them.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, bucket_batches: int, seed: int, *, share: float, drawn: bool = False
    ):
        super().__init__(lengths, batch_size, bucket_batches, seed)
        windows_per_clip = lengths.mean() / FULL_FRAMES
        self.drawn = drawn
        self.n_joined = max(1, round(share * len(lengths)))
        self.n_windows = max(1, round(self.n_joined * windows_per_clip))
        self.windows_per_batch = max(1, int(batch_size * windows_per_clip))

    def __len__(self) -> int:
        apart = len(self.lengths) - self.n_joined
        return -(-apart // self.batch_size) + -(-self.n_windows // self.windows_per_batch)

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, size = self.epoch, self.windows_per_batch
        rng = np.random.default_rng([self.seed, epoch, _STREAM])
        joined, apart = np.split(rng.permutation(len(self.lengths)), [self.n_joined])
        buckets = bucketed(self.lengths[apart], self.batch_size, self.bucket_batches, self.seed, epoch)
        batches = [self._told(apart[bucket], epoch) for bucket in buckets]
        windows = [self._told(window, epoch) for window in np.array_split(joined, self.n_windows)]
        batches += [windows[at : at + size] for at in range(0, len(windows), size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))

    def _told(self, indices: np.ndarray, epoch: int) -> list[Any]:
        return [(epoch, index) if self.drawn else index for index in indices.tolist()]


class WindowClips:
    """The clips of a data set, and a list of them for a window."""

    def __init__(self, clips: ClipDataset):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, told: Any) -> Any:
        return [self.clips[clip] for clip in told] if isinstance(told, list) else self.clips[told]


class WindowCollator:
    """What `clips` makes of a batch of clips, and of a batch of windows the same at full context.

    A window holds as many of its clips as fit into 30 s and into the decoder, from the first on.
    """

    def __init__(self, clips: Collator, processor: WhisperProcessor, language: str, *, timestamps: bool = False):
        self.clips, self.labeller, self.timestamps = clips, labeller(processor, language), timestamps
        self.transcripts = clips.cache.rows["text"].to_numpy()

    def __call__(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        if not isinstance(batch[0], list):
            return self.clips(batch)
        log_mels, labels = zip(*map(self.window, batch))
        return self.clips.collate(log_mels, labels, full_context=True)

    def window(self, clips: list[Any]) -> tuple[LogMel, list[int]]:
        """The log-mel and the labels of clips joined: rows, or (epoch, row)."""
        log_mels = [self.clips.log_mel(clip) for clip in clips]
        transcripts = [self.transcripts[clip[1] if isinstance(clip, tuple) else clip] for clip in clips]
        lengths = [len(log_mel.frames) for log_mel in log_mels]
        count = fitting(lengths)
        while len(labels := self._label(transcripts[:count], lengths)) > MAX_LABEL_TOKENS and count > 1:
            count -= 1
        return join(log_mels[:count]), labels[:MAX_LABEL_TOKENS]

    def _label(self, transcripts: Sequence[str], lengths: Sequence[int]) -> list[int]:
        if self.timestamps:
            return labels_with_timestamps(self.labeller, transcripts, lengths)
        return self.labeller(" ".join(transcripts))


def fitting(lengths: Sequence[int]) -> int:
    """How many clips of these lengths (frames), from the first on, fit into 30 s; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(lengths), FULL_FRAMES, side="right")))


def join(log_mels: Sequence[LogMel]) -> LogMel:
    """One log-mel of clips that follow one another; float32 frames of its own. See the module for how exact it is."""
    frames = np.concatenate([log_mel.frames for log_mel in log_mels]).astype(np.float32)
    floor = pad_value(frames)
    return LogMel(np.maximum(frames, np.float32(floor)), floor)


def labels_with_timestamps(labeller: Labeller, transcripts: Sequence[str], lengths: Sequence[int]) -> list[int]:
    """What the decoder is to produce for clips of `lengths` frames in a row: language, task, then each transcript
    between the times of its start and its end, end. As Whisper was trained, a space goes before each transcript."""
    *ids, no_timestamps = labeller.before
    zero, start = no_timestamps + 1, 0  # <|0.00|>, and one token more for each 20 ms
    for transcript, length in zip(transcripts, lengths):
        body = labeller.tokenizer.encode(f" {transcript}", add_special_tokens=False).ids
        ids += [zero + start // FRAMES_PER_TIMESTAMP, *body, zero + (start + length) // FRAMES_PER_TIMESTAMP]
        start += length
    return [*ids, *labeller.after]
