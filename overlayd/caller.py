# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who runs this process and since which boot, as the kernel attests it.

Nothing here is taken from the environment: ``SUDO_UID`` and the like say what the caller likes.
"""

from __future__ import annotations

from functools import cache
from typing import Final

_UNSET: Final = 0xFFFFFFFF


@cache
def session_id() -> int | None:
    """Return the audit session of this process, which is also logind's; None outside of one."""
    return attested("sessionid")


@cache
def login_uid() -> int | None:
    """Return the uid that logged in, which stays through sudo and su; None outside of a login."""
    return attested("loginuid")


@cache
def boot_id() -> str:
    """Return the id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def attested(which: str, pid: int | str = "self") -> int | None:
    """Return ``sessionid`` or ``loginuid`` of a process; None if it has none.

    :raises OSError: if it cannot be read.
    """
    try:
        with open(f"/proc/{pid}/{which}", encoding="ascii") as file:
            number = int(file.read())
    except FileNotFoundError:  # a kernel without audit
        return None
    return None if number == _UNSET else number
