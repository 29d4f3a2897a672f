# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing of an overlay outlives a boot: reboots, soft reboots, power cuts amid work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import disk
from harness.machine import Capability
from harness.vm import QemuMachine
from tests.system.guest import RUN, SOURCES

if TYPE_CHECKING:
    from tests.crash.tried import Proof
    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
OTHER = "/usr/share/common-licenses"
THIRD = "/usr/share/terminfo"
PLACES = {"applying": BASE, "resetting": OTHER, "removing": THIRD}
TEXT = {"motd": "Try me.\n", "new": "new\n"}
CATCH = Path(__file__).with_name("catch.py")
roughly = pytest.mark.allow_findings(
    r"systemd-(journald\.socket|udevd\.service)", "systemd ends its own roughly in a soft reboot"
)


def some_overlays(guest: Guest) -> None:
    """Have one overlay of each kind, edited, and one that was removed while in use."""
    source = guest.source("some", TEXT)
    batch = f"""
        [[overlay]]
        name = "directory"
        source = "{source}"
        target = "{BASE}"
        [[overlay]]
        name = "file"
        source = "{source}/motd"
        target = "{OTHER}/BSD"
        [[overlay]]
        name = "new-path"
        source = "{source}"
        target = "{THIRD}/far/away"
        read_only = true
        [[overlay]]
        name = "held"
        source = "{source}"
        target = "/usr/share/dpkg"
    """
    guest.machine.copy_in(batch.encode(), f"{SOURCES}/some.toml")
    guest.sh(
        f"""
        overlayd batch {SOURCES}/some.toml
        echo edit > {BASE}/edit; rm {BASE}/profile; echo edit >> {OTHER}/BSD
        setsid sleep 1000 < /usr/share/dpkg/motd > /dev/null 2>&1 &
        overlayd remove held --lazy
        """
    )
    states = {overlay.name: overlay.state for overlay in guest.overlays("--all")}
    assert states == dict.fromkeys(["directory", "file", "new-path"], "active") | {
        "held": "draining"
    }


def check_nothing_is_left(guest: Guest, usr: str = "") -> None:
    """Insist on an overlayd that knows of nothing and is content, and on a /usr like *usr*."""
    assert not usr or guest.usr() == usr
    assert guest.sh("grep -l overlayd: /proc/[0-9]*/mountinfo || true") == ""
    assert guest.overlayd("list", "--all").out == "no overlays\n"
    assert guest.leftovers() == []
    report = guest.doctor()
    assert (report["ok"], report["problems"]) == (True, [])


def changes_on_disk(guest: Guest) -> str:
    """Return what differs between the commit and /usr on the disk of a machine that is off.

    The host looks: it reads all of /usr in two seconds, an emulated machine in minutes.
    """
    assert isinstance(guest.machine, QemuMachine)
    return disk.changes(guest.machine.spec.disks[0].path)


def once_elsewhere(guest: Guest, rounds: int) -> None:
    """Skip where a boot takes half a minute, unless more than a few are asked for."""
    if guest.emulated and rounds == 1:
        pytest.skip("boots of an emulated machine are kept for other tests; --rounds=2 has it")


@pytest.mark.needs(Capability.REBOOT)
@pytest.mark.allow_findings("run-overlayd.mount", "it holds mounts that systemd did not notice yet")
def test_nothing_is_left_after_a_reboot(fresh: Guest, rounds: int) -> None:
    usr = fresh.usr_of_the_commit()
    for _ in range(rounds):
        some_overlays(fresh)
        fresh.machine.reboot()
        assert fresh.sh(f"[ ! -e {RUN} ] || ls -A {RUN}") == ""
        check_nothing_is_left(fresh, usr)


@pytest.mark.needs(Capability.SOFT_REBOOT)
@roughly
def test_nothing_is_left_after_a_soft_reboot_into_the_same_root(fresh: Guest, rounds: int) -> None:
    usr = fresh.usr_of_the_commit()
    for _ in range(rounds):
        some_overlays(fresh)
        fresh.wait_for_mount_units()
        soft_reboot(fresh)
        check_nothing_is_left(fresh, usr)
    # And it goes on as before.
    with fresh.overlay("again", fresh.source("again", TEXT), BASE):
        assert fresh.sh(f"cat {BASE}/motd") == "Try me."


@pytest.mark.needs(Capability.SOFT_REBOOT)
@roughly
def test_nothing_is_left_after_a_soft_reboot_at_once(fresh: Guest, rounds: int) -> None:
    once_elsewhere(fresh, rounds)
    usr = fresh.usr_of_the_commit()
    some_overlays(fresh)
    # systemd unmounts what it knows of, and it has not noticed all mounts yet.
    soft_reboot(fresh)
    check_nothing_is_left(fresh, usr)


def soft_reboot(guest: Guest) -> None:
    """Reboot the user space; overlayd cannot tell from what stays that anything happened."""
    boot = guest.sh("touch /run/stays; cat /proc/sys/kernel/random/boot_id")
    guest.machine.reboot("soft")
    assert guest.sh("ls /run/stays; cat /proc/sys/kernel/random/boot_id") == f"/run/stays\n{boot}"


_SURVIVOR = f"""
[Unit]
DefaultDependencies=no
IgnoreOnIsolate=yes
SurviveFinalKillSignal=yes
[Service]
ExecStart=/bin/sleep infinity
StandardInput=file:{BASE}/motd
"""


