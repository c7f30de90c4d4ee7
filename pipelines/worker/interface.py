"""What a model has to be able to do so that a server can fine-tune it."""

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
"""Task to what the server is busy with while it lasts."""
ASYNCHRONOUS = ("dataset", "train", "eval")
"""Tasks that are answered when they begin; the others when they have ended."""


class Ignored(LabError):
    """A request that is in order and cannot be done now: nothing is begun, and the message says why."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a task, as the page offers it."""

    name: str
    about: str
    """In a few words."""
    default: Any = None
    kind: Literal["text", "number", "file"] = "text"
    choices: tuple[str, ...] = ()
    """The values that it may have; empty where any will do."""


class FineTuningInterface(ABC):
    """A model that a server can fine-tune: six tasks, each with `params` and `logs_dict`.

    `params` is what the client sent, as `check` returned it; JSON values, and bytes for an uploaded file.
    `logs_dict` is the state that goes from one task to the next and outlives the server: JSON values under names of
    your own. What is assigned to it while a task runs can be told by `status` at once; a value that is changed in
    place is noticed when the task ends.

    `dataset`, `train`, `eval`, `test` and `save` run in a process apart, one at a time: the object is pickled to it for
    each, and it may be killed at any moment. It does several tasks in turn, of which `train` is the last. `dataset`,
    `train` and `eval` are called again with the same `params` where the server was killed, and then go on where they
    were. What they print is told to whoever listens, line by line. A LabError is told to the client, with places of
    this machine left out; of any other exception no more than that there was one.

    The server sees to the rest: `train` and `eval` are not called before `dataset` has succeeded, and nothing is called
    while a task is running but `status`.
    """

    @abstractmethod
    def dataset(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        """Prepare what `train` and `eval` need, and note in `logs_dict` where it is."""

    @abstractmethod
    def train(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        """Tune a fresh model, and note in `logs_dict` where it is."""

    @abstractmethod
    def eval(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> None:
        """Score the tuned model, or the one that training would start from where none is tuned."""

    @abstractmethod
    def test(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        """Run the model on what the client sent; the result as JSON values."""

    @abstractmethod
    def save(self, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        """Keep the tuned model somewhere; where, as JSON values that a client may see."""

    @abstractmethod
    def status(self, params: dict[str, Any], logs_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What a client may know: JSON values. Called in the server, at any moment: it has to be quick."""

    def check(self, task: str, params: dict[str, Any], logs_dict: MutableMapping[str, Any]) -> dict[str, Any]:
        """The `params` that `task` is to run with. Called in the server, before anything is begun: it has to be quick.

        What it takes from `logs_dict`, such as the figures of the task before, is no longer told once the task begins.
        Raises LabError for parameters that are wrong, and Ignored for a task that cannot be done now.
        """
        return params

    def forget(self, task: str, logs_dict: MutableMapping[str, Any]) -> None:  # noqa: B027 (many need not)
        """Take from `logs_dict` what a `task` told that was cancelled, such as its figures. Called in the server."""

    def places(self) -> tuple[str, ...]:
        """Places of this machine that no client is to read of, beside the server's own folder."""
        return ()

    def parameters(self) -> dict[str, list[Parameter]]:
        """Task to the parameters that the page offers for it."""
        return {}
