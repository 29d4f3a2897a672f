# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager: what each command does, in terms of observing, planning and executing.

Used in-process by root.  One manager is for one thread.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from overlayd import cleanup, mountinfo, ops, ostree, plan, reconcile
from overlayd import syscalls as sys
from overlayd.errors import NoPermissionError, NotFoundError
from overlayd.examine import examine
from overlayd.executor import Executor, Run
from overlayd.model import Overlay, Phase, State, Storage, check_name
from overlayd.progress import Progress
from overlayd.store import Store, boot_id, not_found, storage_path, upper_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.cleanup import Action
    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.model import Record, Request
    from overlayd.mountinfo import Mount, Table
    from overlayd.overlayfs import Exchange

BASE: Final = 0
APPLIED: Final = 1
_NO_SESSION: Final = 0xFFFFFFFF


@dataclass(slots=True)
class Prepared:
    """An apply of which everything is done but what makes it visible."""

    executor: Executor

    def commit(self) -> Overlay:
        """Attach the overlay.

        :raises OverlaydError: if that fails; then nothing is left.
        """
        run = self.executor.run
        try:
            self.executor.advance()
            return _shown_now(run)
        finally:
            run.close()

    def abandon(self) -> None:
        """Undo what was prepared."""
        self.executor.roll_back()
        self.executor.run.close()


class Manager:
    """Everything that can be done with overlays, for the calling process."""

    def __init__(
        self,
        config: Callable[[], Config],
        *,
        warn: Callable[[str], None],
        way: Exchange | None = None,
        trace: Callable[[str, Operation], None] | None = None,
    ) -> None:
        """Take the configuration when it is needed; report oddities to *warn*.

        *way* forces how a live mount is exchanged; *trace* is called around each operation.

        :raises NoPermissionError: for callers other than root.
        """
        if os.geteuid() != 0:
            message = "overlayd needs root"
            raise NoPermissionError(message, hint="run it with sudo")
        self._load = config
        self._config: Config | None = None
        self._warn = warn
        self._way = way
        self._trace = trace
        self._store = Store(warn)

    @property
    def config(self) -> Config:
        """The configuration, read once."""
        if self._config is None:
            self._config = self._load()
        return self._config

    def apply(self, request: Request, progress: Progress) -> Overlay:
        """Make an overlay.

        :raises OverlaydError: and then nothing is left of it.
        """
        return self.prepare(request, progress).commit()

    def prepare(self, request: Request, progress: Progress) -> Prepared:
        """Do everything of an apply but make it visible; the name and the place are taken.

        :raises OverlaydError: and then nothing is left of it.
        """
        check_name(request.name)
        config = self.config
        self._store.ensure()
        present = self._settled()
        seen = examine(request, config, present, progress=progress, warn=self._warn)
        where = seen.place.place
        try:
            with self._store.locked():
                # Again, now that nobody else can take the name or the place.
                plan.check_free(request.name, where, self._store.records(), config.overlays)
                record = plan.new_record(request, where, seen.measure, _identity(), config)
                run = Run(
                    self._store, progress, record, self._way, source=seen.source, place=seen.place
                )
                steps = plan.plan_apply(record, where, seen.measure, seen.limits)
                executor = Executor(run, steps, self._trace)
                executor.advance(before=ops.MountStorage)
        except BaseException:
            seen.close()
            raise
        try:
            executor.advance(before=ops.Attach)
        except BaseException:
            run.close()
            raise
        return Prepared(executor)

    def describe(self, request: Request, progress: Progress) -> list[str]:
        """Say what an apply would do, having checked everything that can be checked.

        :raises OverlaydError: what the apply would raise.
        """
        config = self.config
        present = self._store.records() if self._store.exists() else []
        seen = examine(request, config, present, progress=progress, warn=self._warn)
        seen.close()
        where = seen.place.place
        record = plan.new_record(request, where, seen.measure, _identity(), config)
        steps = plan.plan_apply(record, where, seen.measure, seen.limits)
        return [step.describe() for step in steps]

    def status(self, name: str) -> Overlay:
        """Return one overlay.

        :raises NotFoundError: if there is none of this name.
        """
        record = plan.by_name(check_name(name), self._observed())
        overlay = self._certain(record, mountinfo.read())
        if overlay is None:
            raise not_found(name)
        return _with_storage(overlay)

    def _certain(self, record: Record, table: Table) -> Overlay | None:
        """Hold a record against a table read a moment later; None if it is gone.

        What does not fit together may be a change under way: then once more, under the lock.
        """
        overlay = reconcile.observe(record, table)
        if overlay.state is State.ACTIVE and record.phase is Phase.ACTIVE:
            return overlay
        try:
            lock = self._store.lock(record)
        except NotFoundError:
            return None
        try:
            fresh = self._store.get(record.uuid)
            if fresh is None or fresh.phase is Phase.DRAINING:
                return None
            return reconcile.observe(fresh, mountinfo.read())
        finally:
            lock.release()

    def reset(self, name: str, version: int, progress: Progress | None = None) -> Overlay:
        """Take an overlay back to *version*, without what was edited since.

        :raises OverlaydError: and then it shows what it showed before.
        """

        def steps(overlay: Overlay, inside: Sequence[Mount]) -> tuple[Operation, ...]:
            return plan.plan_reset(overlay, version, inside)

        run = self._change(name, steps, progress)
        try:
            return _shown_now(run)
        finally:
            run.close()

    def remove(self, name: str, *, lazy: bool = False, progress: Progress | None = None) -> Overlay:
        """Remove an overlay; with *lazy* also while programs use it.

        Returns it as it was, in state *draining* if something still uses it.

        :raises BusyError: if it is in use and not *lazy*, saying by whom.
        """

        def steps(overlay: Overlay, inside: Sequence[Mount]) -> tuple[Operation, ...]:
            return plan.plan_remove(overlay, inside, lazy=lazy)

        run = self._change(name, steps, progress)
        try:
            record = run.record
            state = State.DRAINING if run.draining else State.REMOVED
            return Overlay(record, state, None, None)
        finally:
            run.close()

    def _change(
        self,
        name: str,
        steps: Callable[[Overlay, Sequence[Mount]], tuple[Operation, ...]],
        progress: Progress | None,
    ) -> Run:
        """Run planned *steps* on a live overlay under its lock; the caller closes the run."""
        record = plan.by_name(check_name(name), self._observed())
        lock = self._store.lock(record)
        run = Run(self._store, progress or Progress(), record, self._way, lock=lock)
        try:
            # Whoever held the lock before may have changed or removed it.
            fresh = self._store.get(record.uuid)
            record = plan.by_name(name, [fresh] if fresh is not None else [])
            run.record = record
            table = mountinfo.read()
            overlay = reconcile.observe(record, table)
            planned = steps(overlay, table.within(record.mount_point))
            Executor(run, planned, self._trace).advance()
        except BaseException:
            run.close()
            raise
        return run

    def cleanup(self, *, dry_run: bool = False) -> list[Action]:
        """Remove what has no use any more, or with *dry_run* only say what that is.

        :raises OverlaydError: if the records cannot be read.
        """
        if not self._store.exists():
            return []
        return cleanup.clean(self._store, self.remove, dry_run=dry_run)

    def _settled(self) -> list[Record]:
        """Return the records, with everything finished that a crash cut short."""
        records = self._store.records()
        if reconcile.unfinished(records, self._store.storages()):
            with self._store.locked():
                for text in reconcile.settle(self._store, mountinfo.read()):
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
        table = mountinfo.read()
        found = [
            _with_storage(overlay)
            for record in records
            if record.phase in {Phase.ACTIVE, Phase.REMOVING}
            and (overlay := self._certain(record, table)) is not None
        ]
        if draining:
            gone = cleanup.drained(records)
            found += [
                reconcile.observe(record, table)
                for record in records
                if record.phase is Phase.DRAINING and record not in gone
            ]
            for record in gone:
                self._store.drop(record.uuid)
        return sorted(found, key=lambda overlay: overlay.record.name)


