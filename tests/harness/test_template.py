# SPDX-License-Identifier: LGPL-2.1-or-later
"""Templates: booted once, restored at will, each machine for itself."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from harness.cache import Cache
from harness.errors import CommandError, MachineError
from harness.qemu import Accelerator, Disk, Spec
from harness.template import Method, Template, Templates
from harness.vm import QemuMachine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MEMORY = (Method.MEMORY,)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def nothing(_machine: QemuMachine) -> None:
    """Prepare nothing."""


def never(_machine: QemuMachine) -> None:
    raise AssertionError("made again")


def makes(path: str) -> Callable[[QemuMachine], None]:
    def prepare(machine: QemuMachine) -> None:
        machine.run(f"echo made > {path}")

    return prepare


def exists(machine: QemuMachine, path: str) -> bool:
    return machine.run(f"test -e {path}", check=False).returncode == 0


def contents(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return what would tell that a file was written to."""
    return {
        path.name: (found.st_size, found.st_mtime_ns, found.st_blocks)
        for path in directory.iterdir()
        for found in [path.stat()]
    }


# On a real machine


def test_every_restore_has_the_right_time_and_random_numbers_of_its_own(
    bare_template: Template, tmp_path: Path
) -> None:
    look = "cd /proc/sys/kernel/random; date +%s; cat boot_id uuid; od -An -N16 -tx1 /dev/urandom"
    randoms, boots, clocks = set(), set(), []
    for number in range(10):
        with bare_template.restore(tmp_path / str(number)) as machine:
            clock, boot, uuid, random = machine.run(look).out.splitlines()
            assert abs(int(clock) - time.time()) < 3
            clocks.append(int(clock))
            randoms |= {uuid, random}
            boots.add(boot)
    assert len(randoms) == 20
    assert len(boots) == 1
    assert clocks == sorted(clocks)
    assert clocks[0] < clocks[-1]


def test_machines_of_one_template_do_not_see_one_another(
    bare_template: Template, tmp_path: Path
) -> None:
    before = contents(bare_template.directory)
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(bare_template.restore(tmp_path / name, name=name))
            for name in ("one", "two")
        )
        one.run("echo of one > /run/own; printf one | dd of=/dev/vda conv=fsync 2>/dev/null")
        assert not exists(two, "/run/own")
        two.run("printf two | dd of=/dev/vda conv=fsync 2>/dev/null")
        assert one.run("head -c3 /dev/vda").out == "one"
        assert two.run("head -c3 /dev/vda").out == "two"
        one.power_cut()
        two.run("true")
    with bare_template.restore(tmp_path / "three") as three:
        assert three.run("head -c3 /dev/vda").stdout == bytes(3)
    assert contents(bare_template.directory) == before


def test_a_template_of_a_template_has_both_and_is_made_once(
    bare_template: Template, cache: Cache, tmp_path: Path
) -> None:
    class OurMachine(QemuMachine):
        pass

    templates = Templates(cache, binary=bare_template.binary, kind=OurMachine)
    prepare = makes("/run/made")
    with templates.derived(bare_template, prepare, identity=("1",)) as first:
        assert first.method is Method.MEMORY
        assert first.how == "memory file"

        def again(machine: QemuMachine) -> None:
            assert exists(machine, "/run/made")
            machine.run("echo more > /run/more; printf disk | dd of=/dev/vda conv=fsync")

        with templates.derived(first, again, identity=("2",)) as second:
            pass
    with (
        templates.derived(bare_template, never, identity=("1",)) as first,
        templates.derived(first, never, identity=("2",)) as second,
        first.restore(tmp_path / "one") as one,
        second.restore(tmp_path / "two") as two,
    ):
        assert isinstance(one, OurMachine)
        one.run("test -e /run/made -a ! -e /run/more")
        two.run("test -e /run/made -a -e /run/more")
        assert two.run("head -c4 /dev/vda").out == "disk"
        assert one.run("head -c4 /dev/vda").stdout == bytes(4)


