# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private overlays of root's that are shown to services, each by a drop-in of the unit's.

A copy of the overlay's mount lies where only root gets, on a mount that nobody else sees, and
systemd binds it to its place when it starts the service.  Both are in ``/run``.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from typing import TYPE_CHECKING, Final

from overlayd import locks, mountinfo, overlayfs
from overlayd import syscalls as sys
from overlayd.errors import NotFoundError, OverlaydError, RefusedError, from_oserror, shown
from overlayd.model import UUID
from overlayd.places import ROOTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from overlayd.model import Record

PLACE: Final = f"{ROOTS}/shown"
_LOCK: Final = f"{ROOTS}/shown.lock"
_STAGE: Final = f"{PLACE}/stage"
_UNITS: Final = "/run/systemd/system"
_UNIT: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9:_.@\\-]{0,247}\.service", re.ASCII)
_QUOTES: Final = "\"'"
"""systemd 257 reads paths with these from a unit, and then loses them on the way to the service."""
_PREFIX, _SUFFIX = "50-overlayd-", ".conf"
_SIZE, _INODES = 1 << 20, 4096
_PATIENCE: Final = 90.0
"""Seconds for systemd to do something."""


def check_unit(unit: str) -> None:
    """Insist on a service that systemd knows.

    :raises RefusedError: if it is no name of one.
    :raises NotFoundError: if there is none of that name.
    """
    if _UNIT.fullmatch(unit) is None:
        message = f"{shown(unit)!r} is not the name of a service"
        raise RefusedError(message, hint="such as foo.service")
    if _systemctl("show", "--property=LoadState", "--value", unit).strip() != "loaded":
        message = f"there is no service {unit}"
        raise NotFoundError(message, hint="systemctl list-units --type=service --all")


def present(record: Record, mount_fd: int, unit: str) -> None:
    """Have systemd show the mount *mount_fd* of an overlay to *unit*, from its next start on.

    :raises OverlaydError: and then nothing is left of it.
    """
    with _locked():
        try:
            _ensure()
            path = f"{PLACE}/{record.uuid}"
            if _mounts_at(path):
                _exchange(path, mount_fd)
            else:
                _attach(path, mount_fd, single=bool(record.entry))
            _write(record, path, unit)
            _systemctl("daemon-reload")
        except (OSError, OverlaydError) as error:
            _withdraw(record.uuid, unit)
            if isinstance(error, OSError):
                raise from_oserror(error, f"showing {record.name} to {unit}") from None
            raise


def replace(record: Record, mount_fd: int) -> bool:
    """Let what is shown of an overlay be the mount *mount_fd*, for services that start from now on.

    Returns whether it was another.

    :raises OverlaydError: if that cannot be.
    """
    path = f"{PLACE}/{record.uuid}"
    with _locked():
        try:
            # One that is withdrawn meanwhile stays so.
            return bool(_mounts_at(path)) and _exchange(path, mount_fd)
        except OSError as error:
            raise from_oserror(error, f"showing {record.name} to services") from None


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    try:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_oserror(error, f"opening {_LOCK}") from None
    try:
        locks.take(fd, _LOCK, "what services are shown", 2 * _PATIENCE)
        yield
    finally:
        os.close(fd)


def _mounts_at(path: str) -> int:
    return sum(mount.mount_point == path for mount in mountinfo.read())


