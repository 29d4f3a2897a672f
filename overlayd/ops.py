# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations: the steps that every change consists of, as values, and the one executor.

An operation describes itself, applies itself and undoes itself.  ``undo`` is also called for the
operation that failed, and copes with its being half done.  Operations marked ``final`` come after
the change is committed: they are not undone, and what they leave after a crash the next command
finishes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from overlayd import holders, layers, overlayfs, targets
from overlayd import syscalls as sys
from overlayd.errors import BusyError, KernelError, OverlaydError, SpaceError, from_oserror
from overlayd.model import Phase, Record, SourceKind, Tree, human_size, shown
from overlayd.store import Lock, Store, storage_path, upper_name
from overlayd.walker import OPEN_DIRECTORY, Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.overlayfs import Exchange
    from overlayd.progress import Progress
    from overlayd.targets import OpenPlace, OpenSource

LAYER: Final = "layer"
TREE: Final = "tree"
EMPTY: Final = "empty"
_SIGNALS: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(slots=True)
class Run:
    """What the operations of one change share while they run."""

    store: Store
    progress: Progress
    record: Record
    way: Exchange | None = None
    lock: Lock | None = None
    source: OpenSource | None = None
    place: OpenPlace | None = None
    base_fd: int = -1
    base_mount_fd: int = -1
    overlay_fd: int = -1
    attached: bool = False
    copied: bool = False
    draining: bool = False

    def write(self, record: Record) -> None:
        """Write *record* and make it the one that counts."""
        self.store.write(record)
        self.record = record

    def close(self) -> None:
        """Close every descriptor; a mount that was not attached is gone with it."""
        for fd in (self.overlay_fd, self.base_fd, self.base_mount_fd):
            if fd >= 0:
                os.close(fd)
        self.overlay_fd = self.base_fd = self.base_mount_fd = -1
        for thing in (self.source, self.place):
            if thing is not None:
                thing.close()
        self.source = self.place = None
        if self.lock is not None:
            self.lock.release()


class Operation(Protocol):
    """One step."""

    final: ClassVar[bool]

    def describe(self) -> str:
        """Say what the step does, for people."""

    def apply(self, run: Run) -> None:
        """Do it."""

    def undo(self, run: Run) -> None:
        """Take back what was done of it, all or part."""


class _Step:
    final: ClassVar[bool] = False

    def undo(self, run: Run) -> None:
        """Nothing to take back."""


@dataclass(frozen=True, slots=True)
class Reserve(_Step):
    """Take the name and the place: from here on no other command can."""

    record: Record

    def describe(self) -> str:
        """Say what the step does."""
        return f"reserve the name {self.record.name} and the place {shown(self.record.mount_point)}"

    def apply(self, run: Run) -> None:
        """Make the locked storage directory, then the record."""
        run.lock = run.store.create(self.record.uuid)
        run.write(self.record)

    def undo(self, run: Run) -> None:
        """Remove both; the storage in it was removed before."""
        run.store.drop(self.record.uuid)
        run.store.drop_storage(self.record.uuid)


@dataclass(frozen=True, slots=True)
class MountStorage(_Step):
    """Mount a tmpfs for a part of the overlay's storage."""

    which: str
    size: int
    inodes: int

    def describe(self) -> str:
        """Say what the step does."""
        return (
            f"mount a tmpfs of {human_size(self.size)} and {self.inodes} inodes as {self.which}"
        )

    def apply(self, run: Run) -> None:
        """Mount it."""
        run.store.attach_storage(run.record.uuid, self.which, self.size, self.inodes)

    def undo(self, run: Run) -> None:
        """Unmount it."""
        run.store.drop_storage(run.record.uuid, self.which)


