# SPDX-License-Identifier: LGPL-2.1-or-later
"""What in a machine's console, kernel log and journal must not be there.

Rules turn lines into findings.  They look at the beginning of a kernel message, behind its time
stamp, and at the message ids of systemd's journal entries, so that text that merely quotes a
warning is none.  The lines of a trace stay together.  Nothing here knows where lines come from:
:mod:`harness.watch` brings them.

The rules were written against real logs, which are beside the tests, and the kernel's and
systemd's sources.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from harness.findings import MAX_LINES, Allow, Finding, Growing, Kind
from harness.logs import from_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from harness.logs import LogEvent

KNOWN_NOISE: tuple[Allow, ...] = ()
"""What an innocent guest says under emulation.  So far, nothing that the rules take for bad."""


# -- kernel messages -------------------------------------------------------------------------

# In the order in which they are tried; each matches at the beginning of a message.
_HEADS = (
    (Kind.PANIC, r"Kernel panic - not syncing"),
    (
        Kind.STALL,
        (
            r"(?:watchdog: )?BUG: (?:soft lockup|workqueue lockup)"
            r"|(?:NMI )?watchdog: .*(?i:hard lockup)"
            r"|rcu: INFO: rcu_\w+ (?:self-)?detected (?:expedited )?stall"
            r"|rcu: INFO: rcu_\w+ detected stalls"
            r"|INFO: rcu_\w+ .*stall"
        ),
    ),
    (
        Kind.OOPS,
        (
            r"BUG: |kernel BUG at |Oops: |Unable to handle kernel "
            r"|(?:invalid opcode|divide error|stack segment|int3|double fault|bounds|overflow"
            r"|general protection fault|invalid TSS|segment not present)\b.*: [0-9a-f]+ \[#\d"
        ),
    ),
    (Kind.WARNING, r"WARNING: |UBSAN: |KASAN: |KFENCE: "),
    (Kind.HUNG_TASK, r"INFO: task .{1,40} blocked "),
    (
        Kind.OOM,
        (
            r".{1,20} invoked oom-killer: |oom-kill:constraint="
            r"|(?:Memory cgroup out of memory|Out of memory).*: Killed process"
            r"|.{1,20}: page allocation failure: "
        ),
    ),
    (
        Kind.OVERLAYFS,
        # Its other messages tell of options that have no effect or of features a layer lacks.
        (
            r"overlayfs: (?!option |\"xino|\"check_copy_up\"|disabling |try mounting with"
            r"|NFS export re|upper fs does not support (?:tmpfile|RENAME_WHITEOUT|file handles)"
            r"|.*falling back to )"
        ),
    ),
    (
        Kind.DISK,
        (
            r"EXT4-fs error \(|EXT4-fs \(.{1,20}\): (?:Remounting filesystem read-only|failed )"
            r"|XFS \(.{1,20}\): (?:Corruption|Metadata|Internal error)|BTRFS (?:error|critical) "
            r"|(?:blk_update_request: )?(?:I/O|critical \w+) error, dev |Buffer I/O error on "
            r"|JBD2: .*[Ee]rror"
        ),
    ),
    (
        Kind.CORE_DUMP,
        (
            r"(?:traps: )?(?P<comm>.{1,15})\[(?P<pid>\d+)\]:? "
            r"(?:segfault at |general protection|trap |bad frame )"
        ),
    ),
)
_SYSTEMD_HEADS = (
    (Kind.INIT, r"Freezing execution|Caught <\w+>|!!!!!!|You are in (?:emergency|rescue) mode"),
    (Kind.CYCLE, r"(?P<begins>.*Found ordering cycle)|.*(?:ordering cycle|Found dependency on )"),
    (
        Kind.UNIT,
        (
            r"(?P<failed>[^\s:]+): (?:Failed with result|Job .* failed with result)"
            r"|(?:Failed to start|Dependency failed for|Failed to mount) (?P<name>\S+)"
        ),
    ),
)
# What systemd writes straight to the console, coloured.
_STATUS_HEADS = (
    (
        Kind.UNIT,
        (
            r"\[(?:FAILED|DEPEND)\] (?:Failed to (?:start|mount|listen on|activate swap|unmount) "
            r"|Failed unmounting |Dependency failed for )?(?P<name>\S+)"
        ),
    ),
    (Kind.INIT, r"You are in (?:emergency|rescue) mode|Entering emergency mode"),
    (Kind.PANIC, r"Kernel panic - not syncing"),
)


class _Rules:
    """One expression for all heads, as most lines match none; the group says which did."""

    def __init__(self, heads: tuple[tuple[Kind, str], ...]) -> None:
        self.kinds = {f"h{number}": kind for number, (kind, _) in enumerate(heads)}
        union = "|".join(f"(?P<h{number}>{text})" for number, (_, text) in enumerate(heads))
        self.pattern = re.compile(union)


_KERNEL = _Rules(_HEADS)
_SYSTEMD = _Rules(_SYSTEMD_HEADS)
_STATUS = _Rules(_STATUS_HEADS)

_STAMP = re.compile(r"\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ?")
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\^_c]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
_FROM_SYSTEMD = "systemd[1]: "
_CUT_HERE = "------------[ cut here ]"
_END = re.compile(r"---\[ end (?:trace|Kernel panic)")
_NUMBERED = re.compile(r".*\[#\d+\]")
_KILLED = re.compile(r"(?:Memory cgroup out of memory|Out of memory)")

# Lines that belong to a trace once one has begun.
_TRACE = re.compile(
    r"[\s<#?\"]|CPU: |Hardware name: |R[A-Z0-9]{2}: |[FC]S:  |CR2: |DR\d: |PKRU: |PGD |Code: "
    r"|Call Trace:|Modules linked in: |Workqueue: |Tainted: |task:|note: |Stack:|Oops: |rcu: "
    r"|Kernel Offset: |Sending NMI |NMI backtrace |list_\w+ corruption|refcount_t: |---\["
    r"|irq event stamp|hardirqs |softirqs |Kernel BUG|Internal error|Preemption disabled at"
    r"|[\w.]+\+0x[0-9a-f]+/0x"
)
_PATIENCE = {Kind.OOM: 400}  # the state of all memory and all processes stands in between
_FOREIGN = 4  # lines of others within a trace, in a row, until it is taken for ended


class Log:
    """All findings of one machine, from all its sources.  Not for several threads at once."""

    def __init__(self) -> None:
        self._groups: list[Growing] = []
        self._console = _Kernel("console", self._groups.append)
        self._kernel = _Kernel("kernel", self._groups.append)
        self._journal = _Journal(self._groups.append)
        self._partial = ""

    def console(self, text: str) -> None:
        """Take what the machine wrote on its console; the last line may be unfinished."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._console.raw(line)

    def end_of_console(self) -> None:
        """Take the unfinished line as it is: the machine will write no more."""
        self._console.raw(self._partial)
        self._partial = ""

    def event(self, event: LogEvent) -> None:
        """Take what the machine's agent reports of its journal or kernel log."""
        if event.kernel and event.identifier in {"", "kernel"}:
            self._kernel.message(event.message, f"[{event.monotonic:12.6f}] {event.message}")
        else:
            self._journal.event(event)

    def add(self, finding: Finding) -> None:
        """Take a finding of another source."""
        self._groups.append(Growing(finding.kind, finding.source, finding.subject, *finding.lines))

    def findings(self, allowed: Iterable[Allow] = ()) -> tuple[Finding, ...]:
        """Return what was found since the start or the last :meth:`forget`, each thing once."""
        allowed = tuple(allowed)
        found: OrderedDict[tuple[Kind, str], Finding] = OrderedDict()
        for group in self._groups:
            finding = group.finding()
            identity = (finding.kind, finding.subject)
            if identity not in found or len(finding.lines) > len(found[identity].lines):
                found[identity] = finding
        return tuple(
            finding
            for finding in found.values()
            if not any(allow.covers(finding) for allow in allowed)
        )

    def forget(self) -> None:
        """Drop what was found; a trace that is still coming in belongs to what was dropped."""
        self._groups.clear()


