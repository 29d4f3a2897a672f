# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations that take an overlay away, and who stands in their way."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from overlayd import holders, mountinfo, state
from overlayd import syscalls as sys
from overlayd.errors import BusyError, shown
from overlayd.executor import Step
from overlayd.model import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overlayd.executor import Run
    from overlayd.model import Record


@dataclass(frozen=True, slots=True)
class DropStorage(Step):
    """Unmount storage that is not needed any more."""

    which: str = ""

    def describe(self) -> str:
        """Say what the step does."""
        return f"unmount the storage {self.which}".rstrip()

    def apply(self, run: Run) -> None:
        """Unmount it; the kernel frees the memory when the last user is gone."""
        run.store.drop_storage(run.record.uuid, self.which)


@dataclass(frozen=True, slots=True)
class MarkRemoving(Step):
    """Note that the overlay is on its way out."""

    before: Record

    def describe(self) -> str:
        """Say what the step does."""
        return f"note that {self.before.name} is being removed"

    def apply(self, run: Run) -> None:
        """Write it."""
        run.write(self.before.with_(phase=Phase.REMOVING))

    def undo(self, run: Run) -> None:
        """Write the record as it was."""
        run.write(self.before)


@dataclass(frozen=True, slots=True)
class CheckUnused(Step):
    """Ask other mount namespaces, which a plain unmount does not ask.

    ``copied`` says that this namespace has a second mount of the overlay.
    """

    copied: bool

    def describe(self) -> str:
        """Say what the step does."""
        return "check that nobody in another mount namespace uses it"

    def apply(self, run: Run) -> None:
        """Look for copies of the mount, and only if there are any at every process.

        :raises BusyError: if one uses the overlay, naming it.
        """
        run.copied = self.copied or holders.mounts_elsewhere(run.record.uuid)
        if run.copied:
            check_unused(run.record)


@dataclass(frozen=True, slots=True)
class Detach(Step):
    """Unmount the overlay."""

    mount_point: str
    lazy: bool
    present: int
    decisive: ClassVar[bool] = True

    def describe(self) -> str:
        """Say what the step does."""
        how = "even if it is in use" if self.lazy else "if nobody uses it"
        return f"detach the overlay from {shown(self.mount_point)}, {how}"

    def apply(self, run: Run) -> None:
        """Unmount.

        :raises BusyError: if it is in use and not *lazy*, saying by whom; if the mount *present*
            is not what shows there any more.
        """
        state.check_on_top(run.record, {self.present})
        lazy = self.lazy
        for patience in (0.01, 0.05, 0.2, 0.0):
            try:
                sys.umount2(self.mount_point, sys.MNT_DETACH if lazy else 0)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return
            check_unused(run.record)
            if run.record.tree is not None and holders.runs_from(run.record.tree.fsid):
                # Whoever removes an overlay on /usr/bin may well run from it.
                lazy = True
                continue
            # Nobody to name: somebody looked at the mount for a moment, as 'list' does.
            time.sleep(patience)
        message = f"{run.record.name} is in use, and no process shows how"
        raise BusyError(message, hint="a loop device, a bind mount or a namespace; or use --lazy")


def check_unused(record: Record) -> None:
    """Refuse if a process uses the overlay, in any mount namespace.

    :raises BusyError: naming pid, command and path.
    """
    if record.tree is None:
        return
    users = holders.find(record.tree.fsid, record.mount_point)
    if users:
        named = ", ".join(
            f"{user.pid} ({shown(user.command)}) at {shown(user.path)}" for user in users[:5]
        )
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""  # noqa: PLR2004
        message = f"{record.name} is in use by {named}{more}"
        raise BusyError(message, hint="end them, or let them keep their old files with --lazy")


@dataclass(frozen=True, slots=True)
class Retire(Step):
    """Free the name; keep a note while somebody still uses what was detached.

    ``thorough`` says that nobody has asked yet whether somebody does.
    """

    thorough: bool

    def describe(self) -> str:
        """Say what the step does."""
        return "free the name"

    def apply(self, run: Run) -> None:
        """Drop the record, or turn it into the note."""
        record = run.record
        if (self.thorough or run.copied) and record.tree is not None:
            run.draining = in_use(record)
        if run.draining:
            run.write(record.with_(phase=Phase.DRAINING))
        else:
            run.store.drop(record.uuid)


def in_use(record: Record) -> bool:
    """Whether a process or a mount, here or in another namespace, holds the overlay."""
    if record.tree is None:
        return False
    return (
        record.uuid in mountinfo.read().tagged
        or bool(holders.find(record.tree.fsid, record.mount_point))
        or holders.mounts_elsewhere(record.uuid)
    )


def drained(records: Sequence[Record]) -> list[Record]:
    """Return the removed overlays that nothing uses any more."""
    return [record for record in records if record.phase is Phase.DRAINING and not in_use(record)]