def _exchange(path: str, mount_fd: int) -> bool:
    """Let another mount show at *path*: whoever looks sees the old one or the new one.

    Returns whether it is another.
    """
    for _ in range(_mounts_at(path) - 1):  # an exchange that was cut short
        sys.umount2(path, sys.MNT_DETACH)
    if sys.statfs(path).fsid == sys.fstatfs(mount_fd).fsid:
        return False
    _unstage()
    parent = os.open(PLACE, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        overlayfs.put_beneath(mount_fd, path, parent, _stage)
    finally:
        os.close(parent)
    sys.umount2(path, sys.MNT_DETACH)
    return True


@contextlib.contextmanager
def _stage() -> Iterator[str]:
    os.mkdir(_STAGE, 0o700)
    try:
        yield _STAGE
    finally:
        _unstage()


def _unstage() -> None:
    with contextlib.suppress(OSError):
        overlayfs.unstage(_STAGE)
    with contextlib.suppress(OSError):
        os.rmdir(_STAGE)


def _ensure() -> None:
    """Have a mount at the place that is nobody's peer: what lies on it is not seen elsewhere."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(PLACE, 0o700)
    fd = os.open(PLACE, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not sys.statx(fd).mount_root:
            mount = overlayfs.make_tmpfs(_SIZE, _INODES)
            try:
                sys.move_mount(mount, fd)
            finally:
                os.close(mount)
        sys.mount_propagation(PLACE, sys.MS_PRIVATE)
    finally:
        os.close(fd)


def _attach(path: str, mount_fd: int, *, single: bool) -> None:
    if single:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    else:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    overlayfs.attach(mount_fd, path)


def _write(record: Record, path: str, unit: str) -> None:
    key = "BindReadOnlyPaths" if record.options.read_only else "BindPaths"
    text = f"[Service]\n{key}={_quoted(path)}:{_quoted(record.mount_point)}\n"
    new = _half_written(record.uuid)
    with open(new, "w", encoding="utf-8", errors="surrogateescape") as out:
        out.write(text)
    folder = f"{_UNITS}/{unit}.d"
    os.makedirs(folder, 0o755, exist_ok=True)
    os.rename(new, f"{folder}/{_PREFIX}{record.uuid}{_SUFFIX}")


def _half_written(uuid: str) -> str:
    return f"{_UNITS}/{_PREFIX}{uuid}.new"


def _quoted(path: str) -> str:
    """Return a path as systemd's syntax has it.

    :raises RefusedError: if it cannot be written there.
    """
    if any(ord(character) < 32 or character in _QUOTES for character in path):  # noqa: PLR2004
        message = f"{shown(path)} has quotes or control characters, which systemd cannot bind"
        raise RefusedError(message)
    text = path.replace("\\", "\\\\").replace("%", "%%")
    return '"' + text.replace(":", "\\:") + '"'


def units(uuid: str) -> list[str]:
    """Return the services that an overlay is shown to."""
    try:
        folders = sorted(os.listdir(_UNITS))
    except OSError:
        return []
    file = f"{_PREFIX}{uuid}{_SUFFIX}"
    return [
        folder.removesuffix(".d")
        for folder in folders
        if os.path.exists(f"{_UNITS}/{folder}/{file}")
    ]


def uuids() -> set[str]:
    """Return the overlays that are shown to some service, or whose mount was left."""
    try:
        return {name for name in os.listdir(PLACE) if UUID.fullmatch(name)}
    except OSError:
        return set()


def withdraw(uuid: str, unit: str | None = None) -> list[str]:
    """Show an overlay to no service any more, or not to *unit*; return which they were.

    A service that runs keeps it until it is started again.

    :raises OverlaydError: if systemd does not take notice.
    """
    if not os.path.isdir(ROOTS):
        return []
    with _locked():
        return _withdraw(uuid, unit)


def settle(uuid: str) -> bool:
    """Finish what a killed command began to show, or not to show; return whether there was any.

    :raises OverlaydError: if systemd does not take notice.
    """
    with _locked():
        if not (there := units(uuid)):
            _withdraw(uuid, None)
            return True
        if "yes" not in _systemctl("show", "--property=NeedDaemonReload", "--value", *there):
            return False
        _systemctl("daemon-reload")
        return True


def _withdraw(uuid: str, unit: str | None) -> list[str]:
    gone = [each for each in units(uuid) if unit in {None, each}]
    for each in gone:
        os.unlink(f"{_UNITS}/{each}.d/{_PREFIX}{uuid}{_SUFFIX}")
        with contextlib.suppress(OSError):  # somebody else has one there
            os.rmdir(f"{_UNITS}/{each}.d")
    path = f"{PLACE}/{uuid}"
    last = not units(uuid) and os.path.lexists(path)
    if gone or last:
        # Where a command was killed systemd may know a drop-in that is not there any more.  It
        # has to forget it before the mount goes, or the service would not start.
        _systemctl("daemon-reload")
    if last:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_half_written(uuid))
        for _ in range(_mounts_at(path)):
            with contextlib.suppress(OSError):
                sys.umount2(path, sys.MNT_DETACH)
        with contextlib.suppress(OSError):
            (os.rmdir if os.path.isdir(path) else os.unlink)(path)
    return gone


def restart(services: Sequence[str]) -> None:
    """Start services again, those that run.

    :raises OverlaydError: if one does not come up.
    """
    if services:
        _systemctl("try-restart", *services)


def _systemctl(*arguments: str) -> str:
    """Ask systemd for something.

    :raises OverlaydError: if it does not do it, or there is none.
    """
    try:
        done = subprocess.run(  # noqa: S603
            ["/usr/bin/systemctl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        message = f"systemctl {arguments[0]}: {error}"
        raise OverlaydError(message, hint="systemd shows overlays to services") from None
    if done.returncode != 0:
        said = done.stderr.strip().partition("\n")[0]
        message = f"systemctl {arguments[0]}: {shown(said)}"
        raise OverlaydError(message, hint="systemctl status; journalctl -xe")
    return done.stdout
