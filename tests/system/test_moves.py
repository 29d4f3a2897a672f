# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine moves under commands that are in the middle of their work.

An apply, a reset and a removal are stopped half-way, something happens to the machine, and they go
on.  What happens *between* commands is in ``test_neighbours.py``, ``test_lifecycle.py`` and
``test_systemd.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.machine import Capability
from tests.system.test_lifecycle import DEB, package  # noqa: F401  # a fixture
from tests.system.test_neighbours import EXTENSION, Extension
from tests.system.test_transience import (
    PLACES,
    Middle,
    check_nothing_is_left,
    roughly,
    soft_reboot,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.crash.tried import Proof
    from tests.system.guest import Guest

BESIDE = "/usr/share/dpkg"


class Held(Middle):
    """Commands that are stopped half-way, beside an overlay that nobody touches."""

    def __init__(self, guest: Guest, proof: Proof) -> None:
        super().__init__(guest)
        # Of one file: the call at which the copy was stopped works no more.
        self.source = guest.source("held", {"motd": "Try me.\n"})
        guest.apply("beside", self.source, BESIDE)
        self.prepare()
        proof.fault = "A booted machine moves under commands that stand half-way"
        proof.count(len(self.pids))


@pytest.fixture
def middle(fresh: Guest, proof: Proof) -> Held:
    """Give commands that are stopped half-way."""
    return Held(fresh, proof)


def let_go(middle: Held) -> None:
    """Let the commands end."""
    ended = 'for p; do while grep -qs "^State:.[^Z]" "/proc/$p/status"; do sleep 0.05; done; done'
    middle.guest.sh(f'kill -CONT "$@"; {ended}', *map(str, middle.pids))


def come_back(guest: Guest, *, worked: bool = False) -> None:
    """Insist on whole overlays or none, and on a clean machine once they are removed.

    With *worked* what happened was none of overlayd's business, and every command did its work.
    """
    states = {overlay.name: overlay.state for overlay in guest.overlays()}
    assert set(states.values()) == {"active"}, states
    if worked:
        assert set(states) == {"applying", "beside", "resetting"}
    assert guest.sh(f"cat {BESIDE}/motd") == "Try me."
    for name in states:
        if name == "beside":
            continue
        guest.overlayd("reset", name, "--to", "applied")
        assert guest.sh(f"cat {PLACES[name]}/motd; ls {PLACES[name]}/edit || true") == "Try me."
        guest.overlayd("remove", name)
    with guest.overlay("next", guest.source("next", {"motd": "next"}), PLACES["applying"]):
        assert guest.sh(f"cat {PLACES['applying']}/motd") == "next"
    guest.overlayd("remove", "beside")
    guest.overlayd("cleanup")


@pytest.fixture
def extension(fresh: Guest) -> Iterator[Extension]:
    """Give a way to merge an extension; it is unmerged at the end."""
    extension = Extension(fresh)
    yield extension
    extension.close()


def test_extension_is_merged_under_commands(
    fresh: Guest, extension: Extension, middle: Held
) -> None:
    extension.sysext("merge", "one")
    let_go(middle)
    assert fresh.sh(f"cat {EXTENSION}/file") == "one"
    assert fresh.status("beside").state == "active"
    fresh.overlayd("list")
    extension.sysext("unmerge")
    come_back(fresh)
    check_nothing_is_left(fresh)


@pytest.mark.needs(Capability.OSTREE)
def test_deployment_is_unlocked_under_commands(fresh: Guest, proof: Proof) -> None:
    usr = fresh.usr_of_the_commit()
    middle = Held(fresh, proof)
    fresh.sh("ostree admin unlock")
    let_go(middle)
    assert fresh.status("beside").state == "covered"
    fresh.overlayd("remove", "beside", code=6)
    fresh.sh("umount --lazy /usr")
    come_back(fresh)
    assert fresh.usr() == usr


@pytest.mark.once
@pytest.mark.allow_findings(
    r"dbus|logind|polkit|bus|hostnamed|networkd", "the test ends the bus that all of them use"
)
def test_bus_polkit_and_systemd_start_anew_under_commands(fresh: Guest, middle: Held) -> None:
    fresh.sh(
        "systemctl restart dbus.service; systemctl restart polkit.service; systemctl daemon-reexec",
        timeout=120,
    )
    let_go(middle)
    come_back(fresh, worked=True)
    check_nothing_is_left(fresh)


@pytest.mark.once
@pytest.mark.needs(Capability.OSTREE)
def test_package_is_upgraded_under_commands(
    fresh: Guest,
    package: Path,  # noqa: F811
    proof: Proof,
) -> None:
    fresh.machine.copy_in(package, DEB)
    fresh.sh("ostree admin unlock >/dev/null")
    middle = Held(fresh, proof)
    fresh.sh(f"dpkg --install {DEB}", timeout=180)
    let_go(middle)
    come_back(fresh, worked=True)


@pytest.mark.needs(Capability.OWN_CLOCK)
def test_clock_is_stepped_under_commands(fresh: Guest, rounds: int, proof: Proof) -> None:
    now = int(fresh.sh("date +%s; timedatectl set-ntp false 2>/dev/null || true"))
    for years in (-20,) if fresh.emulated and rounds == 1 else (20, -20):
        middle = Held(fresh, proof)
        fresh.sh(f"date --set=@{now + years * 31_556_952}")
        let_go(middle)
        assert "apply" in fresh.overlayd("history").out
        fresh.overlayd("report")
        assert fresh.doctor()["ok"]
        fresh.overlayd("remove", "applying")
        fresh.overlayd("remove", "resetting")
        fresh.overlayd("apply", "applying", middle.source, PLACES["applying"])
        fresh.overlayd("remove", "applying")
        fresh.overlayd("remove", "beside")
    fresh.sh(f"date --set=@{now + 60}")
    check_nothing_is_left(fresh)


@pytest.mark.needs(Capability.SOFT_REBOOT)
@roughly
def test_soft_reboot_comes_upon_commands(fresh: Guest, middle: Held) -> None:
    assert middle.pids
    soft_reboot(fresh)
    check_nothing_is_left(fresh)


HOSTILE = (
    "PYTHONPATH=/run/evil PYTHONHOME=/run/evil PYTHONSTARTUP=/run/evil/click.py PYTHONINSPECT=1"
    " PYTHONIOENCODING=utf-16 PYTHONWARNINGS=error PYTHONDEVMODE=1 PYTHONPLATLIBDIR=/run/evil"
    " LD_LIBRARY_PATH=/run/evil TMPDIR=/nowhere HOME=/nowhere LANG=C LC_ALL=tr_TR COLUMNS=0"
)


def test_installed_command_takes_nothing_from_its_environment(guest: Guest) -> None:
    source = guest.source("hostile", {"motd": "Try me.\n"})
    guest.sh(
        """
        mkdir -p /run/evil; cd /run/evil
        for name in click overlayd sitecustomize usercustomize encodings
        do echo 'open("/run/evil-was-here", "w")' > $name.py; done
        """
    )
    place = PLACES["applying"]
    for command in (f"apply x {source} {place}", "list", "reset x", "report", "doctor", "remove x"):
        for env in (HOSTILE, ""):
            if (command.startswith(("apply", "remove"))) and not env:
                continue
            guest.sh(
                f"cd /run/evil; env -i {env} /usr/bin/overlayd {command} >/dev/null </dev/null"
            )
    assert guest.sh("ls /run/evil-was-here 2>/dev/null || true; rm -rf /run/evil") == ""
