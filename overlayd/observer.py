# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking at the overlays there are.  Loads little, since ``list`` is to be quick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from overlayd import caller, state
from overlayd.errors import BusyError, NoPermissionError, NotFoundError, not_found
from overlayd.model import Overlay, Phase, State, check_name
from overlayd.mountinfo import Watcher
from overlayd.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.model import Record
    from overlayd.mountinfo import Table


_PATIENCE: Final = 0.5
"""Seconds that a look waits for a change under way."""
_WORLD_PATIENCE: Final = 2.0
"""Seconds that it waits to settle what is unfinished."""
_LOOKS: Final = 5


class Observer:
    """What can be seen of overlays; every look first finishes what a crash cut short."""

    def __init__(self, *, warn: Callable[[str], None]) -> None:
        """Report oddities to *warn*.

        :raises NoPermissionError: for callers other than root.
        """
        if not (caller.capable() or caller.owns_world()):
            message = "overlayd needs root"
            raise NoPermissionError(message, hint="run it with sudo")
        self._warn = warn
        self._store = Store(warn)
        self._mounts = Watcher()

    def status(self, name: str) -> Overlay:
        """Return one overlay.

        :raises NotFoundError: if there is none of this name.
        """
        record = state.by_name(check_name(name), self._observed())
        overlay = self._certain(record, self._mounts.table())
        if overlay is None:
            raise not_found(name)
        return state.with_storage(overlay)

    def _certain(self, record: Record, table: Table) -> Overlay | None:
        """Hold a record against a table read a moment later; None if it is gone.

        What does not fit together may be a change under way: then once more, under the lock.
        """
        overlay = state.observe(record, table)
        if overlay.state is State.ACTIVE and record.phase is Phase.ACTIVE:
            return overlay
        try:
            lock = self._store.lock(record, _PATIENCE)
        except NotFoundError:
            return None
        except BusyError as error:
            # It hangs, or was stopped: all the more reason to show what there is.
            self._warn(error.message)
            return self._at_work(record)
        try:
            fresh = self._fresh(record)
            if fresh is None or fresh.phase is Phase.DRAINING:
                return None
            return state.observe(fresh, self._mounts.table())
        finally:
            lock.release()

    def _fresh(self, record: Record) -> Record | None:
        """Return a record as it is now that its lock is held; None if there is no overlay.

        Whoever held the lock before may have been killed since the records were settled.  What is
        being prepared is locked a moment after its record is there, and dropped under the lock of
        all alone.
        """
        fresh = self._store.get(record.uuid)
        if fresh is None or fresh.phase is Phase.PREPARING:
            return None
        if not state.unfinished([fresh]):
            return fresh
        from overlayd import reconcile  # noqa: PLC0415  # rarely needed, and slow to load

        for text in reconcile.settle_one(self._store, record.uuid, self._mounts.table()):
            self._warn(text)
        return self._store.get(record.uuid)

    def _at_work(self, record: Record) -> Overlay | None:
        """Return an overlay that somebody works on: active as long as a tree of it is attached."""
        for _ in range(_LOOKS):  # a table read while it changes may miss a mount
            fresh = self._store.get(record.uuid)
            if fresh is None or fresh.phase is Phase.DRAINING:
                return None
            record = fresh
            if mounts := state.attached(record, self._mounts.table()):
                return Overlay(record, State.ACTIVE, mounts[-1].mount_id, None)
        if record.phase is Phase.REMOVING:
            return None  # what is left to do does not show
        return state.observe(record, self._mounts.table())

    def _settled(self) -> list[Record]:
        """Return the records, with everything finished that a crash cut short."""
        records = self._store.records()
        if state.unfinished(records):
            try:
                with self._store.locked(_WORLD_PATIENCE):
                    records = self._settle()
            except BusyError as error:
                # Looking is what tells which it is; and the next command will settle it.
                self._warn(f"{error.message}; {error.hint}")
        return records

    def _settle(self) -> list[Record]:
        """Do the same; the caller holds the store's lock."""
        records = self._store.records()
        if state.unfinished(records):
            from overlayd import reconcile  # noqa: PLC0415  # rarely needed, and slow to load

            for text in reconcile.settle(self._store, self._mounts.table):
                self._warn(text)
            records = self._store.records()
        return records

    def _observed(self) -> list[Record]:
        return self._settled() if self._store.exists() else []

    # Last, as the name hides the type within the class from here on.
    def list(self, *, draining: bool = False) -> list[Overlay]:
        """Return every overlay, by name; with *draining* also what is removed but still used.

        :raises OverlaydError: if the records cannot be read.
        """
        records = self._observed()
        table = self._mounts.table()
        found = [
            state.with_storage(overlay)
            for record in records
            if record.phase in {Phase.ACTIVE, Phase.REMOVING}
            and (overlay := self._certain(record, table)) is not None
        ]
        if draining:
            from overlayd import removal  # noqa: PLC0415  # only for this option

            gone = removal.drained(records)
            found += [
                state.observe(record, table)
                for record in records
                if record.phase is Phase.DRAINING and record not in gone
            ]
            for record in gone:
                self._store.drop(record.uuid)
        return sorted(found, key=lambda overlay: overlay.record.name)
