"""The exercises: every task can be solved, typical mistakes are named, and the notebooks have the right form."""

from __future__ import annotations

import importlib
import itertools
import re
import zlib
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import solve_exercises

from pipelines.course import exercise as exercises
from pipelines.course.exercise import Exercise
from pipelines.course.exercises import listening, toy_training

each = pytest.mark.parametrize("path", solve_exercises.NOTEBOOKS, ids=lambda path: path.stem)


def checks_of(path: Path) -> Exercise:
    exercise = importlib.import_module(f"pipelines.course.exercises.{solve_exercises.module_of(path)}").exercise
    return Exercise(exercise.tasks)


def check_cells(path: Path) -> dict[int, str]:
    """Return the arguments of each `exercise.check` of a notebook, by task."""
    source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    return {
        int(number): name for number, name in re.findall(r"^exercise\.check\((\d+), (\w+)\)$", source, re.MULTILINE)
    }


@each
def test_solutions_pass_every_check(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(exercises.STRICT, "1")
    exercise, scope = checks_of(path), {"np": np}
    for number, code in solve_exercises.solutions(solve_exercises.module_of(path)).items():
        exec(code, scope)
        exercise.check(number, scope[check_cells(path)[number]])
    assert exercise.solved == set(range(1, len(exercise.tasks) + 1))


@each
def test_notebook_has_a_cell_and_a_check_for_each_task(path: Path):
    notebook, exercise = nbformat.read(path, as_version=4), checks_of(path)
    nbformat.validate(notebook)
    numbers = list(range(1, len(exercise.tasks) + 1))
    assert list(solve_exercises.tasks(notebook)) == list(check_cells(path)) == numbers
    assert 6 <= len(numbers) <= 10
    titles = re.findall(r"^## Task \d+ · (.*)$", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE)
    assert titles == [task.title for task in exercise.tasks]
    ids = [cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata]
    assert len(ids) == len(set(ids)) == 2 * len(numbers)


@each
def test_untouched_notebook_asks_for_answers(path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda *objects: None)
    exercise, scope = (
        checks_of(path),
        {"np": np, "experiments": importlib.import_module("pipelines.course.exercises.experiments")},
    )
    for number, cell in solve_exercises.tasks(nbformat.read(path, as_version=4)).items():
        exec(cell.source, scope)
        capsys.readouterr()
        exercise.check(number, scope[check_cells(path)[number]])
        assert "There is no answer yet" in capsys.readouterr().out
    assert not exercise.solved


@each
def test_links_of_the_notebook_exist(path: Path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for target in re.findall(r"\]\((?!https:)([^)\s]+)\)", text):
        assert (path.parent / target).exists(), target


def test_first_cell_is_that_of_the_course_notebooks():
    paths = [*solve_exercises.NOTEBOOKS, solve_exercises.ROOT / "notebooks" / "01_feature_pipeline.ipynb"]
    cells = [
        next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code") for path in paths
    ]
    assert len({cell.source for cell in cells}) == 1


def test_solved_notebooks_are_written(tmp_path: Path, capsys):
    solve_exercises.main(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in solve_exercises.NOTEBOOKS]
    assert "..." not in solve_exercises.tasks(nbformat.read(tmp_path / "01_features.ipynb", as_version=4))[1].source


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def masked_by_value(clips: list[list[int]]) -> np.ndarray:
    longest = max(map(len, clips))
    padded = np.array([clip + [50257] * (longest - len(clip)) for clip in clips])
    return np.where(padded == 50257, -100, padded)


def endless(step: Any, limit: int) -> list[int]:
    tokens = [0]
    while (token := int(np.argmax(step(tokens)))) != 1:
        tokens.append(token)
    return tokens[1:]


def greedy_beam(step: Any, width: int, limit: int) -> list[int]:
    tokens = [0]
    while len(tokens) <= limit and (token := int(np.argmax(step(tokens)))) != 1:
        tokens.append(token)
    return tokens[1:]


def interval_over_clips(errors: np.ndarray, words: np.ndarray, speakers: np.ndarray) -> np.ndarray:
    rows = np.random.default_rng(1).integers(0, len(errors), size=(5_000, len(errors)))
    return np.percentile(errors[rows].sum(axis=1) / words[rows].sum(axis=1), [2.5, 97.5])


WRONG = [
    ("features", 1, lambda duration_s: duration_s * 16_000, "number of samples"),
    ("features", 1, lambda duration_s: duration_s * 100, "Whole frames only"),
    ("features", 1, lambda duration_s: duration_s * 10, "too few"),
    ("features", 2, lambda hz: 2595 * np.log10(1 + hz / 700), "HTK"),
    ("features", 2, lambda hz: 3 * hz / 200, "logarithmic"),
    (
        "features",
        3,
        lambda low, centre, high, hz: np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)),
        "negative",
    ),
    (
        "features",
        3,
        lambda low, centre, high, hz: np.maximum(
            0, np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre))
        ),
        "same area",
    ),
    ("features", 4, lambda index: np.zeros(200), "shape (201,)"),
    ("features", 5, lambda power: np.log10(power), "not finite"),
    ("features", 5, lambda power: (np.log10(np.maximum(power, 1e-10)) + 4) / 4, "dynamic range"),
    (
        "features",
        6,
        lambda durations_s, size: 1 - sum(durations_s) / (max(durations_s) * len(durations_s)),
        "own longest",
    ),
    ("features", 7, masked_by_value, "Mask by length"),
    ("features", 7, lambda clips: np.array([clip + [50257] * (4 - len(clip)) for clip in clips]), "count it as text"),
    ("features", 8, lambda sentence: sentence, "equal"),
    ("features", 8, lambda sentence: sentence + " Ja.", "another sentence"),
    ("features", 9, {"clip 1": "too quiet"}, "Unknown kind"),
    ("features", 9, {"clip 99": "clipped"}, "There is no"),
    ("features", 9, {f"clip {n}": "clipped" for n in range(1, 9)}, "1 of 3 faults"),
    ("training", 1, lambda clips, micro, accumulation, epochs: -(-clips // micro) * epochs, "micro-batches"),
    (
        "training",
        1,
        lambda clips, micro, accumulation, epochs: clips * epochs // (micro * accumulation),
        "smaller batch",
    ),
    (
        "training",
        2,
        lambda logits, labels: -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[0, 0, 1],
        "overflows",
    ),
    ("training", 2, lambda logits, labels: log_softmax(logits)[labels >= 0, labels[labels >= 0]].mean(), "sign"),
    (
        "training",
        2,
        lambda logits, labels: -log_softmax(logits)[labels >= 0, labels[labels >= 0]].sum() / labels.size,
        "all positions",
    ),
    ("training", 3, lambda step, peak, warmup, steps: peak * min(1, step / warmup), "At the last step"),
    ("training", 3, lambda step, peak, warmup, steps: peak * (1 - step / steps), "warmup starts there"),
    ("training", 4, lambda gradients, n_tokens: sum(gradients) / len(gradients), "plain mean"),
    (
        "training",
        5,
        lambda history: (min(history, key=lambda row: row["test_wer"])["step"], True),
        "no longer measures it",
    ),
    (
        "training",
        5,
        lambda history: (min(history, key=lambda row: row["validation_wer"])["step"], True),
        "not overfitting",
    ),
    ("training", 6, lambda weights: str(sum(array.sum() for array in weights.values())), "last bit"),
    (
        "training",
        6,
        lambda weights: "".join(
            f"{name}{array.tobytes()}{array.dtype}{array.shape}" for name, array in weights.items()
        ),
        "sort",
    ),
    ("training", 7, {"weights"}, "all 12 steps again"),
    ("training", 7, {"weights", "step", "order", "random_state"}, "differ"),
    ("training", 7, set(toy_training.STATE), "not needed"),
    ("inference", 1, lambda audio_s, elapsed_s: audio_s / elapsed_s, "inverse"),
    ("inference", 2, endless, "is there a limit"),
    ("inference", 2, lambda step, limit: [0, *endless(step, limit)], "start token"),
    ("inference", 3, greedy_beam, "greedy choice"),
    ("inference", 4, lambda text: len(text) / len(zlib.compress(text.encode())) > 2.4, "bytes by bytes"),
    ("inference", 2, lambda step, limit: 5, "Return a list"),
    ("inference", 6, lambda *windows: ["vi", "gick"], "text, start and end"),
    ("features", 1, lambda duration_s: float("nan"), "Whole frames"),
    ("features", 1, lambda duration_s: {}, "Expected one number"),
    ("features", 7, lambda clips: clips, "Expected numbers of the shape (3, 4)"),
    ("training", 7, 5, "Expected a set of names"),
    ("experiments", 7, dict.fromkeys("ABCD", "Not shown"), "got ['Not shown']"),
    ("inference", 4, lambda text: len(set(text.split())) < 4, "short text"),
    (
        "inference",
        5,
        lambda seconds: f"{seconds // 3600:02.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:06.3f}",
        "comma",
    ),
    ("inference", 6, lambda first, second, start_s, end_s: first + second, "twice"),
    ("inference", 6, lambda first, second, start_s, end_s: [w for w in first if w[1] < start_s] + second, "hemm"),
    ("inference", 7, lambda confidences, correct: abs(confidences.mean() - correct.mean()), "overall means"),
    (
        "experiments",
        1,
        lambda reference, hypothesis: sum(a != b for a, b in zip(reference.split(), hypothesis.split(), strict=False)),
        "expected",
    ),
    ("experiments", 2, lambda pairs: 4 / 9, "mean of the sentences"),
    ("experiments", 3, lambda text: re.sub(r"[^a-z ]", "", text.lower()), "letters"),
    ("experiments", 4, interval_over_clips, "Draw whole speakers"),
    ("experiments", 5, lambda differences: 0.0, "never 0"),
    ("experiments", 6, lambda ps: [min(1, p * len(ps)) for p in ps], "Bonferroni"),
    ("experiments", 7, dict.fromkeys("ABCD", "better"), "interval contains 0"),
    ("experiments", 8, lambda sd, difference: int(np.ceil((1.96 * sd / difference) ** 2)), "one half"),
]


@pytest.mark.parametrize(
    ("name", "number", "answer", "words"), WRONG, ids=[f"{row[0]}-{row[1]}-{row[3]}" for row in WRONG]
)
def test_typical_mistake_is_named(name: str, number: int, answer: Any, words: str, capsys: pytest.CaptureFixture):
    exercise = Exercise(importlib.import_module(f"pipelines.course.exercises.{name}").exercise.tasks)
    exercise.check(number, answer)
    line = capsys.readouterr().out
    assert words in line
    assert line.startswith(f"Task {number}: not yet. ")
    assert line.count("\n") == 1
    assert not exercise.solved


def test_error_in_an_answer_names_its_line(capsys: pytest.CaptureFixture):
    scope: dict[str, Any] = {}
    exec("def n_frames(duration_s):\n    return duration_s / 0", scope)
    exercise = checks_of(solve_exercises.NOTEBOOKS[0])
    exercise.check(1, scope["n_frames"])
    assert "stopped with ZeroDivisionError: float division by zero (line 2, in n_frames)" in capsys.readouterr().out


def test_strict_check_raises_as_graders_expect(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(exercises.STRICT, "1")
    with pytest.raises(AssertionError, match="Task 1"):
        checks_of(solve_exercises.NOTEBOOKS[0]).check(1, lambda duration_s: 0)


def test_answer_called_instead_of_given_is_explained(capsys: pytest.CaptureFixture):
    checks_of(solve_exercises.NOTEBOOKS[0]).check(1, 3000)
    assert "without parentheses" in capsys.readouterr().out


def test_status_names_the_next_task(capsys: pytest.CaptureFixture):
    exercise = checks_of(solve_exercises.NOTEBOOKS[0])
    exercise.solved.add(1)
    exercise.status()
    assert capsys.readouterr().out.splitlines()[0] == "[x] 1. How many frames?"
    exercise.solved.update(range(1, 10))
    exercise.status()
    assert capsys.readouterr().out.endswith("All tasks are solved.\n")
    with pytest.raises(ValueError, match="tasks 1 to 9"):
        exercise.check(10, 1)


def test_faults_to_listen_for_can_be_heard():
    import io

    import soundfile

    faults, clips = listening.faults(), listening.clips()
    assert sorted(faults.values()) == sorted(listening.KINDS)
    samples = {clip.name: soundfile.read(io.BytesIO(clip.wav))[0] for clip in clips}
    by_kind = {kind: name for name, kind in faults.items()}
    assert (np.abs(samples[by_kind["clipped"]]) > 0.99).mean() > 0.1
    transcripts = [clip.transcript for clip in clips]
    assert len(set(transcripts)) == len(transcripts) - 1


def sign_flip_p(differences: list[float]) -> float:
    """Return p as one writes it first, with floats compared as they are."""
    flips = itertools.product([1, -1], repeat=len(differences))
    sums = [abs(np.mean(np.multiply(signs, differences))) for signs in flips]
    return np.mean(np.array(sums) >= abs(np.mean(differences)))


OTHER_FORMS = [
    ("inference", 2, lambda step, limit: tuple(greedy_beam(step, 1, limit)[:limit])),
    ("inference", 2, lambda step, limit: np.array(greedy_beam(step, 1, limit)[:limit])),
    ("inference", 2, lambda step, limit: iter(greedy_beam(step, 1, limit)[:limit])),
    ("training", 4, lambda gradients, n: (np.dot(one, n) / sum(n) for one in zip(*gradients, strict=True))),
    ("features", 7, lambda clips: ([*clip, *[-100] * (4 - len(clip))] for clip in clips)),
    ("experiments", 5, sign_flip_p),
    ("experiments", 6, lambda ps: np.array([0.04, 0.09, 0.09, 0.5], dtype=np.float32)),
]


@pytest.mark.parametrize(("module", "number", "answer"), OTHER_FORMS)
def test_right_answer_in_another_form_passes(module: str, number: int, answer: Any, capsys, monkeypatch):
    monkeypatch.delenv(exercises.STRICT, raising=False)
    importlib.import_module(f"pipelines.course.exercises.{module}").exercise.check(number, answer)
    assert "right" in capsys.readouterr().out


def test_long_error_of_a_student_is_shown_in_one_line(capsys, monkeypatch):
    def answer(duration_s: float) -> int:
        raise ValueError("shapes\n(3,)\n" * 500)

    monkeypatch.delenv(exercises.STRICT, raising=False)
    checks_of(next(path for path in solve_exercises.NOTEBOOKS if "features" in path.stem)).check(1, answer)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert len(line) < 350
    assert "in answer" in line


@pytest.mark.parametrize("number", [0, 99, "1", 1.0])
def test_unknown_task_number_is_named(number: Any):
    with pytest.raises(ValueError, match="has the tasks 1 to"):
        checks_of(solve_exercises.NOTEBOOKS[0]).check(number, 1)
