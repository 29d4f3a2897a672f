# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package comes, is replaced and goes while overlays are there; so do polkit and the bus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.cache import Cache, default_root
from harness.machine import Capability
from tests.system import project

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.system.guest import Guest

DEB = "/var/tmp/overlayd.deb"
BASE = "/usr/share/base-files"
OTHER = "/usr/share/common-licenses"
HERS = "/var/tmp/sources/of-alice"
UNIT = "overlayd.service"
# All that dpkg and what it calls leave behind of a package, its own books and logs aside.
_STATE = r"""
find /usr /etc /var -xdev -printf '%p %y %m %U:%G %l\n' |
    grep -Ev '^/(usr/lib/sysimage/dpkg|usr/share/rpm|var/(lib/(dpkg|systemd)|log|tmp|cache))' |
    grep -Ev '/(icon-theme|mimeinfo).cache |/__pycache__' | sort
"""


@pytest.fixture(scope="session")
def package() -> Iterator[Path]:
    """Give the package of the tree, which is what the image has."""
    with project.inputs(Cache(default_root()), lambda _line: None) as inputs:
        yield inputs.packages[0]


@pytest.fixture
def unlocked(fresh: Guest, package: Path) -> Guest:
    """Give a machine in which packages can be installed, with an overlay of root's and alice's."""
    fresh.machine.copy_in(package, DEB)
    fresh.permit("alice")
    fresh.sh("ostree admin unlock >/dev/null")
    fresh.apply("roots", fresh.source("roots", {"mine": "root\n"}), OTHER)
    fresh.sh(f"mkdir {HERS}; echo hers > {HERS}/mine; chown -R alice: {HERS}")
    fresh.overlayd("apply", "hers", HERS, BASE, "--allow-other", user="alice")
    return fresh


def both(guest: Guest) -> dict[str, tuple[str, str]]:
    """Insist on both overlays being seen; return their uuids and states."""
    assert guest.sh(f"cat {BASE}/mine {OTHER}/mine", user="bob") == "hers\nroot"
    return {overlay.name: (overlay.uuid, overlay.state) for overlay in guest.overlays()}


@pytest.mark.once
@pytest.mark.needs(Capability.OSTREE)
def test_upgrade_leaves_overlays_alone_and_ends_the_service_that_is_old(unlocked: Guest) -> None:
    before = both(unlocked)
    old = unlocked.sh(f"systemctl show --property=MainPID --value {UNIT}")
    assert old != "0"
    unlocked.sh(f"dpkg --install {DEB}", timeout=180)
    assert both(unlocked) == before
    assert unlocked.sh(f"test -e /proc/{old} || echo gone") == "gone"
    unlocked.overlayd("reset", "hers", user="alice")
    assert unlocked.sh(f"systemctl show --property=NRestarts --value {UNIT}") == "0"
    unlocked.overlayd("remove", "roots", user="bob", code=7)
    unlocked.overlayd("remove", "hers", user="alice")
    unlocked.overlayd("remove", "roots")