@pytest.mark.needs(Capability.SOFT_REBOOT)
@roughly
@pytest.mark.allow_findings("usr-share-base", "systemd cannot unmount what is in use")
def test_overlay_that_a_service_carries_over_a_soft_reboot_is_reported(
    fresh: Guest, rounds: int
) -> None:
    once_elsewhere(fresh, rounds)
    usr = fresh.usr_of_the_commit()
    fresh.apply("kept", fresh.source("kept", TEXT), BASE)
    fresh.machine.copy_in(_SURVIVOR.encode(), "/run/systemd/system/survivor.service")
    fresh.sh("systemctl daemon-reload; systemctl start survivor")
    fresh.wait_for_mount_units()
    pid = fresh.sh("systemctl show -P MainPID survivor")
    fresh.machine.reboot("soft")
    assert fresh.sh("systemctl show -P MainPID survivor") == pid
    # systemd could not unmount what is in use; the records are gone with the rest of /run/overlayd.
    assert fresh.sh(f"cat {BASE}/motd") == "Try me."
    report = fresh.doctor()
    assert BASE in json.dumps(report["problems"]), report
    fresh.sh(f"systemctl stop survivor; overlayd cleanup; ! mountpoint -q {BASE} || umount {BASE}")
    check_nothing_is_left(fresh, usr)


# Where commands are stopped: when they have made a system call for the nth time.
POINTS = {
    "applying": (("sendfile", 1), ("fsmount", 2), ("fsmount", 3), ("rename", 1), ("move_mount", 3)),
    "resetting": (("fsmount", 2), ("umount2", 1), ("rename", 1), ("move_mount", 2), ("fsmount", 1)),
    "removing": (("rename", 1), ("umount2", 1), ("umount2", 2)),
}


class Middle:
    """Commands that were stopped in the middle of their work, each *turn* somewhere else."""

    def __init__(self, guest: Guest, turn: int = 0) -> None:
        self.guest = guest
        self.turn = turn
        self.pids: list[int] = []
        guest.machine.copy_in(CATCH, f"{SOURCES}/catch.py")
        self.source = guest.source("middle", TEXT)

    def catch(self, doing: str, *command: str) -> None:
        """Stop a command while the overlay's record says what it does."""
        points = POINTS[doing]
        call, count = points[self.turn % len(points)]
        caught = json.loads(
            self.guest.machine.run(
                ["python3", "-IS", f"{SOURCES}/catch.py", doing, call, str(count), *command]
            ).out
        )
        record = caught["record"]
        assert record["phase"] == {"applying": "preparing", "resetting": "active"}.get(doing, doing)
        assert (record["pending"] is None) is (doing == "removing")
        self.pids.append(caught["pid"])

    def prepare(self) -> None:
        """Have an apply, a reset and a removal under way at the same time."""
        guest, place = self.guest, PLACES
        for name in "resetting", "removing":
            guest.apply(name, self.source, place[name])
            guest.sh(f"echo edit > {place[name]}/edit")
        # The first reset of a boot makes something for all, under the lock of all.
        guest.overlayd("reset", "removing")
        self.catch("resetting", "overlayd", "reset", "resetting")
        self.catch("removing", "overlayd", "remove", "removing")
        self.catch("applying", "overlayd", "apply", "applying", self.source, place["applying"])
        # All of them are at it, now.
        states = guest.sh('for pid; do cut -d" " -f3 "/proc/$pid/stat"; done', *map(str, self.pids))
        assert states.split() == ["T", "T", "T"]


@pytest.mark.needs(Capability.POWER_CUT)
def test_nothing_is_left_after_a_power_cut_in_the_middle_of_work(
    fresh: Guest, rounds: int, proof: Proof
) -> None:
    """Power cut of a machine whose commands stand at a system call."""
    once_elsewhere(fresh, rounds)  # test_power.py has one at the trace points
    for turn in range(max(2, rounds)):
        middle = Middle(fresh, turn)
        middle.prepare()
        proof.count(len(middle.pids))
        fresh.machine.power_cut()
        assert changes_on_disk(fresh) == ""
        fresh.machine.start()
        assert fresh.sh(f"[ ! -e {RUN} ] || ls -A {RUN}") == ""
        check_nothing_is_left(fresh)
        fresh.sh(f"rm -rf {SOURCES}")


@pytest.mark.needs(Capability.REBOOT)
def test_nothing_is_left_after_a_reboot_in_the_middle_of_work(fresh: Guest, rounds: int) -> None:
    once_elsewhere(fresh, rounds)
    usr = fresh.usr_of_the_commit()
    Middle(fresh).prepare()
    fresh.machine.reboot()
    assert fresh.sh(f"[ ! -e {RUN} ] || ls -A {RUN}") == ""
    check_nothing_is_left(fresh, usr)


def test_commands_killed_in_the_middle_of_work_are_settled_by_the_next(guest: Guest) -> None:
    usr = guest.usr_of_the_commit()
    before = guest.listing(BASE)
    middle = Middle(guest)
    middle.prepare()
    # As long as they live nobody touches what they work on, and everybody may look.
    assert {overlay.name for overlay in guest.overlays()} >= {"resetting"}
    guest.sh('kill -KILL "$@"', *map(str, middle.pids))
    said = guest.overlayd("list").err
    assert "applying: dropped, it had not been attached" in said
    assert "resetting: " in said
    assert "removing: " in said
    left = {overlay.name: overlay.state for overlay in guest.overlays("--all")}
    assert set(left) <= {"resetting", "removing"}
    assert set(left.values()) <= {"active"}
    assert guest.listing(BASE) == before
    for name in left:
        guest.overlayd("remove", name)
    assert guest.usr() == usr
    report = guest.doctor()
    assert (report["ok"], report["problems"]) == (True, [])
