# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking on at a machine while it is tested, and telling what the rules find.

Journal and kernel log come as events of the agent, the console is read a few times a second.  What
leaves nothing to talk to, a panic for example, breaks the machine at once: whoever waits for an
answer gets the cause instead of a time-out.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from harness.console import KNOWN_NOISE, Log, died, scan, scan_journal
from harness.errors import HarnessError, MachineError, RemoteError
from harness.findings import FATAL, Allow, Finding, Kind
from harness.kmsg import KernelLog
from harness.logs import from_journal
from harness.machine import Capability

if TYPE_CHECKING:
    from collections.abc import Iterable

    from harness.logs import LogEvent
    from harness.machine import Machine

INTERVAL: Final = 0.2
"""Seconds between two looks at the console."""
SETTLE: Final = 5.0
"""Seconds within which everything that was logged before must have arrived."""
_LAST_LINES: Final = 2.0  # seconds in which a dying machine may finish its trace
_QUIET: Final = 0.5  # seconds without a line after which it is taken for finished
_MARKS = itertools.count(1)
_MARK_LENGTH: Final = 40  # a mark may come in two pieces

# Two ways into the journal, as each is in order for itself only.  The console shows what is more
# important than the first number of printk.  The journal is then read at once: who follows it is
# told of entries only after 0.25 s (POST_CHANGE_TIMER_INTERVAL_USEC of systemd's journal-file.c).
_SCRIPT: Final = """
mark=$1 kernel=$2; shift 2
if [ "$kernel" ] && [ -c /dev/kmsg ]; then
  echo "<3>harness: $mark" > /dev/kmsg && echo kernel
  read -r level rest < /proc/sys/kernel/printk && [ "$level" -gt 3 ] && echo console
fi
command -v logger > /dev/null &&
  logger --socket-errors=on -t harness -p user.notice -- "$mark" && echo logger
"""
_READ: Final = """
read -r uptime rest < /proc/uptime && echo "uptime $uptime"
[ $# = 0 ] || journalctl -q -b -o json "$@"
true
"""
_WAYS: Final = frozenset({"kernel", "console", "logger"})
_FIELDS: Final = (
    "MESSAGE,MESSAGE_ID,PRIORITY,SYSLOG_IDENTIFIER,UNIT,USER_UNIT,JOB_RESULT,_TRANSPORT,_COMM,"
    "_SYSTEMD_UNIT,COREDUMP_COMM,COREDUMP_PID"
)
_MOST_ENTRIES: Final = 2000  # read at once; the others come in time to who follows
_READS: Final = 3
_PAUSE: Final = 0.02
_CURSOR: Final = "__CURSOR"


