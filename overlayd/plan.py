# SPDX-License-Identifier: LGPL-2.1-or-later
"""The planner: from a request and what was observed to a tuple of operations.

Pure.  What is refused is refused here, before anything is done; what the kernel alone can refuse
is left to the operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd.errors import (
    BusyError,
    ExistsError,
    NotFoundError,
    RefusedError,
    SpaceError,
    shown,
)
from overlayd.model import Layer, Overlay, Phase, Record, Scope, State, Tree, human_size, is_within
from overlayd.places import USR
from overlayd.store import LAYER, upper_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.model import Request
    from overlayd.mountinfo import Mount, Table
    from overlayd.targets import Place
    from overlayd.walker import Limits, Measure

_SPARE_INODES: Final = 16
_MAX_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose overlay it will be, as the kernel or the bus attests."""

    uid: int
    session_id: int | None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a new overlay's record says of its maker and its moment."""

    uuid: str
    boot_id: str
    owner: Owner
    created_at: str
    deployment: str | None
    scope: Scope = Scope.SYSTEM


def check_free(name: str, place: Place, present: Sequence[Record], limit: int) -> None:
    """Refuse a name or a place that is taken, by components of the path.

    :raises ExistsError: naming the overlay that is in the way.
    :raises SpaceError: if there are as many overlays as there may be.
    """
    point = place.mount_point
    inside = f"{point}/"
    above = {point}
    while len(point) > 1:
        point = point.rpartition("/")[0] or "/"
        above.add(point)
    for record in present:
        other = record.mount_point
        if not (record.name == name or other in above or other.startswith(inside)):
            continue
        if record.phase is Phase.DRAINING:
            continue
        if record.name == name:
            doing = " (another command is applying it)" if record.phase is Phase.PREPARING else ""
            message = f"there is an overlay {name!r} already{doing}"
            raise ExistsError(message, hint=f"it lies on {shown(other)}")
        raise _nesting(place, record)
    if len(present) < limit:
        return
    count = sum(record.phase is not Phase.DRAINING for record in present)
    if count >= limit:
        message = f"there are {count} overlays, as many as there may be"
        raise SpaceError(message, hint="limits.overlays in the configuration")


def _nesting(place: Place, record: Record) -> ExistsError:
    point, other = place.mount_point, record.mount_point
    if point == other:
        fault = f"overlay {record.name!r} lies on {shown(point)} already"
    else:
        relation = "inside" if is_within(point, other) else "around"
        fault = (
            f"the mount would lie on {shown(point)},"
            f" {relation} that of overlay {record.name!r}, {shown(other)}"
        )
    message = f"TARGET {shown(place.target)}: {fault}"
    return ExistsError(message, hint="overlays do not nest; remove the other one first")


def check_mounts(place: Place, table: Table, *, private: bool = False) -> None:
    """Refuse a target that has mounts on it or beneath it, naming them.

    A *private* overlay may lie on one that everybody sees, which then shows through.

    ``/usr`` itself is a mount on every OSTree machine, and on many others.  What somebody stacked
    on it for a while (an extension, ``ostree admin unlock``) may go any time and is no base.

    :raises ExistsError: if one is an overlay of overlayd's, made since the records were read.
    :raises RefusedError: if there is another.
    """
    within = table.within(place.mount_point)
    if place.mount_point == USR and all(m.fstype != "overlay" for m in within):
        within = [mount for mount in within if mount.mount_point != USR]
    if private:
        within = [m for m in within if m.tag is None or m.mount_point != place.mount_point]
    if not within:
        return
    for mount in within:
        if mount.tag is not None:
            message = f"another overlay lies on {shown(mount.mount_point)}"
            hint = "remove it; if it has no name, 'overlayd cleanup' or umount --lazy"
            raise ExistsError(message, hint=hint)
    where = "is a mount point" if within[0].mount_point == place.mount_point else "has mounts in it"
    message = f"TARGET {shown(place.mount_point)} {where}: {_named(within)}"
    raise RefusedError(message, hint="overlayd covers nobody else's mounts")


def check_memory(measure: Measure, label: str, available: int, reserve: int) -> None:
    """Refuse a source that does not fit into the memory that is free, with both figures.

    :raises SpaceError: if it does not.
    """
    usable = max(0, available - reserve)
    if measure.size > usable:
        message = (
            f"{shown(label)} needs {human_size(measure.size)} of memory,"
            f" and {human_size(usable)} is free for it"
        )
        raise SpaceError(message, hint=f"{human_size(reserve)} is kept: limits.memory_reserve")


