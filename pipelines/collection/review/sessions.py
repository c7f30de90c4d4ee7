"""Sessions of a review: which clip each open page shows, and whether a decision is about that clip.

Every showing of a clip has a random token, which the page sends with each key and click. A decision with another token
is about a clip that is not on the page any more: it is refused, so that a double click or a late answer of the server
decides nothing that the reviewer has not seen.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from pipelines.collection.review.queue import Item, Queue
from pipelines.infra.errors import LabError

_MAX_SESSIONS = 10_000
"""The session that has done nothing for longest is forgotten; its page then has to be reloaded."""


class OutdatedClip(LabError):
    """A decision about a clip that is not on the page any more."""


@dataclass(frozen=True)
class Showing:
    """A clip on one page."""

    token: str
    item: Item


@dataclass
class _Session:
    """What one open page shows and has done."""

    showing: Showing | None = None
    earlier: str | None = None
    """Id of a clip that the reviewer went back to."""
    skipped: set[str] = field(default_factory=set)
    decided: list[str] = field(default_factory=list)
    """Ids of the clips that were decided on here, oldest first."""


class Sessions:
    """The open pages of a review. Thread-safe; a decision and the check of its token are one step."""

    def __init__(self, queue: Queue):
        self._queue, self._lock = queue, threading.RLock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    def show(self, session: str) -> Showing | None:
        """Return the clip that the page shows now; None if there is none left for it."""
        with self._lock:
            state = self._state(session)
            if state.earlier is not None:
                item = self._queue.items[state.earlier]
            else:
                item = self._queue.next(session, state.skipped)
            if item is None:
                state.showing = None
            elif state.showing is None or state.showing.item.id != item.id:
                state.showing = Showing(secrets.token_hex(8), item)
            return state.showing

    def item_on_page(self, session: str, token: str) -> Item:
        """Return the clip on the page. Raises OutdatedClip for an old token."""
        with self._lock:
            return self._shown(session, token)[1]

    def decide(self, session: str, token: str, verdict: str, after: str, reviewer: str) -> None:
        """Store a decision. Raises OutdatedClip for an old token, and LabError for what cannot be stored."""
        with self._lock:
            state, item = self._shown(session, token)
            self._queue.decide(item.id, verdict, after, reviewer)
            state.decided.append(item.id)
            state.showing = state.earlier = None

    def skip(self, session: str, token: str) -> None:
        """Leave a clip to others; this page does not show it again. Raises OutdatedClip for an old token."""
        with self._lock:
            state, item = self._shown(session, token)
            if state.earlier is None:
                state.skipped.add(item.id)
                self._queue.release(session)
            state.showing = state.earlier = None

    def back(self, session: str, token: str) -> bool:
        """Show the clip that was decided on before; a new decision replaces the old one. Return False without one.

        Raises OutdatedClip for an old token. An empty token is that of a page whose clips are all decided.
        """
        with self._lock:
            state = self._state(session)
            if token or state.showing is not None:
                self._shown(session, token)
            if not state.decided:
                return False
            self._queue.release(session)
            state.showing, state.earlier = None, state.decided.pop()
            return True

    def leave(self, session: str) -> None:
        """Offer the clip of a closed page to others. A page that comes back may still decide on it."""
        self._queue.release(session)

    def _shown(self, session: str, token: str) -> tuple[_Session, Item]:
        state = self._state(session)
        if state.showing is None or state.showing.token != token:
            raise OutdatedClip("this clip is not on the page any more: decide on the one that is")
        return state, state.showing.item

    def _state(self, session: str) -> _Session:
        state = self._sessions.setdefault(session, _Session())
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return state
