# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which targets are taken, which are refused, and what is said of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import overlayfs, syscalls, targets
from overlayd.errors import (
    BusyError,
    ExistsError,
    KernelError,
    OverlaydError,
    RefusedError,
    SpaceError,
)
from overlayd.model import Request
from overlayd.mountinfo import read
from overlayd.progress import Progress
from tests.mounts.conftest import PLAY, SOURCES, bind, defaults, mount, snapshot, tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.executor import Operation
    from tests.mounts.conftest import World


@pytest.fixture
def source(world: World) -> Path:
    return world.source("s", {"x": "x"})


@pytest.mark.parametrize(
    "target",
    ["/etc", "/", "/usrx", "/var/lib", "/usr/../etc", "/run/overlayd", "/usr/src/../../etc"],
)
def test_target_outside_usr_is_refused(world: World, source: Path, target: str) -> None:
    with pytest.raises(RefusedError, match="not under /usr"):
        world.apply("fix", source, target)
    assert world.leftovers() == []


def test_link_that_leads_out_of_usr_is_refused_saying_where(world: World, source: Path) -> None:
    (PLAY / "local").symlink_to("/var/usrlocal")
    with pytest.raises(RefusedError, match="leads to /var/usrlocal"):
        world.apply("fix", source, PLAY / "local")
    with pytest.raises(RefusedError, match="leads to /var/usrlocal/share"):
        world.apply("fix", source, PLAY / "local/share")


def test_link_within_usr_is_resolved(world: World, source: Path) -> None:
    base = world.base("real", {"a": "a"})
    (PLAY / "link").symlink_to("real")
    overlay = world.apply("fix", source, PLAY / "link")
    assert overlay.record.target == str(base)
    assert (base / "x").read_text() == "x"
    assert (PLAY / "link/x").read_text() == "x"


def test_lib_of_a_merged_usr_is_usr_lib(world: World, source: Path) -> None:
    if not Path("/lib").is_symlink():
        pytest.skip("this machine's /lib is no link: no merged /usr")
    overlay = world.apply("fix", source, "/lib/overlayd-test-new", allow_critical=True)
    assert overlay.record.target == "/usr/lib/overlayd-test-new"
    assert Path("/lib/overlayd-test-new/x").read_text() == "x"


def test_link_loop_is_an_error(world: World, source: Path) -> None:
    (PLAY / "one").symlink_to("two")
    (PLAY / "two").symlink_to("one")
    with pytest.raises(OverlaydError):
        world.apply("fix", source, PLAY / "one/deep")
    assert world.leftovers() == []


