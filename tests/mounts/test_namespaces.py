# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands in other mount namespaces, worlds of other boots, and what copies of mounts hold."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import mountinfo, overlayfs
from overlayd.errors import KernelError, RefusedError
from tests.mounts.conftest import COMMAND, PLAY, ROOT, RUN, mount
from tests.mounts.processes import child, eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
SLAVE = ("unshare", "--mount", "--propagation", "slave")
PRIVATE = ("unshare", "--mount", "--propagation", "private")
ELSEWHERE = pytest.mark.parametrize("way", [SLAVE, PRIVATE], ids=["slave", "private"])
OUR_PID_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "slave")


def overlayd(
    *arguments: str | Path, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def commands(source: Path, base: Path) -> list[tuple[str | Path, ...]]:
    """Return every command that looks at overlays or makes one."""
    batch = Path("/run/sources/file.toml")
    batch.write_text(f'[[overlay]]\nname = "new"\nsource = "{source}"\ntarget = "{base}"\n')
    return [
        ("apply", "new", source, base),
        ("apply", "new", source, base, "--dry-run"),
        ("list",),
        ("list", "--all"),
        ("status", "fix"),
        ("reset", "fix"),
        ("remove", "fix"),
        ("batch", batch),
        ("batch", batch, "--atomic"),
        ("dump",),
        ("cleanup",),
        ("cleanup", "--dry-run"),
    ]


def test_every_command_refuses_in_another_namespace_and_touches_nothing(world: World) -> None:
    base = world.base("app", FILES)
    other = world.base("other", FILES)
    source = world.source("s", NEW)
    world.apply("fix", source, base)
    script = "\n".join(
        shlex.join([*COMMAND, *map(str, command)]) + '; echo "exit $?" >&2'
        for command in commands(source, other)
    )
    done = subprocess.run(
        [*PRIVATE, "sh", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    answers = re.findall(r"(.*)\n(.*)\nexit (\d+)\n", done.stderr)
    assert len(answers) == len(commands(source, other)), done.stderr
    for (message, hint, code), command in zip(answers, commands(source, other), strict=True):
        assert code == "9", command
        assert "another mount namespace" in message, command
        assert re.fullmatch(r"  hint: nsenter --target \d+ --mount overlayd …", hint), command
    assert done.stdout == ""
    world.check_invariants()
    assert (other / "a").read_text() == "base a"
    assert [o.record.name for o in world.manager().list()] == ["fix"]


@ELSEWHERE
def test_the_way_in_that_the_hint_names_works(world: World, way: Sequence[str]) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    done = overlayd("list", before=way)
    assert done.returncode == 9
    hint = re.search(r"hint: (nsenter --target \d+ --mount) overlayd", done.stderr)
    assert hint is not None
    # From within the other namespace, as its user would.
    inside = overlayd("remove", "fix", before=[*way, *hint[1].split()])
    assert (inside.returncode, inside.stdout) == (0, "fix: removed\n"), inside.stderr
    assert (base / "a").read_text() == "base a"
    assert world.leftovers() == []


def test_doctor_in_another_namespace_says_so_and_fails(world: World) -> None:
    world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    done = overlayd("doctor", "--json", before=PRIVATE)
    report = json.loads(done.stdout)
    assert done.returncode == 9
    assert not report["ok"]
    (problem,) = [p for p in report["problems"] if "another mount namespace" in p["text"]]
    assert problem["fatal"]
    assert problem["hint"].startswith("nsenter --target")


@ELSEWHERE
def test_very_first_command_refuses_where_process_1_shares_run_but_not_the_mounts(
    world: World, way: Sequence[str]
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    # Process 1 of a process namespace of our own stands for the machine's, whose /run is safe so.
    code = (
        "import subprocess\n"
        "pid = os.getpid()\n"
        "for line in sys.argv[2:]:\n"
        "    done = subprocess.run([*sys.argv[1].split(), *eval(line)], capture_output=True)\n"
        "    assert done.returncode == 9, (line, done)\n"
        "    assert b'nsenter --target 1 --mount overlayd' in done.stderr, (line, done)\n"
        "    assert not os.path.lexists('/run/overlayd'), line\n"
        "assert pid == 1\n"
    )
    # The others begin with the same question; each start of an interpreter costs.
    some = [c for c in commands(source, base) if c[0] in {"apply", "list", "batch"}][::2]
    lines = [repr([*COMMAND, *map(str, command)]) for command in some]
    with child(
        "import ctypes\nassert ctypes.CDLL(None).mount(b'p', b'/proc', b'proc', 0, None) == 0\n"
        f"os.environ['PYTHONPATH'] = {str(ROOT)!r}\n{code}",
        " ".join(way),
        *lines,
        before=OUR_PID_1,
    ) as first:
        assert not RUN.exists()
        assert mountinfo.read().tagged == {}
        first.let_go()


def test_very_first_command_works_in_the_namespace_of_process_1(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    code = (
        "import ctypes, subprocess\n"
        "assert ctypes.CDLL(None).mount(b'p', b'/proc', b'proc', 0, None) == 0\n"
        f"os.environ['PYTHONPATH'] = {str(ROOT)!r}\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
    )
    with child(code, *COMMAND, "apply", "fix", source, base, before=OUR_PID_1) as first:
        assert (Path(f"/proc/{first.pid}/root") / "usr/src/app/a").exists()


def test_world_that_outlived_its_namespace_is_refused_without_a_wrong_way_in(world: World) -> None:
    world.base("app", FILES)
    made = (
        "import subprocess\nsubprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
    )
    # A private copy makes the world in its own view of a shared /run; it dies, the mount stays.
    with child(
        f"os.environ['PYTHONPATH'] = {str(ROOT)!r}\n{made}",
        *COMMAND,
        "apply",
        "fix",
        world.source("s", NEW),
        PLAY / "app",
        before=("unshare", "--mount", "--propagation", "unchanged"),
    ) as maker:
        assert maker.process.poll() is None
        assert eventually(RUN.is_mount)
        with pytest.raises(KernelError, match="another mount namespace") as caught:
            world.manager().list()
        assert (caught.value.hint or "").startswith("nsenter --target")
        maker.let_go()
    with pytest.raises(KernelError, match="another mount namespace") as caught:
        world.manager().list()
    assert caught.value.hint == "the namespace it belongs to is gone"


def test_world_of_another_boot_is_refused_with_the_way_to_be_rid_of_it(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    world.apply("fix", source, base)
    world.manager().remove("fix")
    path = RUN / "world.json"
    facts = json.loads(path.read_text())
    assert facts["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert facts["namespace"] == os.readlink("/proc/self/ns/mnt")
    path.write_text(json.dumps(facts | {"boot_id": "11111111-2222-3333-4444-555555555555"}))
    for work in (world.manager().list, lambda: world.apply("fix", source, base)):
        with pytest.raises(RefusedError, match="another boot") as caught:
            work()
    assert caught.value.hint is not None
    subprocess.run(shlex.split(caught.value.hint), check=True)
    assert world.apply("fix", source, base).state == "active"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"boot_id": 1}', "\0" * 100])
def test_world_that_cannot_be_read_is_refused_not_guessed(world: World, text: str) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    path = RUN / "world.json"
    whole = path.read_text()
    path.write_text(text)
    with pytest.raises(RefusedError, match="not overlayd's") as caught:
        world.manager().list()
    assert caught.value.hint == f"see 'findmnt {RUN}'"
    path.write_text(whole)
    world.check_invariants()


def test_foreign_mount_on_the_place_of_the_world_is_refused(world: World) -> None:
    base = world.base("app", FILES)
    RUN.mkdir()
    mount("foreign", RUN, "tmpfs")
    for work in (
        world.manager().list,
        lambda: world.apply("fix", world.source("s", NEW), base),
    ):
        with pytest.raises(RefusedError, match="not overlayd's"):
            work()
    assert os.listdir(RUN) == []


def test_symlink_on_the_place_of_the_world_is_not_followed(world: World) -> None:
    base = world.base("app", FILES)
    trap = Path("/run/trap")
    trap.mkdir()
    RUN.symlink_to(trap)
    for work in (
        world.manager().list,
        lambda: world.apply("fix", world.source("s", NEW), base),
    ):
        with pytest.raises(KernelError, match=str(RUN)):
            work()
    assert os.listdir(trap) == []
    assert not trap.is_mount()


def ours(pid: int) -> list[str]:
    """Return the mounts of overlayd's that a process sees, but for the bookkeeping's own."""
    table = mountinfo.read(str(pid))
    tagged = [m.mount_point for mounts in table.tagged.values() for m in mounts]
    return tagged + [m.mount_point for m in table.within(f"{RUN}/storage")]


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
def test_namespaces_of_services_follow_and_hold_nothing_afterwards(
    world: World, *, read_only: bool
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    read = "print(open(sys.argv[1]).read())"
    with child("", base / "a", before=SLAVE, then=read) as early:
        world.apply("fix", source, base, read_only=read_only)
        assert str(base) in ours(early.pid)
        with child("", base / "a", before=SLAVE, then=read) as late:
            assert str(base) in ours(late.pid)
            world.manager().reset("fix", 0)
            world.manager().reset("fix", 1)
            for process in (early, late):
                shown = [m for m in ours(process.pid) if not m.startswith(str(RUN))]
                assert shown == [str(base)]
            assert world.manager().remove("fix").state == "removed"
            assert (ours(early.pid), ours(late.pid)) == ([], [])
            assert (early.let_go(), late.let_go()) == ("base a\n", "base a\n")
    assert world.leftovers() == []


def test_storage_leaves_the_namespaces_of_services_even_where_run_is_private(
    either_world: World,
) -> None:
    world = either_world
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    with child("", before=SLAVE) as service:
        assert len(mountinfo.read(str(service.pid)).within(f"{RUN}/storage")) == 2
        world.manager().remove("fix")
        assert mountinfo.read(str(service.pid)).within(f"{RUN}/storage") == []
        service.let_go()
    assert world.manager().list(draining=True) == []
    assert world.leftovers() == []


def test_stage_is_never_seen_in_a_namespace_that_receives_mounts(world: World) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW) / "a", base / "a")
    with child("", before=SLAVE) as other:
        for version in (0, 1, 0):
            world.manager().reset("fix", version)
        inner = [
            m.mount_point
            for m in mountinfo.read(str(other.pid)).within(f"{RUN}/stage")
            if m.mount_point != f"{RUN}/stage"
        ]
        assert inner == []
        other.let_go()


def test_stage_is_not_seen_in_another_namespace_while_it_is_used(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW) / "a", base / "a")
    genuine = overlayfs.clone
    seen: list[set[str]] = []
    with child("", before=SLAVE) as other:

        def and_look(fd: int) -> int:
            own = mountinfo.read().within(f"{RUN}/stage")
            others = mountinfo.read(str(other.pid)).within(f"{RUN}/stage")
            seen.append({m.mount_point for m in own} - {m.mount_point for m in others})
            return genuine(fd)

        monkeypatch.setattr(overlayfs, "clone", and_look)
        world.manager().reset("fix", 0)
        monkeypatch.undo()
        other.let_go()
    assert any(seen), "it was used, and nobody else saw what was there"


def test_world_of_another_user_is_refused(world: World) -> None:
    world.apply("fix", world.source("s", NEW), world.base("app", FILES))
    os.chown(RUN / "world.json", 1000, 0)
    with pytest.raises(RefusedError, match="inside of 'overlayd enter' of uid 1000"):
        world.manager().list()


def test_private_namespace_that_copied_storage_does_not_keep_the_overlay_from_going(
    world: World,
) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    with child("", before=PRIVATE) as idle:
        world.manager().reset("fix", 0)
        world.manager().remove("fix")
        (draining,) = world.manager().list(draining=True)
        assert draining.state == "draining"
        idle.let_go()
    assert world.manager().list(draining=True) == []
    assert world.leftovers() == []
