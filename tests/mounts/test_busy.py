# SPDX-License-Identifier: LGPL-2.1-or-later
"""Overlays that somebody uses: who it is, what removal and reset do, when the storage is freed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import holders, mountinfo, syscalls
from overlayd.errors import BusyError, NotFoundError
from overlayd.model import Request
from overlayd.progress import Progress
from tests.mounts.conftest import PLAY, ROOT, RUN, bind, mount, snapshot
from tests.mounts.processes import child, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
BASE = PLAY / "app"

SLAVE = ("unshare", "--mount", "--propagation", "slave")
PRIVATE = ("unshare", "--mount", "--propagation", "private")
ANYWHERE = pytest.mark.parametrize(
    "before", [(), SLAVE, PRIVATE], ids=["same namespace", "slave copy", "private copy"]
)


def applied(world: World, *, read_only: bool = False) -> Path:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW), base, read_only=read_only)
    return base


def states(world: World) -> list[tuple[str, str]]:
    return [(o.record.name, str(o.state)) for o in world.manager().list(draining=True)]


HOLDERS = {
    "working directory": ("os.chdir(sys.argv[1])", BASE / "sub", BASE / "sub"),
    "open file": ("f = open(sys.argv[1])", BASE / "a", BASE / "a"),
    "open directory": ("os.open(sys.argv[1], os.O_RDONLY)", BASE / "sub", BASE / "sub"),
    "path descriptor": ("os.open(sys.argv[1], os.O_PATH)", BASE / "sub/c", BASE / "sub/c"),
    "deleted open file": ("f = open(sys.argv[1])\nos.unlink(sys.argv[1])", BASE / "a", BASE / "a"),
    "mapped file": (
        (
            "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\n"
            "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
            "assert libc.mmap(None, 4096, 1, 2, fd, ctypes.c_long(0)) != 2**64 - 1\n"
            "os.close(fd)  # Python's own mmap would keep a copy of it"
        ),
        BASE / "a",
        BASE / "a",
    ),
    "root directory": ("os.chroot(sys.argv[1])", BASE, BASE),
}


@ANYWHERE
@pytest.mark.parametrize("how", HOLDERS)
def test_remove_names_whoever_uses_the_overlay(
    world: World, how: str, before: Sequence[str]
) -> None:
    applied(world)
    code, argument, path = HOLDERS[how]
    with child(code, argument, before=before) as holder:
        command = Path(f"/proc/{holder.pid}/comm").read_text().strip()
        with pytest.raises(BusyError) as caught:
            world.manager().remove("fix")
        assert f"{holder.pid} ({command}) at {path}" in caught.value.message
        assert "--lazy" in (caught.value.hint or "")
        world.check_invariants()
        assert states(world) == [("fix", "active")]
        holder.let_go()
    world.manager().remove("fix")
    assert world.leftovers() == []


@ANYWHERE
def test_remove_names_a_program_that_runs_from_the_overlay(
    world: World, before: Sequence[str]
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {})
    shutil.copy("/usr/bin/sleep", source / "nap")
    world.apply("fix", source, base)
    process = subprocess.Popen([*before, base / "nap", "60"])
    try:
        exe = f"/proc/{process.pid}/exe"
        assert eventually(lambda: os.readlink(exe) == str(base / "nap"))
        with pytest.raises(BusyError, match=rf"{process.pid} \(nap\) at {base / 'nap'}"):
            world.manager().remove("fix")
    finally:
        process.kill()
        process.wait()
    world.manager().remove("fix")
    assert world.leftovers() == []


@ANYWHERE
def test_remove_names_who_listens_on_a_socket_in_the_overlay(
    world: World, before: Sequence[str]
) -> None:
    base = applied(world)
    code = (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\n"
        "os.chdir('/')"
    )
    with child(code, base / "sub/socket", before=before) as holder:
        with pytest.raises(BusyError) as caught:
            world.manager().remove("fix")
        assert f"{holder.pid} (" in caught.value.message
        assert f"at {base / 'sub/socket'}" in caught.value.message
        holder.let_go()
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_remove_names_several_holders_and_counts_the_rest(world: World) -> None:
    base = applied(world)
    code = (
        "os.chdir(sys.argv[1])\nchildren = []\n"
        "r, w = os.pipe()\n"
        "for _ in range(6):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os.close(w)\n"
        "        os.read(r, 1)\n"
        "        os._exit(0)\n"
        "    children.append(pid)\n"
    )
    with child(code, base, then="os.close(w)\nfor pid in children: os.waitpid(pid, 0)\n") as holder:
        with pytest.raises(BusyError, match="and 2 more") as caught:
            world.manager().remove("fix")
        assert caught.value.message.count(f" at {base}") == 5
        holder.let_go()
    world.manager().remove("fix")


def test_remove_of_a_busy_overlay_on_a_single_file_names_the_holder(world: World) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", NEW) / "a", base / "a")
    with child("f = open(sys.argv[1])", base / "a") as holder:
        with pytest.raises(BusyError, match=f"{holder.pid} .* at {base / 'a'}"):
            world.manager().remove("fix")
        holder.let_go()
    world.manager().remove("fix")
    assert (base / "a").read_text() == "base a"
    assert world.leftovers() == []


def test_remove_of_a_read_only_overlay_names_the_holder(world: World) -> None:
    base = applied(world, read_only=True)
    with child("f = open(sys.argv[1])", base / "a") as holder:
        with pytest.raises(BusyError, match=f"{holder.pid} .* at {base / 'a'}"):
            world.manager().remove("fix")
        holder.let_go()
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_holder_of_the_base_or_of_a_neighbour_does_not_block_remove(world: World) -> None:
    base = world.base("app", FILES)
    with child("f = open(sys.argv[1])\nos.chdir(sys.argv[2])", base / "a", base) as holder:
        applied(world)
        other = world.base("other", FILES)
        world.apply("two", world.source("t", NEW), other)
        with child("os.chdir(sys.argv[1])", other) as neighbour:
            world.manager().remove("fix")
            neighbour.let_go()
        world.manager().remove("two")
        assert world.leftovers() == []
        holder.let_go()


MAPPED_BY_THE_COMMAND = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
fd = os.open(sys.argv.pop(1), os.O_RDONLY)
assert libc.mmap(None, 4096, 1, 2, fd, ctypes.c_long(0)) != 2**64 - 1
if sys.argv.pop(1) == "mapped":
    os.close(fd)
from overlayd.cli import main
main()
"""


