# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operations that make an overlay or change what it shows, as values."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from overlayd import caller, mountinfo, overlayfs, state, targets
from overlayd import syscalls as sys
from overlayd.contents import TREE, base_of
from overlayd.errors import KernelError, NotFoundError, OverlaydError, from_oserror, shown
from overlayd.executor import StaysError, Step
from overlayd.model import Phase, Record, Scope, Tree
from overlayd.places import USR
from overlayd.store import LAYER, storage_path, upper_name
from overlayd.walker import OPEN_DIRECTORY

if TYPE_CHECKING:
    from overlayd.executor import Run


@dataclass(frozen=True, slots=True)
class Reserve(Step):
    """Take the name and the place: from here on no other command can."""

    record: Record

    def describe(self) -> str:
        """Say what the step does."""
        return f"reserve the name {self.record.name} and the place {shown(self.record.mount_point)}"

    def apply(self, run: Run) -> None:
        """Write the record, then make the locked storage directory."""
        run.lock = run.store.reserve(self.record)

    def undo(self, run: Run) -> None:
        """Remove both; the storage in it was removed before."""
        run.store.drop_storage(self.record.uuid)
        run.store.drop(self.record.uuid)
        if run.lock is not None:
            run.lock.release()


@dataclass(frozen=True, slots=True)
class Announce(Step):
    """Note what the overlay is about to show, before anything is made for it."""

    tree: Tree

    def describe(self) -> str:
        """Say what the step does."""
        return f"note that version {self.tree.version} is to be shown"

    def apply(self, run: Run) -> None:
        """Write it."""
        run.write(run.record.with_(pending=self.tree))

    def undo(self, run: Run) -> None:
        """Take it back."""
        run.write(run.record.with_(pending=None))


@dataclass(frozen=True, slots=True)
class OpenBase(Step):
    """Reach the base beneath a live overlay, through a copy of the mount that it lies on."""

    mount_point: str
    entry: str

    def describe(self) -> str:
        """Say what the step does."""
        return f"reach the base of {shown(self.mount_point)} beneath the overlay"

    def apply(self, run: Run) -> None:
        """Clone the parent, not recursively, and open the base in it.

        ``/usr`` may be a mount itself, which its parent does not show; and so may be what a private
        overlay lies on.
        """
        private = run.record.scope is Scope.PRIVATE and not self.entry
        if private or self.mount_point == USR:
            run.base_mount_fd = overlayfs.clone_covered(self.mount_point)
            run.base_name = "."
        else:
            parent = targets.open_parent(self.mount_point)
            try:
                run.base_mount_fd = overlayfs.clone(parent)
            finally:
                os.close(parent)
            run.base_name = "." if self.entry else self.mount_point.rpartition("/")[2]
        run.base_fd = os.open(run.base_name, OPEN_DIRECTORY, dir_fd=run.base_mount_fd)

    def undo(self, run: Run) -> None:
        """Detach the copy."""
        _close_base(run)


def _stage_base(run: Run) -> int:
    """Attach the copy of the parent where nobody sees it; return the base's new descriptor."""
    stage = run.store.stage(run.record.uuid)
    run.base_staged = True
    overlayfs.attach(run.base_mount_fd, stage)
    os.close(run.base_fd)
    run.base_fd = -1
    top = os.open(stage, OPEN_DIRECTORY)
    try:
        run.base_fd = os.open(run.base_name, OPEN_DIRECTORY, dir_fd=top)
    finally:
        os.close(top)
    return run.base_fd


@dataclass(frozen=True, slots=True)
class CloseBase(Step):
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
    if run.base_staged:
        run.store.unstage(run.record.uuid)
        run.base_staged = False


