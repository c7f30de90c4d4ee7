"""Exercise 1: frames, mel filters, log-mel, padding, labels, leaks, faults in a corpus."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.course.exercise import Exercise, Task, array, call, is_close, number, require
from pipelines.course.exercises import listening
from pipelines.features.curation.leaks import HeldOut
from pipelines.whisper import log_mel as log_mels

END = 50257
"""Whisper's end token, which its tokenizer also uses for padding."""
IGNORED = -100


def check_n_frames(n_frames: Any) -> None:
    """Check the number of frames of a duration in seconds."""
    for duration_s, expected in ((30.0, 3000), (2.0, 200), (0.5, 50), (0.015, 1)):
        result = number(n_frames, duration_s)
        require(
            result != 16_000 * duration_s, "This is the number of samples. One frame stands for a hop of 160 samples."
        )
        require(
            10 * result != expected,
            f"{result:g} frames for {duration_s} s are too few: a hop of 160 samples is 10 ms at 16 kHz.",
        )
        require(result.is_integer(), f"{duration_s} s gives {result:g}. Whole frames only: round down.")
        require(result == expected, f"Expected {expected} frames for {duration_s} s, got {result:g}.")


def check_hz_to_mel(hz_to_mel: Any) -> None:
    """Check Slaney's mel scale."""
    for hz in (0.0, 440.0, 1_000.0, 2_000.0, 8_000.0):
        expected = 3 * hz / 200 if hz < 1_000 else 15 + 27 * np.log(hz / 1_000) / np.log(6.4)
        result = number(hz_to_mel, hz)
        right, linear = is_close(result, expected, 1e-4), 3 * hz / 200
        require(
            right or not is_close(result, 2595 * np.log10(1 + hz / 700), 1e-3),
            "This is the HTK scale. Whisper uses Slaney's, which is linear up to 1 kHz.",
        )
        require(
            right or not is_close(result, linear),
            f"{hz:g} Hz gives {result:.2f}: above 1 kHz the scale is logarithmic.",
        )
        require(right, f"Expected {expected:.3f} mel for {hz:g} Hz, got {result:.3f}.")


def check_triangle(triangle: Any) -> None:
    """Check one mel filter: its weights over the frequencies of the spectrum."""
    bins_hz = np.linspace(0.0, 8_000.0, 201)
    for low, centre, high in ((200.0, 400.0, 600.0), (1_000.0, 1_500.0, 2_400.0)):
        height = 2 / (high - low)
        expected = height * np.maximum(
            0, np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre))
        )
        result = array(triangle, bins_hz.shape, low, centre, high, bins_hz)
        require(result.min() >= 0, "Some weights are negative: outside the triangle the weight is 0.")
        outside = (bins_hz < low) | (bins_hz > high)
        require(not result[outside].any(), f"There is weight below {low:g} or above {high:g} Hz.")
        require(
            not is_close(result * height, expected, 1e-9),
            "The shape is right, but the peak is 1. All filters have the same area: multiply by 2 / (high - low).",
        )
        require(is_close(result / height, expected / height), "The weights differ from the extractor's triangle.")


def check_log_mel(log_mel: Any) -> None:
    """Check the logarithm, the limit of the dynamic range and the scaling."""
    power = np.abs(np.random.default_rng(1).normal(size=(80, 7))) ** 6
    power[0, 0] = 0.0
    logarithm = np.log10(np.maximum(power, 1e-10))
    limited = np.maximum(logarithm, logarithm.max() - 8)
    result = array(log_mel, power.shape, power)
    require(np.isfinite(result).all(), "The logarithm of 0 is not finite: raise every power to at least 1e-10 first.")
    require(not is_close(result, limited), "Scale it at the end: (x + 4) / 4.")
    require(
        not is_close(result, (logarithm + 4) / 4),
        "Limit the dynamic range: nothing is more than 8 below the maximum of the clip.",
    )
    natural = np.log(np.maximum(power, 1e-10))
    require(
        not is_close(result, (np.maximum(natural, natural.max() - 8) + 4) / 4),
        "This is the natural logarithm. Whisper uses log10.",
    )
    require(is_close(result, (limited + 4) / 4), "The values differ from the extractor's.")


