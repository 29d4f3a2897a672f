# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watch: what a machine logs is found while it happens, and what is fatal ends the wait."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from harness.errors import MachineError
from harness.findings import Allow, Kind
from harness.logs import from_journal
from harness.machine import Capability
from harness.watch import Watch, boot_findings
from tests.harness.agents import eventually
from tests.harness.fakes import FakeMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.logs import LogEvent

WARNING = "WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FakeMachine]:
    machine = FakeMachine(tmp_path)
    machine.greet(20)
    yield machine
    machine.close()


@pytest.fixture
def watch(machine: FakeMachine) -> Iterator[Watch]:
    watch = Watch(machine)
    watch.start()
    yield watch
    watch.stop()


def kinds(watch: Watch) -> list[Kind]:
    return [finding.kind for finding in watch.findings()]


def test_quiet_machine_has_no_findings(watch: Watch) -> None:
    watch.settle()
    assert watch.take() == ()


def test_what_is_on_the_console_is_found_at_once(machine: FakeMachine, watch: Watch) -> None:
    machine.run(["write", WARNING])
    watch.settle()
    assert kinds(watch) == [Kind.WARNING]


def test_what_is_in_the_journal_has_arrived_after_settling(
    machine: FakeMachine, watch: Watch
) -> None:
    for n in range(5):
        with machine.log.open("a") as log:
            log.write("sshd: innocent\n" * 1000)
            log.write(f"systemd: a{n}.service: Failed with result 'exit-code'.\n")
        watch.settle()
        assert [finding.subject for finding in watch.take()] == [f"a{n}.service"]


def test_settling_waits_for_the_mark(machine: FakeMachine, watch: Watch) -> None:
    late = 'sleep 0.4; shift 6; echo "harness: $*" >> ' + str(machine.log)
    machine.program("logger", f"( {late} ) > /dev/null 2>&1 < /dev/null &")
    start = time.monotonic()
    watch.settle()
    assert 0.3 < time.monotonic() - start < 3


def test_settling_does_not_wait_for_ever(machine: FakeMachine, watch: Watch) -> None:
    machine.program("logger", "true")
    start = time.monotonic()
    watch.settle(0.5)
    assert 0.4 < time.monotonic() - start < 3


def test_take_begins_anew(machine: FakeMachine, watch: Watch) -> None:
    machine.run(["write", WARNING])
    watch.settle()
    assert len(watch.take()) == 1
    watch.settle()
    assert watch.take() == ()


def test_allowance_holds_until_taken(machine: FakeMachine, watch: Watch) -> None:
    watch.allow(Allow("x.c:1", "this test wants it", Kind.WARNING))
    machine.run(["write", WARNING])
    watch.settle()
    assert watch.take() == ()
    machine.run(["write", WARNING])
    watch.settle()
    assert len(watch.take()) == 1


