"""Exercises: numbered tasks whose checks say what is wrong with an answer, not only that it is wrong.

    from pipelines.course.exercises.features import exercise

    exercise.check(1, my_function)     prints "Task 1: right." or one line about the first mistake
    exercise.status()                  prints which tasks are solved

A check calls the student's function with several inputs and compares the results, so any correct solution passes. With
the environment variable COURSE_STRICT=1 a wrong answer raises AssertionError, as nbgrader and Otter expect.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STRICT = "COURSE_STRICT"


class Wrong(Exception):
    """An answer is not right; the message says in which way."""


@dataclass(frozen=True)
class Task:
    """One task of an exercise."""

    title: str
    check: Callable[..., None]
    """Takes the answers; raises Wrong."""


@dataclass
class Exercise:
    """The tasks of one notebook, numbered from 1, and those that were solved since it was loaded."""

    tasks: list[Task]
    solved: set[int] = field(default_factory=set)

    def check(self, number: int, *answers: Any) -> None:
        """Check the answers to one task and print the result.

        Raises AssertionError for a wrong answer if COURSE_STRICT is set, and ValueError for an unknown task.
        """
        if type(number) is not int or not 1 <= number <= len(self.tasks):
            raise ValueError(f"this exercise has the tasks 1 to {len(self.tasks)}, not {_short(number)}")
        mistake = _mistake(self.tasks[number - 1], answers)
        if mistake:
            self.solved.discard(number)
            if os.environ.get(STRICT):
                raise AssertionError(f"Task {number}: {mistake}")
            print(f"Task {number}: not yet. {mistake}")
            return
        self.solved.add(number)
        print(f"Task {number}: right. Solved: {len(self.solved)} of {len(self.tasks)}.")

    def status(self) -> None:
        """Print every task, with a mark if it is solved, and what to do next."""
        for number, task in enumerate(self.tasks, 1):
            print("[x]" if number in self.solved else "[ ]", f"{number}. {task.title}")
        left = [number for number in range(1, len(self.tasks) + 1) if number not in self.solved]
        print(f"Next: task {left[0]}" if left else "All tasks are solved.")


def _mistake(task: Task, answers: tuple[Any, ...]) -> str:
    """Return what is wrong with the answers, in one line; empty if they are right."""
    if not answers:
        return "There is no answer: give it after the number of the task, as in the notebook's cell."
    if any(answer is ... for answer in answers):
        return "There is no answer yet: replace the three dots with your own."
    try:
        task.check(*answers)
    except Wrong as error:
        return str(error)
    except Exception as error:
        message = " ".join(str(error)[:1_000].split()).rstrip(".")
        shown = message if len(message) <= 200 else message[:197] + "..."
        return f"Your code stopped with {type(error).__name__}: {shown}{_location(error)}."
    return ""


def _location(error: Exception) -> str:
    """Return the student's line that an error came from; empty if it is not in the student's code."""
    libraries = (sys.prefix, str(Path(__file__).parent), str(Path(np.__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    return f" (line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""


def require(condition: Any, message: str) -> None:
    """Raise Wrong with a message unless the condition is true."""
    if not condition:
        raise Wrong(message)


def call(function: Any, *arguments: Any) -> Any:
    """Call a student's function with copies of the arguments; return what an iterator yields as a list.

    Raises Wrong if it is not a function, or if it returns nothing.
    """
    require(callable(function), f"Give the function itself, without parentheses: got {_short(function)}.")
    result = function(*copy.deepcopy(arguments))
    require(result is not ..., "There is no answer yet: replace the three dots with your own.")
    require(result is not None, "The function returns nothing. Is there a `return` at its end?")
    return list(result) if isinstance(result, Iterator) else result


def number(function: Any, *arguments: Any) -> float:
    """Return a student's result as one number. Raises Wrong if it is none."""
    result = call(function, *arguments)
    require(np.isscalar(result) or np.ndim(result) == 0, f"Expected one number, got {_short(result)}.")
    require(not isinstance(result, str | bytes), f"Expected a number, got the text {_short(result)}.")
    try:
        return float(result)
    except (TypeError, ValueError, OverflowError):
        raise Wrong(f"Expected one number, got {_short(result)}.") from None


def array(function: Any, shape: tuple[int, ...], *arguments: Any) -> np.ndarray:
    """Return a student's result as a float64 array of the given shape. Raises Wrong if it has another one."""
    result = call(function, *arguments)
    try:
        values = np.asarray(result, dtype=np.float64)
    except (TypeError, ValueError):
        raise Wrong(f"Expected numbers of the shape {shape}, got {_short(result)}.") from None
    require(values.shape == shape, f"Expected the shape {shape}, got {values.shape}.")
    return values


def items(function: Any, *arguments: Any) -> list[Any]:
    """Return the items of a student's list, tuple or array. Raises Wrong for anything else."""
    result = call(function, *arguments)
    is_list = np.ndim(result) == 1 if hasattr(result, "__array__") else isinstance(result, list | tuple)
    require(is_list, f"Return a list, got {_short(result)}.")
    return list(result)


def tokens(function: Any, *arguments: Any) -> list[int]:
    """Return a student's result as a list of tokens. Raises Wrong if it is none."""
    result = items(function, *arguments)
    try:
        return [int(token) for token in result]
    except (TypeError, ValueError):
        raise Wrong(f"Return a list of tokens, got {_short(result)}.") from None


def is_close(value: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """Return whether all numbers agree within the tolerance, relative to the largest expected number or to 1."""
    size = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    return bool(np.all(np.abs(np.asarray(value, dtype=np.float64) - expected) <= tolerance * size))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
