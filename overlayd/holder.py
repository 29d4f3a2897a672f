# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process that keeps a user's namespaces while he has private overlays.

    python3 -m overlayd.holder DIRECTORY

It makes them, says in DIRECTORY that it is there, and sleeps.  It ends by SIGTERM, when that
directory, which goes with the login session, does not name it any more, or when somebody who
removed /run/overlayd outside has taken the records from it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from overlayd import caller, userns
from overlayd.errors import OverlaydError
from overlayd.homes import FILE
from overlayd.places import RUN

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOOK: Final = 5.0
"""Seconds between two looks at the directory."""


def main(argv: Sequence[str]) -> int:
    """Run as a program."""
    try:
        (directory,) = argv
    except ValueError:
        sys.stderr.write("usage: python3 -m overlayd.holder DIRECTORY\n")
        return 2
    os.umask(0o077)
    own = json.dumps(caller.identity(os.getpid()))
    try:
        userns.begin(others=True)
    except OverlaydError as error:
        sys.stderr.write(json.dumps({"message": error.message, "hint": error.hint}))
        return error.exit_code
    os.chdir("/")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    # Nothing of the directory stays open: whoever ends the session has to be able to unmount it.
    path = f"{directory}/{FILE}"
    new = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    os.write(new, own.encode())
    os.close(new)
    os.rename(f"{path}.new", path)
    mine = os.stat(RUN)
    while signal.sigtimedwait([signal.SIGTERM], _LOOK) is None:
        if _read(path) != own or not _is_there(mine):
            break
    return 0


def _is_there(world: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(RUN), world)
    except OSError:
        return False


def _read(path: str) -> str:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(file, encoding="utf-8") as text:
            return text.read()
    except OSError:  # it is gone, and so is the session
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
