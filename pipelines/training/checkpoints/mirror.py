"""Copies of a run's checkpoints at a URI: made in the background, gone on from where they are newer than what is here.

    <uri>/checkpoint-40    <uri>/checkpoint-80    ...    and once the run is finished, in their place:    <uri>/model

One URI holds one run: every copy's manifest tells what it trains (`identity`), field by field, and so does its
run.json, which arrives first: what a push left that was cut off is known by it. What is called a checkpoint or the
model there and is not known as this run's is never written over nor removed: such a URI is refused.

A copy counts once its store has read it back. Training never waits for a store and never dies of one: a thread pushes
the newest checkpoint, and before it the best one that it knows, which the model will be made of; what is superseded
meanwhile is not pushed. The finished model supersedes them all; a run that is called again once it is finished sends it
where it is not there.
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

from pipelines.infra import manifest, stores
from pipelines.infra.errors import LabError
from pipelines.infra.parallel import process_pool
from pipelines.infra.stores import sealed as sealed_folder
from pipelines.infra.stores.sealed import Damaged
from pipelines.recipes import differences
from pipelines.training.checkpoints import sealed as sealed_checkpoints

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


PATIENCE_S = 900.0
"""The longest that a run waits at its end for what is not copied yet."""
_PAUSES_S = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Until a push that failed is tried again; a new checkpoint is tried at once."""
LAST_PAUSES_S = (5.0, 15.0, 45.0)
"""The same at the end of a run; after the last one it is given up."""
SHARE = 0.02
"""Of the machine's processor time: after each copy the thread rests so long that it takes no more while training."""

MODEL = 10**9
"""The finished model among the steps: newer than every checkpoint."""


class OtherRun(LabError):
    """The URI holds another run."""


@dataclass(frozen=True)
class Kept:
    """What of a run lay at its URI when it ended."""

    uri: str
    there: tuple[str, ...]
    """Names of the checkpoints that are there, or of the model, whole and read back."""
    missing: tuple[str, ...]
    """Those that should be there and are not."""
    reason: str
    """Why not: the last refusal."""

    def __str__(self) -> str:
        if not self.there:
            return f"NOTHING of this run is kept at {self.uri}: {self.reason or 'no checkpoint was made'}"
        if self.missing:
            return f"NOT kept at {self.uri}: {_and(self.missing)} ({self.reason}). There is {_and(self.there)}"
        return f"kept at {self.uri}: {_and(self.there)}"


class Shelf:
    """What of one run lies below `uri`, as its store has it. Every method may raise LabError."""

    def __init__(self, uri: str, identity: dict[str, Any]):
        self.uri, self.identity, self.store = uri.rstrip("/"), identity, stores.open_store(uri)

    def look(self) -> dict[int, int]:
        """Step to best step of every finished copy; OtherRun, naming the fields, where one is of another run."""
        found = {}
        for step, uri in self._named():
            if (facts := self._refuse_other(uri)) is None:
                logger.info(f"skipping {uri}: unfinished or damaged")
            else:
                found[step] = facts.get("best_step") or step
        return found

    def bring(self, step: int, best: int, there: set[int], run: Path) -> Path:
        """Fetch what was copied, and the best checkpoint that it knows, into the run's folder; where it lies then.

        Damaged where either is not whole.
        """
        for needed in dict.fromkeys((best, step)):
            target = _place(run, needed)
            if manifest.problem(target) is None:
                continue
            if needed not in there:
                raise Damaged(f"it needs {target.name}, which is not there")
            arrived = self._fetch(target.name, run / "fetched")
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            arrived.rename(target)
        shutil.rmtree(run / "fetched", ignore_errors=True)
        return _place(run, step)

    def push(self, folder: Path) -> None:
        """Publish what was sealed just now: it is not read once more before, which takes as long again.

        OtherRun where something else lies in its place.
        """
        self._refuse_other(f"{self.uri}/{folder.name}")
        self.store.publish(folder, f"{self.uri}/{folder.name}", thorough=False)

    def tidy(self, kept: set[int], newest: int) -> None:
        """Remove this run's older checkpoints but `kept`, finished or not; another machine may be at newer ones."""
        for step, uri in self._named():
            if step < newest and step not in kept and self._is_ours(uri):
                self.store.remove(uri)

    def _refuse_other(self, uri: str) -> dict[str, Any] | None:
        """The facts of the finished copy at `uri`, None where it is unfinished; OtherRun where it is not this run's."""
        facts = self.store.facts(uri)
        found = self.store.note(uri) if facts is None else facts.get("identity") or {}
        if found is None:
            raise OtherRun(
                f"{uri} is unfinished and holds files that are not known as this run's (there is no "
                f"{sealed_folder.NOTE}): "
                "name another URI, or take that folder away if nobody needs it"
            )
        unlike = differences(self.identity, found) if found or facts else []
        if unlike:
            raise OtherRun(
                f"{self.uri} holds another run: {'; '.join(unlike)}. Name another URI, or go back to that recipe"
            )
        return facts

    def _is_ours(self, uri: str) -> bool:
        """Whether what lies there, finished or not, tells that it is this run's."""
        facts = self.store.facts(uri)
        found = self.store.note(uri) if facts is None else facts.get("identity")
        return bool(found) and not differences(self.identity, found)

    def _named(self) -> list[tuple[int, str]]:
        """Steps and URIs of what is called a checkpoint or the model there, finished or not."""
        found = ((Path(uri.partition("@")[0]), uri) for uri in self.store.below(self.uri))
        return sorted(
            (_step(path), uri) for path, uri in found if sealed_checkpoints.is_named(path) or path.name == "model"
        )

    def _fetch(self, name: str, into: Path) -> Path:
        try:
            return self.store.fetch(f"{self.uri}/{name}", into=into)
        except Damaged:  # perhaps on the way only
            return self.store.fetch(f"{self.uri}/{name}", into=into)


