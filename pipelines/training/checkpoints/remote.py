"""The copies of one run's checkpoints at a URI.

    <uri>/checkpoint-40    <uri>/checkpoint-80    ...    and after the run is finished only    <uri>/model

One URI holds one run. The manifest of each copy has the run's identity, field by field, and so has its run.json, which
is uploaded first and identifies an incomplete upload. A checkpoint or model at the URI that is not known to be of this
run is never overwritten or removed: such a URI is refused.
"""

from __future__ import annotations

import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.stores import transfer
from pipelines.infra.stores.transfer import Damaged
from pipelines.recipes import differences
from pipelines.training.checkpoints import sealed as sealed_checkpoints

logger = logging.getLogger(__name__)

MODEL = 10**9
"""Step number of the finished model: newer than every checkpoint."""


class OtherRun(LabError):
    """The URI holds another run."""


class RemoteCheckpoints:
    """The copies of one run below `uri`. Every method may raise LabError."""

    def __init__(self, uri: str, identity: dict[str, Any]):
        self.uri, self.identity = uri.rstrip("/"), identity

    @cached_property
    def store(self) -> Any:
        """Store of the URI."""
        return stores.open_store(self.uri)

    def best_steps(self, *, log_skipped: bool = True) -> dict[int, int]:
        """Return step to best step of every finished copy; raise OtherRun if one is of another run."""
        steps = {}
        for step, uri in self._copies():
            if (facts := self._facts(uri)) is not None:
                steps[step] = facts.get("best_step") or step
            elif log_skipped:
                logger.info(f"skipping {uri}: unfinished or damaged")
        return steps

    def fetch(self, step: int, best: int, available: set[int], run: Path) -> Path:
        """Fetch a copy and its best checkpoint into the run's folder; return its path there.

        Raises Damaged if one of them is damaged or not among the `available` steps.
        """
        for needed in dict.fromkeys((best, step)):
            target = local_path(run, needed)
            if manifest.problem(target) is None:
                continue
            if needed not in available:
                raise Damaged(f"it needs {target.name}, which is not there")
            fetched = self._download(target.name, run / "fetched")
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            fetched.rename(target)
        shutil.rmtree(run / "fetched", ignore_errors=True)
        return local_path(run, step)

    def push(self, folder: Path) -> None:
        """Publish a folder that was just sealed, without verifying it again first.

        Raises OtherRun if another run's folder has its name.
        """
        self._facts(f"{self.uri}/{folder.name}")
        self.store.publish(folder, f"{self.uri}/{folder.name}", thorough=False)

    def prune(self, keep: set[int], newest: int) -> None:
        """Remove this run's copies, finished or not, that are older than `newest` and not in `keep`."""
        for step, uri in self._copies():  # another machine may have newer ones
            if step < newest and step not in keep and self._is_ours(uri):
                self.store.remove(uri)

    def _facts(self, uri: str) -> dict[str, Any] | None:
        """Return the facts of the copy at `uri`, None if it is unfinished; raise OtherRun if it is not this run's."""
        facts = self.store.metadata(uri)
        identity = self.store.run_record(uri) if facts is None else facts.get("identity") or {}
        if identity is None:
            raise OtherRun(
                f"{uri} is unfinished and holds files that are not known as this run's (there is no "
                f"{transfer.RUN_FILE}): name another URI, or remove that folder if it is not needed"
            )
        changed = differences(self.identity, identity) if identity or facts else []
        if changed:
            raise OtherRun(
                f"{self.uri} holds another run: {'; '.join(changed)}. Name another URI, or go back to that recipe"
            )
        return facts

    def _is_ours(self, uri: str) -> bool:
        """Return True if the copy, finished or not, has this run's identity."""
        facts = self.store.metadata(uri)
        identity = self.store.run_record(uri) if facts is None else facts.get("identity")
        return bool(identity) and not differences(self.identity, identity)

    def _copies(self) -> list[tuple[int, str]]:
        """Return step and URI of everything named like a checkpoint or the model, finished or not."""
        paths = ((Path(uri.partition("@")[0]), uri) for uri in self.store.list_folders(self.uri))
        return sorted(
            (step_of(path), uri) for path, uri in paths if sealed_checkpoints.is_named(path) or path.name == "model"
        )

    def _download(self, name: str, into: Path) -> Path:
        try:
            return self.store.fetch(f"{self.uri}/{name}", into=into)
        except Damaged:  # perhaps only in transfer
            return self.store.fetch(f"{self.uri}/{name}", into=into)


def name_of(step: int) -> str:
    """Return the folder name of a step."""
    return "model" if step == MODEL else f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """Return the step of a folder name; the model has MODEL."""
    return MODEL if folder.name == "model" else sealed_checkpoints.step_of(folder)


def local_path(run: Path, step: int) -> Path:
    """Return the path of a step in the run's folder."""
    return run / "model" if step == MODEL else run / "checkpoints" / name_of(step)