def _identity() -> plan.Identity:
    """Say who makes an overlay, and when; uid and session as the kernel attests them."""
    with open("/proc/self/sessionid", encoding="ascii") as file:
        session = int(file.read())
    with open("/proc/sys/kernel/random/uuid", encoding="ascii") as file:
        uuid = file.read().strip()
    deployment = ostree.booted()
    return plan.Identity(
        uuid=uuid,
        boot_id=boot_id(),
        owner=os.getuid(),
        session_id=None if session == _NO_SESSION else session,
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        deployment=None if deployment is None else str(deployment),
    )


def _shown_now(run: Run) -> Overlay:
    """Return the overlay that a run has just attached, without reading the table again."""
    mount_id = sys.statx(run.overlay_fd).mnt_id
    return _with_storage(Overlay(run.record, State.ACTIVE, mount_id, None))


def _with_storage(overlay: Overlay) -> Overlay:
    """Add the figures of the writable storage, zeros where there is none."""
    tree = overlay.record.tree
    storage: Storage | None = Storage(0, 0, 0, 0)
    if tree is not None and tree.upper:
        try:
            facts = sys.statfs(storage_path(overlay.record.uuid, upper_name(tree.upper)))
        except OSError:
            storage = None
        else:
            storage = Storage(
                size_bytes=facts.size,
                used_bytes=facts.size - facts.free,
                inodes=facts.files,
                used_inodes=facts.files - facts.ffree,
            )
    return replace(overlay, storage=storage)
