# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of QEMU, as a function of a value."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import qemu
from harness.errors import HostError
from harness.qemu import Accelerator, Disk, Spec

if TYPE_CHECKING:
    from collections.abc import Sequence

SPEC = Spec(
    kernel=Path("/k/vmlinuz"),
    initrd=Path("/k/initrd"),
    append="console=ttyS0 quiet",
    disks=(Disk(path=Path("/d/one.qcow2"), serial="one"), Disk(path=Path("/d/two"), format="raw")),
)


def values(argv: Sequence[str], option: str) -> list[str]:
    """Return the values that *option* has in *argv*."""
    return [value for name, value in pairwise(argv) if name == option]


def test_names_kernel_initrd_and_command_line() -> None:
    argv = qemu.argv(SPEC, "/opt/qemu")
    assert argv[0] == "/opt/qemu"
    assert values(argv, "-kernel") == ["/k/vmlinuz"]
    assert values(argv, "-initrd") == ["/k/initrd"]
    assert values(argv, "-append") == ["console=ttyS0 quiet"]
    assert "-initrd" not in qemu.argv(replace(SPEC, initrd=None))
    assert "-append" not in qemu.argv(replace(SPEC, append=""))


def test_has_no_network_unless_asked_and_never_a_port_of_the_host() -> None:
    assert not any("net" in word for word in qemu.argv(SPEC))
    argv = qemu.argv(replace(SPEC, network=True))
    assert values(argv, "-netdev") == ["user,id=net"]
    for word in (*argv, *qemu.argv(SPEC)):
        assert not any(bad in word for bad in ("hostfwd", "tcp:", "host=", "port=", "vnc"))


def test_sockets_and_logs_are_relative_and_so_never_too_long() -> None:
    chardevs = values(qemu.argv(SPEC), "-chardev")
    paths = [part for one in chardevs for part in one.split(",") if part.startswith("path=")]
    assert len(paths) == len(chardevs)
    assert {"path=qmp.sock", "path=console.log", "path=agent.sock"} <= set(paths)
    assert not any("/" in path for path in paths)


def test_commas_in_values_are_doubled() -> None:
    odd = replace(
        SPEC,
        name="a,b",
        port="x,y",
        memory_file=Path("/m,1/ram"),
        disks=(Disk(path=Path("/d,x=1/disk"), serial="s,t"),),
    )
    argv = qemu.argv(odd)
    assert values(argv, "-name") == ["a,,b"]
    assert "mem-path=/m,,1/ram," in values(argv, "-object")[0]
    assert "file.filename=/d,,x=1/disk," in values(argv, "-blockdev")[0]
    assert any(value.endswith(",name=x,,y") for value in values(argv, "-device"))
    assert any(value.endswith(",serial=s,,t") for value in values(argv, "-device"))


def test_each_disk_has_its_node_in_order() -> None:
    one, two = values(qemu.argv(SPEC), "-blockdev")
    assert one.startswith("driver=qcow2,node-name=disk0,")
    assert two.startswith("driver=raw,node-name=disk1,")
    assert "read-only" not in one
    read_only = replace(SPEC, disks=(Disk(path=Path("/d"), read_only=True),))
    assert values(qemu.argv(read_only), "-blockdev")[0].endswith(",read-only=on")


def test_writes_to_a_disk_are_noted_below_what_the_machine_sees() -> None:
    log = Path("/l,1/log")
    noted = replace(SPEC, disks=(replace(SPEC.disks[0], log=log), SPEC.disks[1]))
    one, two = (value.split(",file.") for value in values(qemu.argv(noted), "-blockdev"))
    assert one[0] == (
        "driver=blklogwrites,node-name=disk0,log.driver=file,log.filename=/l,,1/log,"
        "log.cache.no-flush=on"
    )
    # The node that notes is told of flushes, what is below it need not be.
    assert one[1:] == [
        "driver=qcow2",
        "file.driver=file",
        "file.filename=/d/one.qcow2",
        "discard=unmap",
        "cache.no-flush=on",
    ]
    assert two[0] == "driver=raw,node-name=disk1"
    assert qemu.shape(noted) == qemu.shape(SPEC)


def test_memory_is_anonymous_shared_or_private() -> None:
    (anonymous,) = (one for one in values(qemu.argv(SPEC), "-object") if "id=ram" in one)
    assert anonymous == "memory-backend-ram,id=ram,size=1024M"
    template = replace(SPEC, memory_file=Path("/m"), share=True)
    assert values(qemu.argv(template), "-object")[0].endswith("mem-path=/m,share=on")
    restored = replace(SPEC, memory_file=Path("/m"), incoming=True)
    assert values(qemu.argv(restored), "-object")[0].endswith("share=off,readonly=on,rom=off")
    assert values(qemu.argv(restored), "-incoming") == ["defer"]


def test_accelerator_brings_its_processor() -> None:
    assert values(qemu.argv(SPEC), "-cpu") == ["qemu64"]
    kvm = replace(SPEC, accelerator=Accelerator.KVM)
    assert values(qemu.argv(kvm), "-accel") == ["kvm"]
    assert values(qemu.argv(kvm), "-cpu") == ["host"]
    assert values(qemu.argv(replace(kvm, cpu="max,-svm")), "-cpu") == ["max,-svm"]


def test_reboot_resets_unless_told_otherwise() -> None:
    assert "-no-reboot" not in qemu.argv(SPEC)
    assert "-no-reboot" in qemu.argv(replace(SPEC, reboot=False))


@pytest.mark.parametrize(
    "changed",
    [
        replace(SPEC, name="other"),
        replace(SPEC, kernel=Path("/elsewhere")),
        replace(SPEC, initrd=Path("/elsewhere")),
        replace(SPEC, memory_file=Path("/m"), share=True),
        replace(SPEC, memory_file=Path("/m"), incoming=True),
        replace(SPEC, snapshot="frozen"),
        replace(SPEC, reboot=False),
        replace(SPEC, disks=tuple(replace(one, format="qcow2") for one in SPEC.disks)),
    ],
)
def test_shape_is_the_same_however_it_is_started_and_wherever_it_lies(changed: Spec) -> None:
    assert qemu.shape(changed) == qemu.shape(SPEC)


@pytest.mark.parametrize(
    "changed",
    [
        replace(SPEC, append="quiet"),
        replace(SPEC, initrd=None),
        replace(SPEC, memory_mib=512),
        replace(SPEC, cpus=1),
        replace(SPEC, cpu="max"),
        replace(SPEC, accelerator=Accelerator.KVM),
        replace(SPEC, network=True),
        replace(SPEC, port="other"),
        replace(SPEC, firmware="bios.bin"),
        replace(SPEC, disks=SPEC.disks[:1]),
        replace(SPEC, disks=tuple(replace(one, read_only=True) for one in SPEC.disks)),
        replace(SPEC, extra=("-device", "vmgenid")),
    ],
)
def test_shape_tells_machines_apart(changed: Spec) -> None:
    assert qemu.shape(changed) != qemu.shape(SPEC)


def test_version_is_the_first_line(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho 'QEMU emulator version 10.0.2 (Debian 1:10)'\necho more\n")
    program.chmod(0o755)
    assert qemu.version(program) == "QEMU emulator version 10.0.2 (Debian 1:10)"


def test_a_qemu_that_is_missing_or_fails_is_the_hosts_fault(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot run") as caught:
        qemu.version(tmp_path / "none")
    assert "apt install" in (caught.value.hint or "")
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho first >&2; echo 'no such machine' >&2; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(HostError, match="qemu failed: no such machine"):
        qemu.version(program)
