"""Exercise 2: steps, the loss, the learning rate, accumulation, digests, a broken resume, overfitting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from pipelines.course.exercise import Exercise, Task, array, call, is_close, items, number, require
from pipelines.course.exercises import toy_training

IGNORED = -100


def check_n_steps(n_steps: Any) -> None:
    """Check the number of steps of a training run."""
    for n_clips, micro_batch, accumulation, epochs, expected in (
        (960, 8, 1, 1, 120),
        (960, 4, 4, 2, 120),
        (100, 8, 1, 1, 13),
        (100, 8, 2, 3, 21),
    ):
        result = number(n_steps, n_clips, micro_batch, accumulation, epochs)
        values = f"{n_clips} clips, micro-batch {micro_batch}, accumulation {accumulation}, {epochs} epoch(s)"
        require(
            accumulation == 1 or result != np.ceil(n_clips / micro_batch) * epochs,
            f"{values}: {result:g} counts micro-batches. A step is one update of the weights.",
        )
        require(
            result == expected or result != n_clips * epochs // (micro_batch * accumulation),
            f"{values}: the last, smaller batch of an epoch is a step too.",
        )
        require(result == expected, f"{values}: expected {expected} steps, got {result:g}.")


def check_token_loss(token_loss: Any) -> None:
    """Check the cross-entropy of a batch with ignored positions."""
    logits = np.random.default_rng(2).normal(size=(2, 5, 11)) * 3
    logits[0, 0] += 900.0
    labels = np.array([[1, 4, 9, IGNORED, IGNORED], [10, 0, 3, 2, IGNORED]])
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    real = labels != IGNORED
    chosen = np.take_along_axis(log_probabilities, np.where(real, labels, 0)[..., None], axis=-1)[..., 0]
    expected = -chosen[real].mean()
    result = number(token_loss, logits, labels)
    require(np.isfinite(result), "The loss is not finite. Subtract the largest logit before exp: exp(900) overflows.")
    require(not is_close(result, -expected), "The sign is wrong: the loss is minus the log-probability.")
    require(not is_close(result, -chosen[real].sum()), "This is the sum. The loss is the mean over tokens.")
    require(not is_close(result, -chosen.mean()), f"Positions with the label {IGNORED} must be left out of the loss.")
    require(
        not is_close(result, -np.where(real, chosen, 0).mean()),
        f"The sum is right, but you divided by all positions. Divide by those whose label is not {IGNORED}.",
    )
    rows = np.mean([-chosen[row][real[row]].mean() for row in range(2)])
    require(not is_close(result, rows), "This is the mean of the clips' means. Every token counts the same.")
    require(not is_close(result, expected / np.log(2)), "This is in bits. Use the natural logarithm.")
    require(is_close(result, expected, 1e-5), f"Expected {expected:.4f}, got {result:.4f}.")


def check_learning_rate(learning_rate: Any) -> None:
    """Check warmup to the peak and linear decay to zero."""
    peak, warmup, steps = 1e-4, 10, 110
    result = {step: number(learning_rate, step, peak, warmup, steps) / peak for step in (0, 5, 10, 60, 110)}
    require(is_close(result[0], 0), "Before the first step the rate is 0: warmup starts there.")
    require(is_close(result[10], 1), f"At the end of the warmup, expected the peak, got {result[10]:.3f} of it.")
    require(is_close(result[5], 0.5), f"In the middle of the warmup, expected half of the peak, got {result[5]:.3f}.")
    require(
        is_close(result[110], 0),
        f"At the last step the rate is 0, got {result[110]:.3f} of the peak. Where does it end?",
    )
    require(
        is_close(result[60], 0.5),
        f"At step 60, expected half of the peak, got {result[60]:.3f}: decay is linear from the end of the warmup.",
    )


def check_accumulate(accumulate: Any) -> None:
    """Check that micro-batches together have the gradient of the whole batch."""
    random = np.random.default_rng(3)
    gradients, n_tokens = random.normal(size=(3, 6)), np.array([30, 10, 4])
    expected = (gradients * n_tokens[:, None]).sum(axis=0) / n_tokens.sum()
    result = array(accumulate, (6,), list(gradients), list(n_tokens))
    require(
        not is_close(result, gradients.mean(axis=0)),
        "This is the plain mean. A micro-batch with few tokens then counts as much as one with many, and the result "
        "differs from the whole batch's gradient.",
    )
    require(
        not is_close(result, gradients.sum(axis=0)), "This is the plain sum: the step would be three times as long."
    )
    require(is_close(result, expected), "Weight each gradient by its share of the tokens.")


def check_digest(digest: Any) -> None:
    """Check a digest of weights: equal for equal weights, and for nothing else."""
    weights = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), dtype=np.float32)}
    original = call(digest, weights)
    require(isinstance(original, str), f"Expected a text of hexadecimal digits, got {type(original).__name__}.")
    require(call(digest, weights) == original, "Two calls with the same weights give two digests.")
    reordered = {"b": weights["b"], "a": weights["a"]}
    require(call(digest, reordered) == original, "The order of the dictionary changes the digest: sort the names.")
    changed = weights["a"].copy()
    changed[5] = np.nextafter(changed[5], np.float32(9))
    for other, what in (
        ({**weights, "a": changed}, "A change in the last bit of one weight"),
        ({"b": weights["a"], "a": weights["b"]}, "Exchanging the names of two weights"),
        ({**weights, "b": weights["b"].reshape(3, 2)}, "Another shape"),
        ({**weights, "b": weights["b"].view(np.int32)}, "Another dtype with the same bytes"),
        ({**weights, "a": np.arange(100_000, dtype=np.float32)}, "A long array"),
    ):
        require(call(digest, other) != original, f"{what} leaves the digest as it was.")
    long = np.zeros(100_000, dtype=np.float32)
    middle = long.copy()
    middle[50_000] = 1
    require(
        call(digest, {"a": long}) != call(digest, {"a": middle}),
        "A change in the middle of a long array is not seen: str() abbreviates arrays. Use their bytes.",
    )


def check_resume(needed: Any) -> None:
    """Check the smallest set of names with which a resume is exact."""
    is_set = isinstance(needed, Iterable) and not isinstance(needed, str)
    require(is_set, f"Expected a set of names, such as {{'weights'}}, got {needed!r:.60}.")
    names = set(needed)
    unknown = sorted(names - set(toy_training.STATE), key=str)
    require(not unknown, f"{unknown[0] if unknown else ''!r} is not in the state; it has {list(toy_training.STATE)}.")
    for at in (3, 6):
        expected, result = toy_training.train(toy_training.start(), 12), toy_training.resume(names, at, 12)
        if not np.array_equal(expected["weights"], result["weights"]):
            require("step" in names, f"Interrupted at step {at}: the resumed run makes all 12 steps again.")
            difference = np.abs(expected["weights"] - result["weights"]).max()
            require(
                False,
                f"Interrupted at step {at}: the final weights differ by up to {difference:.2g}. Something that "
                "influences the next step was lost. Follow every value that `train` reads.",
            )
    for name in sorted(names):
        rest = names - {name}
        exact = all(
            np.array_equal(
                toy_training.train(toy_training.start(), 12)["weights"], toy_training.resume(rest, at, 12)["weights"]
            )
            for at in (3, 6)
        )
        require(not exact, "A resume with your set is exact, but one of its names is not needed.")


def check_choice(choose: Any) -> None:
    """Check the choice of a checkpoint and the diagnosis of overfitting."""
    overfitting = _history([2.0, 1.2, 0.6, 0.2], [2.1, 1.5, 1.6, 1.9], [0.9, 0.5, 0.45, 0.47], [0.8, 0.5, 0.44, 0.40])
    healthy = _history([2.0, 1.2, 0.9, 0.8], [2.1, 1.4, 1.1, 1.0], [0.9, 0.6, 0.4, 0.3], [0.9, 0.5, 0.6, 0.7])
    stuck = _history([2.0, 2.0, 2.0, 2.1], [2.1, 2.1, 2.2, 2.3], [0.9, 0.9, 0.95, 0.97], [0.9, 0.8, 0.7, 0.6])
    for name, history, step, overfits, why in (
        ("the first history", overfitting, 300, True, "the training loss falls while the validation loss rises"),
        ("the second history", healthy, 400, False, "both losses fall"),
        ("the third history", stuck, 100, False, "the training loss does not fall: nothing is memorised"),
    ):
        result = items(choose, history)
        require(len(result) == 2, "Return two values: the step, and whether it overfits.")
        best_test = min(history, key=lambda row: row["test_wer"])["step"]
        require(
            result[0] == step or result[0] != best_test,
            f"In {name} you chose step {result[0]}, the best on the test split. A test split that chooses the model "
            "no longer measures it.",
        )
        best_loss = min(history, key=lambda row: row["validation_loss"])["step"]
        require(
            result[0] == step or result[0] != best_loss,
            f"In {name} you chose step {result[0]}, the lowest validation loss. The figure that matters is the WER.",
        )
        require(result[0] == step, f"In {name}, expected step {step}, got {result[0]}. Of equal ones, take the first.")
        verdict = "is overfitting" if overfits else "is not overfitting"
        require(bool(result[1]) == overfits, f"In {name} {why} at the end: that {verdict}.")


def _history(training: list[float], validation: list[float], wer: list[float], test: list[float]) -> list[dict]:
    columns = ("loss", "validation_loss", "validation_wer", "test_wer")
    rows = zip(training, validation, wer, test, strict=True)
    return [{"step": 100 * n, **dict(zip(columns, row, strict=True))} for n, row in enumerate(rows, 1)]


exercise = Exercise(
    [
        Task("How many steps?", check_n_steps),
        Task("The loss of a batch", check_token_loss),
        Task("Warmup and decay", check_learning_rate),
        Task("Add up micro-batches", check_accumulate),
        Task("Choose a checkpoint", check_choice),
        Task("A digest of weights", check_digest),
        Task("Break a resume", check_resume),
    ]
)
