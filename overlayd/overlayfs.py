# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making, attaching and exchanging mounts: what overlayd needs of the kernel, in its own terms.

Measured on Linux 6.1, 6.12 and 6.18: layers given as ``/proc/self/fd/N`` of O_PATH descriptors
on attached mounts, joined by ``:``, are accepted by each of them, and no option is ever built
from a path.  Wrappers raise :class:`OSError`; the caller says what it was doing.
"""

from __future__ import annotations

import contextlib
import errno
import os
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Final

from overlayd import caller, mountinfo
from overlayd import syscalls as sys
from overlayd.model import TAG_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

STORAGE_SOURCE: Final = "overlayd-storage"
"""``source`` of overlayd's tmpfs mounts; for people who read the mount table."""

_OPTIONS: Final = (
    ("metacopy", "off"),
    ("index", "off"),
    ("nfs_export", "off"),
    ("xino", "off"),
)
"""Every option that matters is stated: module parameters would decide otherwise.

So is ``redirect_dir=on``, because dpkg renames directories; safe, as layers carry no attributes of
others.  In a user namespace there can be no redirects: ``userxattr`` rules them out.  For ``uuid``,
which has to do with f_fsid, see :func:`_uuid_options`.
"""


class Exchange(StrEnum):
    """How a mount is put beneath another."""

    BENEATH = "beneath"
    """MOVE_MOUNT_BENEATH, Linux 6.5."""
    TUCK = "tuck"
    """A mount that arrives by propagation lands beneath; every kernel."""


def make_tmpfs(size: int, inodes: int, *, mode: int = 0o700, folios: bool = False) -> int:
    """Return a detached tmpfs of at most *size* bytes and *inodes* inodes.

    With *folios* the kernel may keep a file in more than single pages, where it can and never
    beyond the file's end: filling it takes three quarters of the time (20,000 files, Linux 6.18).
    """
    context = sys.fsopen("tmpfs")
    try:
        if folios:
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "huge", "within_size")
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "source", STORAGE_SOURCE)
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "size", str(size))
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "nr_inodes", str(inodes))
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "mode", f"{mode:o}")
        sys.fsconfig(context, sys.FSCONFIG_CMD_CREATE)
        return sys.fsmount(context, sys.MOUNT_ATTR_NODEV | sys.MOUNT_ATTR_NOSUID)
    finally:
        os.close(context)


def make_read_only(mount_fd: int) -> None:
    """Make the filesystem (not only this mount of it) read-only."""
    context = sys.fspick(mount_fd)
    try:
        sys.fsconfig(context, sys.FSCONFIG_SET_FLAG, "ro")
        sys.fsconfig(context, sys.FSCONFIG_CMD_RECONFIGURE)
    finally:
        os.close(context)


@cache
def _uuid_options() -> tuple[tuple[str, str], ...]:
    """Return what makes f_fsid that of the storage, by which holders are found, without a warning.

    That is ``uuid=null`` (Linux 6.6), and no option before: then it always is.  ``off`` is for
    layers on one filesystem, which ours never are.  The old way of mounting (before 6.5) takes any
    option here, and refuses it later.
    """
    context = sys.fsopen("overlay")
    try:
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "uuid", "null")
        try:
            sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "overlayd", "unknown")
        except OSError:
            return (("uuid", "null"),)
    except OSError:
        pass
    finally:
        os.close(context)
    return ()


def takes_detached_layers(directory: int) -> bool:
    """Whether an overlay can be made of *directory* on a mount that was never attached (6.15).

    By asking: an attempt that fails leaves an error in the kernel's log.
    """
    path = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        context = sys.fsopen("overlay")
        try:
            sys.fsconfig_fd(context, "lowerdir+", path)
        except OSError:
            return False
        finally:
            os.close(context)
    finally:
        os.close(path)
    return True


def make_overlay(
    tag: str, lowers: Sequence[int], upper_work: tuple[int, int] | None, attributes: int
) -> int:
    """Return a detached overlay of the directories *lowers*, topmost first.

    *attributes* are MOUNT_ATTR_*; without *upper_work* there must be two lowers at least.
    """
    context = sys.fsopen("overlay")
    try:
        sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "source", f"{TAG_PREFIX}{tag}")
        for key, value in (*_OPTIONS, *_uuid_options()):
            sys.fsconfig(context, sys.FSCONFIG_SET_STRING, key, value)
        if caller.in_user_namespace():
            sys.fsconfig(context, sys.FSCONFIG_SET_FLAG, "userxattr")
        else:
            sys.fsconfig(context, sys.FSCONFIG_SET_STRING, "redirect_dir", "on")
        sys.fsconfig(
            context,
            sys.FSCONFIG_SET_STRING,
            "lowerdir",
            ":".join(f"/proc/self/fd/{fd}" for fd in lowers),
        )
        if upper_work is not None:
            for key, fd in zip(("upperdir", "workdir"), upper_work, strict=True):
                sys.fsconfig(context, sys.FSCONFIG_SET_STRING, key, f"/proc/self/fd/{fd}")
        sys.fsconfig(context, sys.FSCONFIG_CMD_CREATE)
        return sys.fsmount(context, attributes)
    finally:
        os.close(context)