def removed_by_one_that_uses_it(base: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAPPED_BY_THE_COMMAND, base / "a", how, "remove", "fix"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_remove_does_not_count_that_it_runs_from_the_overlay_itself(world: World) -> None:
    base = applied(world)
    done = removed_by_one_that_uses_it(base, "mapped")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fix: removed\n", "")
    assert (base / "a").read_text() == "base a"
    assert states(world) == []
    assert world.leftovers() == []


def test_remove_names_others_when_it_runs_from_the_overlay_itself(world: World) -> None:
    base = applied(world)
    with child("f = open(sys.argv[1])", base / "a") as other:
        done = removed_by_one_that_uses_it(base, "mapped")
        assert done.returncode == 6
        assert f"fix is in use by {other.pid} (" in done.stderr
        other.let_go()
    done = removed_by_one_that_uses_it(base, "open")
    assert done.returncode == 6, "a file of the overlay that the caller has open counts"
    world.manager().remove("fix")


@pytest.mark.parametrize("before", [SLAVE, PRIVATE], ids=["slave", "private"])
def test_namespace_that_only_looks_on_does_not_block_remove(
    world: World, before: Sequence[str]
) -> None:
    base = applied(world)
    with child("", before=before) as other:
        overlay = world.manager().remove("fix")
        assert (base / "a").read_text() == "base a"
        if before == SLAVE:
            assert overlay.state == "removed"
            assert mountinfo.read(str(other.pid)).tagged == {}
        else:
            # Its copy shows the files still, so the storage cannot be free yet.
            assert overlay.state == "draining"
            assert overlay.record.uuid in mountinfo.read(str(other.pid)).tagged
            assert states(world) == [("fix", "draining")]
        assert world.manager().list() == []
        other.let_go()
    assert states(world) == []
    assert world.leftovers() == []


def test_copies_elsewhere_are_found_and_only_while_they_are_there(world: World) -> None:
    with child("", before=PRIVATE):  # from before the overlay: has no copy
        applied(world)
        uuid = world.manager().status("fix").record.uuid
        assert not holders.mounts_elsewhere(uuid)
        with child("", before=PRIVATE) as other:
            assert holders.mounts_elsewhere(uuid)
            world.manager().reset("fix", 1)
            assert holders.mounts_elsewhere(uuid), "a copy of the tree before"
            other.let_go()
        assert not holders.mounts_elsewhere(uuid)


@pytest.mark.parametrize("missing", ["next_mount_namespace", "listmount", "statmount_magic"])
def test_copies_elsewhere_are_found_where_the_kernel_cannot_list_them(
    world: World, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), missing)

    monkeypatch.setattr(syscalls, missing, refuse)
    base = applied(world)
    with child("f = open(sys.argv[1])", base / "a", before=PRIVATE) as other:
        with pytest.raises(BusyError, match=rf"in use by {other.pid} "):
            world.manager().remove("fix")
        other.let_go()
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_idle_private_copy_can_still_be_read_after_the_removal(world: World) -> None:
    base = applied(world)
    read = "print(open(sys.argv[1]).read())"
    with child("", base / "a", before=PRIVATE, then=read) as other:
        world.manager().remove("fix")
        assert (base / "a").read_text() == "base a"
        assert other.let_go() == "new a\n"
    assert states(world) == []


