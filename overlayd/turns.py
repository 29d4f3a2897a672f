# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose turn it is: calls of many users, so that none of them can keep the others waiting.

Each user has a queue of his own, of bounded length, and so many calls in ten seconds.  What only
looks is done by one thread, a call of each user in turn; what changes something has a thread of its
own, since it may wait for bytes or for a password, and so many of those per user.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from overlayd.errors import OverlaydError, SpaceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.config import UserLimits

    Job = Callable[[], None]

_WINDOW: Final = 10.0
"""Seconds in which calls are counted."""
_KEPT: Final = 4096
"""Users who are remembered though they have nothing to do; more are forgotten."""


@dataclass(slots=True)
class _Turn:
    """What one user has under way."""

    looks: deque[Job] = field(default_factory=deque)
    changes: deque[Job] = field(default_factory=deque)
    running: int = 0
    looking: int = 0
    called: deque[float] = field(default_factory=deque)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.looking or self.looks or self.changes)


class Turns:
    """The queues of all users; *limits* is asked each time, *idle* called when all is done."""

    def __init__(self, limits: Callable[[], UserLimits], idle: Callable[[], None]) -> None:
        """Begin with nobody."""
        self._limits = limits
        self._idle = idle
        self._users: dict[int, _Turn] = {}
        self._round: deque[int] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._looker = threading.Thread(target=self._look, name="look", daemon=True)
        self._looker.start()

    @property
    def busy(self) -> bool:
        """Whether any call is waiting or under way."""
        with self._changed:
            return any(turn.busy for turn in self._users.values())

    def look(self, uid: int, job: Job) -> None:
        """Have *job* done when it is its turn; it only looks.

        :raises SpaceError: if the user has too many calls waiting, or made too many.
        """
        with self._changed:
            turn = self._turn(uid)
            self._admit(uid, turn, turn.looks)
            turn.looks.append(job)
            if len(turn.looks) == 1:
                self._round.append(uid)
            self._changed.notify()

    def change(self, uid: int, job: Job) -> None:
        """Have *job* done on a thread of its own, now or when one of the user's has ended.

        :raises SpaceError: if the user has too many calls waiting, or made too many.
        """
        with self._changed:
            turn = self._turn(uid)
            self._admit(uid, turn, turn.changes)
            turn.changes.append(job)
            self._start(turn)

    def _turn(self, uid: int) -> _Turn:
        """Return what a user has under way; the caller holds the lock."""
        turn = self._users.get(uid)
        if turn is None:
            if len(self._users) >= _KEPT:
                self._users = {key: value for key, value in self._users.items() if value.busy}
            turn = self._users[uid] = _Turn()
        return turn

    def _admit(self, uid: int, turn: _Turn, queue: deque[Job]) -> None:
        """Count a call that is to wait in *queue*; the caller holds the lock."""
        if uid == 0:
            return
        limits, now = self._limits(), time.monotonic()
        while turn.called and turn.called[0] < now - _WINDOW:
            turn.called.popleft()
        if len(turn.called) >= limits.calls:
            message = f"{limits.calls} calls in {_WINDOW:.0f} seconds are as many as you may make"
            raise SpaceError(message, hint="users.calls in the configuration; try again later")
        if (waiting := len(queue)) >= limits.queued:
            message = f"{waiting} of your calls are waiting, and no more may"
            raise SpaceError(message, hint="users.queued in the configuration; try again later")
        turn.called.append(now)

    def _start(self, turn: _Turn) -> None:
        """Start what may be started; the caller holds the lock."""
        try:
            most = self._limits().copies
        except OverlaydError:  # what has been admitted is to end, one way or the other
            most = 1
        while turn.changes and turn.running < most:
            turn.running += 1
            job = turn.changes.popleft()
            threading.Thread(target=self._run, args=(turn, job), name="change", daemon=True).start()

    def _run(self, turn: _Turn, job: Job) -> None:
        try:
            job()
        finally:
            with self._changed:
                turn.running -= 1
                self._start(turn)
                self._changed.notify_all()
            self._idle()

    def _look(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._round or self._ended)
                if not self._round:
                    return
                uid = self._round.popleft()
                turn = self._users[uid]
                job = turn.looks.popleft()
                turn.looking += 1
                if turn.looks:
                    self._round.append(uid)
            try:
                job()
            finally:
                with self._changed:
                    turn.looking -= 1
                self._idle()

    def end(self, patience: float) -> bool:
        """Do what waits only to look, start no change any more, and wait for those under way.

        Returns whether all were done within *patience* seconds.
        """
        deadline = time.monotonic() + patience
        with self._changed:
            self._ended = True
            for turn in self._users.values():
                turn.changes.clear()
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: not any(turn.running for turn in self._users.values()),
                max(0.0, deadline - time.monotonic()),
            )
