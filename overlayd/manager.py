# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manager: what each command does, in terms of observing, planning and executing.

Used in-process by root.  One manager is for one thread.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overlayd import caller, mountinfo, ostree, overlayfs, plan, state
from overlayd.errors import OverlaydError, not_found
from overlayd.executor import Executor, Run
from overlayd.model import TAG_PREFIX, Overlay, Scope, State, check_name
from overlayd.mountinfo import own_mount
from overlayd.observer import Observer
from overlayd.progress import Progress
from overlayd.store import LAYER, storage_path, upper_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.cleanup import Action
    from overlayd.config import Config
    from overlayd.examine import Examined
    from overlayd.executor import Operation
    from overlayd.model import Record, Request
    from overlayd.mountinfo import Table
    from overlayd.overlayfs import Exchange
    from overlayd.targets import Place, Source


@dataclass(slots=True)
class Prepared:
    """An apply of which everything is done but what makes it visible."""

    executor: Executor
    done: Callable[[Run], Overlay]
    critical: str
    """Why the target is critical; empty if it is not."""

    @property
    def record(self) -> Record:
        """The record as it is by now."""
        return self.executor.run.record

    def commit(self) -> Overlay:
        """Attach the overlay.

        :raises OverlaydError: if that fails; then nothing is left.
        """
        run = self.executor.run
        try:
            self.executor.advance()
            return self.done(run)
        finally:
            run.close()

    def abandon(self) -> None:
        """Undo what was prepared."""
        self.executor.roll_back()
        self.executor.run.close()


@dataclass(frozen=True, slots=True)
class User:
    """Somebody other than root whose overlay it will be, and what it is to show."""

    owner: plan.Owner
    source: Source