def test_lazy_remove_frees_the_name_and_the_place_at_once_and_programs_keep_their_files(
    world: World,
) -> None:
    base = applied(world)
    uuid = world.manager().status("fix").record.uuid
    code = "f = open(sys.argv[1], 'r+')\nos.chdir(sys.argv[2])"
    then = (
        "print(f.read())\nf.seek(0)\nf.write('later')\nf.flush()\nprint(open('../a').read())\n"
        "open('fresh', 'w').write('made after the removal')\nprint(open('fresh').read())\n"
    )
    with child(code, base / "a", base / "sub", then=then) as holder:
        overlay = world.manager().remove("fix", lazy=True)
        assert overlay.state == "draining"
        assert (base / "a").read_text() == "base a"
        assert mountinfo.read().tagged == {}
        assert not (RUN / "storage" / uuid).exists()
        assert world.manager().list() == []
        with pytest.raises(NotFoundError):
            world.manager().status("fix")
        assert states(world) == [("fix", "draining")]
        world.apply("fix", world.source("t", {"a": "second"}), base)
        assert (base / "a").read_text() == "second"
        assert sorted(states(world)) == [("fix", "active"), ("fix", "draining")]
        world.manager().remove("fix")
        assert states(world) == [("fix", "draining")]
        assert holder.let_go() == "new a\nlater\nmade after the removal\n"
    assert states(world) == []
    assert world.leftovers() == []


def test_lazy_remove_of_what_nobody_uses_leaves_no_note(world: World) -> None:
    applied(world)
    assert world.manager().remove("fix", lazy=True).state == "removed"
    assert world.leftovers() == []


def test_cleanup_drops_the_note_of_what_was_drained_and_no_other(world: World) -> None:
    base = applied(world)
    with child("os.chdir(sys.argv[1])", base) as holder:
        world.manager().remove("fix", lazy=True)
        assert world.manager().cleanup() == []
        assert states(world) == [("fix", "draining")]
        holder.let_go()
    assert [action.kind for action in world.manager().cleanup()] == ["drained"]
    assert world.leftovers() == []


def test_a_note_of_what_is_draining_does_not_keep_name_place_or_limit(world: World) -> None:
    base = applied(world)
    with child("os.chdir(sys.argv[1])", base) as holder:
        world.manager().remove("fix", lazy=True)
        inner = world.apply("inner", world.source("t", {"x": "x"}), base / "sub")
        assert inner.state == "active"
        world.manager().remove("inner")
        holder.let_go()
    assert states(world) == []


def shmem() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) << 10
    raise AssertionError