def open_beneath(dir_fd: int, path: str, flags: int = os.O_PATH) -> int:
    """Open *path* beneath *dir_fd* with no link of any kind on the way."""
    return sys.openat2(
        dir_fd,
        path or ".",
        flags,
        sys.RESOLVE_BENEATH | sys.RESOLVE_NO_SYMLINKS | sys.RESOLVE_NO_MAGICLINKS,
    )


def attach(mount_fd: int, path: str, *, dir_fd: int | None = None, flags: int = 0) -> None:
    """Attach *mount_fd* at *path*, a link not followed, with MOVE_MOUNT_* *flags*."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        sys.move_mount(mount_fd, place, flags)
    finally:
        os.close(place)


@contextlib.contextmanager
def staged(mount_fd: int, stage: str) -> Iterator[int]:
    """Attach *mount_fd* at the empty directory *stage* for a moment; yields an fd of its root.

    Layers must lie on attached mounts before Linux 6.15.  *stage* must be on a private mount, so
    that nobody else sees it.
    """
    attach(mount_fd, stage)
    try:
        root_fd = os.open(stage, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield root_fd
        finally:
            os.close(root_fd)
    finally:
        unstage(stage)


def unstage(stage: str) -> None:
    """Detach what is mounted at *stage*, and nothing elsewhere.

    Made private first: a peer's unmount would propagate and take mounts of others along.
    """
    sys.mount_propagation(stage, sys.MS_REC | sys.MS_PRIVATE)
    sys.umount2(stage, sys.MNT_DETACH)


def clone(fd: int) -> int:
    """Return a detached copy of the mount below *fd*, without what is mounted beneath it."""
    return sys.open_tree(fd, "", sys.OPEN_TREE_CLONE | sys.AT_EMPTY_PATH)


def clone_covered(path: str) -> int:
    """Return a detached copy of the mount that the topmost one at *path* lies on.

    That is taken off in a mount namespace that a thread has for itself, so nobody sees it.
    """
    from threading import Thread  # noqa: PLC0415  # rarely needed, and slow to load

    found: list[int | OSError] = []

    def look() -> None:
        try:
            sys.unshare(sys.CLONE_NEWNS)
            sys.mount_propagation("/", sys.MS_REC | sys.MS_PRIVATE)
            sys.umount2(path, sys.MNT_DETACH)
            found.append(sys.open_tree(sys.AT_FDCWD, path, sys.OPEN_TREE_CLONE))
        except OSError as error:
            found.append(error)

    thread = Thread(target=look)
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def put_beneath(
    new_fd: int,
    place: str,
    parent_fd: int,
    staging: Callable[[], AbstractContextManager[str]],
    way: Exchange | None = None,
) -> None:
    """Put the detached mount *new_fd* beneath the one at *place*.

    When that one is detached afterwards, a reader has seen the old or the new mount and never
    what lies below.  *parent_fd* is open on the directory that holds *place*; *staging* gives a
    stage as for :func:`staged`.  Without *way* the kernel's own call is tried first.
    """
    if way is not Exchange.TUCK:
        try:
            attach(new_fd, place, flags=sys.MOVE_MOUNT_BENEATH)
        except OSError as error:
            # EINVAL: unknown before 6.5, and refused for some propagation layouts since.
            if way is Exchange.BENEATH or error.errno != errno.EINVAL:
                raise
        else:
            return
    with staging() as stage:
        _tuck(new_fd, place, parent_fd, stage)


def _tuck(new_fd: int, place: str, parent_fd: int, stage: str) -> None:
    """Let *new_fd* arrive through a peer of the parent mount, on which nothing is mounted yet."""
    name = os.path.basename(place)
    parent = _mount_of(parent_fd)
    if sys.statx(sys.AT_FDCWD, place).mnt_id not in _children(parent):
        # What arrived there would lie beneath the mount that really is the parent.
        message = "the mount that the overlay lies on cannot be reached beneath it"
        raise OSError(errno.EOPNOTSUPP, message)
    if not parent.shared:
        sys.mount_propagation(parent.mount_point, sys.MS_SHARED)
    try:
        peer = clone(parent_fd)
        try:
            with staged(peer, stage) as peer_fd:
                attach(new_fd, name, dir_fd=peer_fd)
        finally:
            os.close(peer)
    finally:
        if not parent.shared:
            sys.mount_propagation(parent.mount_point, sys.MS_PRIVATE)


def _children(parent: mountinfo.Mount) -> set[int]:
    return {mount.mount_id for mount in mountinfo.read() if mount.parent_id == parent.mount_id}


def _mount_of(fd: int) -> mountinfo.Mount:
    mount_id = sys.statx(fd).mnt_id
    return next(mount for mount in mountinfo.read() if mount.mount_id == mount_id)
