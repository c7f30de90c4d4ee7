"""The interface of a model that a server can fine-tune."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.infra.errors import LabError

TASKS = {
    "dataset": "processing dataset",
    "train": "training",
    "eval": "evaluating",
    "test": "testing",
    "save": "saving",
}
"""Task to the words of the internal state while it runs."""
ASYNCHRONOUS = ("dataset", "train", "eval")
"""Tasks that are answered at their start; the others at their end."""


class Ignored(LabError):
    """A valid request that cannot run now; the message says why."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a task in the page's form."""

    name: str
    about: str
    """Short description."""
    default: Any = None
    kind: Literal["text", "number", "file"] = "text"
    choices: tuple[str, ...] = ()
    """Allowed values; empty for any."""


class FineTuningInterface(ABC):
    """A model that a server can fine-tune: six tasks, each with `params` and `logs_dict`.

    `params` is what the client sent, as `check` returned it: JSON values, and bytes for an uploaded file.
    `logs_dict` is the state that is passed from task to task and outlives the server: JSON values under names that the
    implementation chooses. `status` sees values that are assigned while a task runs at once; a value that is modified
    in place is seen when the task ends.

    `dataset`, `train`, `eval`, `test` and `save` run in a child process, one at a time. The object is pickled for each
    task, and the process may be killed at any moment. A process runs several tasks in turn and ends after `train`. If
    the server was killed, `dataset`, `train` and `eval` are called again with the same `params` and should resume.
    Their output is sent to clients line by line. A client receives the text of a LabError without local paths; of
    other exceptions only that the task failed.

    The server calls `train` and `eval` only after `dataset` has succeeded, and only `status` while a task is running.
    """

    @abstractmethod
    def dataset(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        """Prepare the data of `train` and `eval`, and record its location in `logs_dict`."""

    @abstractmethod
    def train(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        """Tune a fresh model, and record its location in `logs_dict`."""

    @abstractmethod
    def eval(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        """Score the tuned model, or the base model if none is tuned."""

    @abstractmethod
    def test(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        """Run the model on the client's input; return JSON values."""

    @abstractmethod
    def save(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        """Save the tuned model; return its location as JSON values that a client may see."""

    @abstractmethod
    def status(self, params: dict[str, Any], logs_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return JSON values that a client may see. The server calls it at any moment, so it must be fast."""

    def check(self, task: str, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        """Return the `params` that `task` runs with. The server calls it before the task starts, so it must be fast.

        It may remove values from `logs_dict`, such as scores of the task before. Raises LabError for wrong parameters,
        and Ignored for a task that cannot run now.
        """
        return params

    def forget(self, task: str, logs_dict: MutableMapping[str, Any]) -> None:  # noqa: B027 (optional)
        """Remove the values of a cancelled `task` from `logs_dict`. Called in the server."""

    def private_paths(self) -> tuple[str, ...]:
        """Return paths that are removed from texts for clients, beside the server's folder."""
        return ()

    def parameters(self) -> dict[str, list[Parameter]]:
        """Return the parameters of each task in the page's form."""
        return {}