def scan(text: str, allowed: Iterable[Allow] = KNOWN_NOISE) -> tuple[Finding, ...]:
    """Return what is found in *text*, all that a machine wrote on its console."""
    log = Log()
    log.console(text)
    log.end_of_console()
    return log.findings(allowed)


def scan_journal(
    lines: Iterable[str], allowed: Iterable[Allow] = KNOWN_NOISE
) -> tuple[Finding, ...]:
    """Return what is found in *lines*, the output of ``journalctl -o json``."""
    log = Log()
    for line in lines:
        if line.strip():
            log.event(from_journal(json.loads(line)))
    return log.findings(allowed)


def died(cause: str, output: str) -> Finding:
    """Return the finding for a machine whose own process ended, with the last of its *output*."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return Finding(Kind.DIED, "machine", cause, tuple(lines[-MAX_LINES:]))


class _Kernel:
    """Kernel messages of one source, line by line."""

    def __init__(self, source: str, found: Callable[[Growing], None]) -> None:
        self._source = source
        self._found = found
        self._systemd = _Systemd(source, found)
        self._open: Growing | None = None

    def raw(self, line: str) -> None:
        """Take a line of a console."""
        line = line.rstrip("\r")
        if "\x1b" in line:
            line = _ESCAPE.sub("", line)
        if stamp := _STAMP.search(line):
            self.message(line[stamp.end() :], line[stamp.start() :])
        else:
            self._status(line)

    def message(self, message: str, line: str) -> None:
        """Take a *message*; *line* is how it is shown."""
        if message.startswith(_CUT_HERE):
            self._open = Growing(None, self._source, "", line)
            return
        match = _KERNEL.pattern.match(message)
        if match is None:
            if message.startswith(_FROM_SYSTEMD):
                self._systemd.message(message.removeprefix(_FROM_SYSTEMD), line)
            elif self._open is not None:
                self._continue(self._open, message, line)
            return
        kind = _KERNEL.kinds[match.lastgroup or ""]
        group = self._open
        if kind in {Kind.OVERLAYFS, Kind.DISK, Kind.CORE_DUMP}:  # one line, perhaps amid a trace
            self._found(Growing(kind, self._source, _subject(match, message), line))
        elif group is not None and _belongs(group, kind, message):
            group.add(line, important=kind is Kind.OOM)
            if kind is Kind.OOM and _KILLED.match(message):
                self._open = None
        elif group is not None and group.kind is None:
            group.kind = kind
            group.subject = message
            group.add(line)
            self._found(group)
        else:
            self._open = Growing(kind, self._source, message, line)
            self._found(self._open)

    def _continue(self, group: Growing, message: str, line: str) -> None:
        if _TRACE.match(message):
            group.add(line)
            group.foreign = 0
            if _END.match(message):
                self._open = None
            return
        if group.kind is None:  # what a warning says stands between "cut here" and "WARNING:"
            group.add(line)
        group.foreign += 1
        if group.foreign > (_PATIENCE.get(group.kind, _FOREIGN) if group.kind else _FOREIGN):
            self._open = None

    def _status(self, line: str) -> None:
        line = line.strip()
        if match := _STATUS.pattern.match(line):
            kind = _STATUS.kinds[match.lastgroup or ""]
            self._found(Growing(kind, self._source, _subject(match, line), line))


def _belongs(group: Growing, kind: Kind, message: str) -> bool:
    """Return whether *message*, which could begin a finding of *kind*, goes on with *group*."""
    if group.kind is not kind:
        return False
    return (
        kind is Kind.OOM
        or (kind is Kind.OOPS and bool(_NUMBERED.match(message)))
        or (kind is Kind.STALL and message.startswith("rcu: "))
    )


def _subject(match: re.Match[str], message: str) -> str:
    parts = match.groupdict()
    if pid := parts.get("pid"):
        return f"{parts['comm']} (pid {pid})"
    return (parts.get("name") or parts.get("failed") or message).rstrip(".…")


class _Systemd:
    """What systemd says of itself as text: early in the boot, and on machines without a journal."""

    def __init__(self, source: str, found: Callable[[Growing], None]) -> None:
        self._source = source
        self._found = found
        self._cycle: Growing | None = None

    def message(self, text: str, line: str) -> None:
        match = _SYSTEMD.pattern.match(text)
        if match is None:
            return
        kind = _SYSTEMD.kinds[match.lastgroup or ""]
        if kind is Kind.CYCLE:
            if self._cycle is not None and not match["begins"]:
                self._cycle.add(line)
                return
            self._cycle = Growing(kind, self._source, text, line)
            self._found(self._cycle)
        else:
            self._found(Growing(kind, self._source, _subject(match, text), line))


# -- the journal -----------------------------------------------------------------------------

# systemd's sd-messages.h
_JOB_FAILED = "be02cf6855d2428ba40df7e9d022f03d"
_UNIT_FAILED = "d9b373ed55a64feb8242e02dbe79a49c"
_UNIT_STARTING = "7d4958e842da4a758f6c1cdc7b36dcc5"
_DUMPED_CORE = "fc2e22bc6ee647b6b90729ab34a250b1"
_OUT_OF_MEMORY = "fe6faa94e7774663a0da52717891d8ef"
_FAILURES = frozenset({"failed", "timeout", "dependency", "assert"})
_LAST_RESORTS = frozenset({"emergency.service", "rescue.service"})
_CONTEXT = 8  # entries of a unit that are shown when it fails
_UNITS = 100  # units of which entries are remembered


class _Journal:
    def __init__(self, found: Callable[[Growing], None]) -> None:
        self._found = found
        self._systemd = _Systemd("journal", found)
        self._recent: OrderedDict[str, deque[str]] = OrderedDict()

    def event(self, event: LogEvent) -> None:
        field = event.fields.get
        about = field("UNIT") or field("USER_UNIT") or ""
        line = str(event)
        context = self._remember(about or event.unit, line)
        message_id = field("MESSAGE_ID", "")
        if message_id == _UNIT_FAILED:
            self._add(Kind.UNIT, about, context)
        elif message_id == _JOB_FAILED:
            if field("JOB_RESULT") in _FAILURES:
                self._add(Kind.UNIT, about, context)
        elif message_id == _DUMPED_CORE:
            subject = f"{field('COREDUMP_COMM', '?')} (pid {field('COREDUMP_PID', '?')})"
            self._add(Kind.CORE_DUMP, subject, line.split("\n"))
        elif message_id == _OUT_OF_MEMORY:
            self._add(Kind.OOM, about, context)
        elif message_id == _UNIT_STARTING and about in _LAST_RESORTS:
            self._add(Kind.INIT, about, [line])
        elif event.identifier == "systemd":
            self._systemd.message(event.message, line)

    def _remember(self, unit: str, line: str) -> deque[str]:
        lines = self._recent.setdefault(unit, deque(maxlen=_CONTEXT))
        self._recent.move_to_end(unit)
        lines.append(line)
        if len(self._recent) > _UNITS:
            self._recent.popitem(last=False)
        return lines

    def _add(self, kind: Kind, subject: str, lines: Iterable[str]) -> None:
        self._found(Growing(kind, "journal", subject, *lines))
