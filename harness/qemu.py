# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMU is to run, as a value, and the command line that says so.

Pure: nothing is started or looked at, besides :func:`version` and :func:`create_overlay`, which
ask the programs.  QEMU runs in the machine's working directory and gets the names of sockets and
logs relative to it, so that no directory is too long for the address of a unix socket.

A value describes the machine itself (kernel, disks, memory, devices) and, in its last fields, one
way to start it.  Two values that differ in the latter and in paths only can take over each
other's frozen state: :func:`shape` is the same for both.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from harness.errors import HostError

AGENT_PORT: Final = "org.overlayd.harness"
"""Name of the virtio-serial port that the agent opens unless told otherwise."""
MONITOR: Final = "qmp.sock"
AGENT: Final = "agent.sock"
SHELL: Final = "shell.sock"
SHELL_PORT: Final = "org.overlayd.shell"
"""Name of a second port, for people (:mod:`harness.shell`)."""
SOCKETS: Final = (MONITOR, AGENT, SHELL)
CONSOLE: Final = "console.log"

TUNING: Final = (
    "quiet loglevel=3 mitigations=off audit=0 lsm=landlock,yama nokaslr"
    " tsc=reliable no_timer_check random.trust_cpu=on 8250.nr_uarts=1"
    " init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off"
)
"""Kernel arguments that halve a boot under TCG (52 s to 27 s for a Debian 13 with systemd).

The last three undo Debian's hardening of memory; without them everything takes a quarter longer.
"""


class Accelerator(StrEnum):
    """What executes the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


CPU: Final = {
    # Fewest features to emulate: boots in half the time of "max", and Debian asks for no more.
    Accelerator.TCG: "qemu64",
    Accelerator.KVM: "host",
}
_ACCELERATOR: Final = {
    Accelerator.TCG: "tcg,thread=multi,tb-size=512",
    Accelerator.KVM: "kvm",
}


@dataclass(frozen=True, kw_only=True)
class Disk:
    """One virtio disk; *serial* names it in ``/dev/disk/by-id/virtio-SERIAL``.

    Every write to it and every flush is noted in the file *log*, which is there, for
    :mod:`harness.blocklog`.
    """

    path: Path
    format: str = "qcow2"
    serial: str = ""
    read_only: bool = False
    log: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A machine, and how to start it.

    :ivar append: the kernel's command line, whole; see :data:`TUNING`.
    :ivar cpu: QEMU's name of the processor; empty: what suits the accelerator.
    :ivar firmware: qboot needs a second less under TCG than SeaBIOS, and boots kernels only.
    :ivar port: name of the virtio-serial port for the agent.
    :ivar network: a user-mode network, without any port of the host's.
    :ivar reboot: whether QEMU resets the machine when the guest reboots, or ends.
    :ivar memory_file: backs the memory; None: it is anonymous.
    :ivar share: whether what the machine writes to its memory gets into that file.
    :ivar incoming: whether to wait for a state that comes by the monitor.
    :ivar snapshot: name of the internal snapshot to go on from; empty: boot.
    """

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    disks: tuple[Disk, ...] = ()
    memory_mib: int = 1024
    cpus: int = 2
    accelerator: Accelerator = Accelerator.TCG
    cpu: str = ""
    firmware: str = "qboot.rom"
    port: str = AGENT_PORT
    network: bool = False
    extra: tuple[str, ...] = ()
    # How to start it.
    name: str = "machine"
    reboot: bool = True
    memory_file: Path | None = None
    share: bool = False
    incoming: bool = False
    snapshot: str = ""


