# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one executor: runs operations in order and, when one fails, undoes them in reverse.

An operation describes itself, applies itself and undoes itself.  ``undo`` is also called for the
operation that failed, and copes with its being half done.  Once a *decisive* operation is done the
change has happened: nothing is undone any more, and what a failure or a crash leaves open after
that, the next command finishes.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from overlayd.errors import OverlaydError, SpaceError, from_oserror

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.model import Record, Tree
    from overlayd.overlayfs import Exchange
    from overlayd.progress import Progress
    from overlayd.store import Lock, Store
    from overlayd.targets import OpenPlace, Source

_SIGNALS: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(slots=True)
class Run:
    """What the operations of one change share while they run."""

    store: Store
    progress: Progress
    record: Record
    way: Exchange | None = None
    lock: Lock | None = None
    source: Source | None = None
    place: OpenPlace | None = None
    base_fd: int = -1
    base_mount_fd: int = -1
    base_name: str = ""
    base_staged: bool = False
    overlay_fd: int = -1
    built: Tree | None = None
    attached: bool = False
    copied: bool = False
    draining: bool = False

    def write(self, record: Record) -> None:
        """Write *record* and make it the one that counts."""
        self.store.write(record)
        self.record = record

    def close(self) -> None:
        """Close every descriptor; a mount that was not attached is gone with it."""
        for fd in (self.overlay_fd, self.base_fd, self.base_mount_fd):
            if fd >= 0:
                os.close(fd)
        self.overlay_fd = self.base_fd = self.base_mount_fd = -1
        for thing in (self.source, self.place):
            if thing is not None:
                thing.close()
        self.source = self.place = None
        if self.lock is not None:
            self.lock.release()


class StaysError(Exception):
    """What was done cannot be taken back now; the next command finishes it."""


class Operation(Protocol):
    """One step."""

    decisive: ClassVar[bool]

    def describe(self) -> str:
        """Say what the step does, for people."""

    def apply(self, run: Run) -> None:
        """Do it."""

    def undo(self, run: Run) -> None:
        """Take back what was done of it, all or part.

        :raises StaysError: if it has to stay as it is, and all that came before it with it.
        """


class Step:
    """What most operations share: not decisive, and nothing to undo."""

    decisive: ClassVar[bool] = False

    def undo(self, run: Run) -> None:
        """Nothing to take back."""


@dataclass(slots=True)
class Executor:
    """Runs operations in order and, if one fails, undoes in reverse."""

    run: Run
    operations: Sequence[Operation]
    trace: Callable[[str, Operation], None] | None = None
    _begun: int = field(default=0)
    _decided: bool = field(default=False)

    def advance(self, before: type | None = None) -> None:
        """Run the operations not yet run, up to the first of type *before*.

        :raises OverlaydError: what the failed operation raised; all before it is undone.
        """
        while self._begun < len(self.operations):
            operation = self.operations[self._begun]
            if before is not None and isinstance(operation, before):
                return
            try:
                if not self._decided:
                    self.run.progress.check()
                self._begun += 1
                self._point("before", operation)
                operation.apply(self.run)
                self._decided |= operation.decisive
                self._point("after", operation)
            except BaseException as error:
                if not self._decided:
                    self.roll_back()
                if isinstance(error, OSError):
                    raise _translate(error, operation, decided=self._decided) from error
                raise

    def _point(self, when: str, operation: Operation) -> None:
        if self.trace is not None:
            self.trace(when, operation)

    def roll_back(self) -> None:
        """Undo everything begun, the last first; no signal comes between."""
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            while self._begun:
                self._begun -= 1
                operation = self.operations[self._begun]
                self._point("undo", operation)
                # The first cause is what the caller hears; what cannot be undone now is
                # finished by the next command, which finds the record.
                try:
                    operation.undo(self.run)
                except StaysError:
                    self._begun = 0
                except (OSError, OverlaydError):
                    continue
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _translate(error: OSError, operation: Operation, *, decided: bool) -> OverlaydError:
    hint = "what was asked for is done; the next command finishes the rest" if decided else None
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        message = f"no space left while trying to {operation.describe()}"
        hint = hint or "see 'overlayd list' and the limits in the configuration"
        return SpaceError(message, hint=hint)
    return from_oserror(error, operation.describe(), hint=hint)
