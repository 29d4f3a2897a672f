# SPDX-License-Identifier: LGPL-2.1-or-later
"""One overlay from apply to remove: what is shown, what is kept, what is left."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd.errors import KernelError
from tests.mounts.conftest import EACH_WAY, PLAY, RUN, snapshot

if TYPE_CHECKING:
    from overlayd.executor import Operation
    from overlayd.overlayfs import Exchange
    from tests.mounts.conftest import World

FILES = {"a": "base a", "keep": "base keep", "sub/inner": "base inner"}


@pytest.fixture(params=[None, *EACH_WAY])
def way(request: pytest.FixtureRequest) -> Exchange | None:
    return request.param  # type: ignore[no-any-return]


def test_apply_shows_source_over_base_and_remove_brings_base_back(either_world: World) -> None:
    world = either_world
    base = world.base("app", FILES)
    before = snapshot(base)
    source = world.source("s", {"a": "new a", "sub/more": "more", "fresh/deep/x": "x"})
    overlay = world.apply("fix", source, base)
    assert overlay.state == "active"
    assert (base / "a").read_text() == "new a"
    assert (base / "keep").read_text() == "base keep"
    assert (base / "sub/inner").read_text() == "base inner"
    assert (base / "sub/more").read_text() == "more"
    assert (base / "fresh/deep/x").read_text() == "x"
    world.check_invariants()
    world.manager().remove("fix")
    assert snapshot(base) == before
    assert world.leftovers() == []


def test_edits_show_and_reset_drops_them(either_world: World, way: Exchange | None) -> None:
    world = either_world
    base = world.base("app", FILES)
    before = snapshot(base)
    manager = world.manager(way=way)
    world.apply("fix", world.source("s", {"a": "new a"}), base, manager=manager)
    (base / "a").write_text("edited")
    (base / "keep").unlink()
    (base / "sub").rename(base / "moved")
    assert (base / "moved/inner").read_text() == "base inner"
    manager.reset("fix", 1)
    assert (base / "a").read_text() == "new a"
    assert (base / "keep").read_text() == "base keep"
    assert (base / "sub/inner").read_text() == "base inner"
    assert not (base / "moved").exists()
    (base / "a").write_text("edited again")
    overlay = manager.reset("fix", 0)
    assert overlay.record.tree is not None
    assert overlay.record.tree.version == 0
    assert snapshot(base) == before
    (base / "a").write_text("edited base")
    manager.reset("fix", 1)
    assert (base / "a").read_text() == "new a"
    world.check_invariants()
    manager.remove("fix")
    assert snapshot(base) == before
    assert world.leftovers() == []


def test_read_only_overlay_stays_read_only_through_resets(world: World, way: Exchange) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    manager = world.manager(way=way)
    world.apply("fix", world.source("s", {"a": "new"}), base, manager=manager, read_only=True)
    for version, text in ((None, "new"), (0, "base a"), (1, "new")):
        if version is not None:
            manager.reset("fix", version)
        assert (base / "a").read_text() == text
        with pytest.raises(OSError, match="Read-only"):
            (base / "a").write_text("edit")
        if version == 0:
            assert snapshot(base) == before
    manager.remove("fix")
    assert world.leftovers() == []


def test_later_changes_to_the_source_do_not_show(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {"a": "applied"})
    world.apply("fix", source, base)
    (source / "a").write_text("changed later")
    (source / "b").write_text("added later")
    assert (base / "a").read_text() == "applied"
    assert not (base / "b").exists()
    shutil.rmtree(source)
    world.manager().reset("fix", 1)
    assert (base / "a").read_text() == "applied"


def test_merged_directories_keep_mode_owner_and_times_of_the_base(world: World) -> None:
    base = world.base("app", {"a": "a", "sub/b": "b"})
    base.chmod(0o2775)
    os.chown(base, 12, 34)
    (base / "sub").chmod(0o1751)
    os.chown(base / "sub", 56, 78)
    os.utime(base / "sub", ns=(10**18, 10**18 + 5))
    source = world.source("s", {"sub/c": "c", "new/d": "d"})
    source.chmod(0o700)
    (source / "sub").chmod(0o700)
    (source / "new").chmod(0o711)
    facts = base.stat()
    world.apply("fix", source, base)
    for version in (None, 0, 1):
        if version is not None:
            world.manager().reset("fix", version)
        shown = base.stat()
        assert (shown.st_mode, shown.st_uid, shown.st_gid) == (facts.st_mode, 12, 34)
        sub = (base / "sub").stat()
        assert (stat.S_IMODE(sub.st_mode), sub.st_uid, sub.st_gid) == (0o1751, 56, 78)
        assert sub.st_mtime_ns == 10**18 + 5
    new = (base / "new").stat()
    assert (stat.S_IMODE(new.st_mode), new.st_uid, new.st_gid) == (0o711, 0, 0)


def test_files_belong_to_root_unless_the_owner_is_preserved(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {"a": "a"})
    os.chown(source / "a", 1000, 1001)
    world.apply("fix", source, base)
    assert ((base / "a").stat().st_uid, (base / "a").stat().st_gid) == (0, 0)
    world.manager().remove("fix")
    world.apply("fix", source, base, preserve_owner=True)
    assert ((base / "a").stat().st_uid, (base / "a").stat().st_gid) == (1000, 1001)


def test_set_id_programs_of_the_base_still_work_under_an_overlay(world: World) -> None:
    base = world.base("app", FILES)
    program = base / "id"
    shutil.copy("/usr/bin/id", program)
    os.chown(program, 0, 0)
    program.chmod(0o4755)
    source = world.source("s", {"a": "new"})
    shutil.copy("/usr/bin/id", source / "mine")
    (source / "mine").chmod(0o4755)
    world.apply("fix", source, base)

    def euid(path: Path) -> str:
        done = subprocess.run(
            [path, "-u"], user=65534, group=65534, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert euid(program) == "0"
    assert euid(base / "mine") == "65534"
    assert not (base / "mine").stat().st_mode & 0o6000


def test_programs_with_capabilities_of_the_base_keep_them(world: World) -> None:
    base = world.base("app", FILES)
    program = base / "cat"
    shutil.copy("/usr/bin/cat", program)
    subprocess.run(["setcap", "cap_dac_read_search=ep", program], check=True)
    secret = Path("/run/secret")
    secret.write_text("seen")
    secret.chmod(0o600)
    source = world.source("s", {"a": "new"})
    shutil.copy("/usr/bin/cat", source / "mine")
    subprocess.run(["setcap", "cap_dac_read_search=ep", source / "mine"], check=True)
    world.apply("fix", source, base)
    for name, code in (("cat", 0), ("mine", 1)):
        done = subprocess.run(
            [base / name, secret], user=65534, group=65534, capture_output=True, check=False
        )
        assert done.returncode == code, name


def test_layer_cannot_be_written_to_by_root_either(world: World) -> None:
    record = world.apply("fix", world.source("s", {"a": "new"}), world.base("app", FILES)).record
    with pytest.raises(OSError, match="Read-only"):
        (RUN / "storage" / record.uuid / "layer/tree/more").touch()


@pytest.mark.parametrize("what", ["root", "entry"])
def test_overlay_that_does_not_show_what_it_should_is_not_attached(world: World, what: str) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)

    def trace(when: str, operation: Operation) -> None:
        if when == "before" and type(operation).__name__ == "BuildOverlay":
            (storage,) = (RUN / "storage").iterdir()
            upper = storage / "upper.1/upper"
            if what == "root":
                upper.chmod(0o700)
            else:
                (upper / "a").touch(0o600)

    with pytest.raises(KernelError, match="it was not attached"):
        world.apply(
            "fix", world.source("s", {"a": "new"}), base, manager=world.manager(trace=trace)
        )
    assert snapshot(base) == before
    assert world.leftovers() == []


def test_nosuid_of_the_base_mount_is_kept(world: World) -> None:
    base = world.base("app", FILES)
    subprocess.run(["mount", "-o", "remount,bind,nosuid,noexec", PLAY], check=True)
    world.apply("fix", world.source("s", {"a": "new"}), base)
    flags = os.statvfs(base).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NOEXEC
    assert flags & os.ST_NODEV


def test_file_over_file_covers_that_file_alone(world: World, way: Exchange | None) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    manager = world.manager(way=way)
    source = world.source("s", {"one": "new one"}) / "one"
    overlay = world.apply("fix", source, base / "a", manager=manager)
    assert overlay.record.mount_point == str(base / "a")
    assert (base / "a").read_text() == "new one"
    (base / "neighbour").write_text("goes to the base")
    assert (base / "neighbour").stat().st_dev == base.stat().st_dev
    (base / "neighbour").unlink()
    (base / "a").write_text("edited")
    manager.reset("fix", 1)
    assert (base / "a").read_text() == "new one"
    manager.reset("fix", 0)
    assert (base / "a").read_text() == "base a"
    with pytest.raises(OSError, match="busy"):
        (base / "keep").rename(base / "a")
    world.check_invariants()
    manager.remove("fix")
    after = snapshot(base)
    top = f"{base}/."  # its time changed when the neighbour came and went
    assert after == before | {top: after[top]}
    assert world.leftovers() == []


def test_file_into_directory_goes_under_its_own_name(world: World) -> None:
    base = world.base("app", FILES)
    overlay = world.apply("fix", world.source("s", {"tool": "tool"}) / "tool", base)
    assert (base / "tool").read_text() == "tool"
    assert (base / "a").read_text() == "base a"
    assert overlay.record.target == str(base)
    world.check_invariants()


def test_missing_target_shows_in_its_nearest_parent_and_nothing_is_made_in_the_base(
    world: World,
) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    source = world.source("s", {"x": "x"})
    source.chmod(0o750)
    overlay = world.apply("fix", source, base / "new/deeper")
    assert overlay.record.mount_point == str(base)
    assert overlay.record.target == str(base / "new/deeper")
    assert (base / "new/deeper/x").read_text() == "x"
    assert stat.S_IMODE((base / "new").stat().st_mode) == 0o755
    assert stat.S_IMODE((base / "new/deeper").stat().st_mode) == 0o750
    world.manager().reset("fix", 0)
    assert not (base / "new").exists()
    world.manager().remove("fix")
    assert snapshot(base) == before


def test_missing_target_of_a_file_is_the_new_name(world: World) -> None:
    base = world.base("app", FILES)
    world.apply("fix", world.source("s", {"x": "x"}) / "x", base / "y")
    assert (base / "y").read_text() == "x"
    assert not (base / "x").exists()


def test_a_thousand_lives_leave_nothing(world: World) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    source = world.source("s", {"a": "new a", "b/c": "c"})
    manager = world.manager()
    world.apply("fix", source, base, manager=manager)
    manager.reset("fix", 0)
    manager.remove("fix")

    def state() -> tuple[object, ...]:
        return (
            Path("/proc/self/mountinfo").read_text().count("\n"),
            sorted(os.listdir("/proc/self/fd")),
            sorted(str(path) for path in Path("/run/overlayd").rglob("*")),
            os.statvfs("/run/overlayd").f_ffree,
            len(os.listdir(f"/proc/{os.getpid()}/task")),
        )

    start = state()
    for number in range(1000):
        world.apply("fix", source, base, manager=manager)
        if number % 10 == 0:
            manager.reset("fix", number % 2)
        manager.remove("fix")
    assert state() == start
    assert snapshot(base) == before