def test_log_of_the_hosts_kernel_counts_where_it_is_the_machines(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "kmsg"
    os.mkfifo(device)
    monkeypatch.setattr(type(machine), "kernel_log", device)
    watch = Watch(machine)
    watch.start()
    log = os.open(device, os.O_WRONLY)
    try:
        for record, found in (
            ("2,1,5000,-;BUG: unable to handle page fault", [Kind.OOPS]),
            (f"4,2,5000,-;{WARNING}", [Kind.OOPS, Kind.WARNING]),
        ):
            os.write(log, record.encode())
            assert kinds(watch) == found
        watch.take()
        for record in (
            "3,3,5000,-;Out of memory: Killed process 9 (somebody-elses)",  # not ours to judge
            f"12,4,5000,-;{WARNING}",  # a program wrote that
            "4,5,5000,-;overlayfs: failed to clone lowerpath",  # nor that
        ):
            os.write(log, record.encode())
            assert kinds(watch) == []
    finally:
        os.close(log)
        watch.stop()


def test_panic_ends_a_wait_within_a_second_or_two(machine: FakeMachine, watch: Watch) -> None:
    def panic() -> None:
        time.sleep(0.3)
        with machine.screen.open("a") as screen:
            screen.write("[    9.000000] Kernel panic - not syncing: test\n[    9.1")
            screen.flush()
            time.sleep(0.3)
            screen.write("00000] CPU: 0 PID: 1 Comm: init\n")

    thread = threading.Thread(target=panic)
    thread.start()
    start = time.monotonic()
    with pytest.raises(MachineError, match="Kernel panic - not syncing: test"):
        machine.run(["sleep", "30"])
    assert time.monotonic() - start < 3
    watch.settle()
    thread.join()
    (finding,) = watch.findings()
    assert finding.kind is Kind.PANIC
    assert len(finding.lines) == 2  # its trace was waited for


def test_panic_that_is_allowed_breaks_nothing(machine: FakeMachine, watch: Watch) -> None:
    watch.allow(Allow("not syncing", "wanted"))
    machine.run(["write", "Kernel panic - not syncing: test"])
    watch.settle()
    assert machine.broken is None
    assert watch.take() == ()


def test_machine_that_dies_is_a_finding_once(machine: FakeMachine, watch: Watch) -> None:
    machine.agent.kill()
    with pytest.raises(MachineError):
        machine.run(["true"])
    watch.settle()
    assert [finding.kind for finding in watch.take()] == [Kind.DIED]
    assert watch.take() == ()


def test_machine_that_dies_while_nobody_asks_is_found_when_settling(
    machine: FakeMachine, watch: Watch
) -> None:
    machine.agent.kill()
    watch.settle()
    assert kinds(watch) == [Kind.DIED]


def test_console_that_begins_anew_is_read_from_its_start(
    machine: FakeMachine, watch: Watch
) -> None:
    machine.screen.write_text("a boot of many lines\n" * 50)
    eventually(lambda: watch._seen > 1000)
    machine.screen.write_text(f"[    1.000000] {WARNING}\n")
    watch.settle()
    assert kinds(watch) == [Kind.WARNING]


def test_stopped_watch_leaves_the_machine_alone(machine: FakeMachine) -> None:
    watch = Watch(machine)
    watch.start()
    watch.stop()
    watch.stop()
    machine.run(["write", "Kernel panic - not syncing: test"])
    time.sleep(0.5)
    assert machine.broken is None


# -- the journal, read at once ------------------------------------------------------------------

JOURNALCTL = """
echo "$*" >> "{calls}"
case "$*" in
*--after-cursor=*) cursor=${{*##*--after-cursor=}}; sed "1,/\\"$cursor\\"/d" "{entries}" ;;
*) cat "{entries}" ;;
esac
"""
LOG = """
read -r uptime rest < /proc/uptime
cursor=$(cat /proc/sys/kernel/random/uuid)
printf '{{"__CURSOR":"%s","__MONOTONIC_TIMESTAMP":"%s0000",' \\
  "$cursor" "$(($(echo "$uptime" | tr -d .) + 1))" >> "{entries}"  # in 10 ms, rounded up
printf '"SYSLOG_IDENTIFIER":"%s","MESSAGE":"%s"}}\\n' "$1" "$2" >> "{entries}"
"""


class JournalMachine(FakeMachine):
    """Who follows its journal is told late, as with the real one, but later."""

    def __init__(self, workdir: Path) -> None:
        super().__init__(workdir)
        self.capabilities |= {Capability.SYSTEMD}
        self.entries = workdir / "entries"
        self.entries.touch()
        self.calls = workdir / "calls"
        self.program("journalctl", JOURNALCTL.format(entries=self.entries, calls=self.calls))
        self.program("log", LOG.format(entries=self.entries))
        self.program("logger", 'shift 6; log harness "$*"')
        self.callbacks: list[Callable[[LogEvent], None]] = []

    def follow(self, callback: Callable[[LogEvent], None]) -> None:
        self.callbacks.append(callback)

    def deliver(self) -> None:
        for line in self.entries.read_text().splitlines():
            for callback in self.callbacks:
                callback(from_journal(json.loads(line)))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[JournalMachine]:
    machine = JournalMachine(tmp_path)
    machine.greet(20)
    yield machine
    machine.close()


def log_failure(machine: JournalMachine, unit: str) -> None:
    machine.run(["log", "systemd", f"{unit}: Failed with result 'exit-code'."])


def test_journal_is_read_without_waiting_for_who_follows_it(journal: JournalMachine) -> None:
    watch = Watch(journal)
    watch.start()
    for n in range(3):
        log_failure(journal, f"a{n}.service")
        start = time.monotonic()
        watch.settle()
        assert time.monotonic() - start < 3
        assert [finding.subject for finding in watch.take()] == [f"a{n}.service"]
    first, *later = journal.calls.read_text().splitlines()
    assert "--since=-" in first
    assert all("--after-cursor=" in call for call in later)
    watch.stop()


def test_what_was_read_is_not_found_again_when_it_arrives(journal: JournalMachine) -> None:
    watch = Watch(journal)
    watch.start()
    log_failure(journal, "early.service")
    watch.settle()
    assert len(watch.take()) == 1
    journal.deliver()
    assert watch.take() == ()
    log_failure(journal, "late.service")
    journal.deliver()
    assert len(watch.take()) == 1
    watch.settle()
    assert watch.take() == ()
    watch.stop()


def test_what_was_logged_before_the_watch_is_not_found(journal: JournalMachine) -> None:
    log_failure(journal, "old.service")
    time.sleep(1)  # longer than the answer takes
    watch = Watch(journal)
    watch.start()
    watch.settle()
    assert watch.take() == ()
    watch.stop()


def test_findings_of_a_boot(machine: FakeMachine) -> None:
    assert boot_findings(machine) == ()
    machine.run(["write", WARNING])
    assert [finding.kind for finding in boot_findings(machine)] == [Kind.WARNING]
    assert boot_findings(machine, [Allow("x.c", "known")]) == ()
