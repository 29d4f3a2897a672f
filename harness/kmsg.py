# SPDX-License-Identifier: LGPL-2.1-or-later
"""This host's kernel log, for machines that run on its kernel.

It is everybody's: what is found there need not be of the machine that is looked at.  So only that
counts which must not be on any machine (:data:`COUNTS`); a full disk or a refused mount may well be
somebody else's.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.console import Log
from harness.findings import Kind
from harness.logs import from_kmsg

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.findings import Allow, Finding

DEVICE: Final = Path("/dev/kmsg")
COUNTS: Final = frozenset({Kind.PANIC, Kind.OOPS, Kind.WARNING})
_RECORD: Final = 8192  # bytes at most: CONSOLE_EXT_LOG_MAX of the kernel's printk.h
_FACILITY: Final = 8  # times the number of who says it: the kernel is 0


class KernelLog:
    """What the kernel says from now on; *device* is given by tests.

    :raises OSError: if it cannot be read, by ordinary users for example.
    """

    def __init__(self, device: Path = DEVICE) -> None:
        self._fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a pipe has no past
            os.lseek(self._fd, 0, os.SEEK_END)
        self._log = Log()

    def findings(self, allowed: Iterable[Allow]) -> tuple[Finding, ...]:
        """Return what was found since the start or the last :meth:`forget`, up to this moment."""
        while True:
            try:
                record = os.read(self._fd, _RECORD).decode("utf-8", "replace")
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # records were overwritten: the next read goes on where it can
            if not record:
                break
            # What programs write there says nothing of the kernel.
            priority = record.partition(",")[0]
            if priority.isdigit() and int(priority) < _FACILITY:
                self._log.event(from_kmsg(record))
        return tuple(found for found in self._log.findings(allowed) if found.kind in COUNTS)

    def forget(self) -> None:
        """Drop what was found."""
        self._log.forget()

    def close(self) -> None:
        """End it."""
        os.close(self._fd)