@pytest.mark.once
@pytest.mark.needs(Capability.OSTREE)
def test_purge_takes_everything_but_what_is_mounted_which_a_new_package_finds(
    unlocked: Guest,
) -> None:
    before = both(unlocked)
    files = unlocked.sh("dpkg -L overlayd").split("\n")
    removed = unlocked.sh("dpkg --remove overlayd 2>&1", timeout=180)
    assert "overlays are mounted, and stay until the next reboot" in removed
    assert unlocked.sh("ls /var/lib/overlayd/history.db")
    assert unlocked.sh(f"systemctl show --property=LoadState --value {UNIT}") == "not-found"
    unlocked.sh("dpkg --purge overlayd", timeout=180)
    assert unlocked.sh(f"cat {BASE}/mine {OTHER}/mine", user="bob") == "hers\nroot"
    left = unlocked.sh(
        "find / -xdev -name '*overlayd*' -not -path '/var/tmp/*' -not -path '/var/log/*'"
        " -not -path '/sysroot/*'; find /usr /etc /var/lib -name '*aptostree*'"
    )
    assert left == ""
    gone = unlocked.sh('for f; do [ -d "$f" ] || ! [ -e "$f" ] || echo "$f"; done', *files)
    assert gone == ""
    purged = unlocked.sh(_STATE).split("\n")
    unlocked.sh(f"dpkg --install {DEB}", timeout=180)
    assert both(unlocked) == before
    unlocked.overlayd("remove", "hers", user="alice")
    unlocked.overlayd("remove", "roots")
    # Nobody notices that it was there.
    said = unlocked.sh("dpkg --purge overlayd 2>&1", timeout=180)
    assert "mounted" not in said
    assert "not removed" not in said
    shown = (OTHER, BASE)
    here = [line for line in purged if not line.startswith(shown)]
    again = [line for line in unlocked.sh(_STATE).split("\n") if not line.startswith(shown)]
    assert again == here
    unlocked.sh(f"dpkg --install {DEB}", timeout=180)  # what looks for leaks asks it


@pytest.mark.once
def test_polkit_that_is_stopped_stuck_or_restarted_permits_nothing_meanwhile(
    fresh: Guest,
) -> None:
    apply = ("apply", "hers", HERS, BASE, "--allow-other")
    fresh.permit("alice")
    fresh.sh(f"mkdir -p {HERS}; echo hers > {HERS}/mine; chown -R alice: {HERS}")
    fresh.sh("systemctl mask --runtime --now polkit.service 2>/dev/null")
    try:
        refused = fresh.overlayd(*apply, code=7, user="alice").err
        assert "systemctl status polkit.service" in refused
        assert fresh.overlays() == []
    finally:
        fresh.sh("systemctl unmask --runtime polkit.service 2>/dev/null")
    fresh.overlayd(*apply, user="alice")  # the bus starts it again
    fresh.overlayd("remove", "hers", user="alice")
    fresh.sh("systemctl kill --signal=STOP polkit.service")
    try:
        said = fresh.sh(
            f"""
            su alice -s /bin/sh -c 'cd /; exec overlayd {" ".join(apply)}' >/run/said 2>&1 &
            sleep 2
            cat {BASE}/mine 2>/dev/null && exit 1
            start=$(date +%s)
            su bob -s /bin/sh -c 'cd /; overlayd list'
            [ $(($(date +%s) - start)) -lt 15 ] || echo slow
            systemctl kill --signal=CONT polkit.service
            systemctl restart polkit.service
            wait $! || cat /run/said
            rm /run/said
            """
        )
    finally:
        fresh.sh("systemctl kill --signal=CONT polkit.service")
    # Whether it had been answered before the restart is nobody's to say: there or not there.
    assert "slow" not in said, said
    assert said.startswith("no overlays"), said
    if fresh.overlays():
        assert said == "no overlays"
        fresh.overlayd("remove", "hers", user="alice")
    else:
        assert "polkit" in said


@pytest.mark.once
@pytest.mark.allow_findings(
    r"dbus|logind|polkit|bus|hostnamed|networkd", "the test ends the bus that all of them use"
)
def test_bus_that_is_restarted_ends_the_service_and_no_overlay(unlocked: Guest) -> None:
    before = both(unlocked)
    old = unlocked.sh(f"systemctl show --property=MainPID --value {UNIT}")
    unlocked.sh("systemctl restart dbus.service", timeout=120)
    unlocked.sh(f"for _ in $(seq 100); do [ -e /proc/{old} ] || exit 0; sleep 0.1; done; exit 1")
    assert both(unlocked) == before
    # Nobody but the bus was gone: the next call starts the service.
    unlocked.sh("for _ in $(seq 100); do busctl status >/dev/null 2>&1 && break; sleep 0.1; done")
    unlocked.overlayd("reset", "hers", user="alice")
    unlocked.overlayd("remove", "hers", user="alice")
    unlocked.overlayd("remove", "roots")