def test_memory_is_freed_when_the_last_user_of_what_was_removed_leaves(world: World) -> None:
    base = applied(world)
    size = 200 << 20
    with (base / "big").open("wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    with child("f = open(sys.argv[1], 'rb')", base / "big", then="print(len(f.read()))") as holder:
        world.manager().remove("fix", lazy=True)
        held = shmem()
        assert held >= size
        # Others may use memory meanwhile; what counts is that it goes down by this much.
        assert holder.let_go() == f"{size}\n"
    assert eventually(lambda: shmem() <= held - size + (20 << 20))


def test_foreign_mount_inside_blocks_remove_and_reset_naming_it(world: World) -> None:
    base = applied(world)
    for name in ("sub", "in\rside", "in side\n"):
        inner = base / name
        inner.mkdir(exist_ok=True)
        mount("foreign", inner, "tmpfs")
        shown = str(inner).replace("\r", "\\r").replace("\n", "\\n")
        for lazy in (False, True):
            with pytest.raises(BusyError) as caught:
                world.manager().remove("fix", lazy=lazy)
            assert shown in caught.value.message
        with pytest.raises(BusyError) as caught:
            world.manager().reset("fix", 0)
        assert shown in caught.value.message
        assert states(world) == [("fix", "active")]
        subprocess.run(["umount", inner], check=True)
    world.manager().reset("fix", 0)
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_mount_on_top_makes_it_covered_and_blocks_remove_and_reset(world: World) -> None:
    base = applied(world)
    mount("foreign", base, "tmpfs")
    (base / "theirs").write_text("theirs")
    assert states(world) == [("fix", "covered")]
    assert world.manager().status("fix").state == "covered"
    for lazy in (False, True):
        with pytest.raises(BusyError, match=rf"mounted over fix: {base} \(tmpfs of foreign\)"):
            world.manager().remove("fix", lazy=lazy)
    with pytest.raises(BusyError, match=rf"mounted over fix: {base} \(tmpfs of foreign\)"):
        world.manager().reset("fix", 1)
    assert world.manager().cleanup() == []
    assert (base / "theirs").read_text() == "theirs"
    subprocess.run(["umount", base], check=True)
    assert states(world) == [("fix", "active")]
    world.manager().reset("fix", 0)
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_mount_over_a_directory_above_makes_it_covered(world: World) -> None:
    base = world.base("outer/app", FILES)
    world.apply("fix", world.source("s", NEW), base)
    mount("foreign", PLAY / "outer", "tmpfs")
    assert states(world) == [("fix", "covered")]
    with pytest.raises(BusyError, match=rf"mounted over fix: ({PLAY}/outer \(tmpfs|a parent)"):
        world.manager().remove("fix")
    (PLAY / "outer/app").mkdir()
    assert states(world) == [("fix", "covered")]
    with pytest.raises(BusyError, match=rf"mounted over fix: ({PLAY}/outer \(tmpfs|a parent)"):
        world.manager().reset("fix", 0)
    subprocess.run(["umount", PLAY / "outer"], check=True)
    assert states(world) == [("fix", "active")]
    world.manager().remove("fix")
    assert world.leftovers() == []


@pytest.mark.parametrize("tidy", ["remove", "lazy remove", "cleanup"])
def test_overlay_that_somebody_unmounted_is_lost_and_can_be_tidied_up(
    world: World, tidy: str
) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    world.apply("fix", world.source("s", NEW), base)
    subprocess.run(["umount", base], check=True)
    assert states(world) == [("fix", "lost")]
    with pytest.raises(NotFoundError) as caught:
        world.manager().reset("fix", 0)
    assert caught.value.hint == "overlayd remove fix"
    if tidy == "cleanup":
        assert [action.kind for action in world.manager().cleanup(dry_run=True)] == ["lost"]
        assert states(world) == [("fix", "lost")]
        actions = world.manager().cleanup()
        assert [(action.kind, action.failed) for action in actions] == [("lost", None)]
    else:
        world.manager().remove("fix", lazy=tidy == "lazy remove")
    assert states(world) == []
    assert snapshot(base) == before
    assert world.leftovers() == []


def apply_fix(manager: Manager) -> object:
    return manager.apply(Request("fix", "/run/sources/s", str(PLAY / "app")), Progress())


LAST_MOMENT: dict[str, tuple[bool, str, Callable[[Manager], object]]] = {
    "Attach": (False, "sub", apply_fix),
    "Attach over": (False, "", apply_fix),
    "PutBeneath": (True, "", lambda m: m.reset("fix", 0)),
    "DetachOld": (True, "", lambda m: m.reset("fix", 0)),
    "Detach": (True, "", lambda m: m.remove("fix", lazy=True)),
}


@pytest.mark.parametrize("step", LAST_MOMENT)
def test_mount_of_others_that_comes_at_the_last_moment_stays(world: World, step: str) -> None:
    present, where, work = LAST_MOMENT[step]
    base = world.base("app", FILES)
    world.source("s", NEW)
    if present:
        apply_fix(world.manager())

    def trace(when: str, operation: Operation) -> None:
        if when == "before" and type(operation).__name__ == step.split(maxsplit=1)[0]:
            mount("theirs", base / where, "tmpfs")
            (base / where / "theirs").touch()

    with pytest.raises(BusyError):
        work(world.manager(trace=trace))
    world.manager().list()
    assert (base / where / "theirs").exists()
    (place,) = [m for m in mountinfo.read() if m.source == "theirs"]
    assert place.mount_point == str(base / where)
    subprocess.run(["umount", base / where], check=True)
    world.check_invariants()
    if present:
        world.manager().remove("fix")
    assert world.leftovers() == []


def test_storage_that_somebody_deleted_does_not_keep_the_overlay(world: World) -> None:
    base = world.base("app", FILES)
    storage = RUN / "storage" / world.apply("fix", world.source("s", NEW), base).record.uuid
    for part in storage.iterdir():
        subprocess.run(["umount", "--lazy", part], check=True)
    shutil.rmtree(storage)
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_storage_that_somebody_mounted_on_goes_with_the_overlay(world: World) -> None:
    base = world.base("app", FILES)
    storage = RUN / "storage" / world.apply("fix", world.source("s", NEW), base).record.uuid
    mount("theirs", storage / "layer", "tmpfs")
    mount("theirs", storage / "upper.1", "tmpfs")
    world.manager().remove("fix")
    assert world.leftovers() == []


def test_lost_overlay_that_a_program_still_uses_drains(world: World) -> None:
    base = applied(world)
    with child("f = open(sys.argv[1])", base / "a", then="print(f.read())") as holder:
        subprocess.run(["umount", "--lazy", base], check=True)
        assert states(world) == [("fix", "lost")]
        world.manager().remove("fix", lazy=True)
        assert states(world) == [("fix", "draining")]
        assert holder.let_go() == "new a\n"
    assert states(world) == []
    assert world.leftovers() == []


def test_bind_mount_of_the_overlay_elsewhere_makes_it_drain(world: World) -> None:
    base = applied(world)
    elsewhere = Path("/run/elsewhere")
    elsewhere.mkdir()
    bind(base, elsewhere)
    assert world.manager().remove("fix").state == "draining"
    assert (base / "a").read_text() == "base a"
    assert (elsewhere / "a").read_text() == "new a"
    assert states(world) == [("fix", "draining")]
    subprocess.run(["umount", elsewhere], check=True)
    assert states(world) == []
    assert world.leftovers() == []


def test_reset_lets_a_running_program_keep_its_file_and_it_does_not_block_remove(
    world: World,
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", NEW)
    shutil.copy("/usr/bin/sleep", source / "nap")
    world.apply("fix", source, base)
    with child(
        "f = open(sys.argv[1])\nos.chdir(sys.argv[2])",
        base / "a",
        base / "sub",
        then="print(f.read())\nprint(open('c').read())",
    ) as holder:
        process = subprocess.Popen([base / "nap", "60"])
        try:
            exe = f"/proc/{process.pid}/exe"
            assert eventually(lambda: os.readlink(exe) == str(base / "nap"))
            world.manager().reset("fix", 0)
            assert not (base / "nap").exists()
            assert process.poll() is None
            digest = Path("/usr/bin/sleep").read_bytes()
            assert Path(exe).read_bytes() == digest
            world.manager().remove("fix")
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()
        assert holder.let_go() == "new a\nnew c\n"
    assert world.leftovers() == []


@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
@pytest.mark.parametrize("before", [SLAVE, PRIVATE], ids=["slave", "private"])
def test_holder_of_what_a_reset_took_away_does_not_block_remove_from_another_namespace(
    world: World, before: Sequence[str], *, read_only: bool
) -> None:
    base = applied(world, read_only=read_only)
    with child("os.chdir(sys.argv[1])", base, before=before, then="print(open('a').read())") as old:
        world.manager().reset("fix", 1)
        world.manager().remove("fix")
        assert (base / "a").read_text() == "base a"
        assert old.let_go() == "new a\n"
    assert states(world) == []
    assert world.leftovers() == []


def test_remove_that_was_refused_works_for_the_command_line_with_exit_code_6(world: World) -> None:
    base = applied(world)
    with child("os.chdir(sys.argv[1])", base) as holder:
        done = world.run("remove", "fix", code=6)
        line, hint = done.stderr.splitlines()
        assert line.startswith(f"overlayd: fix is in use by {holder.pid} (")
        assert line.endswith(f") at {base}")
        assert "--lazy" in hint
        assert world.run("remove", "fix", "--lazy").stdout == (
            "fix: removed, something still uses the old files\n"
        )
        assert "draining" in world.run("list", "--all").stdout
        holder.let_go()
