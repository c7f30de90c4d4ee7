"""Join a share of the training clips to windows of 30 s, the input that Whisper gets from a long recording.

A model that is tuned only on clips at their own length forgets how to transcribe an input of 30 s, which other tools
give it for every clip. So in every epoch a random share of the clips is joined, one after another, up to 30 s or to a
random number, and trained on at full context. As in Whisper's training (Radford et al. 2022, section 2.3), labels and
inputs of a window depend on chance:

- the transcripts are joined with spaces, or each is put between Whisper's timestamps. With `fill="random"`, a clip that
  the end of a window with timestamps cuts has only its start, so that a transcriber knows where to go on;
- the text of the window before is the prompt, or there is none.

Clips that were cut from long recordings are joined in their true order (training/data/recordings.py), all others at
random.

The cache stores log-mels and no waveforms, so log-mels are joined. They equal those of the joined recordings, each
padded with silence to whole frames, except for the frames whose 25 ms cross a border: the last of a clip and the first
two of the next. The extractor's clamp, 80 dB below the loudest frame, is applied again to the whole window. That is
exact, because no clip's clamp was higher.

docs/benchmarks.md has the effect on the tour, here and in other tools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.features.clips import MAX_LABEL_TOKENS
from pipelines.training.data.bpe_dropout import MergeDropout
from pipelines.whisper.batching import IGNORED, BucketSampler, ClipDataset, Collator, bucketed
from pipelines.whisper.log_mel import FULL_FRAMES, LogMel, pad_value
from pipelines.whisper.tokens import Labeller, labeller, prompt_ids

if TYPE_CHECKING:
    import torch
    from transformers import WhisperProcessor

    from pipelines.recipes.training_settings import TrainingSettings


FRAMES_PER_TIMESTAMP = 2
"""Timestamp tokens are 20 ms apart, frames 10 ms."""
_STREAM = 30
"""Part of the seed, so that this draw differs from that of the buckets, which have the same seed and epoch."""
_MEAN_RANDOM_FILL = 0.5
"""Mean share of 30 s that windows of random size hold."""
_MIN_CUT_FRAMES = 20
"""Shortest beginning of a clip that is cut at the end of a window."""


@dataclass(frozen=True)
class Window:
    """Clips that are joined to one input of 30 s, as the sampler draws them."""

    clips: Sequence[Any]
    timestamps: bool = False
    """Whether the labels have timestamps."""
    before: Sequence[Any] = ()
    """Clips whose text is the prompt: those of the window before, or what precedes in the recording."""


@dataclass(frozen=True)
class WindowOptions:
    """How windows are made; the fields are described in recipes.training_settings.TrainingSettings."""

    share: float
    fill: str = "full"
    timestamps: float = 0.0
    prompt: float = 0.0

    @classmethod
    def of(cls, settings: TrainingSettings) -> WindowOptions:
        return cls(settings.window_share, settings.window_fill, settings.window_timestamps, settings.window_prompt)


class WindowSampler(BucketSampler):
    """Sampler of batches of clips and batches of windows in random order.

    `options.share` of the clips goes into windows of about 30 s, or with `fill="random"` of one clip to about 30 s,
    15 s on average. Clips beyond 30 s are left out (see WindowCollator). A batch of windows has at most as many frames
    as one of clips has on average, and at least one window. Only seed and epoch decide the draw, and every epoch
    has the same number of batches. With `with_epoch`, clips are (epoch, index) as in EpochSampler.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        bucket_batches: int,
        seed: int,
        *,
        options: WindowOptions,
        with_epoch: bool = False,
    ):
        super().__init__(lengths, batch_size, bucket_batches, seed)
        windows_per_clip = lengths.mean() / FULL_FRAMES
        self.options, self.with_epoch = options, with_epoch
        self.n_joined = max(1, round(options.share * len(lengths)))
        fill = _MEAN_RANDOM_FILL if options.fill == "random" else 1
        self.n_windows = min(self.n_joined, max(1, round(self.n_joined * windows_per_clip / fill)))
        self.windows_per_batch = max(1, int(batch_size * windows_per_clip))

    def __len__(self) -> int:
        n_single = len(self.lengths) - self.n_joined
        return -(-n_single // self.batch_size) + -(-self.n_windows // self.windows_per_batch)

    def __iter__(self) -> Iterator[list[Any]]:
        epoch, size = self.epoch, self.windows_per_batch
        rng = np.random.default_rng([self.seed, epoch, _STREAM])
        windows, single = self._draw(epoch, rng)
        buckets = bucketed(self.lengths[single], self.batch_size, self.bucket_batches, self.seed, epoch)
        batches: list[list[Any]] = [self._clips(single[bucket], epoch) for bucket in buckets]
        batches += [windows[start : start + size] for start in range(0, len(windows), size)]
        yield from (batches[i] for i in rng.permutation(len(batches)))

    def _draw(self, epoch: int, rng: np.random.Generator) -> tuple[list[Window], np.ndarray]:
        """Return the windows of an epoch, and the clips that are in none."""
        joined, single = np.split(rng.permutation(len(self.lengths)), [self.n_joined])
        parts, timestamps, prompt = self._cut(joined, epoch)
        clips = [self._clips(part, epoch) for part in parts]
        before = [clips[i - 1] if prompt[i] else () for i in range(len(clips))]
        return [*map(Window, clips, timestamps, before)], single

    def _cut(self, joined: np.ndarray, epoch: int) -> tuple[list[np.ndarray], list[bool], list[bool]]:
        """Return the parts of `joined` that become windows, and whether each has timestamps and a prompt.

        Their random numbers are not those of the batches' order.
        """
        rng = np.random.default_rng([self.seed, epoch, _STREAM, 1])
        parts = np.array_split(joined, self.n_windows)
        if self.options.fill == "random":
            parts = np.split(joined, _random_cuts(len(joined), self.n_windows, rng))
        probabilities = self.options.timestamps, self.options.prompt
        timestamps, prompt = ((rng.random(len(parts)) < one).tolist() for one in probabilities)
        return parts, timestamps, prompt

    def _clips(self, indices: np.ndarray, epoch: int) -> list[Any]:
        return [(epoch, index) if self.with_epoch else index for index in indices.tolist()]


def _random_cuts(n_clips: int, n_windows: int, rng: np.random.Generator) -> np.ndarray:
    """Return where `n_clips` are cut into `n_windows` of random sizes, at least one clip each."""
    weights = np.cumsum(rng.random(n_windows))
    return (np.arange(n_windows) + 1 + np.floor(weights / weights[-1] * (n_clips - n_windows)).astype(int))[:-1]


class WindowClips:
    """Data set that returns a clip for an index, and the window of clips for a window of indices."""

    def __init__(self, clips: ClipDataset):
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: Any) -> Any:
        if not isinstance(item, Window):
            return self.clips[item]
        clips, before = ([self.clips[clip] for clip in part] for part in (item.clips, item.before))
        return Window(clips, item.timestamps, before)