def test_path_through_a_file_is_refused(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    with pytest.raises(RefusedError, match="a part of the path is a file"):
        world.apply("fix", source, base / "a/b")


def test_directory_over_a_file_target_is_refused(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    with pytest.raises(RefusedError, match="directory and TARGET"):
        world.apply("fix", source, base / "a")


def test_fifo_as_target_is_refused_at_once(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    os.mkfifo(base / "pipe")
    with pytest.raises(RefusedError, match="FIFO"):
        world.apply("fix", source / "x", base / "pipe")


def test_foreign_mount_on_the_target_is_refused_by_name(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    mount("mine", base, "tmpfs")
    with pytest.raises(RefusedError, match=r"is a mount point: /usr/src/app \(tmpfs of mine\)"):
        world.apply("fix", source, base)


def test_foreign_mount_beneath_the_target_is_refused_by_name(world: World, source: Path) -> None:
    base = world.base("app", {"deep/er/": ""})
    mount("mine", base / "deep/er", "tmpfs")
    with pytest.raises(RefusedError, match=r"has mounts in it: /usr/src/app/deep/er"):
        world.apply("fix", source, base)
    world.base("app2", {"a": "a"})
    world.apply("fix", source, PLAY / "app2")


def test_overlays_do_not_nest_by_components(world: World, source: Path) -> None:
    base = world.base("lib", {"sub/a": "a"})
    lookalike = world.base("lib64", {"a": "a"})
    world.apply("one", source, base)
    for target in (base, base / "sub", PLAY / "lib/sub/new"):
        with pytest.raises(ExistsError, match="'one'"):
            world.apply("two", source, target)
    world.apply("two", source, lookalike)
    world.manager().remove("one")
    world.apply("one", source, base / "sub")
    with pytest.raises(ExistsError, match="around that of overlay 'one'"):
        world.apply("three", source, base)
    world.check_invariants()


def test_name_in_use_is_refused_until_it_is_removed(world: World, source: Path) -> None:
    world.base("a", {"x": "1"})
    world.base("b", {"x": "2"})
    world.apply("fix", source, PLAY / "a")
    with pytest.raises(ExistsError, match="overlay 'fix' already"):
        world.apply("fix", source, PLAY / "b")
    world.manager().remove("fix")
    world.apply("fix", source, PLAY / "b")


@pytest.mark.parametrize(
    "target",
    ["/usr/bin", "/usr/lib", "/usr/share", "/usr/sbin/new-tool", "/usr/lib/systemd/system"],
)
def test_critical_target_needs_the_option(world: World, source: Path, target: str) -> None:
    with pytest.raises(RefusedError, match="critical target") as caught:
        world.apply("fix", source, target)
    assert caught.value.hint is not None
    assert "--allow-critical" in caught.value.hint
    assert world.leftovers() == []


def test_missing_target_whose_parent_is_critical_is_critical(world: World, source: Path) -> None:
    with pytest.raises(RefusedError, match="the overlay has to cover it"):
        world.apply("fix", source, "/usr/share/overlayd-test-does-not-exist")


def test_single_program_can_be_tried_without_the_option(world: World) -> None:
    source = world.source("p", {"env": "#!/bin/sh\necho mine\n"})
    (source / "env").chmod(0o755)
    program = "/usr/bin/env"
    before = Path(program).read_bytes()
    world.apply("fix", source / "env", program)
    assert Path(program).read_text().endswith("mine\n")
    world.manager().remove("fix")
    assert Path(program).read_bytes() == before


def test_single_set_id_program_is_critical(world: World) -> None:
    source = world.source("p", {"x": "x"})
    base = world.base("app", {"prog": "p"})
    (base / "prog").chmod(0o4755)
    with pytest.raises(RefusedError, match="set-id"):
        world.apply("fix", source / "x", base / "prog")


def test_the_interpreter_that_runs_overlayd_is_critical(world: World) -> None:
    import sys  # noqa: PLC0415

    interpreter = os.path.realpath(sys.executable)
    if not interpreter.startswith("/usr/bin/"):
        target = world.base("app", {"python": ""}) / "python"
        bind(Path(interpreter), target)
        with pytest.raises(RefusedError, match=r"is a mount point|overlayd itself needs"):
            world.apply("fix", world.source("p", {"x": "x"}) / "x", target)
        return
    with pytest.raises(RefusedError, match="overlayd itself needs"):
        world.apply("fix", world.source("p", {"x": "x"}) / "x", interpreter)


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b", "a b", "a\nb", "ä\u202e", "\udcff"])
def test_odd_characters_in_every_path(world: World, name: str) -> None:
    base = world.base(f"t{name}", {"a": "base"})
    source = world.source(f"s{name}", {f"f{name}": "odd", "a": "new"})
    overlay = world.apply("fix", source, base)
    assert (base / f"f{name}").read_text() == "odd"
    assert (base / "a").read_text() == "new"
    assert [o.state for o in world.manager().list()] == ["active"]
    (base / "a").write_text("edit")
    assert world.manager().reset("fix", 1).record.target == overlay.record.target
    assert (base / "a").read_text() == "new"
    world.run("status", "fix")
    world.manager().remove("fix")
    assert (base / "a").read_text() == "base"
    assert world.leftovers() == []


def test_long_paths_and_names_of_255_bytes(world: World) -> None:
    deep = "/".join("d" * 200 for _ in range(3))
    base = world.base(deep, {"a": "base"})
    long = "n" * 255
    world.apply("fix", world.source("s", {long: "long", "a": "new"}), base)
    assert (base / long).read_text() == "long"
    world.manager().reset("fix", 1)
    assert (base / "a").read_text() == "new"
    world.manager().remove("fix")


def test_two_stacked_file_systems_are_named_before_anything_is_done(world: World) -> None:
    base = world.base("app", {"a": "a"})
    other = world.base("lower", {"b": "b"})
    lower = base
    for level in range(2):
        place = world.base(f"level{level}", {})
        mount("ov", place, "overlay", f"lowerdir={other}:{lower}")
        lower = place
    inner = PLAY / "level1"
    (other / "app").mkdir()
    with pytest.raises(KernelError, match="two file systems at most"):
        world.apply("fix", world.source("s", {"x": "x"}), inner / "app")
    assert world.leftovers() == []


def test_target_on_an_overlay_works_once(world: World) -> None:
    lower = world.base("lower", {"app/a": "a"})
    other = world.base("other", {})
    place = world.base("place", {})
    mount("ov", place, "overlay", f"lowerdir={other}:{lower}")
    world.apply("fix", world.source("s", {"x": "x"}), place / "app")
    assert (place / "app/x").read_text() == "x"
    world.manager().reset("fix", 0)
    assert not (place / "app/x").exists()


def test_limit_of_overlays_is_named(world: World, source: Path) -> None:
    settings = dataclasses.replace(defaults(), overlays=2)
    manager = world.manager(settings=settings)
    for number in range(3):
        world.base(f"t{number}", {})
    world.apply("a", source, PLAY / "t0", manager=manager)
    world.apply("b", source, PLAY / "t1", manager=manager)
    with pytest.raises(SpaceError, match="2 overlays"):
        world.apply("c", source, PLAY / "t2", manager=manager)


def test_the_real_usr_of_this_machine_can_be_overlaid_and_comes_back(world: World) -> None:
    target = Path("/usr/share/doc")
    target.mkdir(exist_ok=True)
    names = sorted(os.listdir(target))
    world.apply("fix", world.source("s", {"overlayd-test": "here"}), target)
    assert (target / "overlayd-test").read_text() == "here"
    assert sorted([*names, "overlayd-test"]) == sorted(os.listdir(target))
    world.manager().reset("fix", 0)
    world.manager().remove("fix")
    assert sorted(os.listdir(target)) == names
    assert world.leftovers() == []


def test_base_that_is_read_only_works(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    before = snapshot(base)
    import subprocess  # noqa: PLC0415

    subprocess.run(["mount", "-o", "remount,bind,ro", str(PLAY)], check=True)
    world.apply("fix", source, base)
    (base / "a").write_text("edited")
    world.manager().reset("fix", 1)
    world.manager().remove("fix")
    assert snapshot(base) == before


def test_source_is_not_the_target_nor_around_nor_inside_it(world: World) -> None:
    base = world.base("app", {"sub/a": "a"})
    alias = SOURCES / "alias"
    alias.mkdir()
    bind(base, alias)
    for source, word in (
        (base, "is"),
        (PLAY, "contains|mounts"),
        (base / "sub", "lies in"),
        (alias, "is"),
        (alias / "sub", "lies in"),
        (base / "sub/a", "lies in"),
    ):
        with pytest.raises(RefusedError, match=word):
            world.apply("fix", source, base)
    with pytest.raises(RefusedError, match="is TARGET"):
        world.apply("fix", base / "sub/a", base / "sub/a")
    assert world.leftovers() == []


def test_source_in_overlayds_own_storage_is_refused(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    other = world.base("other", {})
    overlay = world.apply("fix", source, base)
    inside = f"/run/overlayd/storage/{overlay.record.uuid}/layer/tree"
    with pytest.raises(RefusedError, match="own storage"):
        world.apply("two", inside, other)
    with pytest.raises(RefusedError, match=r"mounts beneath|contains"):
        world.apply("two", "/run", other)


def test_source_with_a_mount_beneath_it_is_refused_by_name(world: World, source: Path) -> None:
    base = world.base("app", {})
    (source / "inner").mkdir()
    mount("foreign", source / "inner", "tmpfs")
    with pytest.raises(RefusedError, match=str(source / "inner")):
        world.apply("fix", source, base)


@pytest.mark.parametrize("pseudo", ["/proc", "/sys", "/proc/self/fd", "/dev/pts", "/sys/fs/cgroup"])
def test_pseudo_file_systems_are_no_source(world: World, pseudo: str) -> None:
    base = world.base("app", {})
    with pytest.raises(RefusedError):
        world.apply("fix", pseudo, base)
    assert world.leftovers() == []


def test_devices_fifos_and_sockets_are_no_source(world: World, source: Path) -> None:
    base = world.base("app", {})
    os.mkfifo(source / "pipe")
    for path, word in ((source, "FIFO"), (source / "pipe", "FIFO"), (Path("/dev/null"), "device")):
        with pytest.raises(RefusedError, match=word):
            world.apply("fix", path, base)
    (source / "pipe").unlink()
    os.mknod(source / "null", 0o20666, os.makedev(1, 3))
    with pytest.raises(RefusedError, match="character device"):
        world.apply("fix", source, base)
    assert world.leftovers() == []


def test_file_over_directory_and_directory_over_file_are_refused_by_name(world: World) -> None:
    base = world.base("app", {"d/x": "x", "f": "f", "l": "-> f"})
    for files, name in (({"d": "file"}, "d"), ({"f/x": "x"}, "f"), ({"l/x": "x"}, "l")):
        source = tree(SOURCES / f"s-{name}", files)
        with pytest.raises(RefusedError, match=f"s-{name}/{name}"):
            world.apply("fix", source, base)
    with pytest.raises(RefusedError, match="a file over a directory"):
        world.apply("fix", tree(SOURCES / "file", {"d": "x"}) / "d", base)
    assert world.leftovers() == []


def test_apply_over_a_detached_place_leaves_no_trace(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})

    def trace(when: str, operation: object) -> None:
        if when == "before" and type(operation).__name__ == "Attach":
            shutil.rmtree(base)

    with pytest.raises(OverlaydError):
        world.apply("fix", source, base, manager=world.manager(trace=trace))
    assert not read().tagged
    assert world.leftovers() == []


def before(step: str, work: Callable[[], object]) -> Callable[[str, Operation], None]:
    """Return a trace that does *work* before a step."""

    def trace(when: str, operation: Operation) -> None:
        if when == "before" and type(operation).__name__ == step:
            work()

    return trace


def test_target_moved_at_the_last_moment_is_refused_and_nothing_stays_where_it_went(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.base("app", {"a": "a"})
    genuine = syscalls.move_mount

    def and_first_it_moves(mount_fd: int, place_fd: int, flags: int = 0) -> None:
        base.rename(PLAY / "moved")
        base.mkdir()
        genuine(mount_fd, place_fd, flags)

    trace = before(
        "Attach", lambda: monkeypatch.setattr(syscalls, "move_mount", and_first_it_moves)
    )
    with pytest.raises(BusyError, match="changed while it was looked at"):
        world.apply("fix", source, base, manager=world.manager(trace=trace))
    assert not read().tagged
    assert world.leftovers() == []
    assert os.listdir(PLAY / "moved") == ["a"]


def test_directory_that_comes_beneath_a_single_file_meanwhile_is_not_covered(world: World) -> None:
    base = world.base("app", {"keep": "keep"})
    file = world.source("s", {"a": "file"}) / "a"
    trace = before("FillLayer", lambda: tree(base / "a", {"inner": "inner"}))
    with pytest.raises(RefusedError, match="a file over a directory"):
        world.apply("fix", file, base, manager=world.manager(trace=trace))
    assert (base / "a/inner").read_text() == "inner"
    assert world.leftovers() == []


def test_place_exchanged_on_the_same_mount_is_not_the_place_any_more(
    world: World, source: Path
) -> None:
    base = world.base("app", {"a": "a"})
    with contextlib.closing(targets.open_source(str(source))) as opened:
        place = targets.open_target(str(base), opened)
        targets.check_still_there(place)
        base.rename(PLAY / "moved")
        base.mkdir()
        with pytest.raises(BusyError):
            targets.check_still_there(place)
        place.close()


def test_place_that_was_mounted_on_is_not_the_place_any_more(world: World, source: Path) -> None:
    base = world.base("app", {"a": "a"})
    with contextlib.closing(targets.open_source(str(source))) as opened:
        place = targets.open_target(str(base), opened)
        bind(base, base)  # the same directory
        with pytest.raises(BusyError):
            targets.check_still_there(place)
        place.close()


def test_place_that_goes_is_noticed_before_anything_is_made(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.base("app", {"a": "a"})
    genuine = targets.open_target
    steps: list[str] = []

    def and_then_it_goes(path: str, opened: targets.OpenSource) -> targets.OpenPlace:
        place = genuine(path, opened)
        base.rename(PLAY / "moved")
        base.mkdir()
        return place

    def trace(_when: str, operation: Operation) -> None:
        steps.append(operation.describe())

    monkeypatch.setattr(targets, "open_target", and_then_it_goes)
    with pytest.raises(BusyError):
        world.apply("fix", source, base, manager=world.manager(trace=trace))
    assert steps == []


def test_source_that_is_a_device_is_refused_before_anything_is_done(world: World) -> None:
    device = SOURCES / "device"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    request = Request("fix", str(device), str(world.base("app", {"a": "a"}) / "a"))
    with pytest.raises(RefusedError, match="is a character device"):
        world.manager().describe(request, Progress())


def test_file_that_comes_where_a_directory_is_missing_is_not_covered(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.base("app", {})
    genuine = overlayfs.open_beneath

    def and_it_comes(dir_fd: int, path: str, flags: int = os.O_PATH) -> int:
        try:
            return genuine(dir_fd, path, flags)
        except FileNotFoundError:
            (base / "a").write_text("a")
            raise

    monkeypatch.setattr(overlayfs, "open_beneath", and_it_comes)
    with pytest.raises(RefusedError, match="a part of the path is a file"):
        world.apply("fix", source / "x", base / "a/x")
    assert (base / "a").read_text() == "a"
    assert world.leftovers() == []


def test_mount_is_not_attached_through_a_link(world: World) -> None:
    base = world.base("app", {"a": "a"})
    (PLAY / "link").symlink_to("app")
    mount_fd = overlayfs.make_tmpfs(4096, 8)
    with pytest.raises(OSError, match=r"."):
        overlayfs.attach(mount_fd, str(PLAY / "link"))
    os.close(mount_fd)
    assert os.listdir(base) == ["a"]


@pytest.mark.parametrize(
    "path",
    ["/etc", "/usrx", "/usr/../etc", "/usr/./src", "/usr//src", "/usr/src/link", "/usr/src/link/x"],
)
def test_target_that_is_claimed_has_no_links_and_lies_under_usr(
    world: World, source: Path, path: str
) -> None:
    world.base("app", {"x": "x"})
    (PLAY / "link").symlink_to("app")
    with (
        contextlib.closing(targets.open_source(str(source))) as opened,
        pytest.raises(RefusedError),
    ):
        targets.open_target(path, opened)
