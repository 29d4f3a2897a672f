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
from overlayd.errors import OverlaydError
from overlayd.executor import Executor, Run
from overlayd.model import TAG_PREFIX, Overlay, State, check_name
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
    from overlayd.model import Request
    from overlayd.mountinfo import Table
    from overlayd.overlayfs import Exchange
    from overlayd.targets import Place


@dataclass(slots=True)
class Prepared:
    """An apply of which everything is done but what makes it visible."""

    executor: Executor
    done: Callable[[Run], Overlay]

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


class Manager(Observer):
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
        super().__init__(warn=warn)
        self._load = config
        self._config: Config | None = None
        self._way = way
        self._trace = trace

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
        from overlayd import ops, targets  # noqa: PLC0415  # other commands do not load them

        check_name(request.name)
        config = self.config
        self._store.ensure()
        if state.unfinished(self._store.remembered()):
            self._settled()
        seen = self._examine(request, progress, present=True)
        where = seen.place.place
        try:
            with self._store.locked():
                # Again and exactly, now that nobody else can take the name or the place.
                try:
                    plan.check_free(request.name, where, self._store.reserved(), config.overlays)
                except OverlaydError:
                    plan.check_free(request.name, where, self._settle(), config.overlays)
                targets.check_still_there(seen.place)
                record = plan.new_record(request, where, seen.measure, self._identity(), config)
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
        return Prepared(executor, self._shown)

    def _examine(self, request: Request, progress: Progress, *, present: bool) -> Examined:
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
        )

    def _identity(self) -> plan.Identity:
        """Say who makes an overlay, and when; uid and session as the kernel attests them."""
        return plan.Identity(
            uuid=str(uuid.uuid4()),
            boot_id=self._store.boot_id,
            owner=os.getuid(),
            session_id=caller.session_id(),
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            deployment=str(booted) if (booted := ostree.booted()) and booted.name else None,
        )

    def describe(self, request: Request, progress: Progress) -> list[str]:
        """Say what an apply would do, having checked everything that can be checked.

        :raises OverlaydError: what the apply would raise.
        """
        seen = self._examine(request, progress, present=self._store.exists())
        seen.close()
        where = seen.place.place
        record = plan.new_record(request, where, seen.measure, self._identity(), self.config)
        steps = plan.plan_apply(record, where, seen.measure, seen.limits)
        return [step.describe() for step in steps]

    def reset(self, name: str, version: int, progress: Progress | None = None) -> Overlay:
        """Take an overlay back to *version*, without what was edited since.

        :raises OverlaydError: and then it shows what it showed before.
        """

        def steps(overlay: Overlay, table: Table) -> tuple[Operation, ...]:
            return plan.plan_reset(overlay, version, plan.mounts_around(overlay, table))

        run = self._change(name, steps, progress)
        try:
            return self._shown(run)
        finally:
            run.close()

    def remove(self, name: str, *, lazy: bool = False, progress: Progress | None = None) -> Overlay:
        """Remove an overlay; with *lazy* also while programs use it.

        Returns it as it was, in state *draining* if something still uses it.

        :raises BusyError: if it is in use and not *lazy*, saying by whom.
        """

        def steps(overlay: Overlay, table: Table) -> tuple[Operation, ...]:
            record = overlay.record
            copied = len(table.tagged.get(record.uuid, [])) > 1
            around = plan.mounts_around(overlay, table)
            return plan.plan_remove(overlay, around, lazy=lazy, copied=copied)

        run = self._change(name, steps, progress)
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
    ) -> Run:
        """Run planned *steps* on a live overlay under its lock; the caller closes the run."""
        record = state.by_name(check_name(name), self._observed())
        lock = self._store.lock(record)
        run = Run(self._store, progress or Progress(), record, self._way, lock=lock)
        try:
            # Whoever held the lock before may have changed or removed it.
            fresh = self._store.get(record.uuid)
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
        """Return the overlay that a run has just attached, without reading the table again."""
        record, tree = run.record, run.record.tree
        # By path: what arrived by propagation is a copy of the mount that was built.
        mount_id = mountinfo.top_mount_id(record.mount_point)
        if tree is not None:
            places = [storage_path(record.uuid, part) for part in (LAYER, upper_name(tree.upper))]
            made = [own_mount(place, "tmpfs", overlayfs.STORAGE_SOURCE) for place in places]
            tag = f"{TAG_PREFIX}{record.uuid}"
            made.append(
                own_mount(record.mount_point, "overlay", tag, st_dev=tree.st_dev, mount_id=mount_id)
            )
            self._mounts.note(made, [storage_path(record.uuid), record.mount_point])
        return state.with_storage(Overlay(record, State.ACTIVE, mount_id, None))

    def cleanup(self, *, dry_run: bool = False) -> list[Action]:
        """Remove what has no use any more, or with *dry_run* only say what that is.

        :raises OverlaydError: if the records cannot be read.
        """
        from overlayd import cleanup  # noqa: PLC0415  # for this command alone

        if not self._store.exists():
            return []
        return cleanup.clean(self._store, self.remove, dry_run=dry_run)
