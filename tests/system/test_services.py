# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running services see an overlay come and go, and overlays bring units and libraries."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.guest import Guest

BASE = "/usr/share/base-files"
UNITS = "/usr/lib/systemd/system"
CONFINED = "PrivateTmp=yes\nProtectSystem=strict\nProtectHome=yes"
"""Settings that give a service a mount namespace of its own."""

# Says what it reads whenever that is something else than before.
_READER = f"""
[Service]
StandardOutput=append:/run/readers/%p
ExecStart=/bin/sh -c 'while :; do now=; read -r now < {BASE}/motd; \
    if [ "$$now" != "$$was" ]; then was=$$now; echo "$$now"; fi; sleep 0.1; done'
"""
_HOLDER = f"""
[Service]
StandardOutput=append:/run/readers/%p
StandardInput=file:{BASE}/motd
ExecStart=/bin/sh -c 'read -r line; echo "$$line"; exec sleep infinity'
"""
_WAIT = """
for _ in $(seq 600)
do [ "$(tail -n 1 "/run/readers/$0")" = "$1" ] && exit; sleep 0.05
done
echo "$0 has read:"; cat "/run/readers/$0"; exit 1
"""


class Readers:
    """Services of the test's own."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.names: list[str] = []

    def start(self, name: str, text: str, settings: str = "") -> None:
        """Start a service."""
        self.guest.sh(
            'mkdir -p /run/readers; printf "%s" "$2" > "/run/systemd/system/$1.service"; '
            'systemctl start "$1"',
            name,
            f"{text}{settings}\n",
        )
        self.names.append(name)

    def wait(self, name: str, line: str) -> None:
        """Wait until that is the last line that the service has read."""
        self.guest.machine.run(["sh", "-c", _WAIT, name, line], timeout=60)

    def pid(self, name: str) -> str:
        """Return the pid of a service that runs, and has never been restarted."""
        active, restarts, pid = self.guest.sh(
            'systemctl is-active "$1"; systemctl show -P NRestarts "$1"; '
            'systemctl show -P MainPID "$1"',
            name,
        ).split()
        assert (active, restarts) == ("active", "0")
        return pid

    def stop(self) -> None:
        """Stop all and forget them."""
        if self.names:
            self.guest.sh(
                'systemctl stop "$@"; for name; do rm "/run/systemd/system/$name.service"; done; '
                "rm -r /run/readers; systemctl daemon-reload",
                *self.names,
            )


@pytest.fixture
def readers(guest: Guest) -> Iterator[Readers]:
    """Give a way to start services; they are stopped at the end."""
    with contextlib.closing(_Closing(Readers(guest))) as closing:
        yield closing.readers


class _Closing:
    def __init__(self, readers: Readers) -> None:
        self.readers = readers

    def close(self) -> None:
        self.readers.stop()


def test_running_services_see_an_overlay_come_change_and_go(guest: Guest, readers: Readers) -> None:
    base = guest.sh(f"head -n 1 {BASE}/motd")
    source = guest.source("motd", {"motd": "from the overlay\n"})
    readers.start("plain", _READER)
    readers.start("confined", _READER, CONFINED)
    pids = [readers.pid("plain"), readers.pid("confined")]
    for name in "plain", "confined":
        readers.wait(name, base)
    guest.apply("motd", source, BASE)
    readers.start("late", _READER, CONFINED)
    for name in readers.names:
        readers.wait(name, "from the overlay")
    guest.sh(f"echo edited > {BASE}/motd")
    for name in readers.names:
        readers.wait(name, "edited")
    guest.overlayd("reset", "motd", "--to", "applied")
    for name in readers.names:
        readers.wait(name, "from the overlay")
    guest.overlayd("remove", "motd")
    for name in readers.names:
        readers.wait(name, base)
    assert [readers.pid("plain"), readers.pid("confined")] == pids
    # Nor is anything left in the namespaces of the two that have their own.
    assert guest.sh("grep -l overlayd: /proc/[0-9]*/mountinfo 2>/dev/null || echo none") == "none"


@pytest.mark.parametrize("settings", ["", CONFINED], ids=["plain", "confined"])
def test_service_that_holds_a_file_is_named_and_may_keep_it(
    guest: Guest, readers: Readers, settings: str
) -> None:
    source = guest.source("held", {"motd": "held\n"})
    overlay = guest.apply("held", source, BASE)
    readers.start("holder", _HOLDER, settings)
    readers.wait("holder", "held")
    pid = readers.pid("holder")
    said = guest.overlayd("remove", "held", code=6).err
    assert f"held is in use by {pid} (sleep) at {BASE}/motd" in said
    assert "--lazy" in said
    assert guest.status("held").state == "active"
    assert "something still uses" in guest.overlayd("remove", "held", "--lazy").out
    assert [(o.name, o.state) for o in guest.overlays("--all")] == [("held", "draining")]
    assert guest.overlays() == []
    # The service keeps what it has, and it alone: the name and the place are free.
    assert guest.sh('cat "/proc/$1/fd/0"', pid) == "held"
    assert readers.pid("holder") == pid
    again = guest.apply("held", source, BASE)
    assert again.uuid != overlay.uuid
    guest.overlayd("remove", "held", "--lazy")
    readers.stop()
    readers.names.clear()
    assert guest.overlays("--all") == []


def test_unit_file_of_an_overlay_works_after_daemon_reload(guest: Guest) -> None:
    unit = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/echo started by overlay\n"
    source = guest.source(
        "unit", {"tried.service": unit, "systemd-journald.service.d/tried.conf": "[Service]\n"}
    )
    refused = guest.overlayd("apply", "unit", source, UNITS, code=5).err
    assert "critical target" in refused
    guest.apply("unit", source, UNITS, "--allow-critical")
    said = guest.sh(
        "systemctl daemon-reload; systemctl start tried; systemctl is-active tried; "
        "systemctl show -P FragmentPath tried; journalctl -q -b -u tried -o cat | grep started; "
        "systemctl show -P DropInPaths systemd-journald; systemctl stop tried"
    )
    active, path, line, drop_ins = said.split("\n")
    assert (active, path, line) == ("active", f"{UNITS}/tried.service", "started by overlay")
    assert f"{UNITS}/systemd-journald.service.d/tried.conf" in drop_ins.split()
    guest.overlayd("remove", "unit")
    said = guest.sh(
        "systemctl daemon-reload; systemctl show -P LoadState tried; "
        "systemctl show -P DropInPaths systemd-journald; systemctl is-system-running"
    )
    state, drop_ins, system = said.split("\n")
    assert (state, system) == ("not-found", "running")
    assert "tried.conf" not in drop_ins


def test_library_of_an_overlay_works_after_ldconfig(guest: Guest) -> None:
    # A library under a name of its own: zlib's with a letter of its SONAME exchanged.
    guest.sh(
        """
        mkdir -p /var/tmp/sources/lib; cd /var/tmp/sources/lib
        zlib=$(ldconfig -p | sed -n 's/.*libz\\.so\\.1 .* => //p' | head -n 1)
        sed 's/libz\\.so\\.1\\x00/libq.so.1\\x00/' "$zlib" > libq.so.1.0
        """
    )
    where = guest.sh("dirname $(ldconfig -p | sed -n 's/.*libz\\.so\\.1 .* => //p' | head -n 1)")
    where = where.replace("/lib/", "/usr/lib/").replace("/usr/usr/", "/usr/")
    load = (
        "import ctypes; z = ctypes.CDLL('libq.so.1'); z.zlibVersion.restype = ctypes.c_char_p; "
        "print(z.zlibVersion().decode())"
    )
    try:
        overlay = guest.apply("lib", "/var/tmp/sources/lib/libq.so.1.0", where, "--allow-critical")
        assert overlay.mount_point == where
        said = guest.sh(
            'python3 -c "$1" 2>&1 | grep -c "cannot open shared object"; ldconfig; '
            'ldconfig -p | grep -c libq; python3 -c "$1"; readlink "$2/libq.so.1"',
            load,
            where,
            check=False,
        )
        missing, cached, version, link = said.split("\n")
        assert (missing, cached, link) == ("1", "1", "libq.so.1.0")
        assert version[0].isdigit()
        # What began to run meanwhile has libraries of the overlay mapped.
        guest.overlayd("remove", "lib", "--lazy")
    finally:
        guest.sh("ldconfig")
    said = guest.sh('ldconfig -p | grep -c libq; ls "$1" | grep -c libq', where, check=False)
    assert said == "0\n0"
    assert guest.overlays("--all") == []
