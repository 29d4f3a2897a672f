# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small tmpfs that everything of overlayd's lies on, and whose it is.

::

    /run/overlayd              shared, made once per boot
      world.json               boot id and mount namespace it belongs to
      lock                     held for the moment in which names and places are given out
      records/UUID.json        one per overlay, always written whole and renamed into place
      storage/UUID/            locked (flock) while an operation on the overlay runs
        layer  upper.N         mount points of the overlay's own tmpfs mounts
      stage/                   a private mount, for mounts that nobody else shall see
      quarantine/              records that could not be believed
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from typing import Final

from overlayd import caller, mountinfo, overlayfs
from overlayd import syscalls as sys
from overlayd.errors import KernelError, NoPermissionError, RefusedError, from_oserror
from overlayd.places import RUN

_SIZE: Final = 32 << 20
_INODES: Final = 65536
_WORLD: Final = f"{RUN}/world.json"


class World:
    """The tmpfs at ``/run/overlayd``; ``boot_id`` is the kernel's."""

    def __init__(self) -> None:
        """Look at nothing yet."""
        self.boot_id = caller.boot_id()
        self._checked: tuple[object, ...] = ()

    def exists(self) -> bool:
        """Whether there is a world, and it is this mount namespace's.

        :raises KernelError: if it belongs to another mount namespace; the hint is the way in.
        :raises RefusedError: if something else is mounted there.
        :raises NoPermissionError: for callers who may not look.
        """
        try:
            fd = os.open(RUN, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            self._check_namespace_of_run()
            return False
        except OSError as error:
            raise from_oserror(error, f"opening {RUN}") from None
        try:
            if not sys.statx(fd).mount_root:
                self._check_namespace_of_run()
                return False
        finally:
            os.close(fd)
        self._check_world()
        return True

    def _check_world(self) -> None:
        try:
            facts = os.stat(_WORLD)
            world_is = (facts.st_dev, facts.st_ino, facts.st_ctime_ns, mountinfo.namespace())
            if world_is == self._checked:
                return
            with open(_WORLD, encoding="ascii") as file:
                world = json.load(file)
            owner, boot = world["namespace"], world["boot_id"]
        except PermissionError:
            message = "overlayd needs root"
            raise NoPermissionError(message, hint="run it with sudo") from None
        except (OSError, ValueError, KeyError, TypeError):
            message = f"{RUN} is a mount, but not overlayd's"
            raise RefusedError(message, hint=f"see 'findmnt {RUN}'") from None
        if facts.st_uid != os.geteuid():
            message = f"this is inside of 'overlayd enter' of uid {facts.st_uid}"
            raise RefusedError(message, hint="use another terminal")
        if boot != self.boot_id:
            message = f"{RUN} is left from another boot"
            raise RefusedError(message, hint=f"umount -R {RUN}") from None
        if owner != world_is[-1]:
            self._refuse_namespace(owner)
        self._checked = world_is

    @staticmethod
    def _check_namespace_of_run() -> None:
        """Refuse to begin in a namespace that shares /run with process 1 but not its mounts."""
        try:
            same_run = os.path.samestat(os.stat("/run"), os.stat("/proc/1/root/run"))
            owner = mountinfo.namespace("1")
        except OSError:
            return  # no view of process 1: nothing to compare with
        if same_run and owner != mountinfo.namespace():
            World._refuse_namespace(owner)

    @staticmethod
    def _refuse_namespace(owner: str) -> None:
        message = "this is another mount namespace than the one overlayd's mounts belong to"
        way = None
        for pid in ["1", *filter(str.isdigit, os.listdir("/proc"))]:
            with contextlib.suppress(OSError):
                if mountinfo.namespace(pid) == owner:
                    way = f"nsenter --target {pid} --mount overlayd …"
                    break
        raise KernelError(message, hint=way or "the namespace it belongs to is gone")

    def ensure(self) -> None:
        """Make the world if there is none.

        :raises OverlaydError: if it cannot be made.
        """
        if self.exists():
            return
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(RUN, 0o700)
            # The directory beneath the mount is the lock of the two first commands of a boot.
            fd = os.open(RUN, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if not self.exists():
                    self._make(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_oserror(error, f"making {RUN}") from None

    def cover(self) -> None:
        """Make a world for this mount namespace alone, over whatever there is.

        :raises OverlaydError: if there is no place for it, or it cannot be made.
        """
        with contextlib.suppress(OSError):  # only root can, and need not
            os.mkdir(RUN, 0o700)
        try:
            fd = os.open(RUN, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            message = f"there is no directory {RUN}, which is made at boot"
            raise KernelError(message, hint="systemd-tmpfiles --create, as root") from None
        try:
            self._make(fd)
        except OSError as error:
            raise from_oserror(error, f"mounting a tmpfs at {RUN}") from None
        finally:
            os.close(fd)

    def _make(self, run_fd: int) -> None:
        """Fill a detached tmpfs and attach it: there is no half-made world."""
        mount_fd = overlayfs.make_tmpfs(_SIZE, _INODES)
        try:
            world = {"schema": 1, "boot_id": self.boot_id, "namespace": mountinfo.namespace()}
            write_file(mount_fd, "world.json", json.dumps(world).encode())
            write_file(mount_fd, "lock", b"")
            for name in ("records", "storage", "stage", "quarantine"):
                os.mkdir(name, 0o700, dir_fd=mount_fd)
            # Shared, so that a namespace which starts later lets go of the storage with us.
            sys.mount_setattr_propagation(mount_fd, sys.MS_SHARED)
            sys.move_mount(mount_fd, run_fd)
        finally:
            os.close(mount_fd)


def write_file(dir_fd: int, name: str, data: bytes) -> None:
    """Make the file *name* in *dir_fd* with *data* in it."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    try:
        write_whole(fd, data)
    finally:
        os.close(fd)


def write_whole(fd: int, data: bytes) -> None:
    """Write all of *data*.

    :raises OSError: ENOSPC if only a part fits; tmpfs writes what does and calls it a success.
    """
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
