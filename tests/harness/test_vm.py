# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of a machine in QEMU, on a bare kernel: boots, power cuts, and ways to break."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.errors import CapabilityError, ChannelError, MachineError
from harness.machine import Capability
from harness.qemu import Spec
from harness.vm import QemuMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.template import Template

ROOT = Path(__file__).parents[2]
BLOCK = 4096

# Writes numbered blocks for ever, and tells on the console which of them are on the disk.
WRITER = f"""
import os
disk = os.open("/dev/vda", os.O_RDWR)
console = os.open("/dev/ttyS0", os.O_WRONLY)
for number in range(1, 10000):
    os.pwrite(disk, b"%08d" % number * {BLOCK // 8}, number * {BLOCK})
    os.fdatasync(disk)
    os.write(console, b"written %d\\n" % number)
"""
READER = f"""
import os, sys
disk = os.open("/dev/vda", os.O_RDONLY)
for number in range(1, int(sys.argv[1]) + 1):
    if os.pread(disk, {BLOCK}, number * {BLOCK}) != b"%08d" % number * {BLOCK // 8}:
        sys.exit("block %d is not what was written" % number)
print("all there")
"""


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Return a directory whose name is too long for a unix socket and special to QEMU."""
    return tmp_path / ("long,name=" * 12)


@pytest.fixture
def machine(bare_template: Template, workdir: Path) -> Iterator[QemuMachine]:
    with bare_template.restore(workdir) as machine:
        yield machine


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def boot_id(machine: QemuMachine) -> str:
    return machine.run("cat /proc/sys/kernel/random/boot_id").out.strip()


def test_runs_commands_on_its_own_kernel(machine: QemuMachine) -> None:
    result = machine.run("uname -r; echo problem >&2; exit 3", check=False)
    assert (result.returncode, result.err) == (3, "problem\n")
    assert result.out.strip() == machine.kernel
    machine.run("echo 'said on the console' > /dev/ttyS0")
    wait_until(lambda: "said on the console" in machine.console(), 5)
    assert machine.command[0].endswith("qemu-system-x86_64")


def test_reboot_brings_a_new_boot_id_and_keeps_the_disk(machine: QemuMachine) -> None:
    before, process = boot_id(machine), machine.pid
    machine.run("echo kept | dd of=/dev/vda conv=fsync 2>/dev/null; touch /run/gone")
    machine.reboot()
    assert boot_id(machine) != before
    assert machine.pid == process
    assert machine.run("head -c 4 /dev/vda").out == "kept"
    assert machine.run("test -e /run/gone", check=False).returncode != 0


def test_power_cut_keeps_what_was_flushed(machine: QemuMachine) -> None:
    before, process = boot_id(machine), machine.pid
    machine.copy_in(WRITER.encode(), "/run/writer.py")
    machine.copy_in(READER.encode(), "/run/reader.py")
    machine.run("python3 /run/writer.py >/dev/null 2>&1 &")
    wait_until(lambda: "written 30\n" in machine.console().replace("\r", ""))
    machine.power_cut()
    assert machine.pid is None
    with pytest.raises(MachineError, match="is off"):
        machine.run("true")
    told = [int(number) for number in re.findall(r"written (\d+)\r?\n", machine.console())]
    machine.start()
    assert boot_id(machine) != before
    assert machine.pid != process
    machine.copy_in(READER.encode(), "/run/reader.py")
    assert machine.run(f"python3 /run/reader.py {told[-1]}").out == "all there\n"


def test_a_qemu_killed_from_outside_is_reported_at_once_and_for_ever(machine: QemuMachine) -> None:
    assert machine.pid is not None
    machine.run("echo 'its last line' > /dev/ttyS0")
    threading.Timer(0.3, os.kill, (machine.pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(MachineError, match="QEMU died, killed by SIGKILL") as first:
        machine.run("sleep 60")
    assert time.monotonic() - start < 10
    for again in (lambda: machine.run("true"), machine.reboot, machine.power_cut, machine.start):
        with pytest.raises(MachineError) as caught:
            again()
        assert caught.value is first.value
    assert any("its last line" in note for note in first.value.__notes__)


def test_a_qemu_that_dies_is_noticed_though_nobody_asks(machine: QemuMachine) -> None:
    assert machine.pid is not None
    os.kill(machine.pid, signal.SIGTERM)
    wait_until(lambda: machine.broken, 5)
    assert "QEMU died, exit status 0: " in str(machine.broken)
    assert "terminating on signal 15" in str(machine.broken)


def test_a_machine_that_powers_itself_off_is_told_from_a_qemu_that_dies(
    machine: QemuMachine,
) -> None:
    with pytest.raises(MachineError, match="powered itself off"):
        machine.run("echo o > /proc/sysrq-trigger; sleep 60")


def test_a_machine_that_stands_still_is_named(machine: QemuMachine) -> None:
    machine.monitor.command("stop")
    with pytest.raises(MachineError, match="stands still: paused"):
        machine.greet(timeout=0.3)


def test_an_agent_that_does_not_answer_is_a_timeout_with_the_console(machine: QemuMachine) -> None:
    machine.run("echo 'last line of all' > /dev/ttyS0")
    machine.run("{ sleep 0.1; kill -STOP $PPID; } >/dev/null 2>&1 &")
    time.sleep(0.5)
    with pytest.raises(ChannelError) as caught:
        machine.greet(timeout=0.5)
    assert machine.broken is caught.value
    assert any("last line of all" in note for note in caught.value.__notes__)


def test_closing_leaves_the_logs_and_no_process(machine: QemuMachine, workdir: Path) -> None:
    process = machine.pid
    machine.run("echo bye > /dev/ttyS0")
    machine.close()
    machine.close()
    assert not Path(f"/proc/{process}").exists()
    assert "bye" in machine.console()
    assert not [path for path in workdir.iterdir() if path.is_socket()]
    with pytest.raises(MachineError, match="is off"):
        machine.run("true")
    assert machine.broken is None


def test_capabilities_of_the_system_are_added(bare_template: Template, tmp_path: Path) -> None:
    plain = QemuMachine(bare_template.spec, workdir=tmp_path)
    with pytest.raises(CapabilityError, match="cannot do soft-reboot"):
        plain.reboot("soft")
    system = frozenset({Capability.SYSTEMD, Capability.SOFT_REBOOT})
    machine = QemuMachine(bare_template.spec, workdir=tmp_path, capabilities=system)
    machine.need(Capability.SOFT_REBOOT, Capability.POWER_CUT)


def test_a_qemu_that_does_not_start_is_reported_with_its_words(
    bare_template: Template, tmp_path: Path
) -> None:
    spec = replace(bare_template.spec, name="bad", disks=(), kernel=tmp_path / "none")
    with QemuMachine(spec, workdir=tmp_path, binary=bare_template.binary) as machine:
        with pytest.raises(MachineError, match=r"bad: QEMU died, exit status 1: .*none") as caught:
            machine.start()
        assert machine.broken is caught.value
        assert machine.pid is None


def test_a_qemu_that_is_missing_is_reported(tmp_path: Path) -> None:
    spec = Spec(kernel=Path("/none"))
    with (
        QemuMachine(spec, workdir=tmp_path, binary=tmp_path / "none") as machine,
        pytest.raises(MachineError, match=r"exit status 127: .*none"),
    ):
        machine.start()


def test_no_qemu_outlives_a_harness_that_is_killed(bare_template: Template, tmp_path: Path) -> None:
    code = """\
        import os, signal, sys
        from pathlib import Path
        from harness.qemu import Spec
        from harness.vm import QemuMachine
        spec = Spec(kernel=Path(sys.argv[2]))
        machine = QemuMachine(spec, workdir=Path(sys.argv[1]), binary=Path(sys.argv[3]))
        machine._launch(spec)
        print(machine.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    arguments = [tmp_path, bare_template.spec.kernel, bare_template.binary]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    process = Path(f"/proc/{int(done.stdout)}")
    wait_until(lambda: not process.exists() or "\nState:\tZ" in (process / "status").read_text(), 5)
