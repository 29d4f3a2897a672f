# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user namespace and a mount namespace of a user's own, in which he may mount without root.

His own uid is mapped and what subordinate uids he has; nobody else's, and not root's.  Whatever he
does in it he does with his own rights on what there is outside: files of others' stay as closed to
him as they were.  Root has a mount namespace alone.
"""

from __future__ import annotations

import contextlib
import os

from overlayd import caller
from overlayd import syscalls as sys
from overlayd.errors import KernelError, RefusedError

TYPE_CHECKING = False  # see overlayd.entrance
if TYPE_CHECKING:
    from typing import Final

# Each of them, if it has this value, keeps users from it: file, value, how to change it.
_SWITCHES: Final = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)


def _kinds() -> int:
    return sys.CLONE_NEWNS if os.geteuid() == 0 else sys.CLONE_NEWUSER | sys.CLONE_NEWNS


def begin(*, others: bool) -> None:
    """Move this process, which has one thread, into new namespaces with a world of their own.

    With *others* the subordinate uids of the user are mapped besides his own, if he has any.
    Mounts that appear outside appear inside as well, and never the other way round.

    :raises KernelError: if users may not do that here, naming the switch.
    """
    from overlayd import subids  # noqa: PLC0415  # joining needs none of it

    uid, gid = os.geteuid(), os.getegid()
    try:
        with subids.helper() if others else contextlib.nullcontext(bool) as map_others:
            sys.unshare(_kinds())
            if uid and not map_others():
                _write("setgroups", "deny")
                _write("uid_map", f"{uid} {uid} 1")
                _write("gid_map", f"{gid} {gid} 1")
        _entered()
        sys.mount_propagation("/", sys.MS_REC | sys.MS_SLAVE)
    except OSError as error:
        raise _closed(error) from None
    from overlayd.world import World  # noqa: PLC0415  # joining needs none of it

    World().cover()


def join(pidfd: int) -> None:
    """Move this process, which has one thread, into the namespaces of another.

    :raises OSError: if that may not be.
    """
    sys.setns(pidfd, _kinds())
    _entered()


def maps_others() -> bool:
    """Whether more uids than the user's own are mapped here."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return len(file.readlines()) > 1


def become_root() -> None:
    """Become uid 0 of this user namespace, a subordinate uid outside, which can change owners here.

    It cannot mount, as no program can that is entered.

    :raises RefusedError: if no subordinate uids are mapped.
    """
    if os.geteuid() == 0:
        return
    if not maps_others():
        from overlayd import subids  # noqa: PLC0415

        hint = subids.missing() or "you got them after you made the first of these overlays"
        raise RefusedError("no subordinate uids of yours are mapped here", hint=hint)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    sys.drop_from_bounding_set(caller.CAP_SYS_ADMIN)


def _entered() -> None:
    """Forget what was true outside."""
    caller.capable.cache_clear()
    caller.in_user_namespace.cache_clear()


def _write(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
        file.write(text)


def _closed(error: OSError) -> KernelError:
    """Say which switch keeps users from namespaces, as far as that can be found out."""
    for name, value, hint in _SWITCHES:
        with contextlib.suppress(OSError):
            with open(f"/proc/sys/{name}", encoding="ascii") as file:
                found = file.read().strip()
            if found == value:
                message = f"users may have no user namespace here: {name.replace('/', '.')}={found}"
                return KernelError(message, hint=hint)
    message = f"no user namespace can be had: {error.strerror}"
    return KernelError(message, hint="a container or a security module may forbid it")
