# SPDX-License-Identifier: LGPL-2.1-or-later
"""Into the namespaces of private overlays, for good: a program that sees them.

Loads little, as ``enter`` is to start quickly: what it needs does without ``typing``,
``dataclasses`` and regular expressions, and, where the words are plain, without the command line.
"""

from __future__ import annotations

import os
import signal
import sys

from overlayd import homes, userns
from overlayd import syscalls as kernel
from overlayd.errors import (
    NotFoundError,
    OverlaydError,
    RefusedError,
    from_oserror,
    not_found,
    shown,
)

TYPE_CHECKING = False  # checkers take it for that of typing, which takes long to load
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def enter_at_once(words: Sequence[str]) -> None:
    """Do ``enter NAME... -- COMMAND...`` if that is all there is, and nothing is in the way.

    Otherwise it returns, and the command line does it again and says what is wrong.

    :raises OverlaydError: if it is too late for that.
    """
    middle = words.index("--") if "--" in words else 0
    names, command = words[:middle], words[middle + 1 :]
    plain = names and command and not any(name.startswith("-") for name in names)
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if not plain or None in streams or "_OVERLAYD_COMPLETE" in os.environ:
        return
    try:
        place = _go_in(names)
    except (OverlaydError, OSError):
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    become(command, place)


def enter(names: Sequence[str], command: Sequence[str], *, as_root: bool = False) -> NoReturn:
    """Become *command* where the private overlays are seen, of which *names* have to be there.

    With *as_root* by uid 0 of the user namespace, which is a subordinate uid of the user's.

    :raises NotFoundError: if one of them is not there, or there is no such command.
    """
    become(command, _go_in(names), as_root=as_root)


def _go_in(names: Sequence[str]) -> str:
    """Go where private overlays are seen, of which *names* have to be there.

    Returns where this process was.
    """
    with homes.opened() as home:
        found = homes.find(home)
    if found is None:
        raise not_found(names[0])
    present = homes.names(found)
    for name in names:
        if name not in present:
            raise not_found(name)
    place = working_directory()
    join(found)
    return place


def working_directory() -> str:
    """Return where this process is; the root if that is gone."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def become(command: Sequence[str], place: str, *, as_root: bool = False) -> NoReturn:
    """Become a command, with no way to more rights than the user has."""
    try:
        os.chdir(place)
    except OSError:
        os.chdir("/")
    if os.geteuid() != 0:
        kernel.no_new_privs()
    if as_root:
        userns.become_root()
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], [*command])  # noqa: S606  # it is the caller's
    except OSError as error:
        raise from_oserror(error, f"running {shown(command[0])}") from None


def join(pid: int) -> None:
    """Go where process *pid* is.

    :raises OverlaydError: if it is gone, or this process is there already.
    """
    try:
        if homes.is_inside(pid):
            message = "this is inside of 'overlayd enter' already"
            raise RefusedError(message, hint="use another terminal to change private overlays")
        pidfd = os.pidfd_open(pid)
        try:
            userns.join(pidfd)
        finally:
            os.close(pidfd)
    except ProcessLookupError:
        message = "the process that kept private overlays has ended, and they with it"
        raise NotFoundError(message) from None
    except OSError as error:
        raise from_oserror(error, "entering the namespaces of private overlays") from None
