# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removing what has no use any more: lost overlays, orphaned mounts, records in quarantine."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from overlayd import mountinfo, reconcile, removal, state
from overlayd import syscalls as sys
from overlayd.errors import NotFoundError, OverlaydError, from_oserror, shown
from overlayd.model import Phase, State
from overlayd.store import QUARANTINE, quarantined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from overlayd.model import Record
    from overlayd.mountinfo import Mount, Table
    from overlayd.store import Store


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that was removed, or would be; ``failed`` says why it could not be."""

    kind: str
    subject: str
    text: str
    failed: str | None = None


def clean(store: Store, remove: Callable[[Record], object], *, dry_run: bool) -> list[Action]:
    """Remove everything that is provably overlayd's and of no use; say what it was.

    Others may change overlays meanwhile: what a record and the mount table seem to say together is
    looked at again when nobody is at work on it.  *remove* removes an overlay if it is lost.

    :raises OverlaydError: if the records cannot be read.
    """
    actions: list[Action] = []

    def act(action: Action, work: Callable[[], object]) -> None:
        if not dry_run:
            try:
                work()
            except (NotFoundError, FileNotFoundError):
                return  # somebody else did it
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
        if _is_lost(record, table) and _is_still_lost(store, record.uuid):
            text = f"{record.name}: its mount is gone from {shown(record.mount_point)}"
            act(Action("lost", record.name, text), lambda record=record: remove(record))  # type: ignore[misc]
    for record in removal.drained(records):
        text = f"{record.name}: nobody uses what was removed"
        act(Action("drained", record.name, text), lambda uuid=record.uuid: store.drop(uuid))  # type: ignore[misc]
    for mount in filter(reconcile.proven, reconcile.leftovers(table, records)):
        with _nobody_at_work(store, uuid := mount.tag or "") as free:
            if free and _is_left_over(store, mount):
                text = f"an overlay without a record on {shown(mount.mount_point)}"
                act(Action("orphan", uuid, text), lambda mount=mount: _detach(store, mount))  # type: ignore[misc]
    for name in quarantined():
        text = f"a record that could not be believed: {shown(name)}"
        act(
            Action("quarantine", name, text),
            lambda name=name: _delete(f"{QUARANTINE}/{name}"),  # type: ignore[misc]
        )
    return actions


@contextlib.contextmanager
def _nobody_at_work(store: Store, uuid: str) -> Iterator[bool]:
    """Say whether nobody works on an overlay, and keep it so."""
    try:
        lock = store.try_lock(uuid)
    except FileNotFoundError:
        yield True
        return
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _is_lost(record: Record, table: Table) -> bool:
    settled = record.phase is Phase.ACTIVE and record.pending is None
    return settled and state.observe(record, table).state is State.LOST


def _is_still_lost(store: Store, uuid: str) -> bool:
    with _nobody_at_work(store, uuid) as free:
        record = store.get(uuid) if free else None
        return record is not None and _is_lost(record, mountinfo.read())


def _is_left_over(store: Store, mount: Mount) -> bool:
    """Whether a mount still is; call while nobody is at work on its overlay."""
    record = store.get(mount.tag or "")
    found = reconcile.leftovers(mountinfo.read(), [] if record is None else [record])
    return mount in found


def _delete(path: str) -> None:
    """Delete whatever lay where a record should be."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _detach(store: Store, mount: Mount) -> None:
    """Unmount what is left over, and the storage that it showed."""
    try:
        sys.umount2(mount.mount_point)
    except OSError as error:
        raise from_oserror(error, f"unmounting {shown(mount.mount_point)}") from None
    store.drop_storage(mount.tag or "")
