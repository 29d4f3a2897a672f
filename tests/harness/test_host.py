# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host has and gets.

What installs packages runs against an ``apt-get`` that writes down what it was asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from harness import host
from harness.errors import HostError
from harness.host import Cgroups

if TYPE_CHECKING:
    from pathlib import Path

V2 = "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "25 20 0:22 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755\n"
    "26 25 0:23 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n"
    "27 25 0:24 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory\n"
)
OLD_QEMU = "QEMU emulator version 7.2.15 (Debian 1:7.2+dfsg-7+deb12u12)"
NEW_QEMU = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)"

# It installs whatever is in $OFFERED.
APT_GET = """#!/bin/sh
echo "$@" >> "$LOG"
for word in "$@"; do
    case $word in
        Dir::Etc::SourceParts=*) cat "${word#*=}"/backports.list >> "$LOG" ;;
        update) [ ! -e "$OFFERED/fails" ] ;;
        install) [ -e "$OFFERED/ready" ] || { touch "$OFFERED/ready"; exit 100; }
            cp "$OFFERED"/bin/* "$BIN" ;;
    esac
done
"""


class Machine:
    """A host that has only what is in one directory, and an APT that can install more."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = root / "bin"
        self.offered = root / "offered"
        self.log = root / "log"
        for directory in (self.bin, self.offered / "bin"):
            directory.mkdir(parents=True)
        (self.offered / "ready").touch()
        # It has a shell and what the script above needs.
        for name in ("sh", "cat", "cp", "touch"):
            found = host.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)
        self.program("apt-get", APT_GET)
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setattr(host, "_PATH", "")
        for name in ("log", "offered", "bin"):
            monkeypatch.setenv(name.upper(), str(getattr(self, name)))
        self._monkeypatch = monkeypatch
        self.user(0)

    def user(self, uid: int) -> None:
        """Be another user."""
        self._monkeypatch.setattr(os, "geteuid", lambda: uid)

    def program(self, name: str, text: str, *, offered: bool = False) -> None:
        """Have a program, or have it offered in a package."""
        path = (self.offered / "bin" if offered else self.bin) / name
        path.write_text(text)
        path.chmod(0o755)

    def qemu(self, version: str, *, offered: bool = False) -> None:
        """Have QEMU, or have it offered."""
        self.program(host.QEMU, f"#!/bin/sh\necho '{version}'\n", offered=offered)
        self.program("qemu-img", "#!/bin/sh\n", offered=offered)

    def candidate(self, version: str) -> None:
        """Have APT's lists name a version of QEMU."""
        text = f"qemu-system-x86:\n  Installed: (none)\n  Candidate: {version}\n"
        self.program("apt-cache", f"#!/bin/sh\ncat <<'END'\n{text}END\n")

    def release(self, codename: str) -> None:
        """Be this release of Debian."""
        self._monkeypatch.setattr(host, "_release", lambda: {"VERSION_CODENAME": codename})

    def calls(self) -> list[str]:
        """Return how APT was called."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Return such a host."""
    return Machine(tmp_path, monkeypatch)


def test_control_groups_are_told_apart() -> None:
    assert host.cgroups(V2) is Cgroups.V2
    assert host.cgroups(HYBRID) is Cgroups.HYBRID
    assert host.cgroups("".join(HYBRID.splitlines(keepends=True)[::2])) is Cgroups.V1
    assert host.cgroups("20 1 8:1 / / rw - ext4 /dev/sda1 rw\n") is Cgroups.NONE


def test_mount_on_top_decides_about_control_groups() -> None:
    assert host.cgroups(HYBRID + V2) is Cgroups.V2


def test_this_host_can_be_looked_at() -> None:
    found = host.look()
    assert found.cpus >= 1
    assert found.memory_mib > 0
    assert found.root is (os.geteuid() == 0)


def test_commands_that_are_there_need_no_apt(machine: Machine) -> None:
    machine.user(1000)
    host.need({"cat": "coreutils"})
    assert machine.calls() == []


