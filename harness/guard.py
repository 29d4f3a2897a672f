# SPDX-License-Identifier: LGPL-2.1-or-later
"""One machine in the care of the plugin: watched, and looked over after each test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import HarnessError, MachineError
from harness.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from harness.findings import Allow, Finding
    from harness.machine import Machine
    from harness.provider import Case

    Leaks = Callable[[Machine], Iterable[str]]


@dataclass(frozen=True)
class Verdict:
    """What a test did to its machine: what logs have against it, and what it left behind."""

    findings: tuple[Finding, ...] = ()
    leaks: tuple[str, ...] = ()

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.findings + other.findings, self.leaks + other.leaks)

    def __bool__(self) -> bool:
        return bool(self.findings or self.leaks)

    def __str__(self) -> str:
        parts = [str(finding) for finding in self.findings]
        if self.leaks:
            parts.append("\n  ".join(["left behind:", *self.leaks]))
        return "\n\n".join(parts)


class Guard:
    """Guards *machine* until :meth:`close`.

    :ivar shared: whether several tests use the machine.
    :ivar before: its mount table when the test began.
    """

    def __init__(
        self, machine: Machine, case: Case, *, shared: bool, allowed: Iterable[Allow]
    ) -> None:
        self.machine = machine
        self.case = case
        self.shared = shared
        self.before = ""
        self.watch = Watch(machine, allowed=allowed)
        self.watch.start()
        self._known: frozenset[str] = frozenset()

    def note_leaks(self, check: Leaks) -> None:
        """Let pass what lies in a shared machine before a test: it is of earlier ones."""
        if self.shared:
            self._known = frozenset(self._left(check))

    def begin(self, allowed: Iterable[Allow]) -> None:
        """Note how things are when a test begins; *allowed* are its own allowances.

        :raises MachineError: if the machine broke in an earlier test.
        """
        self.watch.allow(*allowed)
        self.before = self.machine.run(["cat", "/proc/1/mountinfo"]).out

    def findings(self) -> Verdict:
        """Return what the logs say of the test, once all has arrived that was logged."""
        self.watch.settle()
        return Verdict(findings=self.watch.take())

    def left(self, check: Leaks) -> Verdict:
        """Return what is left when the test's own fixtures are gone, and what came in meanwhile."""
        leaks = tuple(leak for leak in self._left(check) if leak not in self._known)
        return Verdict(findings=self.watch.take(), leaks=leaks)

    def _left(self, check: Leaks) -> tuple[str, ...]:
        if self.machine.broken is not None:
            return ()
        try:
            return tuple(check(self.machine))
        except MachineError:
            return ()  # off, or broken just now: nothing is left over, or a finding says so
        except HarnessError as error:
            return (f"the check itself failed: {error}",)

    def close(self) -> None:
        """End the watch and the machine."""
        self.watch.stop()
        self.machine.close()
