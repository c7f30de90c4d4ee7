"""Copy a run's checkpoints to a URI in the background, and resume from them if they are newer than the local ones.

Training never waits for a store and never fails because of one. A thread pushes the newest checkpoint, and before it
the best one, from which the model will be written. A checkpoint that is superseded in the meantime is not pushed. The
finished model replaces them all. A copy counts after its store has read it back.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra import manifest
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.infra.stores import transfer
from pipelines.infra.stores.transfer import Damaged
from pipelines.training.checkpoints.remote import MODEL, OtherRun, RemoteCheckpoints, local_path, name_of, step_of

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


FINAL_WAIT_S = 900.0
"""Longest time in seconds that a run waits at its end for copies."""
_RETRY_PAUSES_S = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Pauses in seconds after failed pushes; a new checkpoint is pushed at once."""
LAST_PAUSES_S = (5.0, 15.0, 45.0)
"""The same at the end of a run; after the last one the thread gives up."""
SHARE = 0.02
"""Largest share of the machine's processor time that the thread takes while training: it pauses after each copy."""


@dataclass(frozen=True)
class MirrorState:
    """The state of a run's copies when its sitting ended."""

    uri: str
    there: tuple[str, ...]
    """Names of the checkpoints at the URI, or of the model; each copy was verified."""
    missing: tuple[str, ...]
    """Names that should be there and are not."""
    reason: str
    """Why they are missing: the last error."""

    def __str__(self) -> str:
        if not self.there:
            return f"NOTHING of this run is kept at {self.uri}: {self.reason or 'no checkpoint was made'}"
        if self.missing:
            return f"NOT kept at {self.uri}: {_and(self.missing)} ({self.reason}). There is {_and(self.there)}"
        return f"kept at {self.uri}: {_and(self.there)}"