def check_share(record: Record, present: Sequence[Record], config: Config, memory: int) -> None:
    """Refuse a user's overlay for which he, or all together, would have too much.

    *memory* is all that the machine has, in bytes.

    :raises SpaceError: naming the limit, what is used of it, and where it is set.
    """
    used = limits_of(record.owner, present, config, memory)
    more = usage_of(record.owner, [record])
    for what, key, name, asked, write in (
        ("overlays of one user", "users.overlays", "overlays", 1, str),
        ("storage of one user", "users.bytes", "bytes", more.bytes, human_size),
        ("files of one user", "users.inodes", "inodes", more.inodes, str),
        ("storage of all", "limits.memory_share", "bytes_of_all", more.bytes, human_size),
    ):
        if name not in used:  # root has no limits of his own
            continue
        now, limit = used[name]
        if (now or 0) + asked > limit:
            message = (
                f"{what}: {write(now or 0)} of {write(limit)} in use, {write(asked)} asked for"
            )
            raise SpaceError(message, hint=f"{key} in the configuration; or remove an overlay")


def limits_of(
    uid: int, present: Sequence[Record], config: Config, memory: int
) -> dict[str, tuple[int | None, int]]:
    """Return what a user has of each limit, None where nothing is counted, and how much he may.

    *memory* is all that the machine has, in bytes.  Root has no limits of his own.
    """
    usage, users = usage_of(uid, present), config.users
    everybody: dict[str, tuple[int | None, int]] = {
        "bytes_of_all": (taken(present), memory * config.memory_share // 100),
        "overlays_of_all": (
            sum(record.phase is not Phase.DRAINING for record in present),
            config.overlays,
        ),
    }
    if uid == 0:
        return {
            "source_size": (None, config.source_size),
            "source_entries": (None, config.source_entries),
            "source_depth": (None, config.source_depth),
            "overlays_of_all": everybody["overlays_of_all"],
        }
    return {
        "overlays": (usage.overlays, users.overlays),
        "bytes": (usage.bytes, users.bytes),
        "inodes": (usage.inodes, users.inodes),
        "source_size": (None, users.source_size),
        "source_entries": (None, users.source_entries),
        "source_depth": (None, users.source_depth),
        "copies": (None, users.copies),
        "queued": (None, users.queued),
        "calls": (None, users.calls),
        **everybody,
    }


@dataclass(frozen=True, slots=True)
class Usage:
    """What overlays take together; ``bytes`` and ``inodes`` are what their storage may hold."""

    overlays: int
    bytes: int
    inodes: int


def usage_of(uid: int, present: Sequence[Record]) -> Usage:
    """Return what a user has, what is removed but still used counted."""
    own = [record for record in present if record.owner == uid]
    inodes = sum(r.inodes + sum(layer.entries for layer in r.layers) for r in own)
    return Usage(len(own), taken(own), inodes)


def taken(present: Sequence[Record]) -> int:
    """Return the bytes that the storage of all of them may take."""
    return sum(record.size + sum(layer.size for layer in record.layers) for record in present)


def new_record(
    request: Request, place: Place, measure: Measure, identity: Identity, config: Config
) -> Record:
    """Return the record of an overlay that is about to be made."""
    read_only = request.options.read_only
    return Record(
        uuid=identity.uuid,
        name=request.name,
        phase=Phase.PREPARING,
        boot_id=identity.boot_id,
        owner=identity.owner.uid,
        session_id=identity.owner.session_id,
        scope=identity.scope,
        source=request.source,
        target=place.target,
        mount_point=place.mount_point,
        entry=place.entry,
        created_at=identity.created_at,
        options=request.options,
        size=0 if read_only else request.size or config.upper_size,
        inodes=0 if read_only else config.upper_inodes,
        layers=(Layer(1, request.source, measure.entries, measure.size),),
        tree=None,
        pending=Tree(version=1, upper=1),
        deployment=identity.deployment,
    )


def plan_apply(
    record: Record, place: Place, measure: Measure, limits: Limits
) -> tuple[Operation, ...]:
    """Return what makes the overlay of *record*."""
    from overlayd import contents, ops  # noqa: PLC0415  # what one command needs, another does not load

    layer = record.layers[0]
    # Directories on the way to the target, the layer's own two, and room for what tmpfs charges
    # for attributes since Linux 6.6.
    inodes = measure.entries + measure.entries // 4 + len(place.prefix) + _SPARE_INODES
    inodes += 2 * sum(path.count("/") + 1 for path in record.options.writable_dirs)
    steps: list[Operation] = [
        ops.Reserve(record),
        contents.MountStorage(LAYER, max(measure.size, 4096), inodes),
        contents.FillLayer(
            record.source,
            place.prefix,
            limits,
            record.options.preserve_owner,
            measure.entries,
            layer.size,
            record.options.writable_dirs,
        ),
    ]
    tree = record.pending or Tree(version=1, upper=1)
    steps += _upper(record, tree)
    steps.append(ops.BuildOverlay(tree))
    if place.entry:
        steps.append(ops.ShowEntry(place.entry))
    steps += [ops.Attach(place.mount_point), ops.Commit()]
    return tuple(steps)


def _upper(record: Record, tree: Tree) -> list[Operation]:
    from overlayd import contents  # noqa: PLC0415  # as above

    # Of a read-only overlay the topmost directory stays empty.
    size, inodes = (4096, 8) if record.options.read_only else (record.size, record.inodes)
    return [
        contents.MountStorage(upper_name(tree.upper), size, inodes),
        contents.PrepareUpper(tree.upper),
    ]


def plan_reset(overlay: Overlay, version: int, around: Sequence[Mount]) -> tuple[Operation, ...]:
    """Return what takes the overlay to *version*, with nothing of the edits since.

    :raises NotFoundError: if there is no such version.
    :raises OverlaydError: if the overlay is in no state for it.
    """
    from overlayd import ops, removal  # noqa: PLC0415  # as above

    record = overlay.record
    if version != 0 and version not in {layer.version for layer in record.layers}:
        message = f"{record.name} has no version {version}"
        known = ", ".join(str(layer.version) for layer in record.layers)
        raise NotFoundError(message, hint=f"it has 0 (the base) and {known}")
    present = _in_place(overlay, around)
    tree = Tree(version=version, upper=present.upper + 1)
    steps: list[Operation] = [
        ops.Announce(tree),
        ops.OpenBase(record.mount_point, record.entry),
    ]
    steps += _upper(record, tree)
    steps.append(ops.BuildOverlay(tree))
    steps.append(ops.CloseBase())
    if record.entry:
        steps.append(ops.ShowEntry(record.entry))
    place, on_top = record.mount_point, overlay.mount_id or 0
    steps += [ops.PutBeneath(place, on_top), ops.DetachOld(place, on_top)]
    # The old storage before the record: until that is written the next command knows of it.
    return (*steps, removal.DropStorage(upper_name(present.upper)), ops.Commit())


def plan_remove(
    overlay: Overlay, around: Sequence[Mount], *, lazy: bool, copied: bool = False
) -> tuple[Operation, ...]:
    """Return what takes the overlay away; *copied* if this namespace has a second mount of it.

    :raises OverlaydError: if it is covered, or holds mounts of others.
    """
    from overlayd import removal  # noqa: PLC0415  # as above

    steps: list[Operation] = [removal.MarkRemoving(overlay.record)]
    if overlay.state is not State.LOST:
        _in_place(overlay, around)
        if not lazy:
            steps.append(removal.CheckUnused(copied))
        steps.append(removal.Detach(overlay.record.mount_point, lazy, overlay.mount_id or 0))
    # The storage first: as long as there is a record, the next command knows of it.  Of what
    # somebody else unmounted nobody knows yet who still uses it, or where it is now.
    thorough = lazy or overlay.state is State.LOST
    return (*steps, removal.DropStorage(), removal.Retire(thorough))


def _in_place(overlay: Overlay, around: Sequence[Mount]) -> Tree:
    """Return the tree that is attached, if the overlay can be worked on.

    :raises NotFoundError: if the mount is gone.
    :raises BusyError: if something is mounted over it or inside it.
    """
    record = overlay.record
    if overlay.state is State.LOST or record.tree is None:
        message = f"the mount of {record.name} is gone from {shown(record.mount_point)}"
        raise NotFoundError(message, hint=f"overlayd remove {record.name}")
    others = [mount for mount in around if mount.tag != record.uuid]
    if overlay.state is State.COVERED:
        message = f"something is mounted over {record.name}: {_named(others) or 'a parent of it'}"
        raise BusyError(message, hint="only when that is gone can the overlay be changed")
    if inside := [mount for mount in others if mount.mount_point != record.mount_point]:
        message = f"something is mounted inside {record.name}: {_named(inside)}"
        raise BusyError(message, hint="unmount that first")
    return record.tree


def _named(mounts: Sequence[Mount]) -> str:
    return ", ".join(
        f"{shown(mount.mount_point)} ({shown(mount.fstype)} of {shown(mount.source)})"
        for mount in mounts[:_MAX_NAMES]
    )


def mounts_around(overlay: Overlay, table: Table) -> list[Mount]:
    """Return what may stand in the way of a change: what covers the overlay, or lies inside."""
    if overlay.state is State.COVERED:
        return table.covering(overlay.record.mount_point)
    return table.within(overlay.record.mount_point)