class Watch:
    """Watches one machine from :meth:`start` to :meth:`stop`."""

    def __init__(self, machine: Machine, *, allowed: Iterable[Allow] = KNOWN_NOISE) -> None:
        self.machine = machine
        self._always = tuple(allowed)
        self._now: list[Allow] = []
        self._log = Log()
        self._seen = 0  # characters of the console
        self._marks: dict[str, set[str]] = {}
        self._begin = 0.0  # of this host's monotonic clock
        self._cursor = ""  # of the last entry that was read at once
        self._cursors: set[str] = set()  # of entries that came already
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._follows = False
        self._kernel: KernelLog | None = None  # the host's, if the machine runs on that
        self._told = False  # that the machine died

    def start(self) -> None:
        """Begin; all that is on the console already counts as well.

        :raises MachineError: if the machine broke.
        """
        self._begin = time.monotonic()
        if self.machine.kernel_log is not None:
            with suppress(OSError):  # it may not be read: then it is not watched
                self._kernel = KernelLog(self.machine.kernel_log)
        with suppress(RemoteError):  # nothing is logged there: the console remains
            self.machine.follow(self._event)
            self._follows = True
        if Capability.CONSOLE in self.machine.capabilities:
            name = f"console of {self.machine.name}"
            self._thread = threading.Thread(target=self._look, name=name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End; may be called again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._follows:
            self._follows = False
            self.machine.unfollow(self._event)
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def allow(self, *allowances: Allow) -> None:
        """Let these pass until the next :meth:`take`."""
        with self._change:
            self._now.extend(allowances)

    def settle(self, timeout: float = SETTLE) -> None:
        """Wait until all that the machine had logged by now has arrived.

        Marks are written to where logs come from, and waited for where they end.  A machine that
        is off or broke, or where a mark does not arrive in time, is not waited for.
        """
        if self.machine.broken is not None:
            self._let_it_finish()
            return
        mark = f"mark {os.getpid()}-{next(_MARKS):06}"
        try:
            with self._change:
                self._marks[mark] = set()
            ways = self._write(mark)
            for _ in range(_READS):
                if self._arrived(mark, ways, _PAUSE) or not self._reads_journal:
                    break
                self._ask("sh", "-c", _READ, "sh")  # what it was given it had not taken yet
            self._arrived(mark, ways, timeout)
        except HarnessError:  # it is off, or has just broken
            if self.machine.broken is not None:
                self._let_it_finish()
        finally:
            with self._change:
                self._marks.pop(mark, None)
        self._read()

    def _write(self, mark: str) -> set[str]:
        """Write the mark and read the journal; return the ways on which the mark must arrive."""
        can = self.machine.capabilities
        kernel = "yes" if Capability.OWN_KERNEL in can else ""
        lines = self._ask("sh", "-c", _SCRIPT + _READ, "sh", mark, kernel)
        ways = _WAYS.intersection(lines)
        if Capability.CONSOLE not in can:
            ways -= {"console"}
        return set(ways if self._follows else ways & {"console"})

    @property
    def _reads_journal(self) -> bool:
        return self._follows and Capability.SYSTEMD in self.machine.capabilities

    def _arrived(self, mark: str, ways: set[str], timeout: float) -> bool:
        with self._change:
            return self._change.wait_for(lambda: ways <= self._marks[mark], timeout)

    def _ask(self, *command: str) -> list[str]:
        """Run a script that ends with reading the journal; return its other lines."""
        start = time.monotonic()
        options: list[str] = []
        if self._reads_journal:
            since = f"--since=-{math.ceil(start - self._begin) + 1}s"
            where = f"--after-cursor={self._cursor}" if self._cursor else since
            options = [f"--output-fields={_FIELDS}", f"-n{_MOST_ENTRIES}", where]
        answer = self.machine.run([*command, *options], check=False)
        ago = time.monotonic() - self._begin
        others, entries, begin = [], [], 0.0
        for line in answer.out.splitlines():
            if line.startswith("{"):
                entries.append(from_journal(json.loads(line)))
            elif line.startswith("uptime "):
                begin = float(line.removeprefix("uptime ")) - ago
            else:
                others.append(line)
        for event in entries:
            # What was before the start is not ours.  After a reboot all is of after it.
            if self._cursor or event.monotonic >= begin:
                self._event(event)
        if entries:
            self._cursor = entries[-1].fields.get(_CURSOR, "")
        return others

    def findings(self) -> tuple[Finding, ...]:
        """Return what was found and is not allowed, since the start or the last :meth:`take`."""
        self._read()
        with self._change:
            if self.machine.broken is not None and not self._told:
                self._add_death(self.machine.broken)
            allowed = (*self._always, *self._now)
            found = self._log.findings(allowed)
            return found + (self._kernel.findings(allowed) if self._kernel is not None else ())

    def take(self) -> tuple[Finding, ...]:
        """Return the findings, and begin anew without them and without what :meth:`allow` said."""
        found = self.findings()
        with self._change:
            self._log.forget()
            if self._kernel is not None:
                self._kernel.forget()
            self._now.clear()
        return found

    def _let_it_finish(self) -> None:
        """Wait until a machine that broke writes no more."""
        end = time.monotonic() + _LAST_LINES
        quiet_since, seen = time.monotonic(), self._seen
        while time.monotonic() < min(end, quiet_since + _QUIET):
            time.sleep(_QUIET / 5)
            self._read()
            if self._seen != seen:
                quiet_since, seen = time.monotonic(), self._seen
        with self._change:
            self._log.end_of_console()

    def _add_death(self, cause: MachineError) -> None:
        self._told = True
        if any(finding.kind in FATAL for finding in self._log.findings()):
            return  # that is why
        notes = "\n".join(getattr(cause, "__notes__", ()))
        self._log.add(died(str(cause), notes))

    # What comes in.

    def _event(self, event: LogEvent) -> None:
        with self._change:
            if (cursor := event.fields.get(_CURSOR)) is not None:
                if cursor in self._cursors:
                    return
                self._cursors.add(cursor)
            self._log.event(event)
            if "mark " in event.message:
                self._reached("kernel" if event.kernel else "logger", event.message)
        self._break_if_fatal()

    def _look(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._read()

    def _read(self) -> None:
        if Capability.CONSOLE not in self.machine.capabilities:
            return
        with self._change:
            text = self.machine.console()
            if len(text) < self._seen:
                self._seen = 0
            if new := text[self._seen :]:
                self._seen = len(text)
                self._log.console(new)
                recent = text[-len(new) - _MARK_LENGTH :]
                if self._marks and "mark " in recent:
                    self._reached("console", recent)
        self._break_if_fatal()

    def _reached(self, way: str, text: str) -> None:
        for mark, ways in self._marks.items():
            if mark in text:
                ways.add(way)
        self._change.notify_all()

    def _break_if_fatal(self) -> None:
        if self.machine.broken is not None:
            return
        with self._change:
            found = self._log.findings((*self._always, *self._now))
        for finding in found:
            if finding.kind in FATAL and finding.kind is not Kind.DIED:
                self.machine.break_(MachineError(f"{self.machine.name}: {finding.subject}"))
                return


def boot_findings(machine: Machine, allowed: Iterable[Allow] = KNOWN_NOISE) -> tuple[Finding, ...]:
    """Return what is found in all that *machine* logged since it was started.

    For a machine that is about to be a template: a watch that begins after a restore sees nothing
    of its boot.
    """
    found: list[Finding] = []
    allowed = tuple(allowed)
    if Capability.CONSOLE in machine.capabilities:
        found += scan(machine.console(), allowed)
    if Capability.SYSTEMD in machine.capabilities:
        found += scan_journal(machine.journal("-b", "-o", "json").splitlines(), allowed)
    unique = {(finding.kind, finding.subject): finding for finding in found}
    return tuple(unique.values())
