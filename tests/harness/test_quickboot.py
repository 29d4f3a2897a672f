# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the initramfs of a quick boot has: masks, and everything that its program asks for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from harness import quickboot
from harness.errors import BuildError
from tests.harness.trees_of_debian import write

if TYPE_CHECKING:
    from pathlib import Path

UNIT = re.compile(r"[a-z0-9@_-]+\.(service|socket|timer|target|path|mount|automount)", re.ASCII)
# Without these a machine is not what is to be tested.
NEEDED = {
    *("dbus.service", "dbus.socket", "polkit.service", "systemd-logind.service"),
    *("systemd-udevd.service", "systemd-networkd.service", "systemd-sysctl.service"),
    *("systemd-tmpfiles-setup.service", "systemd-journald.service", "ostree-remount.service"),
    *("kmod-static-nodes.service", "tmp.mount", "systemd-user-sessions.service"),
    *("cloud-init-main.service", "systemd-sysext.service", "harness-agent.service"),
}


def test_masks_are_units_and_each_is_named_once() -> None:
    names = (*quickboot.MASKED, *quickboot.SKIPPED)
    assert [name for name in names if not UNIT.fullmatch(name)] == []
    assert len(names) == len(set(names))


def test_what_machines_are_tested_for_is_not_masked() -> None:
    assert not NEEDED & {*quickboot.MASKED, *quickboot.SKIPPED}


def test_generators_of_ostree_and_cloud_init_run() -> None:
    assert not [name for name in quickboot.GENERATORS if not name.startswith("systemd-")]


def test_skipped_unit_is_skipped_by_a_condition() -> None:
    text = quickboot.FILES["systemd/system/ssh.service.d/quick.conf"]
    assert "ConditionPathExists=/nonexistent" in text


def test_missing_library_is_named(tmp_path: Path) -> None:
    write(tmp_path / "usr/bin/tool", elf_that_needs("libnone.so.1"))
    with pytest.raises(BuildError, match=r"usr/bin/tool needs libnone\.so\.1"):
        quickboot.libraries(tmp_path, "usr/bin/tool")


def test_libraries_are_followed_from_one_to_the_next(tmp_path: Path) -> None:
    directory = "usr/lib/x86_64-linux-gnu"
    write(tmp_path / "usr/bin/tool", elf_that_needs("liba.so.1"))
    write(tmp_path / directory / "liba.so.1", elf_that_needs("libb.so.1"))
    write(tmp_path / directory / "libb.so.1", elf_that_needs("liba.so.1"))
    found = quickboot.libraries(tmp_path, "usr/bin/tool")
    assert found == [f"{directory}/liba.so.1", f"{directory}/libb.so.1"]


def elf_that_needs(library: str) -> bytes:
    """Return a file with the two sections that tell what it needs."""
    strings = b"\0" + library.encode() + b"\0"
    names = b"\0.dynamic\0.dynstr\0.shstrtab\0"
    dynamic = (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(16)
    body, sections, at = b"", [bytes(64)], 64
    for name, data in ((".dynamic", dynamic), (".dynstr", strings), (".shstrtab", names)):
        index = names.index(b"\0" + name.encode() + b"\0") + 1
        section = index.to_bytes(4, "little") + bytes(20)
        section += (at + len(body)).to_bytes(8, "little") + len(data).to_bytes(8, "little")
        sections.append(section + bytes(24))
        body += data
    header = b"\x7fELF\x02\x01".ljust(40, b"\0") + (at + len(body)).to_bytes(8, "little")
    header += bytes(10) + (64).to_bytes(2, "little") + (4).to_bytes(2, "little")
    header += (3).to_bytes(2, "little")
    return header.ljust(64, b"\0") + body + b"".join(sections)
