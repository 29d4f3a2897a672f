# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watching a long operation, and stopping it.

One object goes down into every loop that can take long.  The loop reports what it did; whoever
started the operation may look on, or ask it to stop.  Stopping is a flag and not an exception out
of nowhere, so that no system call's result is ever lost between the call and the note of it.
"""

from __future__ import annotations

from overlayd.errors import InterruptedByUserError


class Progress:
    """Counts of a running operation, and the wish that it stop."""

    def __init__(self) -> None:
        """Start at nothing done and no total known."""
        self.entries = 0
        self.size = 0
        self.total_entries = 0
        self.total_size = 0
        self._stop = False

    def stop(self) -> None:
        """Ask the operation to stop at its next step; safe in a signal handler."""
        self._stop = True

    @property
    def stopped(self) -> bool:
        """Whether the operation is to stop."""
        return self._stop

    def check(self) -> None:
        """Return if the operation may go on.

        :raises InterruptedByUserError: if it is to stop.
        """
        if self._stop:
            message = "interrupted; nothing is left behind"
            raise InterruptedByUserError(message)

    def expect(self, entries: int, size: int) -> None:
        """Announce a copy of *entries* entries and *size* bytes."""
        self.total_entries += entries
        self.total_size += size

    def close(self) -> None:
        """Stop showing anything."""

    def advance(self, entries: int, size: int) -> None:
        """Report *entries* and *size* bytes as copied, and check."""
        self.entries += entries
        self.size += size
        if self._stop:
            self.check()
