# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the time goes: building, booting, restoring, testing.

Whoever does something that takes long says so with :func:`phase`, and the report draws a bar of
it.  Time is counted once: what an inner phase takes is taken off the outer one.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Phase(StrEnum):
    """What time is spent on."""

    BUILD = "build"
    BOOT = "boot"
    RESTORE = "restore"
    TEST = "test"
    TEARDOWN = "teardown"


class Ledger:
    """Seconds by phase, of all threads together; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spent: dict[Phase, float] = {}
        self._local = threading.local()

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the time of the block as *phase*, less what inner phases take."""
        outer: list[float] | None = getattr(self._local, "inner", None)
        inner = [0.0]
        self._local.inner = inner
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._local.inner = outer
            if outer is not None:
                outer[0] += seconds
            with self._lock:
                self._spent[phase] = self._spent.get(phase, 0.0) + seconds - inner[0]

    def take(self) -> dict[Phase, float]:
        """Return what was spent since the last call, and start again at nothing."""
        with self._lock:
            spent, self._spent = self._spent, {}
        return spent


LEDGER = Ledger()
phase = LEDGER.phase