class CheckpointMirror:
    """The thread that copies one run's checkpoints; a context manager around training that ends with last tries."""

    def __init__(self, uri: str, run: Path, identity: dict[str, Any], keep: int):
        self.remote, self.keep = RemoteCheckpoints(uri, identity), keep
        self.run, self.aside = run, run / "unsent"
        self._changed = threading.Condition()
        self._remote_steps: dict[int, int] | None = None
        """Step to best step of the copies at the URI; None until they were listed."""
        self._offered: dict[int, Path] = {}
        """Step to the folder that it is pushed from."""
        self._best_of: dict[int, int] = {}
        self._targets: tuple[int, ...] = ()
        """Steps that should be at the URI: the best, then the newest."""
        self._pushing: int | None = None
        self._reason, self._failures, self._due, self._rest_until = "", 0, 0.0, 0.0
        self._ending = self._dropped = False
        self._lines: collections.deque[str] = collections.deque()
        """Messages of the thread, which the main thread logs."""

    def resume_from(self, local: Path | None) -> Path | None:
        """Return the newest whole copy, fetched into the run's folder, or `local` if that is as new.

        Each is a checkpoint or the finished model. Raises LabError if the store does not answer and `local` is None:
        training must not start from step 0 without notice.
        """
        shutil.rmtree(self.aside, ignore_errors=True)
        try:
            newest = self._fetch_newer(local)
        except OtherRun:
            raise
        except LabError as error:
            if local is None:
                raise
            logger.info(f"note: {error}. Continuing with the files on this machine")
            newest = local
        if newest is None:
            logger.info(f"no checkpoint at {self.remote.uri} yet: this run's checkpoints are copied there")
        else:
            self.offer(newest)
        return newest

    def offer(self, newest: Path) -> None:
        """Have a sealed checkpoint (and the best one, which it names) or the finished model copied.

        Checkpoints that it supersedes are no longer copied.
        """
        step = step_of(newest)
        best = manifest.read(newest).get("best_step") or step
        with self._changed:
            self._targets, self._best_of[step] = tuple(dict.fromkeys((best, step))), best
            for target in self._targets:
                if target not in (self._remote_steps or {}) and target not in self._offered:
                    self._hold(target)
            for superseded in self._offered.keys() - {*self._targets, self._pushing}:
                self._release(superseded)
            self._due = 0.0
            self._changed.notify()

    def callback(self) -> TrainerCallback:
        """Return the callback that offers every checkpoint and logs the thread's messages."""
        from transformers import TrainerCallback

        mirror = self

        class MirrorCallback(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if state.is_world_process_zero:
                    mirror.offer(local_path(mirror.run, state.global_step))

            def on_step_end(self, args, state, control, **kwargs):
                mirror.log_messages()

            def on_log(self, args, state, control, **kwargs):
                mirror.log_messages()
                mirror.log_unsent()

        return MirrorCallback()

    def log_messages(self) -> None:
        """Log what happened since the last call; the thread itself does not log, so that output lines stay whole."""
        while self._lines:
            logger.info(self._lines.popleft())

    def log_unsent(self) -> None:
        """Log what is not at the URI yet, if anything."""
        with self._changed:
            unsent, pushing, reason = self._unsent(), self._pushing, self._reason
        if unsent:
            waiting = "it will be tried again" if reason else "it comes next"
            doing = f"{name_of(pushing)} is being copied" if pushing else waiting
            logger.info(f"not at {self.remote.uri} yet: {_and(map(name_of, unsent))}; {doing}")

    def busy(self) -> bool:
        """Return True while the thread pushes a copy."""
        with self._changed:
            return self._pushing is not None

    def state(self) -> MirrorState:
        """Return which copies are at the URI, and which are missing."""
        with self._changed:
            remote, missing = sorted(self._remote_steps or {}), self._unsent()
            return MirrorState(self.remote.uri, tuple(map(name_of, remote)), tuple(map(name_of, missing)), self._reason)

    def __enter__(self) -> CheckpointMirror:
        self._thread = threading.Thread(target=self._work, name="checkpoint mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait up to FINAL_WAIT_S for the last copies, but not if the run was interrupted from outside."""
        waits = kind is None or issubclass(kind, Exception)
        with self._changed:
            self._ending, self._dropped = True, not waits
            self._failures, self._due = 0, 0.0
            unsent = self._unsent()
            if not waits:
                self._reason = self._reason or "the run was interrupted"
            self._changed.notify()
        if waits and unsent:
            logger.info(
                f"waiting up to {FINAL_WAIT_S / 60:.0f} min until {_and(map(name_of, unsent))} is at {self.remote.uri} "
                "(an interrupt ends the waiting, not the run)"
            )
        if waits:
            self._wait(time.monotonic() + FINAL_WAIT_S)
        with self._changed:
            self._dropped = True
        self.log_messages()
        shutil.rmtree(self.aside, ignore_errors=True)
        logger.info(str(self.state()))

    def _wait(self, until: float) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            while self._thread.is_alive() and time.monotonic() < until:
                self._thread.join(0.1)
                self.log_messages()
        if self._thread.is_alive():
            self._reason = self._reason or "the store had not taken it when the waiting was over"

    def _fetch_newer(self, local: Path | None) -> Path | None:
        best_steps, newest, local_step = self.remote.best_steps(), local, step_of(local) if local else 0
        for step in sorted((step for step in best_steps if step > local_step), reverse=True):
            try:
                newest = self.remote.fetch(step, best_steps[step], {*best_steps}, self.run)
                break
            except Damaged as error:
                logger.info(f"skipping {name_of(step)} at {self.remote.uri}: {error}")
        newest_step = step_of(newest) if newest else 0
        self._remote_steps = {step: best for step, best in best_steps.items() if step <= newest_step}
        return newest

    def _hold(self, step: int) -> None:
        """Protect a checkpoint from pruning with hard links; without links it may be pruned before it is pushed."""
        folder, held = local_path(self.run, step), self.aside / name_of(step)
        if manifest.problem(folder, thorough=False) is not None:
            return
        facts, identity = manifest.read(folder), self.remote.identity
        if facts.get("identity") != identity or transfer.RUN_FILE not in facts["files"]:
            # only once: another write would make the model appear newer
            manifest.replace(folder, transfer.RUN_FILE, json.dumps(identity, indent=1).encode(), identity=identity)
        try:
            shutil.copytree(folder, held, copy_function=os.link)
        except OSError:
            shutil.rmtree(held, ignore_errors=True)
            held = folder
        self._offered[step] = held

    def _release(self, step: int) -> None:
        if (held := self._offered.pop(step)).parent == self.aside:
            shutil.rmtree(held, ignore_errors=True)

    def _unsent(self) -> list[int]:
        """Return the steps to push: the best before the newest, which is of no use without it."""
        return [step for step in self._targets if step not in (self._remote_steps or {}) and step in self._offered]

    # The methods below run in the thread.

    def _work(self) -> None:
        while (step := self._next()) is not None:
            started = time.thread_time()
            try:
                self._push(step)
            except Exception as error:  # stores and their clients raise all kinds; training continues
                self._record_failure(step, error)
            rest_s = (time.thread_time() - started) / (SHARE * process_pool.cores())
            with self._changed:
                self._pushing, self._rest_until = None, time.monotonic() + rest_s

    def _next(self) -> int | None:
        """Wait for the next step to push and return it; None at the end."""
        with self._changed:
            while True:
                unsent, now = self._unsent(), time.monotonic()
                done = self._ending and (not unsent or self._failures > len(LAST_PAUSES_S))
                if done or self._dropped:
                    return None
                due = self._due if self._ending else max(self._due, self._rest_until)
                if unsent and now >= due:
                    self._pushing = unsent[0]
                    return self._pushing
                self._changed.wait(due - now if unsent else None)

    def _push(self, step: int) -> None:
        started = time.monotonic()
        if self._remote_steps is None:
            best_steps = self.remote.best_steps(log_skipped=False)
            with self._changed:
                self._remote_steps = {older: best for older, best in best_steps.items() if older < step}
        self.remote.push(self._offered[step])
        with self._changed:
            self._remote_steps[step] = self._best_of.get(step, step)
            self._release(step)
            self._failures, self._reason = 0, ""
            done = not self._unsent()
        self._lines.append(f"{name_of(step)} is kept at {self.remote.uri} ({time.monotonic() - started:.1f} s)")
        if done:
            self._prune()

    def _prune(self) -> None:
        """Keep the same copies as locally: the model, or the newest checkpoints and the best that each names."""
        newest = [MODEL] if MODEL in self._remote_steps else sorted(self._remote_steps)[-self.keep :]
        keep = {*newest} | {self._remote_steps[step] for step in newest}
        try:
            self.remote.prune(keep, newest[-1])
        except Exception as error:
            self._lines.append(f"note: older checkpoints stay at {self.remote.uri}: {_one_line(error)}")
        else:
            with self._changed:
                self._remote_steps = {step: best for step, best in self._remote_steps.items() if step in keep}

    def _record_failure(self, step: int, error: Exception) -> None:
        with self._changed:
            self._reason = _one_line(error)
            pauses = LAST_PAUSES_S if self._ending else _RETRY_PAUSES_S
            self._due = time.monotonic() + pauses[min(self._failures, len(pauses) - 1)]
            self._failures += 1
            if step not in self._targets:
                self._release(step)
        self._lines.append(f"{name_of(step)} is not kept at {self.remote.uri}: {self._reason}")


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


def _one_line(error: Exception) -> str:
    """Return an error's message on one line, with its type unless it is a LabError."""
    message = " ".join(str(error).split())
    return message if isinstance(error, LabError) else f"{type(error).__name__}: {message}"
