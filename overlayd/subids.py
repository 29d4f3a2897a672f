# SPDX-License-Identifier: LGPL-2.1-or-later
"""Subordinate uids and gids: other ids than his own that a user may have in a user namespace.

They are mapped to 0 and what follows, his own to itself, as ``podman --userns=keep-id`` does.
``newuidmap`` and ``newgidmap`` write such maps, as the kernel lets only root do that; whoever has
no such ids, or not these programs, has his own alone.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_PROGRAMS: Final = ("newgidmap", "newuidmap")
_FILES: Final = ("/etc/subgid", "/etc/subuid")
# Waits until there is something to map; the words are numbers.
_SCRIPT: Final = 'read -r _ && newgidmap "$0" $1 && newuidmap "$0" $2'


def ranges(path: str, uid: int) -> list[tuple[int, int]]:
    """Return first and count of each range that a file like ``/etc/subuid`` gives a user."""
    whose = {str(uid)}
    with contextlib.suppress(KeyError):
        whose.add(pwd.getpwuid(uid).pw_name)
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if name in whose and first.isdecimal() and count.isdecimal() and int(count):
                    found.append((int(first), int(count)))
    except OSError:
        return []
    return found


def mapping(own: int, given: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return a map (inside, outside, count): *own* to itself, what was *given* around it from 0."""
    found = [(own, own, 1)]
    inside = 0
    for first, count in given:
        given_of_it = 0
        while given_of_it < count:
            inside += inside == own
            taken = count - given_of_it
            if inside < own:
                taken = min(taken, own - inside)
            found.append((inside, first + given_of_it, taken))
            inside += taken
            given_of_it += taken
    return found


def missing() -> str | None:
    """Return what this user lacks to have subordinate uids; None if nothing."""
    if not all(map(shutil.which, _PROGRAMS)):
        return "there is no newuidmap (package uidmap)"
    for path in _FILES:
        if not ranges(path, os.geteuid()):
            return f"{path} gives you none"
    return None


@contextlib.contextmanager
def helper() -> Generator[Callable[[], bool]]:
    """Give a function that maps all ids of this user, once this process is in its namespace.

    It says whether it did.  What does it has to be started before, as set-id programs give nothing
    inside.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or missing():
        yield lambda: False
        return
    maps = [
        " ".join(str(number) for part in mapping(own, ranges(path, uid)) for number in part)
        for own, path in zip((gid, uid), _FILES, strict=True)
    ]
    process = subprocess.Popen(  # noqa: S603
        ["/bin/sh", "-c", _SCRIPT, str(os.getpid()), *maps],
        stdin=subprocess.PIPE,
        bufsize=0,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    assert process.stdin is not None  # noqa: S101
    with process.stdin as pipe:

        def write() -> bool:
            pipe.write(b"\n")
            return process.wait() == 0

        yield write
    process.wait()  # at the end of its input it does nothing