def check_padding_share(padding_share: Any) -> None:
    """Check the share of padding if consecutive clips form a batch and are padded to its longest clip."""
    for durations_s, size, expected in (
        ([2.0, 4.0], 2, 0.25),
        ([2.0, 4.0, 3.0, 9.0], 2, 1 - 18 / 26),
        ([5.0, 5.0, 5.0], 2, 0.0),
        ([1.0, 2.0, 6.0], 2, 0.1),
    ):
        result = number(padding_share, durations_s, size)
        real = sum(durations_s)
        whole = 1 - real / (max(durations_s) * len(durations_s))
        right = is_close(result, expected)
        require(
            right or not is_close(result, whole),
            "You padded all clips to the longest of all. Each batch is padded to its own longest clip.",
        )
        require(
            right or not is_close(result, 1 / (1 - expected) - 1),
            "You divided by the real seconds. The share is padding / (real + padding).",
        )
        require(
            right,
            f"Expected {expected:.3f} for {durations_s} in batches of {size}, got {result:.3f}. "
            "Is the last batch, which may be smaller, included?",
        )


def check_labels(pad_labels: Any) -> None:
    """Check the collator's labels: padded with -100, and with the end token of each clip."""
    clips = [[7, 8, 9, END], [5, END], [3, 4, END]]
    labels = array(pad_labels, (3, 4), clips)
    require(
        not (labels[1, 2:] == END).any(),
        f"Padding with {END} makes the loss count it as text: use {IGNORED}, which the loss ignores.",
    )
    require((labels[1, 2:] == IGNORED).all(), f"After the end of a clip, expected {IGNORED}, got {labels[1, 2:]}.")
    ends = [labels[0, 3], labels[1, 1], labels[2, 2]]
    require(
        all(end == END for end in ends),
        "The end tokens of the clips are gone. Whisper pads with its end token, so a mask by value hides the real end "
        "too, and the model never learns to stop. Mask by length.",
    )
    require((labels[0] == clips[0]).all() and labels[2, 0] == 3, "The text tokens have changed.")


def check_leak(hidden_copy: Any) -> None:
    """Check a training sentence that a comparison of strings accepts and the lab refuses."""
    for sentence in ("Kan du höra mig?", "Vi ses på torsdag, säger Åsa."):
        copy = call(hidden_copy, sentence)
        require(isinstance(copy, str), f"Expected a text, got {type(copy).__name__}.")
        require(copy != sentence, "The two sentences are equal: even a comparison of strings finds that leak.")
        held_out = HeldOut()
        held_out.add("test row 1", sentence=sentence)
        require(
            held_out.row_of_sentence(copy),
            f"{copy!r} counts as another sentence. The lab compares sentences without case and punctuation: "
            "change only these.",
        )


def check_faults(faults: Any) -> None:
    """Check the clips that a student marked as faulty: name to kind."""
    require(isinstance(faults, dict), "Expected a dictionary such as {'clip 3': 'wrong transcript'}.")
    expected = listening.faults()
    names = {clip.name for clip in listening.clips()}
    unknown = sorted(set(faults) - names, key=str)
    require(not unknown, f"There is no {unknown[:1]}; the clips are {sorted(names)}.")
    kinds = sorted(set(map(str, faults.values())) - set(listening.KINDS))
    require(not kinds, f"Unknown kind {kinds[:1]}; expected one of {list(listening.KINDS)}.")
    innocent = faults.keys() - expected.keys()
    missing = expected.keys() - faults.keys()
    right = [name for name in faults if faults[name] == expected.get(name)]
    require(
        not innocent and not missing and len(right) == len(expected),
        f"{len(right)} of {len(expected)} faults are named correctly; {len(innocent)} of your clips have no fault, "
        f"{len(missing)} faulty clips are missing. Read the transcript while you listen.",
    )


def check_filter_bank(filter_of: Any) -> None:
    """Check the design of a whole filter bank against the extractor's."""
    bank = log_mels.mel_filters(80)
    for index in (0, 40, 79):
        result = array(filter_of, (201,), index)
        neighbour = bank[:, min(index + 1, 79)]
        require(
            index == 79 or not is_close(result * 100, neighbour * 100),
            f"Filter {index} is filter {index + 1} of the extractor: 80 filters have 82 edges, and filter k uses the "
            "edges k, k + 1 and k + 2.",
        )
        require(
            is_close(result * 100, bank[:, index] * 100, 1e-4),
            f"Filter {index} differs from the extractor's by up to {np.abs(result - bank[:, index]).max():.2g}. "
            "The edges are evenly spaced in mel from 0 to 8,000 Hz, not in Hz.",
        )


exercise = Exercise(
    [
        Task("How many frames?", check_n_frames),
        Task("From hertz to mel", check_hz_to_mel),
        Task("One mel filter", check_triangle),
        Task("All 80 mel filters", check_filter_bank),
        Task("The logarithm", check_log_mel),
        Task("What padding costs", check_padding_share),
        Task("The label mask", check_labels),
        Task("Construct a leak", check_leak),
        Task("Find the faults by listening", check_faults),
    ]
)
