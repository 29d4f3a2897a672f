# SPDX-License-Identifier: LGPL-2.1-or-later
"""Children of this very interpreter: everything is loaded, so that one costs a millisecond."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc = ctypes.CDLL(None, use_errno=True)


def forked(work: Callable[[], object]) -> int:
    """Do *work* in a child that never outlives this process; return its process id.

    Its exit status is 1 if anything is raised, which then is on standard error.
    """
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # whatever it is, this is the end of the child
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def adopt_orphans(*, yes: bool) -> None:
    """Let what children of this process leave behind become its own children, or no longer."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


def children() -> set[int]:
    """Return the children of this process, ended ones that nobody waited for among them."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                parent = int(file.read().rpartition(b") ")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            found.add(int(pid))
    return found


def open_files() -> int:
    """Return how many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))