class CheckpointMirror:
    """The thread that copies one run's checkpoints; a context around training that ends with the last tries."""

    def __init__(self, uri: str, run: Path, identity: dict[str, Any], keep: int):
        self.shelf, self.keep = Shelf(uri, identity), keep
        self.run, self.aside = run, run / "unsent"
        self._changed = threading.Condition()
        self._there: dict[int, int] | None = None
        """Step to best step of what is at the URI; None until it was looked at."""
        self._offered: dict[int, Path] = {}
        """Step to the folder that it is pushed from."""
        self._best_of: dict[int, int] = {}
        self._wanted: tuple[int, ...] = ()
        self._pushing: int | None = None
        self._reason, self._failures, self._due, self._rested = "", 0, 0.0, 0.0
        self._ending = self._dropped = False
        self._lines: collections.deque[str] = collections.deque()
        shutil.rmtree(self.aside, ignore_errors=True)

    def go_on_from(self, last: Path | None) -> Path | None:
        """What to go on from: the newest whole copy at the URI, or `last`, which is here, if it is as new.

        Each is a checkpoint or the finished model, in the run's folder. Where nothing is here, a store that does not
        answer is an error: nobody should start anew without noticing.
        """
        try:
            newest = self._bring_newer(last)
        except OtherRun:
            raise
        except LabError as error:
            if last is None:
                raise
            logger.info(f"note: {error}. Going on with what is on this machine")
            newest = last
        if newest is None:
            logger.info(f"no checkpoint at {self.shelf.uri} yet: this run's checkpoints are copied there")
        else:
            self.offer(newest)
        return newest

    def offer(self, newest: Path) -> None:
        """Have a sealed checkpoint copied, and the best one that it knows, or the finished model.

        What it supersedes is copied no more.
        """
        step = _step(newest)
        best = manifest.read(newest).get("best_step") or step
        with self._changed:
            self._wanted, self._best_of[step] = tuple(dict.fromkeys((best, step))), best
            for wanted in self._wanted:
                if wanted not in (self._there or {}) and wanted not in self._offered:
                    self._hold(wanted)
            for superseded in self._offered.keys() - {*self._wanted, self._pushing}:
                self._let_go(superseded)
            self._due = 0.0
            self._changed.notify()

    def callback(self) -> TrainerCallback:
        """What the trainer calls: at every checkpoint, and to tell what the thread has to say."""
        from transformers import TrainerCallback

        copies = self

        class Copier(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if state.is_world_process_zero:
                    copies.offer(_place(copies.run, state.global_step))

            def on_step_end(self, args, state, control, **kwargs):
                copies.tell()

            def on_log(self, args, state, control, **kwargs):
                copies.tell()
                copies.tell_unsent()

        return Copier()

    def tell(self) -> None:
        """Tell what happened since the last call; the thread itself tells nothing, so that lines stay whole."""
        while self._lines:
            logger.info(self._lines.popleft())

    def tell_unsent(self) -> None:
        """Tell what is not at the URI yet, if anything."""
        with self._changed:
            unsent, pushing, reason = self._unsent(), self._pushing, self._reason
        if unsent:
            waiting = "it will be tried again" if reason else "it comes next"
            doing = f"{_name(pushing)} is being copied" if pushing else waiting
            logger.info(f"not at {self.shelf.uri} yet: {_and(map(_name, unsent))}; {doing}")

    def busy(self) -> bool:
        """Whether the thread is at work just now."""
        with self._changed:
            return self._pushing is not None

    def kept(self) -> Kept:
        """How things stand."""
        with self._changed:
            there, missing = (tuple(map(_name, steps)) for steps in (sorted(self._there or {}), self._unsent()))
            return Kept(self.shelf.uri, there, missing, self._reason)

    def __enter__(self) -> CheckpointMirror:
        self._thread = threading.Thread(target=self._work, name="copies of checkpoints", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """The last tries, within PATIENCE_S; none where the run was interrupted from outside."""
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
                f"waiting up to {PATIENCE_S / 60:.0f} min until {_and(map(_name, unsent))} is at {self.shelf.uri} "
                "(an interrupt ends the waiting, not the run)"
            )
        if waits:
            self._wait(time.monotonic() + PATIENCE_S)
        with self._changed:
            self._dropped = True
        self.tell()
        shutil.rmtree(self.aside, ignore_errors=True)
        logger.info(str(self.kept()))

    def _wait(self, until: float) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            while self._thread.is_alive() and time.monotonic() < until:
                self._thread.join(0.1)
                self.tell()
        if self._thread.is_alive():
            self._reason = self._reason or "the store had not taken it when the waiting was over"

    def _bring_newer(self, last: Path | None) -> Path | None:
        found, after = self.shelf.look(), _step(last) if last else 0
        newest = last
        for step in sorted((step for step in found if step > after), reverse=True):
            try:
                newest = self.shelf.bring(step, found[step], {*found}, self.run)
                break
            except Damaged as error:
                logger.info(f"skipping {_name(step)} at {self.shelf.uri}: {error}")
        reached = _step(newest) if newest else 0
        self._there = {step: best for step, best in found.items() if step <= reached}
        return newest

    def _hold(self, step: int) -> None:
        """Keep a checkpoint beyond its pruning, as hard links; where there are none, as long as it is there."""
        folder, held = _place(self.run, step), self.aside / _name(step)
        if manifest.problem(folder, thorough=False) is not None:
            return
        sealed_as, identity = manifest.read(folder), self.shelf.identity
        if sealed_as.get("identity") != identity or sealed_folder.NOTE not in sealed_as["files"]:
            # only once: told again, the model would look newer
            manifest.replace(folder, sealed_folder.NOTE, json.dumps(identity, indent=1).encode(), identity=identity)
        try:
            shutil.copytree(folder, held, copy_function=os.link)
        except OSError:
            shutil.rmtree(held, ignore_errors=True)
            held = folder
        self._offered[step] = held

    def _let_go(self, step: int) -> None:
        if (held := self._offered.pop(step)).parent == self.aside:
            shutil.rmtree(held, ignore_errors=True)

    def _unsent(self) -> list[int]:
        """What is offered and not at the URI; the best before the newest, which is of no use without it."""
        return [step for step in self._wanted if step not in (self._there or {}) and step in self._offered]

    # ---- in the thread

    def _work(self) -> None:
        while (step := self._next()) is not None:
            started = time.thread_time()
            try:
                self._push(step)
            except Exception as error:  # whatever a store or its client may raise, training goes on
                self._note_failure(step, error)
            rest_s = (time.thread_time() - started) / (SHARE * process_pool.cores())
            with self._changed:
                self._pushing, self._rested = None, time.monotonic() + rest_s

    def _next(self) -> int | None:
        """Wait for the next checkpoint to push; None when there will be none."""
        with self._changed:
            while True:
                unsent, now = self._unsent(), time.monotonic()
                over = self._ending and (not unsent or self._failures > len(LAST_PAUSES_S))
                if over or self._dropped:
                    return None
                due = self._due if self._ending else max(self._due, self._rested)
                if unsent and now >= due:
                    self._pushing = unsent[0]
                    return self._pushing
                self._changed.wait(due - now if unsent else None)

    def _push(self, step: int) -> None:
        started = time.monotonic()
        if self._there is None:
            there = self.shelf.look()
            with self._changed:
                self._there = {found: best for found, best in there.items() if found < step}
        self.shelf.push(self._offered[step])
        with self._changed:
            self._there[step] = self._best_of.get(step, step)
            self._let_go(step)
            self._failures, self._reason = 0, ""
            done = not self._unsent()
        self._lines.append(f"{_name(step)} is kept at {self.shelf.uri} ({time.monotonic() - started:.1f} s)")
        if done:
            self._tidy()

    def _tidy(self) -> None:
        """What is kept here is kept there: the model, or the newest checkpoints and the best that each knows."""
        newest = [MODEL] if MODEL in self._there else sorted(self._there)[-self.keep :]
        kept = {*newest} | {self._there[step] for step in newest}
        try:
            self.shelf.tidy(kept, newest[-1])
        except Exception as error:
            self._lines.append(f"note: older checkpoints stay at {self.shelf.uri}: {_words(error)}")
        else:
            with self._changed:
                self._there = {step: best for step, best in self._there.items() if step in kept}

    def _note_failure(self, step: int, error: Exception) -> None:
        with self._changed:
            self._reason = _words(error)
            pauses = LAST_PAUSES_S if self._ending else _PAUSES_S
            self._due = time.monotonic() + pauses[min(self._failures, len(pauses) - 1)]
            self._failures += 1
            if step not in self._wanted:
                self._let_go(step)
        self._lines.append(f"{_name(step)} is not kept at {self.shelf.uri}: {self._reason}")


def _name(step: int) -> str:
    return "model" if step == MODEL else f"checkpoint-{step}"


def _step(folder: Path) -> int:
    return MODEL if folder.name == "model" else sealed_checkpoints.step_of(folder)


def _place(run: Path, step: int) -> Path:
    return run / "model" if step == MODEL else run / "checkpoints" / _name(step)


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


def _words(error: Exception) -> str:
    """An error on one line; what is no LabError tells its kind, too."""
    words = " ".join(str(error).split())
    return words if isinstance(error, LabError) else f"{type(error).__name__}: {words}"
