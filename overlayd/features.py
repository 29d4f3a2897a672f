# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this kernel can do, found out by doing it.

Never by version: distributions move features in both directions.  Every trial runs in a child
with a mount namespace of its own, so that nothing of it is ever seen.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from overlayd import overlayfs
from overlayd import syscalls as sys
from overlayd.places import USR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_GROUND: Final = "/run"
_OPEN: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Features:
    """What was tried: for each feature None if it works, else the reason; and the depth left."""

    results: dict[str, str | None]
    depth_left: int

    def works(self, name: str) -> bool:
        """Whether the feature *name* works."""
        return self.results.get(name, "not tried") is None


def probe() -> Features:
    """Try everything in a child process.

    :raises OSError: if there can be no child or no mount namespace.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must not go on as a second caller.
        try:
            try:
                answer = _probe_here()
            except BaseException as error:  # noqa: BLE001
                answer = {"results": {"namespace": repr(error)}, "depth": 0}
            os.write(writing, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        data = file.read()
    os.waitpid(child, 0)
    value = json.loads(data)
    return Features(value["results"], value["depth"])


def _probe_here() -> dict[str, object]:
    sys.unshare(sys.CLONE_NEWNS)
    sys.mount_propagation("/", sys.MS_REC | sys.MS_PRIVATE)
    usr = os.open(USR, _OPEN)
    results: dict[str, str | None] = {}

    def attempt(name: str, trial: Callable[[], object]) -> None:
        try:
            trial()
        except OSError as error:
            results[name] = f"{error.filename or name}: {error.strerror}"
        else:
            results[name] = None

    attempt("openat2", lambda: os.close(overlayfs.open_beneath(usr, "")))
    attempt("new mount API", _ground)
    attempt("writable overlay", lambda: _overlay("a", "b"))
    attempt("read-only overlay", _read_only)
    attempt("exchange by MOVE_MOUNT_BENEATH", lambda: _exchange(overlayfs.Exchange.BENEATH))
    attempt("exchange by propagation", lambda: _exchange(overlayfs.Exchange.TUCK))
    attempt("listmount", sys.listmount)
    attempt("unique mount ids", lambda: sys.statx(usr, unique=True))
    attempt("user attributes on tmpfs", lambda: os.setxattr(f"{_GROUND}/a", "user.probe", b"1"))
    return {"results": results, "depth": _depth_left(usr)}


def _ground() -> None:
    _attach(overlayfs.make_tmpfs(1 << 20, 1024), _GROUND)
    sys.mount_propagation(_GROUND, sys.MS_PRIVATE)
    for name in ("a", "b", "place", "stage", "upper", "work", "d0", "d1", "d2"):
        os.mkdir(f"{_GROUND}/{name}")


def _attach(mount_fd: int, path: str) -> None:
    try:
        overlayfs.attach(mount_fd, path)
    finally:
        os.close(mount_fd)


def _overlay(*lowers: str) -> None:
    top = os.open(_GROUND, _OPEN)
    fds = [os.open(name, _OPEN, dir_fd=top) for name in lowers]
    upper_work = os.open("upper", _OPEN, dir_fd=top), os.open("work", _OPEN, dir_fd=top)
    _attach(overlayfs.make_overlay("probe", fds, upper_work, 0), f"{_GROUND}/place")
    with open(f"{_GROUND}/place/file", "w", encoding="ascii") as file:
        file.write("probe")


def _read_only() -> None:
    fds = [os.open(f"{_GROUND}/{name}", _OPEN) for name in ("a", "b")]
    os.close(overlayfs.make_overlay("probe", fds, None, sys.MOUNT_ATTR_RDONLY))


@contextlib.contextmanager
def _stage() -> Iterator[str]:
    yield f"{_GROUND}/stage"


def _exchange(way: overlayfs.Exchange) -> None:
    parent = os.open(_GROUND, _OPEN)
    fds = [os.open(name, _OPEN, dir_fd=parent) for name in ("a", "b")]
    new = overlayfs.make_overlay("probe", fds, None, 0)
    try:
        device = os.fstat(new).st_dev
        overlayfs.put_beneath(new, f"{_GROUND}/place", parent, _stage, way)
        sys.umount2(f"{_GROUND}/place", sys.MNT_DETACH)
    finally:
        os.close(new)
    if os.stat(f"{_GROUND}/place").st_dev != device:
        raise OSError(5, "the new mount is not where it should be", way)


def _depth_left(usr: int) -> int:
    """Return how many overlays can lie on one another at /usr."""
    lower = usr
    for depth in range(3):
        try:
            other = os.open(f"{_GROUND}/b", _OPEN)
            mount = overlayfs.make_overlay("probe", [lower, other], None, 0)
            place = f"{_GROUND}/d{depth}"
            _attach(mount, place)
            lower = os.open(place, _OPEN)
        except OSError:
            return depth
    return 3
