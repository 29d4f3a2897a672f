# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lines by which callers send their sources: sockets whose near end is the service's alone.

A pipe of the caller's will not do.  Whoever has an end of it can keep its lock for as long as he
likes (``splice`` from a terminal where nobody types does, on Linux 6.18), and then a reader hangs
in the kernel where not even SIGKILL ends it.  Of a socket pair that is made here the caller gets
the far end, and nothing that he does to that holds up the near one.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from itertools import count
from typing import Final

from overlayd.errors import NotFoundError, SpaceError

_UNUSED: Final = 30.0
"""Seconds after which a line on which nothing was asked for is given up."""


@dataclass(slots=True)
class _Line:
    near: socket.socket
    caller: str
    uid: int
    made: float


class Lines:
    """Lines that were handed out and not taken up yet; for several threads."""

    def __init__(self) -> None:
        """Begin with none."""
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._lines: dict[int, _Line] = {}

    def make(self, caller: str, uid: int, most: int) -> tuple[int, socket.socket]:
        """Make a line for *caller*, a unique name; return its number and the far end.

        :raises SpaceError: if the user has *most* of them that were not taken up.
        """
        now = time.monotonic()
        with self._lock:
            for number, line in [*self._lines.items()]:
                if now - line.made > _UNUSED:
                    self._lines.pop(number).near.close()
            if sum(line.uid == uid for line in self._lines.values()) >= most:
                message = f"you asked for {most} lines and sent nothing yet"
                raise SpaceError(message, hint="users.queued and users.copies in the configuration")
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            near.settimeout(0.0)
            number = next(self._numbers)
            self._lines[number] = _Line(near, caller, uid, now)
            return number, far

    def take(self, number: int, caller: str) -> int:
        """Return the near end of a line that was made for *caller*, as a descriptor to be closed.

        :raises NotFoundError: if there is none, or not any more.
        """
        with self._lock:
            line = self._lines.get(number)
            if line is None or line.caller != caller:
                message = "there is no such line to send a source by"
                raise NotFoundError(message, hint="OpenStream makes one; it is for one Apply, soon")
            return self._lines.pop(number).near.detach()

    def forget(self, caller: str) -> None:
        """Give up the lines of a caller who is gone."""
        with self._lock:
            for number, line in [*self._lines.items()]:
                if line.caller == caller:
                    self._lines.pop(number).near.close()

    def close(self) -> None:
        """Give up all."""
        with self._lock:
            for line in self._lines.values():
                line.near.close()
            self._lines.clear()