def test_falls_back_to_a_snapshot_and_says_so(
    bare_template: Template, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_machine: QemuMachine, _state: Path) -> None:
        raise MachineError("no such capability")

    monkeypatch.setattr(QemuMachine, "freeze", refuse)
    said: list[str] = []
    templates = Templates(cache, binary=bare_template.binary, say=said.append)
    with templates.derived(bare_template, makes("/run/made"), identity=()) as first:
        assert first.method is Method.SNAPSHOT
        assert first.how == "savevm (memory file does not work: no such capability)"
        assert f"machines are made by {first.how}" in said
        with templates.derived(first, makes("/run/more"), identity=()) as second:
            before = contents(second.directory)
            with second.restore(tmp_path / "machine") as machine:
                machine.run("test -e /run/made -a -e /run/more")
                machine.run("touch /run/mine; printf disk | dd of=/dev/vda conv=fsync")
            assert contents(second.directory) == before


def test_falls_back_to_a_cold_boot_and_says_so(
    bare_template: Template, cache: Cache, tmp_path: Path
) -> None:
    templates = Templates(cache, binary=bare_template.binary, methods=(Method.COLD,))

    def prepare(machine: QemuMachine) -> None:
        machine.run("touch /run/lost; printf kept > /dev/vda")

    with templates.derived(bare_template, prepare, identity=()) as template:
        assert template.how == "cold boot"
        with template.restore(tmp_path / "machine") as machine:
            assert machine.run("head -c4 /dev/vda").out == "kept"
            assert not exists(machine, "/run/lost")


def test_what_fails_while_preparing_is_passed_on_and_leaves_nothing(
    bare_template: Template, cache: Cache
) -> None:
    used: list[QemuMachine] = []

    def prepare(machine: QemuMachine) -> None:
        used.append(machine)
        machine.run("exit 3")

    templates = Templates(cache, binary=bare_template.binary)
    with (
        pytest.raises(CommandError, match="exit status 3"),
        templates.derived(bare_template, prepare, identity=()),
    ):
        raise AssertionError("unreachable")
    assert not cache.list()
    assert used[0].pid is None
    assert not used[0].workdir.exists()


# Fingerprints


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "qemu"
    path.write_text("#!/bin/sh\necho QEMU emulator version 10.0.2\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    for name in ("kernel", "initrd", "disk"):
        (tmp_path / name).write_text(name)
    return Spec(
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "initrd",
        disks=(Disk(path=tmp_path / "disk"),),
    )


def test_fingerprint_is_that_of_the_content(
    cache: Cache, program: Path, spec: Spec, tmp_path: Path
) -> None:
    templates = Templates(cache, binary=program)
    first = templates.fingerprint(spec)
    copy = tmp_path / "copy"
    copy.write_text("kernel")
    assert templates.fingerprint(replace(spec, kernel=copy, name="other")) == first
    seen = {first}
    for file in (spec.kernel, spec.initrd, spec.disks[0].path):
        assert file is not None
        file.write_text("changed")
        seen.add(templates.fingerprint(spec))
    seen.add(templates.fingerprint(spec, ["what the disk holds"]))
    seen.add(templates.fingerprint(replace(spec, memory_mib=512)))
    seen.add(templates.fingerprint(replace(spec, append="quiet")))
    seen.add(templates.fingerprint(replace(spec, accelerator=Accelerator.KVM)))
    program.write_text("#!/bin/sh\necho QEMU emulator version 10.0.3\n")
    seen.add(templates.fingerprint(spec))
    assert len(seen) == 9


def test_identity_stands_for_the_disks(
    cache: Cache, program: Path, spec: Spec, tmp_path: Path
) -> None:
    templates = Templates(cache, binary=program)
    before = templates.fingerprint(spec, ["image 1"])
    (tmp_path / "disk").write_text("is not read")
    assert templates.fingerprint(spec, ["image 1"]) == before
    assert templates.fingerprint(spec, ["image 2"]) != before