@dataclass(frozen=True, slots=True)
class FillLayer(_Step):
    """Copy the source into the layer."""

    source: str
    prefix: tuple[str, ...]
    limits: Limits
    preserve_owner: bool
    entries: int
    size: int

    def describe(self) -> str:
        """Say what the step does."""
        where = f" as {shown('/'.join(self.prefix))}" if self.prefix else ""
        return (
            f"copy {self.entries} entries, {human_size(self.size)}, from {shown(self.source)}"
            f" into the layer{where}"
        )

    def apply(self, run: Run) -> None:
        """Copy, then make the layer's filesystem read-only."""
        if run.source is None or run.place is None:
            raise AssertionError
        top = os.open(storage_path(run.record.uuid, LAYER), OPEN_DIRECTORY)
        try:
            if run.record.options.read_only:
                os.close(layers.make_directory(top, EMPTY, run.place.base_fd))
            os.mkdir(TREE, 0o700, dir_fd=top)
            tree = os.open(TREE, OPEN_DIRECTORY, dir_fd=top)
            try:
                self._fill(run, run.source, run.place, tree)
                # Once filled: what is made in a directory changes its time, and may inherit.
                layers.copy_directory_attributes(run.place.base_fd, tree)
            finally:
                os.close(tree)
            overlayfs.make_read_only(top)
        finally:
            os.close(top)

    def _fill(self, run: Run, source: OpenSource, place: OpenPlace, tree: int) -> None:
        copier = layers.Copier(
            label=self.source,
            limits=self.limits,
            preserve_owner=self.preserve_owner,
            progress=run.progress,
            dest_root=tree,
        )
        run.progress.expect(self.entries, self.size)
        if not self.prefix:
            copier.tree(source.fd, place.base_fd)
            return
        folders = self.prefix if source.kind is SourceKind.DIRECTORY else self.prefix[:-1]
        made = []
        fd = os.dup(tree)
        try:
            for name in folders:
                os.mkdir(name, 0o755, dir_fd=fd)
                inner = os.open(name, OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = inner
                os.fchmod(fd, 0o755)
                made.append(name)
            if source.kind is SourceKind.DIRECTORY:
                copier.dest_root = fd
                copier.tree(source.fd, None)
            else:
                name = self.prefix[-1]
                copier.single_file(source.fd, source.file, fd, name)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class PrepareUpper(_Step):
    """Make the upper and work directories; the upper's root looks like the base's."""

    number: int

    def describe(self) -> str:
        """Say what the step does."""
        return "prepare the writable upper, its root as the base's"

    def apply(self, run: Run) -> None:
        """Make them."""
        top = os.open(storage_path(run.record.uuid, upper_name(self.number)), OPEN_DIRECTORY)
        try:
            os.close(layers.make_directory(top, "upper", base_of(run)))
            os.mkdir("work", 0o700, dir_fd=top)
        finally:
            os.close(top)


def base_of(run: Run) -> int:
    """Return the fd of the base directory, from the target or from a copy of its parent."""
    if run.base_fd >= 0:
        return run.base_fd
    if run.place is None:
        raise AssertionError
    return run.place.base_fd


@dataclass(frozen=True, slots=True)
class OpenBase(_Step):
    """Reach the base beneath a live overlay, through a copy of the mount that it lies on."""

    mount_point: str
    entry: str

    def describe(self) -> str:
        """Say what the step does."""
        return f"reach the base of {shown(self.mount_point)} beneath the overlay"

    def apply(self, run: Run) -> None:
        """Clone the parent, not recursively, and attach it where nobody sees it."""
        parent = targets.open_parent(self.mount_point)
        try:
            run.base_mount_fd = overlayfs.clone(parent)
        finally:
            os.close(parent)
        stage = run.store.stage(run.record.uuid)
        place = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sys.move_mount(run.base_mount_fd, place)
        finally:
            os.close(place)
        name = "." if self.entry else self.mount_point.rpartition("/")[2]
        top = os.open(stage, OPEN_DIRECTORY)
        try:
            run.base_fd = os.open(name, OPEN_DIRECTORY, dir_fd=top)
        finally:
            os.close(top)

    def undo(self, run: Run) -> None:
        """Detach the copy."""
        _close_base(run)


@dataclass(frozen=True, slots=True)
class CloseBase(_Step):
    """Let go of the base: the overlay holds it by itself now."""

    def describe(self) -> str:
        """Say what the step does."""
        return "let go of the base"

    def apply(self, run: Run) -> None:
        """Detach the copy of the parent."""
        _close_base(run)


def _close_base(run: Run) -> None:
    for fd in (run.base_fd, run.base_mount_fd):
        if fd >= 0:
            os.close(fd)
    run.base_fd = run.base_mount_fd = -1
    run.store.unstage(run.record.uuid)


@dataclass(frozen=True, slots=True)
class BuildOverlay(_Step):
    """Build the overlay mount, detached, and look at it through its descriptor."""

    tree: Tree

    def describe(self) -> str:
        """Say what the step does."""
        what = "the base alone" if self.tree.version == 0 else f"version {self.tree.version}"
        how = "writable" if self.tree.upper else "read-only"
        return f"build a {how} overlay that shows {what}, detached, and check it"

    def apply(self, run: Run) -> None:
        """Build, check, and note which superblock it is."""
        record = run.record
        base = base_of(run)
        with contextlib.ExitStack() as stack:

            def opened(path: str) -> int:
                fd = os.open(path, OPEN_DIRECTORY)
                stack.callback(os.close, fd)
                return fd

            lowers = [base]
            if self.tree.version:
                lowers.insert(0, opened(f"{storage_path(record.uuid, LAYER)}/{TREE}"))
            elif not self.tree.upper:
                lowers.insert(0, opened(f"{storage_path(record.uuid, LAYER)}/{EMPTY}"))
            upper_work = None
            if self.tree.upper:
                top = storage_path(record.uuid, upper_name(self.tree.upper))
                upper_work = opened(f"{top}/upper"), opened(f"{top}/work")
            attributes = sys.MOUNT_ATTR_NODEV | _inherited(base)
            if record.options.read_only:
                attributes |= sys.MOUNT_ATTR_RDONLY
            try:
                run.overlay_fd = overlayfs.make_overlay(
                    record.uuid, lowers, upper_work, attributes
                )
            except OSError as error:
                raise _build_error(error, base) from None
            _check_overlay(run.overlay_fd, base, lowers[0] if len(lowers) > 1 else -1)
        tree = Tree(
            version=self.tree.version,
            upper=self.tree.upper,
            st_dev=os.fstat(run.overlay_fd).st_dev,
            fsid=sys.fstatfs(run.overlay_fd).fsid,
        )
        run.write(record.with_(pending=tree))

    def undo(self, run: Run) -> None:
        """Close it, which ends it, and take it out of the record."""
        if run.overlay_fd >= 0:
            os.close(run.overlay_fd)
            run.overlay_fd = -1
        if run.record.pending is not None and run.record.tree is not None:
            run.write(run.record.with_(pending=None))


def _inherited(base: int) -> int:
    """Return the flags of the base's mount that the overlay takes over.

    nosuid only as the base has it: programs of the base must go on working.
    """
    flags = os.fstatvfs(base).f_flag
    attributes = 0
    if flags & os.ST_NOSUID:
        attributes |= sys.MOUNT_ATTR_NOSUID
    if flags & os.ST_NOEXEC:
        attributes |= sys.MOUNT_ATTR_NOEXEC
    return attributes


def _build_error(error: OSError, base: int) -> OverlaydError:
    if error.errno == errno.EINVAL and sys.fstatfs(base).type == sys.OVERLAYFS_SUPER_MAGIC:
        return depth_error()
    return from_oserror(error, "building the overlay", hint="see 'overlayd doctor'")


def depth_error() -> KernelError:
    """Return the error for a target that lies on as many stacked filesystems as there may be."""
    message = "the kernel stacks two file systems at most, and the target lies on that many already"
    return KernelError(message, hint="an overlay cannot lie on an overlay that lies on another")


def _check_overlay(overlay: int, base: int, layer: int) -> None:
    """Look at the finished mount before anybody else can.

    :raises KernelError: if its root or the first entry of its layer is not as it must be.
    """
    seen, meant = os.fstat(overlay), os.fstat(base)
    if (seen.st_mode, seen.st_uid, seen.st_gid) != (meant.st_mode, meant.st_uid, meant.st_gid):
        message = "the overlay's root does not look like the base's; it was not attached"
        raise KernelError(message)
    if layer < 0:
        return
    with os.scandir(layer) as entries:
        probe = next(entries, None)
    if probe is None:
        return
    meant = os.stat(probe.name, dir_fd=layer, follow_symlinks=False)
    seen = os.stat(probe.name, dir_fd=overlay, follow_symlinks=False)
    if (seen.st_mode, seen.st_uid) != (meant.st_mode, meant.st_uid):
        message = f"the overlay does not show {shown(probe.name)}; it was not attached"
        raise KernelError(message)


@dataclass(frozen=True, slots=True)
class ShowEntry(_Step):
    """Cut the one file out of the overlay that is to cover a file."""

    entry: str

    def describe(self) -> str:
        """Say what the step does."""
        return f"take the single file {shown(self.entry)} out of the overlay"

    def apply(self, run: Run) -> None:
        """Clone the file's mount; before Linux 6.15 only an attached tree can be cloned."""
        stage = run.store.stage(run.record.uuid)
        with overlayfs.staged(run.overlay_fd, stage) as root:
            file = os.open(self.entry, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
            try:
                entry_fd = overlayfs.clone(file)
            finally:
                os.close(file)
        os.close(run.overlay_fd)
        run.overlay_fd = entry_fd
        run.store.unstage(run.record.uuid)

    def undo(self, run: Run) -> None:
        """Clear the stage."""
        run.store.unstage(run.record.uuid)


@dataclass(frozen=True, slots=True)
class Attach(_Step):
    """Attach the finished mount: the instant from which it is seen."""

    mount_point: str

    def describe(self) -> str:
        """Say what the step does."""
        return f"attach it at {shown(self.mount_point)}"

    def apply(self, run: Run) -> None:
        """Attach it to the directory that was opened when the place was chosen."""
        if run.place is None:
            raise AssertionError
        sys.move_mount(run.overlay_fd, run.place.place_fd)
        run.attached = True

    def undo(self, run: Run) -> None:
        """Detach it."""
        if run.attached:
            sys.umount2(self.mount_point, sys.MNT_DETACH)
            run.attached = False


@dataclass(frozen=True, slots=True)
class Replace(_Step):
    """Put the new mount beneath the present one and detach that: no gap."""

    mount_point: str

    def describe(self) -> str:
        """Say what the step does."""
        return f"put it beneath the present overlay at {shown(self.mount_point)}, and detach that"

    def apply(self, run: Run) -> None:
        """Exchange the two."""
        parent = targets.open_parent(self.mount_point)
        try:
            stage = run.store.stage(run.record.uuid)
            overlayfs.exchange(run.overlay_fd, self.mount_point, parent, stage, run.way)
        finally:
            os.close(parent)
        run.store.unstage(run.record.uuid)

    def undo(self, run: Run) -> None:
        """Clear the stage; the exchange itself is done or not begun."""
        run.store.unstage(run.record.uuid)


@dataclass(frozen=True, slots=True)
class Commit(_Step):
    """Write into the record what is shown now."""

    def describe(self) -> str:
        """Say what the step does."""
        return "write the record"

    def apply(self, run: Run) -> None:
        """Make the pending tree the one that counts."""
        record = run.record
        run.write(record.with_(phase=Phase.ACTIVE, tree=record.pending, pending=None))


@dataclass(frozen=True, slots=True)
class MarkRemoving(_Step):
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
class CheckUnused(_Step):
    """Ask other mount namespaces, which a plain unmount does not ask."""

    def describe(self) -> str:
        """Say what the step does."""
        return "check that nobody in another mount namespace uses it"

    def apply(self, run: Run) -> None:
        """Look for copies of the mount, and only if there are any at every process.

        :raises BusyError: if one uses the overlay, naming it.
        """
        run.copied = holders.foreign_copies(run.record.uuid)
        if run.copied:
            check_unused(run.record)


@dataclass(frozen=True, slots=True)
class Detach(_Step):
    """Unmount the overlay."""

    mount_point: str
    lazy: bool

    def describe(self) -> str:
        """Say what the step does."""
        how = "even if it is in use" if self.lazy else "if nobody uses it"
        return f"detach the overlay from {shown(self.mount_point)}, {how}"

    def apply(self, run: Run) -> None:
        """Unmount.

        :raises BusyError: if it is in use and not *lazy*, saying by whom.
        """
        for patience in (0.01, 0.05, 0.2, 0.0):
            try:
                sys.umount2(self.mount_point, sys.MNT_DETACH if self.lazy else 0)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return
            check_unused(run.record)
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
    users = holders.find({record.tree.fsid})
    if users:
        named = ", ".join(
            f"{user.pid} ({shown(user.command)}) at {shown(user.path)}" for user in users[:5]
        )
        more = f" and {len(users) - 5} more" if len(users) > 5 else ""  # noqa: PLR2004
        message = f"{record.name} is in use by {named}{more}"
        raise BusyError(message, hint="end them, or let them keep their old files with --lazy")


@dataclass(frozen=True, slots=True)
class Retire(_Step):
    """Free the name; keep a note while somebody still uses what was detached."""

    lazy: bool
    final: ClassVar[bool] = True

    def describe(self) -> str:
        """Say what the step does."""
        return "free the name"

    def apply(self, run: Run) -> None:
        """Drop the record, or turn it into the note."""
        record = run.record
        if (self.lazy or run.copied) and record.tree is not None:
            run.draining = in_use(record)
        if run.draining:
            run.write(record.with_(phase=Phase.DRAINING))
        else:
            run.store.drop(record.uuid)


def in_use(record: Record) -> bool:
    """Whether a process or another mount namespace holds the overlay."""
    if record.tree is None:
        return False
    return bool(holders.find({record.tree.fsid})) or holders.foreign_copies(record.uuid)


@dataclass(frozen=True, slots=True)
class DropStorage(_Step):
    """Unmount storage that is not needed any more."""

    which: str = ""
    final: ClassVar[bool] = True

    def describe(self) -> str:
        """Say what the step does."""
        return f"unmount the storage {self.which}".rstrip()

    def apply(self, run: Run) -> None:
        """Unmount it; the kernel frees the memory when the last user is gone."""
        run.store.drop_storage(run.record.uuid, self.which)


@dataclass(slots=True)
class Executor:
    """Runs operations in order and, if one fails, undoes in reverse."""

    run: Run
    operations: Sequence[Operation]
    trace: Callable[[str, Operation], None] | None = None
    _begun: int = field(default=0)

    def advance(self, before: type | None = None) -> None:
        """Run the operations not yet run, up to the first of type *before*.

        :raises OverlaydError: what the failed operation raised; all before it is undone.
        """
        while self._begun < len(self.operations):
            operation = self.operations[self._begun]
            if before is not None and isinstance(operation, before):
                return
            try:
                if not operation.final:
                    self.run.progress.check()
                self._begun += 1
                self._point("before", operation)
                operation.apply(self.run)
                self._point("after", operation)
            except BaseException as error:
                if not operation.final:
                    self.roll_back()
                if isinstance(error, OSError):
                    raise _translate(error, operation) from error
                raise

    def _point(self, when: str, operation: Operation) -> None:
        if self.trace is not None:
            self.trace(when, operation)

    def roll_back(self) -> None:
        """Undo everything begun, the last first; no signal comes between."""
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            while self._begun:
                self._begun -= 1
                operation = self.operations[self._begun]
                self._point("undo", operation)
                # The first cause is what the caller hears; what cannot be undone now is
                # finished by the next command, which finds the record.
                with contextlib.suppress(OSError, OverlaydError):
                    operation.undo(self.run)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _translate(error: OSError, operation: Operation) -> OverlaydError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        message = f"no space left while trying to {operation.describe()}"
        return SpaceError(message, hint="see 'overlayd list' and the limits in the configuration")
    return from_oserror(error, operation.describe())
