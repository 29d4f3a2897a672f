# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the doctor says to users other than root."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import TYPE_CHECKING

from overlayd import __version__
from tests.bus.conftest import COMMAND
from tests.bus.peer import Peer
from tests.mounts.conftest import mount
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from tests.bus.conftest import Bus


def problems(bus: Bus, user: str, code: int = 0) -> list[str]:
    """Return what the doctor tells a user is wrong."""
    report = json.loads(bus.overlayd(user, "doctor", "--json", code=code).stdout)
    assert report["ok"] is (code == 0)
    return [problem["text"] for problem in report["problems"]]


def test_doctor_of_a_user_is_content_where_service_and_polkit_are(bus: Bus) -> None:
    bus.serve()
    report = json.loads(bus.overlayd("alice", "doctor", "--json").stdout)
    assert (report["ok"], report["problems"], report["service"]) == (True, [], __version__)
    assert report["features"]["private overlays"] is True
    assert "overlayd works here" in bus.overlayd("alice", "doctor").stdout


def test_doctor_names_overlays_of_the_user_that_show_nothing(bus: Bus) -> None:
    bases = [bus.base(name, {"motd": "base"}) for name in ("one", "two")]
    bus.serve()
    with Peer("alice") as alice:
        for name, base in zip(("lost", "covered"), bases, strict=True):
            assert not alice.apply(name, base).error
    subprocess.run(["umount", bases[0]], check=True)
    mount("other", str(bases[1]), "tmpfs")
    said = problems(bus, "alice")
    assert [text.partition(":")[0] for text in said] == ["covered", "lost"]
    assert problems(bus, "bob") == []
    subprocess.run(["umount", bases[1]], check=True)


def test_doctor_says_that_polkit_the_service_or_the_bus_is_missing(bus: Bus) -> None:
    bus.serve()
    bus.stop("polkit", signal.SIGKILL)
    mount("services", "/usr/share/dbus-1/system-services", "tmpfs")
    bus.call("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "ReloadConfig")
    assert eventually(lambda: not bus.has_name("org.freedesktop.PolicyKit1"), 10)
    # Private overlays need none of them.
    assert "no polkit" in problems(bus, "alice")[0]
    bus.stop("service")
    assert "no service" in problems(bus, "alice")[0]
    bus.stop("dbus", signal.SIGKILL)
    assert "bus cannot be reached" in problems(bus, "alice")[0]


def test_doctor_says_why_a_user_has_no_private_overlays(bus: Bus) -> None:
    # Of a namespace around, so that nobody else is kept from anything.
    script = f"echo 0 > /proc/sys/user/max_user_namespaces; {' '.join(COMMAND)} doctor --json"
    around = ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", script]
    bus.serve()
    report = json.loads(bus.as_user("alice", *around).stdout)
    assert (report["ok"], report["features"]) == (True, {"private overlays": False})
    [problem] = report["problems"]
    assert "user.max_user_namespaces=0" in problem["text"]
    assert "sysctl" in problem["hint"]
    bus.stop("service")
    bus.stop("dbus", signal.SIGKILL)
    report = json.loads(bus.as_user("alice", *around, code=10).stdout)
    assert [problem["fatal"] for problem in report["problems"]] == [False, True]
