# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bare kernel, booted for real: what is on it, and what a project puts there."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

from harness import bare, elf, host, kernels, userland
from harness.bare import BareMachine, Content, Hardware
from harness.cache import Cache, default_root
from harness.errors import BuildError, CapabilityError, CommandTimeoutError
from harness.initramfs import Archive
from harness.machine import Capability
from harness.userland import Userland

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODULE = "import json, sys\n\n\ndef answer():\n    return 42\n"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareMachine]:
    """Return a running machine that has a small project and a library."""
    found = host.which(host.QEMU)
    if found is None or host.qemu_version(host.says(found)) < (host.QEMU_AT_LEAST,):
        pytest.skip("needs QEMU 10 or newer")
    directory = tmp_path_factory.mktemp("bare")
    (directory / "libraries").mkdir()
    (directory / "libraries/library.py").write_text("from project import answer\n")
    files = Archive()
    files.file("src/project.py", MODULE.encode())
    content = Content(
        files=files,
        userland=Userland(libraries=(directory / "libraries",)),
        precompile=("-c", "import library"),
        cwd="/src",
    )
    cache = Cache(default_root())
    try:
        with (
            kernels.fetch("6.12", cache) as kernel,
            bare.machine(
                kernel,
                content,
                cache,
                workdir=directory / "machine",
                hardware=Hardware(memory_mib=512, binary=found),
            ) as machine,
        ):
            machine.start()
            yield machine
    except BuildError as error:
        pytest.skip(f"there is no such machine: {error}")


def python(machine: BareMachine, code: str) -> object:
    return json.loads(machine.run(["python3", "-c", code], cwd="/src").out)


def test_kernel_is_the_one_that_was_asked_for(machine: BareMachine) -> None:
    assert machine.kernel.startswith("6.12.")
    assert machine.run(["uname", "-r"]).out.strip() == machine.kernel


def test_overlays_can_be_mounted_and_namespaces_made(machine: BareMachine) -> None:
    script = (
        "cd $(mktemp -d /run/XXXXXX) && mkdir a b u w m && touch a/x && "
        "mount -t overlay o -o lowerdir=a:b,upperdir=u,workdir=w m && echo y > m/x && cat u/x && "
        "unshare --mount --propagation private sh -c 'umount m; ls m | wc -l' && umount m"
    )
    assert machine.run(script).out.split() == ["y", "0"]


def test_root_is_an_ordinary_shared_mount(machine: BareMachine) -> None:
    tables = machine.run(["cat", "/proc/self/mountinfo"]).out.splitlines()
    (root,) = [line for line in tables if line.split()[4] == "/"]
    assert " shared:" in root
    assert machine.run("unshare -m sh -c 'mount -t tmpfs t /mnt; readlink /proc/1/ns/mnt'").out


def test_project_and_libraries_come_compiled_and_are_taken_so(machine: BareMachine) -> None:
    code = "import sys, json, library, project; print(json.dumps([project.answer()]))"
    said = machine.run(["python3", "-v", "-c", code], cwd="/src")
    assert json.loads(said.out) == [42]
    for name in ("/src/project.py", "/usr/lib/python3/dist-packages/library.py"):
        assert f"matches {name}" in said.err


def test_python_has_what_programs_commonly_need(machine: BareMachine) -> None:
    names = "ctypes, hashlib, json, lzma, multiprocessing, sqlite3, ssl, tomllib, zlib"
    code = (
        "import importlib, json\ngone = []\n"
        f"for name in '{names}'.split(', '):\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError: gone.append(name)\n"
        "print(json.dumps(gone))"
    )
    assert python(machine, code) == ["sqlite3", "ssl"]  # for their libraries' size
    traceback = machine.run(["python3", "-c", "import json; json.loads('{')"], check=False)
    assert 'File "/usr/lib/python3.13/json/decoder.py", line' in traceback.err


def test_programs_that_are_copied_work_under_another_name(machine: BareMachine) -> None:
    for name in ("cat", "env", "id", "sleep"):
        place = machine.run(["sh", "-c", f"readlink -f $(command -v {name})"]).out.strip()
        assert place == f"/usr/bin/{name}"


def test_users_streams_and_terminals_are_there(machine: BareMachine) -> None:
    assert machine.user("nobody").run(["id", "-u"]).out.strip() == "65534"
    assert machine.run("echo x | cat /dev/stdin").out == "x\n"
    assert python(machine, "import os; print(len(os.openpty()))") == 2


def test_orphans_are_collected(machine: BareMachine) -> None:
    machine.run("(sh -c 'sleep 0.1 & exec true' &) ; sleep 0.5")
    assert " Z " not in machine.run(["ps", "-o", "stat,comm"]).out


def test_output_is_streamed_as_it_comes(machine: BareMachine) -> None:
    arrived: list[tuple[float, bytes]] = []

    def note(data: bytes) -> None:
        arrived.append((time.monotonic(), data))

    script = "echo first; sleep 1; echo second >&2; exit 3"
    assert machine.stream(["sh", "-c", script], note, timeout=30) == 3
    assert b"".join(data for _, data in arrived) == b"first\nsecond\n"
    assert arrived[-1][0] - arrived[0][0] > 0.5


def test_stream_ends_with_its_time(machine: BareMachine) -> None:
    with pytest.raises(CommandTimeoutError, match=r"still running after 0\.5 s"):
        machine.stream(["sleep", "60"], lambda _data: None, timeout=0.5)
    assert machine.run(["true"]).returncode == 0


def test_several_commands_run_at_once(machine: BareMachine) -> None:
    threads = [threading.Thread(target=machine.run, args=(["sleep", "1"],)) for _ in range(4)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 4


def test_what_it_cannot_do_it_says(machine: BareMachine) -> None:
    with pytest.raises(CapabilityError, match="no service manager on a bare kernel"):
        machine.need(Capability.SYSTEMD)
    with pytest.raises(CapabilityError, match="no service manager"):
        machine.reboot("soft")


def test_power_cut_loses_everything_and_it_boots_again(machine: BareMachine) -> None:
    before = machine.hello.boot_id
    machine.copy_in(b"x", "/root/left")
    machine.power_cut()
    machine.start()
    assert machine.hello.boot_id != before
    assert machine.run(["test", "-e", "/root/left"], check=False).returncode == 1


def test_reboot_from_within(machine: BareMachine) -> None:
    before = machine.hello.boot_id
    machine.reboot()
    assert machine.hello.boot_id != before


def test_userland_is_small(machine: BareMachine) -> None:
    del machine
    entries = [e for e in Cache(default_root()).list() if e.kind == "userland"]
    sizes = [(entry.path / "archive").stat().st_size for entry in entries]
    assert min(sizes) < 30 << 20


def test_library_that_no_package_has_is_named(tmp_path: Path) -> None:
    from tests.harness import elves  # noqa: PLC0415

    (tmp_path / "program").write_bytes(elves.program("libnone.so.1"))
    with pytest.raises(BuildError, match=r"libnone\.so\.1"):
        elf.libraries([tmp_path / "program"], [tmp_path])


def test_program_that_no_package_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no program nonsense in the packages"):
        userland._program(tmp_path, "nonsense")