def argv(spec: Spec, binary: str | Path = "qemu-system-x86_64") -> list[str]:
    """Return the command line for *spec*, to be run in the machine's working directory."""
    command = [
        str(binary),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-name", _escaped(spec.name)),
        *("-machine", "q35,memory-backend=ram,usb=off,smbus=off,sata=off"),
        *("-accel", _ACCELERATOR[spec.accelerator]),
        *("-cpu", spec.cpu or CPU[spec.accelerator]),
        *("-smp", str(spec.cpus)),
        *("-m", f"{spec.memory_mib}M"),
        *("-object", _memory(spec)),
        *("-bios", spec.firmware),
        *("-kernel", str(spec.kernel)),
        *("-chardev", f"socket,id=monitor,path={MONITOR},server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"file,id=console,path={CONSOLE},append=on"),
        *("-serial", "chardev:console"),
        *("-object", "rng-random,id=random,filename=/dev/urandom"),
        *("-device", "virtio-rng-pci,rng=random"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={AGENT},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=agent,name={_escaped(spec.port)}"),
        *("-chardev", f"socket,id=shell,path={SHELL},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=shell,name={SHELL_PORT}"),
    ]
    if spec.initrd is not None:
        command += ["-initrd", str(spec.initrd)]
    if spec.append:
        command += ["-append", spec.append]
    for number, disk in enumerate(spec.disks):
        command += _disk(number, disk)
    if spec.network:
        command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]
    if not spec.reboot:
        command.append("-no-reboot")
    if spec.incoming:
        command += ["-incoming", "defer"]
    if spec.snapshot:
        command += ["-loadvm", spec.snapshot]
    return [*command, *spec.extra]


def shape(spec: Spec) -> str:
    """Return all of *spec* that a frozen state depends on, besides what is in its files."""
    plain = replace(
        spec,
        kernel=Path("kernel"),
        initrd=spec.initrd and Path("initrd"),
        disks=tuple(
            replace(disk, path=Path("disk"), format="qcow2", log=None) for disk in spec.disks
        ),
        name="machine",
        reboot=True,
        memory_file=None,
        share=False,
        incoming=False,
        snapshot="",
    )
    return "\n".join(argv(plain, "qemu"))


def _memory(spec: Spec) -> str:
    size = f"id=ram,size={spec.memory_mib}M"
    if spec.memory_file is None:
        return f"memory-backend-ram,{size}"
    # A private mapping needs no right to write: nothing can damage a template.
    mode = "share=on" if spec.share else "share=off,readonly=on,rom=off"
    return f"memory-backend-file,{size},mem-path={_escaped(str(spec.memory_file))},{mode}"


def _disk(number: int, disk: Disk) -> list[str]:
    # What the guest flushes is handed to the host's kernel, which outlives QEMU; it need not get
    # to the host's disk (no-flush), since it is QEMU that a power cut ends and not the host.
    node = [
        *(f"driver={disk.format}", "file.driver=file"),
        *(f"file.filename={_escaped(str(disk.path))}", "discard=unmap", "cache.no-flush=on"),
    ]
    if disk.log is not None:
        log = f"log.driver=file,log.filename={_escaped(str(disk.log))},log.cache.no-flush=on"
        node = ["driver=blklogwrites", log, *(f"file.{option}" for option in node)]
    node.insert(1, f"node-name=disk{number}")
    device = ["virtio-blk-pci", f"drive=disk{number}"]
    if disk.read_only:
        node.append("read-only=on")
    if disk.serial:
        device.append(f"serial={_escaped(disk.serial)}")
    return ["-blockdev", ",".join(node), "-device", ",".join(device)]


def _escaped(value: str) -> str:
    """Return *value* as part of an option's value, where a comma ends it."""
    return value.replace(",", ",,")


def version(binary: str | Path = "qemu-system-x86_64") -> str:
    """Return QEMU's version line, with the distribution's package version where it has one.

    :raises HostError: if it cannot be run.
    """
    return _run([str(binary), "--version"]).partition("\n")[0].strip()


def create_overlay(path: Path, backing: str, *, backing_format: str = "qcow2") -> None:
    """Make *path* a qcow2 image that has only what differs from *backing*.

    A relative *backing* lies beside *path*.

    :raises HostError: if that cannot be done.
    """
    _run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", backing_format, "-b", backing, str(path)]
    )


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(
            f"cannot run {command[0]}: {error}", hint="apt install qemu-system-x86 qemu-utils"
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise HostError(f"{command[0]} failed: {reason}")
    return done.stdout