class WindowCollator:
    """Collator of clips (with the collator `clips`) and of windows (at full context).

    A window has the first of its clips, as many as fit into 30 s and into the decoder. A batch of windows with prompts
    also has `decoder_input_ids` int64 [B, L]; the labels of prompts are IGNORED. With `merges` to drop, the clips of
    windows are (epoch, row), and the first one decides a window's draw.
    """

    def __init__(
        self,
        clips: Collator,
        processor: WhisperProcessor,
        language: str,
        merges: MergeDropout | None = None,
        *,
        cut_last: bool = False,
    ):
        self.clips, self.labeller, self.merges, self.cut_last = clips, labeller(processor, language), merges, cut_last
        self.transcripts = clips.cache.rows["text"].to_numpy()
        self.start = prompt_ids(processor, language)[0]
        self.pad = self.labeller.suffix[0]
        self.previous = processor.tokenizer.convert_tokens_to_ids("<|startofprev|>")

    def __call__(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        if not isinstance(batch[0], Window):
            return self.clips(batch)
        log_mels, labels = zip(*map(self.window, batch))
        prompts = [self.prompt(window, len(ids)) for window, ids in zip(batch, labels)]
        masked = [[IGNORED] * len(prompt) + ids for prompt, ids in zip(prompts, labels)]
        collated = self.clips.collate(log_mels, masked, full_context=True)
        if any(prompts):
            inputs = [[*prompt, self.start, *ids[:-1]] for prompt, ids in zip(prompts, labels)]
            collated["decoder_input_ids"] = padded(inputs, self.pad)
        return collated

    def window(self, window: Window) -> tuple[LogMel, list[int]]:
        """Return the joined log-mel and labels of a window whose clips are rows or (epoch, row)."""
        log_mels, transcripts = [self.clips.log_mel(clip) for clip in window.clips], self._transcripts(window.clips)
        lengths = [len(log_mel.frames) for log_mel in log_mels]
        count = count_within_30_s(lengths)
        while len(labels := self._label(window, transcripts[:count], lengths)) > MAX_LABEL_TOKENS and count > 1:
            count -= 1
        rest = FULL_FRAMES - sum(lengths[:count])
        if window.timestamps and self.cut_last and count < len(lengths) and _MIN_CUT_FRAMES <= rest < lengths[count]:
            start = self.labeller.prefix[-1] + 1 + (FULL_FRAMES - rest) // FRAMES_PER_TIMESTAMP
            labels = [*labels[:-1], start, labels[-1]]
            cut = LogMel(log_mels[count].frames[:rest], log_mels[count].pad_value)
            return join([*log_mels[:count], cut]), labels[:MAX_LABEL_TOKENS]
        return join(log_mels[:count]), labels[:MAX_LABEL_TOKENS]

    def prompt(self, window: Window, n_labels: int) -> list[int]:
        """Return the prompt's tokens: those of `window.before`, as many as the decoder takes beside `n_labels`."""
        text = " ".join(filter(None, self._transcripts(window.before)))
        room = min(MAX_LABEL_TOKENS // 2 - 1, MAX_LABEL_TOKENS - 1 - n_labels)
        if not text or room < 1:
            return []
        ids = self.labeller.tokenizer.encode(f" {text}", add_special_tokens=False).ids
        return [self.previous, *ids[-room:]]

    def _transcripts(self, clips: Sequence[Any]) -> list[str]:
        return [self.transcripts[clip[1] if isinstance(clip, tuple) else clip] for clip in clips]

    def _label(self, window: Window, transcripts: Sequence[str], lengths: Sequence[int]) -> list[int]:
        labels = self._written(window, transcripts, lengths, self.merges)
        is_too_long = len(transcripts) == 1 and len(labels) > MAX_LABEL_TOKENS
        return self._written(window, transcripts, lengths, None) if self.merges and is_too_long else labels

    def _written(
        self, window: Window, transcripts: Sequence[str], lengths: Sequence[int], merges: MergeDropout | None
    ) -> list[int]:
        write = merges.labeller_for(*window.clips[0]) if merges else self.labeller
        if window.timestamps:
            return labels_with_timestamps(write, transcripts, lengths)
        return write(" ".join(filter(None, transcripts)))


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return int64 [B, L]: each row, then `value`."""
    import torch

    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def count_within_30_s(lengths: Sequence[int]) -> int:
    """Return how many of the first clips, of `lengths` in frames, fit into 30 s; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(lengths), FULL_FRAMES, side="right")))


def join(log_mels: Sequence[LogMel]) -> LogMel:
    """Return the log-mel of clips in a row, a float32 copy; see the module for its accuracy."""
    frames = np.concatenate([log_mel.frames for log_mel in log_mels]).astype(np.float32)
    floor = pad_value(frames)
    return LogMel(np.maximum(frames, np.float32(floor)), floor)


def labels_with_timestamps(labeller: Labeller, transcripts: Sequence[str], lengths: Sequence[int]) -> list[int]:
    """Return the label ids of clips of `lengths` frames in a row, with timestamps.

    They are language, task, each transcript between the times of its start and end, end of text. As in Whisper's
    training, a space precedes each transcript.
    """
    *ids, no_timestamps = labeller.prefix
    zero, start = no_timestamps + 1, 0  # <|0.00|>, and one token more for each 20 ms
    for transcript, length in zip(transcripts, lengths):
        if transcript:  # empty: a clip without speech
            body = labeller.tokenizer.encode(f" {transcript}", add_special_tokens=False).ids
            ids += [zero + start // FRAMES_PER_TIMESTAMP, *body, zero + (start + length) // FRAMES_PER_TIMESTAMP]
        start += length
    return [*ids, *labeller.suffix]
