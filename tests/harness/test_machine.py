# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all machines have in common, tried on this one by way of a real agent."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from harness import units
from harness.errors import (
    CapabilityError,
    ChannelError,
    CommandError,
    MachineError,
    RemoteError,
    UnitError,
)
from harness.machine import Capability
from tests.harness.agents import LocalMachine, eventually, in_thread

if TYPE_CHECKING:
    from pathlib import Path

    from harness.logs import LogEvent

ALL = frozenset(Capability)


@pytest.fixture
def able(tmp_path: Path) -> LocalMachine:
    """Return this machine as one that can do everything; the test closes it."""
    return LocalMachine(tmp_path, ALL)


# Commands and files.


def test_machine_greets_when_it_is_asked_who_it_is(tmp_path: Path) -> None:
    with LocalMachine(tmp_path) as machine:
        assert machine.kernel == os.uname().release
        assert machine.hello.boot_id == "first"


def test_run_checks_unless_told_not_to(local: LocalMachine) -> None:
    with pytest.raises(CommandError, match="exit status 3: exit 3"):
        local.run("exit 3")
    assert local.run("exit 3", check=False).returncode == 3
    assert local.run(["echo", "a b"], env={"X": "1"}, cwd="/").out == "a b\n"
    assert local.broken is None


def test_user_view_runs_and_copies_as_the_user(local: LocalMachine, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("becomes another user, which root may")
    nobody = local.user("nobody")
    assert nobody.run("id -un").out == "nobody\n"
    place = f"/tmp/harness-{os.getpid()}"
    try:
        nobody.copy_in(b"mine", place, mode=0o600)
        assert local.run(["stat", "-c", "%U %a", place]).out == "nobody 600\n"
        assert nobody.copy_out(place, tmp_path / "out") == ()
        assert (tmp_path / "out").read_bytes() == b"mine"
    finally:
        local.run(["rm", "-f", place])
    with pytest.raises(RemoteError, match="Permission denied"):
        nobody.copy_in(b"x", "/etc/not-mine")


def test_mount_table_of_the_machine(local: LocalMachine) -> None:
    top = local.mounts().top("/proc")
    assert top is not None
    assert top.fstype == "proc"


# Capabilities.


def test_missing_capability_is_refused_with_its_reason(local: LocalMachine) -> None:
    with pytest.raises(CapabilityError, match="local cannot do console: there is no screen"):
        local.console()
    with pytest.raises(CapabilityError, match="cannot do soft-reboot: not with this kind"):
        local.reboot("soft")
    for call in (local.reboot, local.power_cut, local.journal):
        with pytest.raises(CapabilityError):
            call()
    with pytest.raises(CapabilityError, match="systemd"):
        local.wait_for_unit("x.service")
    local.need()


# Broken.


def test_lost_channel_breaks_the_machine_and_later_calls_raise_the_same(
    local: LocalMachine,
) -> None:
    raised = in_thread(lambda: local.run("sleep 30"))
    time.sleep(0.2)
    local.agent.kill()
    eventually(lambda: raised)
    assert isinstance(raised[0], ChannelError)
    assert local.broken is raised[0]
    for call in (lambda: local.run("true"), local.greet, lambda: local.hello):
        with pytest.raises(ChannelError) as caught:
            call()
        assert caught.value is raised[0]


def test_cause_that_a_watcher_found_reaches_who_waits(local: LocalMachine) -> None:
    raised = in_thread(lambda: local.run("sleep 30"))
    time.sleep(0.2)
    cause = MachineError("Kernel panic - not syncing")
    local.break_(cause)
    local.break_(MachineError("a consequence"))
    eventually(lambda: raised)
    assert raised[0] is cause
    with pytest.raises(MachineError, match="panic"):
        local.copy_in(b"", "/tmp/x")


def test_backend_may_know_the_cause_behind_a_lost_channel(
    local: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_diagnose", lambda _: MachineError("QEMU was killed by signal 9"))
    local.agent.kill()
    with pytest.raises(MachineError, match="signal 9"):
        local.run("true")
    with pytest.raises(MachineError, match="signal 9"):
        local.run("true")


def test_command_that_fails_does_not_break_the_machine(local: LocalMachine) -> None:
    with pytest.raises(CommandError):
        local.run("sleep 9", timeout=0.1)
    with pytest.raises(RemoteError):
        local.copy_out("/no/such", local.workdir / "x")
    assert local.run("echo well").out == "well\n"


def test_machine_is_closed_on_leaving(tmp_path: Path) -> None:
    with LocalMachine(tmp_path) as machine:
        machine.greet()
    assert not machine.agent.directory.exists()
    machine.close()


# Life.


@pytest.mark.parametrize("mode", ["system", "soft"])
def test_reboot_returns_when_another_agent_answers(able: LocalMachine, mode: str) -> None:
    with able:
        before = able.greet()
        able.reboot(mode, timeout=30)  # type: ignore[arg-type]
        after = able.hello
        assert after.agent != before.agent
        assert (after.boot_id != before.boot_id) is (mode == "system")
        assert able.run("echo up").out == "up\n"


def test_reboot_waits_while_the_old_system_shuts_down(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with able:
        able.greet()
        reboot = able._reboot
        monkeypatch.setattr(
            able, "_reboot", lambda mode: threading.Timer(1, reboot, (mode,)).start()
        )
        able.reboot(timeout=30)
        assert able.hello.boot_id == "second"


def test_reboot_goes_on_when_an_agent_is_ended_amid_its_greeting(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with able:
        able.greet()
        request = able.channel.request
        ended: list[str] = []

        def interrupted(op: str, **arguments: Any) -> dict[str, object]:  # noqa: ANN401
            if op == "load" and not ended:
                ended.append(op)
                able.agent.kill()
                able.agent.start()
            return request(op, **arguments)

        monkeypatch.setattr(able.channel, "request", interrupted)
        able.reboot(timeout=30)
        assert ended
        assert able.run("echo up").out == "up\n"


def test_reboot_that_never_begins_breaks_the_machine(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with able:
        able.greet()
        monkeypatch.setattr(able, "_reboot", lambda _: None)
        with pytest.raises(ChannelError, match="not begun a system reboot within 1 s"):
            able.reboot(timeout=1)
        assert able.broken is not None


def test_soft_reboot_that_was_none_is_an_error(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with able:
        able.greet()
        reboot = able._reboot
        monkeypatch.setattr(able, "_reboot", lambda _: reboot("system"))
        with pytest.raises(MachineError, match="system reboot when asked for a soft one"):
            able.reboot("soft", timeout=30)


def test_reboot_by_systemctl_survives_that_the_agent_is_ended(able: LocalMachine) -> None:
    with able:
        able.program("systemctl", f'echo "$@" > {able.workdir}/asked; kill -9 $PPID')
        able.greet()
        super(LocalMachine, able)._reboot("soft")
        assert (able.workdir / "asked").read_text() == "--no-block soft-reboot\n"


def test_machine_without_power_says_so_until_it_is_started(able: LocalMachine) -> None:
    with able:
        able.greet()
        raised = in_thread(lambda: able.run("sleep 30"))
        time.sleep(0.2)
        able.power_cut()
        eventually(lambda: raised)
        with pytest.raises(MachineError, match="local is off") as caught:
            able.run("true")
        assert caught.value.hint == "start() it"
        able.start(timeout=30)
        assert able.run("echo back").out == "back\n"
        assert able.broken is None


def test_journal_is_followed_from_now_on_and_over_a_reboot(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is a file, and its reader a script, as there need be no systemd here."""
    journal = able.workdir / "journal"

    def log(message: str, at: float) -> None:
        entry = {"MESSAGE": message, "__MONOTONIC_TIMESTAMP": f"{at * 1e6:.0f}", "__CURSOR": "c"}
        with journal.open("a") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")

    with able:
        able.change_part(monkeypatch, {'"/run/systemd/system"': repr(str(able.workdir))})
        able.program(
            "journalctl", f'echo "$@" >> {able.workdir}/asked; exec tail -f -n+1 {journal}'
        )
        log("old", time.monotonic() - 10)
        able.greet()
        events: list[LogEvent] = []
        able.follow(events.append)
        log("new", time.monotonic())
        eventually(lambda: events)
        able.greet()  # as after a restore: the reader goes on, and nothing comes twice
        log("newer", time.monotonic())
        eventually(lambda: len(events) >= 2)
        able.reboot(timeout=30)
        log("newest", time.monotonic())
        eventually(lambda: len(events) >= 3)
        assert [event.message for event in events] == ["new", "newer", "newest"]
        asked = (able.workdir / "asked").read_text().splitlines()
        assert len(asked) == 2
        assert "--since=@" in asked[0]
        able.unfollow(events.append)


def test_reader_of_the_journal_that_ends_is_started_again_where_it_was(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with able:
        able.change_part(monkeypatch, {'"/run/systemd/system"': repr(str(able.workdir))})
        entry = '{"MESSAGE":"m","__CURSOR":"s=7;i=1","__MONOTONIC_TIMESTAMP":"9999999999999999"}'
        able.program("journalctl", f"echo \"$@\" >> {able.workdir}/asked; echo '{entry}'")
        able.greet()
        events: list[LogEvent] = []
        able.follow(events.append)
        eventually(lambda: len(events) >= 3)
        asked = (able.workdir / "asked").read_text().splitlines()
        assert "--after-cursor=s=7;i=1" in asked[1]


# Units.

ACTIVE = "LoadState=loaded\\nActiveState=active\\nSubState=running"
STARTING = "LoadState=loaded\\nActiveState=activating\\nSubState=start"
FAILED = "LoadState=loaded\\nActiveState=failed\\nSubState=failed\\nResult=exit-code"


def test_unit_that_is_active_is_reached_at_once(able: LocalMachine) -> None:
    with able:
        able.program("systemctl", f"printf '{ACTIVE}\\n'")
        able.greet()
        able.wait_for_unit("x.service")


def test_failed_unit_is_an_error_with_its_journal(able: LocalMachine) -> None:
    with able:
        able.program("systemctl", f"printf '{FAILED}\\n'")
        able.greet()
        able.program("journalctl", 'echo "last words of $6"')
        start = time.monotonic()
        with pytest.raises(UnitError, match=r"^x.service on local failed: exit-code") as caught:
            able.wait_for_unit("x.service", timeout=60)
        assert time.monotonic() - start < 10
        assert "journal of x.service:\nlast words of x.service" in caught.value.__notes__


def test_unit_that_does_not_get_on_is_an_error_after_the_timeout(able: LocalMachine) -> None:
    with able:
        able.program("systemctl", f"printf '{STARTING}\\n'")
        able.greet()
        able.program("journalctl", "true")
        with pytest.raises(UnitError, match=r"is still activating \(start\) after 0\.3 s"):
            able.wait_for_unit("x.service", timeout=0.3)


def test_waiting_for_a_unit_ends_with_the_managers_signal(
    able: LocalMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A service manager that is asked twice only: at first and after its signal."""
    bus = able.agent.directory / "private"
    able.change_part(monkeypatch, {'"/run/systemd/private"': repr(str(bus))})
    able.program("systemctl", f"echo asked >> {tmp_path}/asked; cat {tmp_path}/state")
    (tmp_path / "state").write_text(STARTING.replace("\\n", "\n"))
    heard: list[bytes] = []

    def manage() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(bus))
            server.listen()
            able_to_connect.set()
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b"OK 0123\r\n")
                time.sleep(0.5)
                connection.sendall(b"l\4 other /org/freedesktop/systemd1/unit/y_2eservice changed")
                time.sleep(0.3)
                (tmp_path / "state").write_text(ACTIVE.replace("\\n", "\n"))
                # The path comes in two pieces, as it may.
                connection.sendall(b"l\4 some /org/freedesktop/systemd1/unit/x_2d1")
                time.sleep(0.05)
                connection.sendall(b"_2eservice changed")
                heard.append(connection.recv(1))

    able_to_connect = threading.Event()
    thread = threading.Thread(target=manage)
    thread.start()
    able_to_connect.wait(10)
    with able:
        able.greet()
        start = time.monotonic()
        able.wait_for_unit("x-1.service", timeout=20)
        assert 0.7 < time.monotonic() - start < 3
        assert (tmp_path / "asked").read_text().count("asked") == 2
        thread.join(10)
        assert heard == [
            b"\0AUTH EXTERNAL " + f"{os.getuid()}".encode().hex().encode() + b"\r\nBEGIN\r\n",
            b"",
        ]


DONE = {"Type": "oneshot", "InactiveEnterTimestampMonotonic": "7"}
SKIPPED = {"ConditionResult": "no", "ConditionTimestampMonotonic": "7"}


@pytest.mark.parametrize(
    ("active", "more", "verdict"),
    [
        ("active", {}, "reached: is active"),
        ("reloading", {}, "reached: is reloading"),
        ("failed", {"Result": "timeout"}, "lost: failed: timeout"),
        ("activating", {}, "open"),
        ("deactivating", {}, "open"),
        ("inactive", {}, "open"),
        ("inactive", {"LoadState": "not-found"}, "lost: cannot be started: not-found"),
        ("inactive", {"LoadState": "masked"}, "lost: cannot be started: masked"),
        ("inactive", DONE, "reached: has done its work"),
        ("inactive", DONE | {"Type": "simple"}, "open"),
        ("inactive", SKIPPED, "lost: was skipped: a condition was not met"),
    ],
)
def test_state_of_a_unit_is_judged(active: str, more: dict[str, str], verdict: str) -> None:
    shown = {"LoadState": "loaded", "ActiveState": active, "Result": "success", **more}
    state = units.judge(shown, queued=True)
    assert (f"{'reached' if state.reached else 'lost'}: {state}" if state else "open") == verdict


def test_inactive_unit_for_which_nothing_is_queued_is_lost() -> None:
    state = units.judge({"LoadState": "loaded", "ActiveState": "inactive"}, queued=False)
    assert state is not None
    assert not state.reached
    assert "nothing is queued" in state.why


def test_oneshot_that_was_seen_at_work_has_done_it_though_systemd_forgot_it() -> None:
    shown = {"LoadState": "loaded", "ActiveState": "inactive", "Type": "oneshot"}
    state = units.judge(shown, queued=True, ran=True)
    assert state is not None
    assert state.reached
    forgotten = units.judge(shown, queued=False)
    assert forgotten is not None
    assert "was not started" in forgotten.why


def test_object_path_of_a_unit() -> None:
    assert units.object_path("a-b@1.service").endswith("/unit/a_2db_401_2eservice")
    assert units.object_path("1é.mount").endswith("/unit/_31_c3_a9_2emount")
