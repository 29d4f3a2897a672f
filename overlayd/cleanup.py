# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removing what has no use any more: lost overlays, orphaned mounts, records in quarantine."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from overlayd import mountinfo, reconcile, removal, state
from overlayd import syscalls as sys
from overlayd.errors import BusyError, OverlaydError, from_oserror
from overlayd.model import Phase, State, shown
from overlayd.store import QUARANTINE, quarantined

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.mountinfo import Mount
    from overlayd.store import Store


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that was removed, or would be; ``failed`` says why it could not be."""

    kind: str
    subject: str
    text: str
    failed: str | None = None


def clean(store: Store, remove: Callable[[str], object], *, dry_run: bool) -> list[Action]:
    """Remove everything that is provably overlayd's and of no use; say what it was.

    *remove* removes an overlay by its name.

    :raises OverlaydError: if the records cannot be read.
    """
    actions: list[Action] = []

    def act(action: Action, work: Callable[[], object]) -> None:
        if not dry_run:
            try:
                work()
            except OverlaydError as error:
                action = replace(action, failed=error.message)
            except OSError as error:
                action = replace(action, failed=from_oserror(error, "removing it").message)
        actions.append(action)

    if dry_run:
        done = reconcile.cut_short(store)
    else:
        with store.locked():
            done = reconcile.settle(store, mountinfo.read)
    actions += [Action("unfinished", "", text) for text in done]
    records = store.records()
    table = mountinfo.read()
    for record in records:
        overlay = state.observe(record, table)
        if record.phase is Phase.ACTIVE and overlay.state is State.LOST:
            text = f"{record.name}: its mount is gone from {shown(record.mount_point)}"
            act(Action("lost", record.name, text), lambda name=record.name: remove(name))  # type: ignore[misc]
    for record in removal.drained(records):
        text = f"{record.name}: nobody uses what was removed"
        act(Action("drained", record.name, text), lambda uuid=record.uuid: store.drop(uuid))  # type: ignore[misc]
    for mount in reconcile.leftovers(table, records):
        if reconcile.proven(mount):
            text = f"an overlay without a record on {shown(mount.mount_point)}"
            act(
                Action("orphan", mount.tag or "", text),
                lambda mount=mount: _detach_orphan(store, mount),  # type: ignore[misc]
            )
    for name in quarantined():
        text = f"a record that could not be believed: {shown(name)}"
        act(
            Action("quarantine", name, text),
            lambda name=name: _delete(f"{QUARANTINE}/{name}"),  # type: ignore[misc]
        )
    return actions


def _delete(path: str) -> None:
    """Delete whatever lay where a record should be."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _detach_orphan(store: Store, mount: Mount) -> None:
    try:
        sys.umount2(mount.mount_point)
    except OSError as error:
        raise from_oserror(error, f"unmounting {shown(mount.mount_point)}") from None
    uuid = mount.tag or ""
    try:
        lock = store.try_lock(uuid)
    except FileNotFoundError:
        return
    if lock is None:
        message = f"another command works on {uuid}"
        raise BusyError(message)
    try:
        store.drop_storage(uuid)
    finally:
        lock.release()
