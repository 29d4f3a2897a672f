# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be found wrong with a machine, and what of it is all right."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MAX_LINES = 40
"""Lines of a finding that are kept."""


class Kind(StrEnum):
    """What was found."""

    PANIC = "panic"
    INIT = "init"  # process 1 gave up
    OOPS = "oops"
    WARNING = "warning"
    OVERLAYFS = "overlayfs"
    OOM = "oom"
    HUNG_TASK = "hung-task"
    STALL = "stall"
    DISK = "disk"
    CORE_DUMP = "core-dump"
    UNIT = "unit"
    CYCLE = "ordering-cycle"
    DIED = "died"  # the machine itself, QEMU for example


FATAL = frozenset({Kind.PANIC, Kind.INIT, Kind.DIED})
"""After these nothing in the machine will answer any more."""


@dataclass(frozen=True)
class Finding:
    """Something that must not be there.

    :ivar subject: the unit, process or message it is about; equal for what is reported twice, as
        on the console and in the journal.
    """

    kind: Kind
    source: str
    subject: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.kind} ({self.source}): {self.subject}", *self.lines])


@dataclass(frozen=True)
class Allow:
    """Findings that are all right: of *kind*, or any, with a line that *pattern* is found in."""

    pattern: str
    reason: str
    kind: Kind | None = None

    def covers(self, finding: Finding) -> bool:
        """Return whether *finding* is one of these."""
        if self.kind not in {None, finding.kind}:
            return False
        return any(re.search(self.pattern, line) for line in (finding.subject, *finding.lines))


class Growing:
    """A finding that may still get lines; *kind* is set before anybody sees it."""

    def __init__(self, kind: Kind | None, source: str, subject: str, *lines: str) -> None:
        self.kind = kind
        self.source = source
        self.subject = subject
        self.lines = list(lines[:MAX_LINES])
        self.foreign = 0

    def add(self, line: str, *, important: bool = False) -> None:
        """Take a further line; an *important* one takes the place of the last if there are many."""
        if len(self.lines) < MAX_LINES:
            self.lines.append(line)
        elif important:
            self.lines[-1] = line

    def finding(self) -> Finding:
        """Return what it is by now."""
        assert self.kind is not None  # noqa: S101 - only then it is handed out
        return Finding(self.kind, self.source, self.subject, tuple(self.lines))
