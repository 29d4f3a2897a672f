# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding what SOURCE and TARGET are, once, as descriptors that cannot be exchanged afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd import overlayfs
from overlayd import syscalls as sys
from overlayd.errors import BusyError, NotFoundError, RefusedError, from_oserror, shown
from overlayd.model import SourceKind, is_within
from overlayd.places import RUN, USR
from overlayd.walker import OPEN_DIRECTORY, refuse_special

if TYPE_CHECKING:
    from collections.abc import Iterator

    from overlayd.mountinfo import Table
    from overlayd.receiver import Receiver

# Names from linux/magic.h; their files have no size, no end or side effects.
_PSEUDO: Final = {
    0x9FA0: "proc",
    0x62656572: "sysfs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x73636673: "securityfs",
    0x1CD1: "devpts",
    0xCAFE4A11: "bpf",
    0x6165676C: "pstore",
    0xDE5E81E4: "efivarfs",
    0x62656570: "configfs",
    0xF97CFF8C: "selinuxfs",
    0x19800202: "mqueue",
    0x42494E4D: "binfmt_misc",
    0x187: "autofs",
    0x6E736673: "nsfs",
    0x65735543: "fusectl",
    0x67596969: "rpc_pipefs",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an overlay goes.

    ``target`` is the caller's TARGET with links resolved; ``mount_point`` where the mount lies.
    ``prefix`` is where in the layer the source is put: empty if its root lies on the mount
    point.  ``entry`` names the one file that is shown where a file covers a file.
    """

    target: str
    mount_point: str
    prefix: tuple[str, ...]
    entry: str


@dataclass(slots=True)
class OpenPlace:
    """A place, open: ``base_fd`` is the lower directory, ``place_fd`` what is mounted on."""

    place: Place
    base_fd: int
    place_fd: int

    def close(self) -> None:
        """Close the descriptors."""
        for fd in {self.base_fd, self.place_fd}:
            with contextlib.suppress(OSError):
                os.close(fd)


@dataclass(slots=True)
class Source:
    """A source: what it is, and the path by which the caller named it."""

    kind: SourceKind
    path: str

    @property
    def name(self) -> str:
        """The last component of the path as the caller wrote it."""
        return os.path.basename(self.path.rstrip("/"))

    def close(self) -> None:
        """Let go of it."""


@dataclass(slots=True)
class OpenSource(Source):
    """A source, open: ``fd`` is the directory, or for a file the directory that ``file`` is in."""

    real_path: str
    fd: int
    file: str

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


@dataclass(slots=True)
class Streamed(Source):
    """A source that its owner sends; its path is a claim of his, and never opened here."""

    receiver: Receiver

    def close(self) -> None:
        """Stop listening to him."""
        self.receiver.close()


def open_source(path: str) -> OpenSource:
    """Open SOURCE; a symlink at its end is followed, as it is what the caller named.

    :raises NotFoundError: if there is nothing.
    :raises RefusedError: for what cannot be a source.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        message = f"SOURCE {shown(path)} does not exist"
        raise NotFoundError(message) from None
    except OSError as error:
        raise from_oserror(error, f"opening SOURCE {shown(path)}") from None
    try:
        facts = os.fstat(fd)
        real_path = os.readlink(f"/proc/self/fd/{fd}")
        if is_within(real_path, RUN):
            message = f"SOURCE {shown(path)} lies in overlayd's own storage"
            raise RefusedError(message)
        if (pseudo := _PSEUDO.get(sys.fstatfs(fd).type)) is not None:
            message = f"SOURCE {shown(path)} lies on {pseudo}, which is no real file system"
            raise RefusedError(message)
        if stat.S_ISDIR(facts.st_mode):
            directory = os.open(".", OPEN_DIRECTORY, dir_fd=fd)
            return OpenSource(SourceKind.DIRECTORY, path, real_path, directory, "")
        if not stat.S_ISREG(facts.st_mode):
            raise refuse_special(facts.st_mode, f"SOURCE {path}")
        folder, file = os.path.split(real_path)
        directory = os.open(folder, OPEN_DIRECTORY)
        return OpenSource(SourceKind.FILE, path, real_path, directory, file)
    except OSError as error:
        raise from_oserror(error, f"opening SOURCE {shown(path)}") from None
    finally:
        os.close(fd)


def resolve_target(path: str) -> str:
    """Return what TARGET leads to, by the rights of this process.

    :raises RefusedError: if that lies outside /usr.
    """
    real = os.path.realpath(path)
    if not is_within(real, USR):
        leads = "" if real == path else f" leads to {shown(real)}, which"
        message = f"TARGET {shown(path)}{leads} is not under /usr"
        raise RefusedError(message)
    return real


def open_target(real: str, source: Source) -> OpenPlace:
    """Open the place that TARGET means for this source; *real* has no links in it.

    :raises RefusedError: if it lies outside /usr, has links in it, or cannot take this source.
    """
    if not is_within(real, USR) or not {"", ".", ".."}.isdisjoint(real.split("/")[1:]):
        message = f"TARGET {shown(real)} is not a path under /usr without links"
        raise RefusedError(message)
    try:
        usr_fd = os.open(USR, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return _open_beneath(usr_fd, real, source)
        finally:
            os.close(usr_fd)
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            message = f"TARGET {shown(real)}: a part of the path is a file"
            raise RefusedError(message) from None
        if error.errno == errno.ELOOP:
            message = f"TARGET {shown(real)}: a part of the path is a link"
            raise RefusedError(message) from None
        raise from_oserror(error, f"opening TARGET {shown(real)}") from None


def _open_beneath(usr_fd: int, real: str, source: Source) -> OpenPlace:
    parts = real.split("/")[2:]
    missing: list[str] = []
    while True:
        try:
            fd = overlayfs.open_beneath(usr_fd, "/".join(parts))
        except FileNotFoundError:
            missing.insert(0, parts.pop())
        else:
            break
    try:
        mode = os.fstat(fd).st_mode
        found = "/".join([USR, *parts])
        if stat.S_ISDIR(mode):
            prefix = tuple(missing)
            if not missing and source.kind is SourceKind.FILE:
                prefix = (source.name,)
            base_fd = os.open(".", OPEN_DIRECTORY, dir_fd=fd)
            return OpenPlace(Place(real, found, prefix, ""), base_fd, base_fd)
        if missing:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not stat.S_ISREG(mode):
            raise refuse_special(mode, f"TARGET {real}")
        if source.kind is SourceKind.DIRECTORY:
            message = f"SOURCE {shown(source.path)} is a directory and TARGET {shown(real)} a file"
            raise RefusedError(message)
        base_fd = overlayfs.open_beneath(usr_fd, "/".join(parts[:-1]), OPEN_DIRECTORY)
        place = OpenPlace(Place(real, found, (parts[-1],), parts[-1]), base_fd, fd)
        fd = -1
        return place
    finally:
        if fd >= 0:
            os.close(fd)


def check_still_there(place: OpenPlace) -> None:
    """Refuse a place that is not what its path leads to any more.

    It may have been opened through an overlay that was removed since.  Ask when no overlay can
    come or go there, or when the kernel refuses the place.

    :raises BusyError: saying so.
    """
    try:
        there = _still_there(place)
    except OSError:
        there = False
    if not there:
        raise moved(place.place.target)


def moved(path: str) -> BusyError:
    """Return the error for a target that is not what it was a moment ago."""
    message = f"TARGET {shown(path)} changed while it was looked at"
    return BusyError(message, hint="try again")


def check_attached(mount_point: str, mount_fd: int) -> None:
    """Refuse a place whose path does not lead to the mount *mount_fd* that was attached there.

    :raises BusyError: saying so.
    """
    try:
        now = _open_now(mount_point)
        try:
            there = sys.statx(now).mnt_id == sys.statx(mount_fd).mnt_id
        finally:
            os.close(now)
    except OSError:
        there = False
    if not there:
        raise moved(mount_point)


def _still_there(place: OpenPlace) -> bool:
    point = place.place.mount_point
    usr_fd = os.open(USR, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        opened = {point: place.place_fd}
        if place.place.entry:
            opened[os.path.dirname(point)] = place.base_fd
        for path, fd in opened.items():
            now = overlayfs.open_beneath(usr_fd, path.removeprefix(USR).strip("/"))
            try:
                same = os.path.samestat(os.fstat(now), os.fstat(fd))
                if not same or sys.statx(now).mnt_id != sys.statx(fd).mnt_id:
                    return False
            finally:
                os.close(now)
    finally:
        os.close(usr_fd)
    return True


def open_parent(mount_point: str) -> int:
    """Open the directory that holds *mount_point*, on the mount beneath.

    :raises OSError: if it is gone or reached through a link now.
    """
    folder = os.path.dirname(mount_point)
    if folder == "/":
        return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return _open_now(folder)


def _open_now(path: str) -> int:
    """Open what *path*, under /usr, leads to now, without links."""
    usr_fd = os.open(USR, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return overlayfs.open_beneath(usr_fd, path.removeprefix(USR).strip("/"))
    finally:
        os.close(usr_fd)


def _ancestors(path: str) -> Iterator[tuple[int, int]]:
    """Yield device and inode of *path* and each directory above it."""
    while True:
        facts = os.stat(path)
        yield facts.st_dev, facts.st_ino
        if path == "/":
            return
        path = os.path.dirname(path)


def check_apart(source: OpenSource, place: Place, table: Table) -> None:
    """Refuse a source that is, contains or lies in the target, or has mounts beneath it.

    Compared by device and inode as well as by path, so that a bind mount does not hide it.

    :raises RefusedError: naming both.
    """
    try:
        above_source = list(_ancestors(source.real_path))
        above_target = list(_ancestors(place.mount_point))
    except OSError as error:
        raise from_oserror(error, f"looking at {shown(source.path)}") from None
    relation = None
    if above_source[0] == above_target[0] and (not place.prefix or place.entry):
        relation = "is"
    elif source.kind is SourceKind.DIRECTORY and above_source[0] in above_target:
        relation = "contains"
    elif not place.entry and place.target == place.mount_point and above_target[0] in above_source:
        relation = "lies in"
    if relation is not None:
        message = f"SOURCE {shown(source.path)} {relation} TARGET {shown(place.target)}"
        raise RefusedError(message, hint="copy the source to a place of its own first")
    if source.kind is SourceKind.DIRECTORY:
        inner = [m for m in table.within(source.real_path) if m.mount_point != source.real_path]
        if inner:
            names = ", ".join(shown(mount.mount_point) for mount in inner[:3])
            message = f"SOURCE {shown(source.path)} has mounts beneath it: {names}"
            raise RefusedError(message, hint="a source must lie on one file system")