def test_user_is_told_what_to_install(machine: Machine) -> None:
    machine.user(1000)
    with pytest.raises(HostError, match="missing commands: kpartx, ostree") as caught:
        host.need({"kpartx": "kpartx", "cat": "coreutils", "ostree": "ostree"})
    assert caught.value.hint == "as root: apt-get install kpartx ostree"
    assert machine.calls() == []


def test_root_installs_what_is_missing(machine: Machine) -> None:
    machine.program("ostree", "", offered=True)
    host.need({"ostree": "ostree", "cat": "coreutils"})
    (call,) = machine.calls()
    assert call.endswith("install --no-install-recommends ostree")


def test_lists_are_fetched_when_installing_fails_without(machine: Machine) -> None:
    (machine.offered / "ready").unlink()
    machine.program("ostree", "", offered=True)
    host.need({"ostree": "ostree"})
    assert [call.split()[4] for call in machine.calls()] == ["install", "update", "install"]


def test_package_without_the_command_is_an_error(machine: Machine) -> None:
    machine.program("other", "", offered=True)
    with pytest.raises(HostError, match="ostree: not there after"):
        host.need({"ostree": "ostree"})


def test_version_of_qemu_is_read() -> None:
    assert host.qemu_version(OLD_QEMU) == (7, 2, 15)
    assert host.qemu_version(NEW_QEMU) == (10, 0, 2)
    assert host.qemu_version("command not found") == ()


def test_new_qemu_is_taken_as_it_is(machine: Machine) -> None:
    machine.qemu(NEW_QEMU)
    machine.user(1000)
    assert host.qemu() == machine.bin / host.QEMU
    assert machine.calls() == []


def test_qemu_of_debian_13_is_simply_installed(machine: Machine) -> None:
    machine.candidate("1:10.0.2+ds-2+deb13u1")
    machine.release("trixie")
    machine.qemu(NEW_QEMU, offered=True)
    assert host.qemu() == machine.bin / host.QEMU
    (call,) = machine.calls()
    assert call.endswith("install --no-install-recommends qemu-system-x86 qemu-utils")


def test_qemu_of_debian_12_comes_from_backports_and_no_source_stays(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.candidate("1:7.2+dfsg-7+deb12u12")
    machine.release("bookworm")
    machine.qemu(OLD_QEMU)
    machine.qemu(NEW_QEMU, offered=True)
    monkeypatch.setattr(host, "machine_mirror", lambda: "http://mirror/debian")
    assert host.qemu() == machine.bin / host.QEMU
    call, source = machine.calls()
    assert "-t bookworm-backports" in call
    assert source.endswith("http://mirror/debian bookworm-backports main")
    (parts,) = [w.split("=")[1] for w in call.split() if w.startswith("Dir::Etc::SourceParts=")]
    assert not os.path.lexists(parts)


def test_user_without_qemu_is_told_where_it_comes_from(machine: Machine) -> None:
    machine.candidate("1:7.2+dfsg-7+deb12u12")
    machine.release("bookworm")
    machine.qemu(OLD_QEMU)
    machine.user(1000)
    with pytest.raises(HostError, match=r"QEMU 10 or newer is needed.*7\.2\.15") as caught:
        host.qemu()
    assert str(caught.value.hint).startswith(
        "as root: apt-get install -t bookworm-backports qemu-system-x86 qemu-utils"
    )


def test_qemu_that_is_too_old_even_after_installation_is_an_error(machine: Machine) -> None:
    machine.candidate("1:10.0.2")
    machine.qemu(OLD_QEMU, offered=True)
    with pytest.raises(HostError, match=r"needed; APT installed .*7\.2\.15"):
        host.qemu()


def test_room_is_asked_for_where_a_directory_will_be(tmp_path: Path) -> None:
    later = tmp_path / "not/yet"
    assert host.free_disk(later) > 0
    host.need_disk(later, 1, what="a test")
    with pytest.raises(HostError, match="a test needs"):
        host.need_disk(later, 1 << 60, what="a test")
