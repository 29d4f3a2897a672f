# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who runs this process and since which boot, as the kernel attests it.

Nothing here is taken from the environment: ``SUDO_UID`` and the like say what the caller likes.
"""

from __future__ import annotations

import errno
import os
from functools import cache, partial

from overlayd.places import RUN

TYPE_CHECKING = False  # see overlayd.entrance
if TYPE_CHECKING:
    from typing import Final

_UNSET: Final = 0xFFFFFFFF
CAP_SYS_ADMIN: Final = 21
_ENDED: Final = "ZX"
"""States of a process that is there no more."""


@cache
def session_id() -> int | None:
    """Return the audit session of this process, which is also logind's; None outside of one."""
    return attested("sessionid")


@cache
def login_uid() -> int | None:
    """Return the uid that logged in, which stays through sudo and su; None outside of a login."""
    return attested("loginuid")


@cache
def capable() -> bool:
    """Whether this process may mount where it is: root, or somebody in a user namespace of his."""
    if os.geteuid() == 0:
        return True
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        _, _, rest = file.read().partition("\nCapEff:")
    return bool(int(rest.split(maxsplit=1)[0], 16) >> CAP_SYS_ADMIN & 1)


@cache
def in_user_namespace() -> bool:
    """Whether this is a user namespace beneath the first one.

    Overlays keep what they note in ``user.*`` attributes there, and not every owner can be given.
    """
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != ["0", "0", str(_UNSET)]


def owns_world() -> bool:
    """Whether this is inside of a private world of the caller's, where he may look at least."""
    try:
        return os.stat(RUN).st_uid == os.geteuid()
    except OSError:
        return False


def identity(pid: int) -> dict[str, object]:
    """Return what tells process *pid* from another that has its number later.

    :raises OSError: if there is no such process.
    """
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    if fields[0] in _ENDED:
        raise ProcessLookupError(errno.ESRCH, "it has ended")
    return {"pid": pid, "started": int(fields[19])}


@cache
def boot_id() -> str:
    """Return the id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def attested(which: str, pid: int | str = "self", uid: int | None = None) -> int | None:
    """Return ``sessionid`` or ``loginuid`` of a process; None if it has none.

    With *uid*, also None for a process of anybody else: who was meant is gone, and his pid in use
    again.

    :raises OSError: if it cannot be read.
    """
    process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if uid is not None and not _belongs(process, uid):
            return None
        number = int(_read(process, which))
    except FileNotFoundError:  # a kernel without audit
        return None
    finally:
        os.close(process)
    return None if number == _UNSET else number


def _belongs(process: int, uid: int) -> bool:
    _, _, ids = _read(process, "status").partition("\nUid:")
    return int(ids.split(maxsplit=1)[0]) == uid


def _read(process: int, name: str) -> str:
    """Read a file of a process, all of it the same one's, as its directory is open."""
    opener = partial(os.open, dir_fd=process)
    with open(name, encoding="utf-8", errors="replace", opener=opener) as file:
        return file.read()