@dataclass(frozen=True, slots=True)
class BuildOverlay(Step):
    """Build the overlay mount, detached, and look at it through its descriptor."""

    tree: Tree

    def describe(self) -> str:
        """Say what the step does."""
        what = "the base alone" if self.tree.version == 0 else f"version {self.tree.version}"
        return f"build an overlay that shows {what}, detached, and check it"

    def apply(self, run: Run) -> None:
        """Build, check, and note which superblock it is."""
        record = run.record
        base = base_of(run)
        with contextlib.ExitStack() as stack:

            def opened(path: str) -> int:
                try:
                    fd = os.open(path, OPEN_DIRECTORY)
                except FileNotFoundError:
                    message = f"storage of {record.name} is gone: {os.path.dirname(path)}"
                    hint = f"somebody unmounted it; overlayd remove {record.name}"
                    raise NotFoundError(message, hint=hint) from None
                stack.callback(os.close, fd)
                return fd

            if run.base_mount_fd >= 0 and not overlayfs.takes_detached_layers(base):
                base = _stage_base(run)
            top = storage_path(record.uuid, upper_name(self.tree.upper))
            upper = opened(f"{top}/upper")
            lowers, layer = [base], -1
            if self.tree.version:
                layer = opened(f"{storage_path(record.uuid, LAYER)}/{TREE}")
                lowers.insert(0, layer)
            upper_work = None
            if record.options.read_only:
                lowers.insert(0, upper)
            else:
                upper_work = upper, opened(f"{top}/work")
            attributes = sys.MOUNT_ATTR_NODEV | _inherited(base)
            if record.options.read_only:
                attributes |= sys.MOUNT_ATTR_RDONLY
            try:
                run.overlay_fd = overlayfs.make_overlay(record.uuid, lowers, upper_work, attributes)
            except OSError as error:
                raise _build_error(error, base) from None
            _check_overlay(run.overlay_fd, base, layer)
        run.built = Tree(
            version=self.tree.version,
            upper=self.tree.upper,
            st_dev=os.fstat(run.overlay_fd).st_dev,
            fsid=sys.fstatfs(run.overlay_fd).fsid,
        )


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
    # In a user namespace it is its owner's.
    uid, gid = (
        (os.geteuid(), os.getegid()) if caller.in_user_namespace() else (meant.st_uid, meant.st_gid)
    )
    if (seen.st_mode, seen.st_uid, seen.st_gid) != (meant.st_mode, uid, gid):
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
class ShowEntry(Step):
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
class Attach(Step):
    """Attach the finished mount: the instant from which it is seen."""

    mount_point: str

    def describe(self) -> str:
        """Say what the step does."""
        return f"attach it at {shown(self.mount_point)}"

    def apply(self, run: Run) -> None:
        """Attach it to the directory that was opened when the place was chosen.

        :raises BusyError: if somebody mounted something there since; the copy may have taken long.
        """
        if run.place is None:
            raise AssertionError
        targets.check_still_there(run.place)
        if any(
            m.mount_point != self.mount_point for m in mountinfo.read().within(self.mount_point)
        ):
            raise targets.moved(self.mount_point)
        sys.move_mount(run.overlay_fd, run.place.place_fd)
        run.attached = True
        # From here on it cannot be moved; since it was opened, it may have been.
        targets.check_attached(self.mount_point, run.overlay_fd)

    def undo(self, run: Run) -> None:
        """Detach it.

        :raises StaysError: if others mounted something on it, which would go as well.
        """
        if run.attached:
            # The path may lead elsewhere.
            if not state.is_bare(run.overlay_fd):
                raise StaysError
            sys.umount_fd(run.overlay_fd, sys.MNT_DETACH)
            run.attached = False


@dataclass(frozen=True, slots=True)
class PutBeneath(Step):
    """Put the new mount beneath the present one: nobody sees it yet."""

    mount_point: str
    present: int
    decisive: ClassVar[bool] = True

    def describe(self) -> str:
        """Say what the step does."""
        return f"put it beneath the present overlay at {shown(self.mount_point)}"

    def apply(self, run: Run) -> None:
        """Put it there, by the kernel's own call or by propagation.

        :raises BusyError: if the mount *present* is not what shows there any more.
        """
        state.check_on_top(run.record, {self.present})
        parent = targets.open_parent(self.mount_point)
        try:
            overlayfs.put_beneath(
                run.overlay_fd,
                self.mount_point,
                parent,
                lambda: run.store.staging(run.record.uuid),
                run.way,
            )
        finally:
            os.close(parent)


@dataclass(frozen=True, slots=True)
class DetachOld(Step):
    """Detach the present mount, so that the one beneath it shows: no gap."""

    mount_point: str
    present: int

    def describe(self) -> str:
        """Say what the step does."""
        return "detach the present one; programs keep the files they have open"

    def apply(self, run: Run) -> None:
        """Detach the topmost mount.

        :raises BusyError: if that is not *present*; a later command finishes then.
        """
        state.check_on_top(run.record, {self.present})
        sys.umount2(self.mount_point, sys.MNT_DETACH)


@dataclass(frozen=True, slots=True)
class Commit(Step):
    """Write into the record what is shown now."""

    decisive: ClassVar[bool] = True

    def describe(self) -> str:
        """Say what the step does."""
        return "write the record"

    def apply(self, run: Run) -> None:
        """Make the tree that was built the one that counts."""
        run.write(run.record.with_(phase=Phase.ACTIVE, tree=run.built, pending=None))
