# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a record and the mount table say together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from overlayd import mountinfo
from overlayd import syscalls as sys
from overlayd.errors import BusyError, not_found, shown
from overlayd.model import Overlay, Phase, State, Storage
from overlayd.store import LAYER, storage_path, upper_name

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from overlayd.model import Record
    from overlayd.mountinfo import Mount, Table


def by_name(name: str, present: Iterable[Record]) -> Record:
    """Return the record that has the name now.

    :raises NotFoundError: if there is none.
    """
    for record in present:
        if record.name == name and record.phase is not Phase.DRAINING:
            return record
    raise not_found(name)


def unfinished(records: Sequence[Record]) -> bool:
    """Whether any record looks as if an operation ran or had been cut short."""
    active = Phase.ACTIVE
    return any(
        (record.phase is not active and record.phase is not Phase.DRAINING)
        or record.pending is not None
        for record in records
    )


def attached(record: Record, table: Table) -> list[Mount]:
    """Return the mounts that carry the overlay's tag at its place."""
    return [
        mount
        for mount in table.tagged.get(record.uuid, [])
        if mount.mount_point == record.mount_point
    ]


def observe(record: Record, table: Table) -> Overlay:
    """Hold a record against the mount table."""
    if record.phase is Phase.DRAINING:
        return Overlay(record, State.DRAINING, None, None)
    mine = [
        mount
        for mount in attached(record, table)
        if record.tree is not None and mount.st_dev == record.tree.st_dev
    ]
    if not mine:
        return Overlay(record, State.LOST, None, None)
    # Where the mount beneath /usr is its peer, a copy of the overlay lies hidden at the same path.
    ids = {mount.mount_id for mount in mine}
    try:
        top = mountinfo.top_mount_id(record.mount_point)
    except OSError:
        top = 0
    if top in ids:
        return Overlay(record, State.ACTIVE, top, None)
    return Overlay(record, State.COVERED, mine[-1].mount_id, None)


def check_on_top(record: Record, mounts: Container[int]) -> None:
    """Refuse if what shows at the overlay's place is none of *mounts* now, or holds others' mounts.

    Mounts are given by their ids.  The kernel unmounts whatever is on top, and lazily all that is
    inside: so this is asked right before.

    :raises BusyError: saying so.
    """
    place = record.mount_point
    try:
        on_top = mountinfo.top_mount_id(place) in mounts
    except OSError:
        on_top = False
    within = mountinfo.read().within(place)
    if not on_top or any(m.mount_point != place and m.tag != record.uuid for m in within):
        message = f"somebody mounted or unmounted something at {shown(place)} meanwhile"
        raise BusyError(message, hint=f"see 'findmnt {shown(place)}', then try again")


def is_bare(mount_fd: int) -> bool:
    """Whether nothing is mounted on the mount *mount_fd*: what is would go with it."""
    own = sys.statx(mount_fd).mnt_id
    return all(mount.parent_id != own for mount in mountinfo.read())


def with_storage(overlay: Overlay) -> Overlay:
    """Add the figures of the writable storage, zeros where there is none."""
    tree = overlay.record.tree
    storage: Storage | None = Storage(0, 0, 0, 0)
    if tree is not None and not overlay.record.options.read_only:
        try:
            facts = sys.statfs(storage_path(overlay.record.uuid, upper_name(tree.upper)))
        except OSError:
            storage = None
        else:
            storage = None
            if facts.fsid == tree.fsid:  # else somebody unmounted it, and that is what lies beneath
                storage = Storage(
                    size_bytes=facts.size,
                    used_bytes=facts.size - facts.free,
                    inodes=facts.files,
                    used_inodes=facts.files - facts.ffree,
                )
    return replace(overlay, storage=storage)


def missing_storage(record: Record) -> list[str]:
    """Return the parts of an overlay's storage that somebody unmounted."""
    if record.tree is None:
        return []
    missing = []
    for part in (LAYER, upper_name(record.tree.upper)):
        try:
            mounted = sys.statx(sys.AT_FDCWD, storage_path(record.uuid, part)).mount_root
        except OSError:
            mounted = False
        if not mounted:
            missing.append(part)
    return missing
