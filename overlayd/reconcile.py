# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finishing what a crash cut short: the first thing every command does.

Each overlay ends wholly there or wholly gone.  Only records whose lock is free are touched, as
the lock goes with the process that died.  What cannot be proven to be overlayd's is left alone.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from overlayd import mountinfo, state
from overlayd import syscalls as sys
from overlayd.errors import BusyError, from_oserror
from overlayd.model import UUID, Phase, Record, is_within
from overlayd.places import ROOTS
from overlayd.store import storage_path, upper_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.model import Tree
    from overlayd.mountinfo import Mount, Table
    from overlayd.store import Store


def settle(store: Store, look: Callable[[], Table]) -> list[str]:
    """Finish or drop every operation that was cut short; say what was done.

    Call under the store's lock.  *look* reads the mount table, for each when it is locked: whoever
    was at work on it may have been killed a moment ago.

    :raises OverlaydError: if the kernel refuses an unmount.
    """
    done: list[str] = []
    records = {record.uuid: record for record in store.records()}
    for uuid in {*records, *store.storages()}:
        record = records.get(uuid)
        if record is None:
            if UUID.fullmatch(uuid) is None:
                continue
        elif record.phase in {Phase.ACTIVE, Phase.DRAINING} and record.pending is None:
            continue
        try:
            lock = store.try_lock(uuid)
        except FileNotFoundError:
            lock = None
            if record is None:
                continue
        except NotADirectoryError:
            continue  # somebody put something else there
        else:
            if lock is None:
                continue  # somebody is at work on it
        try:
            done += settle_one(store, uuid, look())
        finally:
            if lock is not None:
                lock.release()
    return done


def settle_one(store: Store, uuid: str, table: Table) -> list[str]:
    """Do the same for one overlay, under its lock, with a table read since that was taken.

    :raises OverlaydError: if the kernel refuses an unmount.
    """
    try:
        # The record may have been finished between reading it and taking the lock.
        if (fresh := store.get(uuid)) is None:
            return _drop_orphan(store, uuid, table)
        return _settle_one(store, fresh, table)
    except OSError as error:
        raise from_oserror(error, f"finishing what was left of {uuid}") from None


def cut_short(store: Store) -> list[str]:
    """Say what :func:`settle` would look at; changes nothing."""
    found = []
    for record in store.records():
        if not state.unfinished([record]):
            continue
        try:
            lock = store.try_lock(record.uuid)
        except (FileNotFoundError, NotADirectoryError):
            lock = None
        else:
            if lock is None:
                continue  # somebody is at work on it
            lock.release()
        found.append(f"{record.name}: an operation that was cut short")
    return found


def _drop_orphan(store: Store, uuid: str, table: Table) -> list[str]:
    """Unmount storage that no record speaks for, unless an overlay still shows it."""
    if not os.path.exists(storage_path(uuid)):
        return []  # both went a moment ago
    if uuid in table.tagged:
        return []  # the record was lost, the overlay was not: cleanup's business
    store.unstage(uuid)
    store.drop_storage(uuid)
    store.drop(uuid)
    return [f"unmounted storage left by {uuid}"]


def _settle_one(store: Store, record: Record, table: Table) -> list[str]:
    store.unstage(record.uuid)
    tree = record.tree
    attached = state.attached(record, table)
    devices = {mount.st_dev for mount in attached}
    old = {m.mount_id for m in attached if tree is not None and m.st_dev == tree.st_dev}
    if record.phase is Phase.REMOVING:
        if old:
            store.write(record.with_(phase=Phase.ACTIVE))
            return [f"{record.name}: its removal had not begun; it stays"]
        stored = os.path.exists(storage_path(record.uuid))
        _forget(store, record)
        # Without storage whoever removes it may be at work still, and about to do the same.
        return [f"{record.name}: finished its removal"] if stored else []
    if record.pending is None:
        return []
    new = devices - {tree.st_dev if tree is not None else 0}
    if new:
        return _finish(store, record, record.pending, new.pop(), old)
    if record.phase is Phase.PREPARING:
        _forget(store, record)
        return [f"{record.name}: dropped, it had not been attached"]
    store.drop_storage(record.uuid, upper_name(record.pending.upper))
    store.write(record.with_(pending=None))
    return [f"{record.name}: its reset had not begun; it stays as it was"]


def _finish(store: Store, record: Record, pending: Tree, st_dev: int, old: set[int]) -> list[str]:
    """Let the tree that is attached already be the one that counts."""
    if old:
        # Both are attached: the new one beneath, the old one on top.
        try:
            state.check_on_top(record, old)
        except BusyError:
            return []  # not while mounts of others would go with it
        sys.umount2(record.mount_point, sys.MNT_DETACH)
    if record.tree is not None:
        store.drop_storage(record.uuid, upper_name(record.tree.upper))
    fsid = sys.statfs(storage_path(record.uuid, upper_name(pending.upper))).fsid
    tree = replace(pending, st_dev=st_dev, fsid=fsid)
    store.write(record.with_(phase=Phase.ACTIVE, tree=tree, pending=None))
    return [f"{record.name}: finished what was cut short"]


def _forget(store: Store, record: Record) -> None:
    store.drop_storage(record.uuid)
    store.drop(record.uuid)


def leftovers(table: Table, records: Sequence[Record]) -> list[Mount]:
    """Return the mounts that carry overlayd's tag while no record accounts for them."""
    known = {record.uuid: record for record in records}
    found = []
    for uuid, mounts in table.tagged.items():
        record = known.get(uuid)
        if record is not None and (record.phase is not Phase.ACTIVE or record.pending is not None):
            continue  # somebody is at work on it
        tree = None if record is None else record.tree
        found += [
            mount
            for mount in mounts
            # What services are shown of root's private overlays has its record elsewhere.
            if not is_within(mount.mount_point, ROOTS)
            and (tree is None or mount.st_dev != tree.st_dev)
        ]
    return found


def proven(mount: Mount) -> bool:
    """Whether a mount with overlayd's tag really shows storage of overlayd's.

    A tag can be forged by anybody who can mount; the id of the storage's filesystem cannot.
    """
    tag = mount.tag or ""
    if UUID.fullmatch(tag) is None:
        return False
    top = storage_path(tag)
    try:
        if mountinfo.top_mount_id(mount.mount_point) != mount.mount_id:
            return False
        shown_by = sys.statfs(mount.mount_point).fsid
        parts = os.listdir(top)
    except OSError:
        return False
    for part in parts:
        with contextlib.suppress(OSError):
            if sys.statfs(f"{top}/{part}").fsid == shown_by:
                return True
    return False