def memory() -> int:
    """Return how much memory the machine has, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Manager(Observer):
    """Everything that can be done with overlays, for the calling process."""

    def __init__(
        self,
        config: Callable[[], Config],
        *,
        warn: Callable[[str], None],
        way: Exchange | None = None,
        trace: Callable[[str, Operation], None] | None = None,
        scope: Scope = Scope.SYSTEM,
    ) -> None:
        """Take the configuration when it is needed; report oddities to *warn*.

        *way* forces how a live mount is exchanged; *trace* is called around each operation.
        *scope* says who sees the overlays of the mount namespace that this process is in.

        :raises NoPermissionError: for callers other than root.
        """
        super().__init__(warn=warn)
        self._load = config
        self._config: Config | None = None
        self._way = way
        self._trace = trace
        self._scope = scope

    @property
    def config(self) -> Config:
        """The configuration, read once."""
        if self._config is None:
            self._config = self._load()
        return self._config

    def apply(self, request: Request, progress: Progress, user: User | None = None) -> Overlay:
        """Make an overlay, *user*'s if there is one, as :meth:`prepare` does.

        :raises OverlaydError: and then nothing is left of it.
        """
        return self.prepare(request, progress, user).commit()

    def prepare(self, request: Request, progress: Progress, user: User | None = None) -> Prepared:
        """Do everything of an apply but make it visible; the name and the place are taken.

        With a *user* the source is the one that he gives, within the limits that are his.

        :raises OverlaydError: and then nothing is left of it.
        """
        from overlayd import contents, ops, targets  # noqa: PLC0415  # other commands do not load them

        check_name(request.name)
        config = self.config
        self._store.ensure()
        if state.unfinished(self._store.remembered()):
            self._settled()
        seen = self._examine(request, progress, present=True, user=user)
        where = seen.place.place
        owner = plan.Owner(os.getuid(), caller.session_id()) if user is None else user.owner
        try:
            with self._store.locked():
                # Again and exactly, now that nobody else can take the name or the place.
                try:
                    plan.check_free(request.name, where, self._store.reserved(), config.overlays)
                except OverlaydError:
                    plan.check_free(request.name, where, self._settle(), config.overlays)
                targets.check_still_there(seen.place)
                identity = self._identity(owner)
                record = plan.new_record(request, where, seen.measure, identity, config)
                if user is not None:
                    plan.check_share(record, self._store.reserved(), config, memory())
                run = Run(
                    self._store, progress, record, self._way, source=seen.source, place=seen.place
                )
                steps = plan.plan_apply(record, where, seen.measure, seen.limits)
                executor = Executor(run, steps, self._trace)
                executor.advance(before=contents.MountStorage)
        except BaseException:
            seen.close()
            raise
        try:
            executor.advance(before=ops.Attach)
        except BaseException:
            run.close()
            raise
        return Prepared(executor, self._shown, seen.critical)

    def consider(self, request: Request, user: User) -> tuple[str, str]:
        """Check all of a user's apply that costs little.

        Return why TARGET is critical, if it is, and what the overlay would cover.

        :raises OverlaydError: for the first thing that is wrong.
        """
        check_name(request.name)
        self._store.ensure()
        seen = self._examine(request, Progress(), present=True, user=user)
        seen.place.close()
        return seen.critical, seen.place.place.mount_point

    def _examine(
        self, request: Request, progress: Progress, *, present: bool, user: User | None = None
    ) -> Examined:
        """Check all that needs no lock; *present* says that there is a world to ask for records."""
        from overlayd.examine import examine  # noqa: PLC0415  # for an apply alone

        def check_free(place: Place) -> None:
            if not present:
                return
            try:
                plan.check_free(request.name, place, self._store.remembered(), self.config.overlays)
            except OverlaydError:
                # Somebody else may have removed it since.
                plan.check_free(request.name, place, self._settled(), self.config.overlays)

        return examine(
            request,
            self.config,
            check_free,
            table=self._mounts.table(),
            progress=progress,
            warn=self._warn,
            given=None if user is None else user.source,
            private=self._scope is Scope.PRIVATE,
        )

    def _identity(self, owner: plan.Owner) -> plan.Identity:
        """Say who makes an overlay, and when."""
        return plan.Identity(
            uuid=str(uuid.uuid4()),
            boot_id=self._store.boot_id,
            owner=owner,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            deployment=str(booted) if (booted := ostree.booted()) and booted.name else None,
            scope=self._scope,
        )

    def describe(self, request: Request, progress: Progress, user: User | None = None) -> list[str]:
        """Say what an apply would do, having checked everything that can be checked.

        :raises OverlaydError: what the apply would raise.
        """
        seen = self._examine(request, progress, present=self._store.exists(), user=user)
        seen.close()
        where = seen.place.place
        owner = plan.Owner(os.getuid(), caller.session_id()) if user is None else user.owner
        record = plan.new_record(request, where, seen.measure, self._identity(owner), self.config)
        steps = plan.plan_apply(record, where, seen.measure, seen.limits)
        return [step.describe() for step in steps]

    def reset(
        self, name: str, version: int, progress: Progress | None = None, *, uuid: str | None = None
    ) -> Overlay:
        """Take an overlay back to *version*, without what was edited since.

        With a *uuid* only that overlay is meant, whoever has the name by now.

        :raises OverlaydError: and then it shows what it showed before.
        """

        def steps(overlay: Overlay, table: Table) -> tuple[Operation, ...]:
            return plan.plan_reset(overlay, version, plan.mounts_around(overlay, table))

        run = self._change(name, steps, progress, uuid)
        try:
            return self._shown(run)
        finally:
            run.close()

    def remove(
        self,
        name: str,
        *,
        lazy: bool = False,
        progress: Progress | None = None,
        uuid: str | None = None,
    ) -> Overlay:
        """Remove an overlay; with *lazy* also while programs use it.

        Returns it as it was, in state *draining* if something still uses it.  With a *uuid* only
        that overlay is meant, whoever has the name by now.

        :raises BusyError: if it is in use and not *lazy*, saying by whom.
        """

        def steps(overlay: Overlay, table: Table) -> tuple[Operation, ...]:
            record = overlay.record
            copied = len(table.tagged.get(record.uuid, [])) > 1
            around = plan.mounts_around(overlay, table)
            return plan.plan_remove(overlay, around, lazy=lazy, copied=copied)

        run = self._change(name, steps, progress, uuid)
        try:
            record = run.record
            self._mounts.note([], [storage_path(record.uuid), record.mount_point])
            state = State.DRAINING if run.draining else State.REMOVED
            return Overlay(record, state, None, None)
        finally:
            run.close()

    def _change(
        self,
        name: str,
        steps: Callable[[Overlay, Table], tuple[Operation, ...]],
        progress: Progress | None,
        uuid: str | None,
    ) -> Run:
        """Run planned *steps* on a live overlay under its lock; the caller closes the run."""
        record = state.by_name(check_name(name), self._observed())
        if uuid is not None and record.uuid != uuid:
            raise not_found(name)
        lock = self._store.lock(record)
        run = Run(self._store, progress or Progress(), record, self._way, lock=lock)
        try:
            # Whoever held the lock before may have changed or removed it.
            fresh = self._fresh(record)
            record = state.by_name(name, [fresh] if fresh is not None else [])
            run.record = record
            table = self._mounts.table()
            overlay = state.observe(record, table)
            Executor(run, steps(overlay, table), self._trace).advance()
        except BaseException:
            run.close()
            raise
        return run

    def _shown(self, run: Run) -> Overlay:
        """Return the overlay that a run has just attached, without reading the table again.

        It is attached: that something about it cannot be seen is no failure.
        """
        try:
            return self._seen(run)
        except OSError:
            return Overlay(run.record, State.ACTIVE, None, None)

    def _seen(self, run: Run) -> Overlay:
        record, tree = run.record, run.record.tree
        # By path: what arrived by propagation is a copy of the mount that was built.
        try:
            mount_id = mountinfo.top_mount_id(record.mount_point)
        except OSError:  # somebody covered a directory above in this very moment
            return state.with_storage(state.observe(record, mountinfo.read()))
        if tree is not None:
            places = [storage_path(record.uuid, part) for part in (LAYER, upper_name(tree.upper))]
            made = [own_mount(place, "tmpfs", overlayfs.STORAGE_SOURCE) for place in places]
            tag = f"{TAG_PREFIX}{record.uuid}"
            made.append(
                own_mount(record.mount_point, "overlay", tag, st_dev=tree.st_dev, mount_id=mount_id)
            )
            self._mounts.note(made, [storage_path(record.uuid), record.mount_point])
        return state.with_storage(Overlay(record, State.ACTIVE, mount_id, None))

    def limits(self, uid: int = 0) -> dict[str, tuple[int | None, int]]:
        """Return what *uid* has of each limit, None where nothing is counted, and how much he may.

        :raises OverlaydError: if the records cannot be read.
        """
        return plan.limits_of(uid, self._observed(), self.config, memory())

    def cleanup(self, *, dry_run: bool = False) -> list[Action]:
        """Remove what has no use any more, or with *dry_run* only say what that is.

        :raises OverlaydError: if the records cannot be read.
        """
        from overlayd import cleanup  # noqa: PLC0415  # for this command alone

        if not self._store.exists():
            return []
        return cleanup.clean(self._store, self._remove_lost, dry_run=dry_run)

    def _remove_lost(self, record: Record) -> None:
        """Remove an overlay whose mount is gone.

        :raises NotFoundError: if it is not, or the overlay is.
        """

        def steps(overlay: Overlay, _table: Table) -> tuple[Operation, ...]:
            if overlay.state is not State.LOST:
                raise not_found(record.name)
            return plan.plan_remove(overlay, (), lazy=False)

        self._change(record.name, steps, None, record.uuid).close()
