# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks that are waited for only so long: who holds one may hang, or was stopped."""

from __future__ import annotations

import fcntl
import time

from overlayd.errors import BusyError, from_oserror


def take(fd: int, path: str, what: str, patience: float) -> None:
    """Lock *fd*, which is *path*, the lock of *what*; wait for it for *patience* seconds.

    :raises BusyError: if another command keeps it.
    :raises OverlaydError: if it cannot be locked.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                message = f"another command keeps the lock of {what}"
                hint = f"it hangs or was stopped: fuser -v {path}"
                raise BusyError(message, hint=hint) from None
            time.sleep(0.002)
        except OSError as error:
            raise from_oserror(error, f"locking {path}") from None
        else:
            return
