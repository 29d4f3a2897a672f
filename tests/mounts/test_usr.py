# SPDX-License-Identifier: LGPL-2.1-or-later
"""``/usr`` itself as the target, and mounts whose parent is a peer of what lies beneath it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from overlayd import mountinfo
from overlayd import syscalls as sc
from overlayd.errors import KernelError, RefusedError
from overlayd.overlayfs import Exchange
from tests.mounts.conftest import EACH_WAY, PLAY, WAYS, bind, mount, snapshot

if TYPE_CHECKING:
    from tests.mounts.conftest import World

needs_beneath = pytest.mark.skipif(
    Exchange.BENEATH not in WAYS,
    reason="before Linux 6.5 an overlay on a /usr that is a mount cannot be reset, only removed",
)
FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}


def as_ostree_mounts_usr() -> None:
    """Mount /usr read-only on itself, and as systemd does each mount shared by itself."""
    usr = Path("/usr")
    sc.umount2(str(PLAY))
    bind(usr, usr)
    for path in ("/", "/usr"):
        sc.mount_propagation(path, sc.MS_SHARED)
    mount("none", usr, "none", flags=sc.MS_BIND | 0x20 | 1)  # remount, read-only


@pytest.mark.parametrize("way", EACH_WAY)
def test_overlay_on_a_directory_bound_on_itself_lives_its_whole_life(
    world: World, way: Exchange
) -> None:
    base = world.base("app", FILES)
    before = snapshot(base)
    bind(PLAY, PLAY)  # shared, so a peer: each overlay lies hidden beneath it once more
    manager = world.manager(way=way)
    overlay = world.apply("fix", world.source("s", NEW), base, manager=manager)
    assert len(mountinfo.read().tagged[overlay.record.uuid]) == 2
    (seen,) = world.manager().list()
    assert (seen.state, seen.mount_id) == ("active", mountinfo.top_mount_id(str(base)))
    (base / "a").write_text("edited")
    for version, text in ((1, "new a"), (0, "base a"), (1, "new a")):
        assert manager.reset("fix", version).state == "active"
        assert (base / "a").read_text() == text
        assert world.manager().status("fix").state == "active"
        assert len(mountinfo.read().tagged[overlay.record.uuid]) == 2
    assert manager.remove("fix").state == "removed"
    assert world.leftovers() == []
    assert snapshot(base) == before


@needs_beneath
def test_usr_itself_can_be_edited_reset_and_restored(world: World) -> None:
    as_ostree_mounts_usr()
    names = sorted(os.listdir("/usr"))
    with pytest.raises(OSError, match="Read-only"):
        os.mkdir("/usr/nothing")
    manager = world.manager()
    world.apply("all", world.source("s", {"share/new/file": "new"}), "/usr", allow_critical=True)
    new, edited = Path("/usr/share/new/file"), Path("/usr/src/edited")
    assert new.read_text() == "new"
    edited.write_text("edited")
    os.rename("/usr/share/new", "/usr/share/old")
    assert manager.reset("all", 1).state == "active"
    assert new.read_text() == "new"
    assert not edited.exists()
    assert manager.reset("all", 0).state == "active"
    assert sorted(os.listdir("/usr")) == names
    assert not new.exists()
    edited.write_text("edited again")
    assert manager.remove("all").state == "removed"
    assert sorted(os.listdir("/usr")) == names
    assert not edited.exists()
    assert world.leftovers() == []


def test_reset_on_usr_itself_without_mount_beneath_is_refused_and_changes_nothing(
    world: World,
) -> None:
    as_ostree_mounts_usr()
    world.apply("all", world.source("s", {"new": "new"}), "/usr", allow_critical=True)
    Path("/usr/edited").write_text("edited")
    with pytest.raises(KernelError, match="cannot be reached beneath it"):
        world.manager(way=Exchange.TUCK).reset("all", 1)
    assert Path("/usr/edited").read_text() == "edited"
    assert world.manager().status("all").state == "active"
    world.manager().remove("all")
    assert world.leftovers() == []


@needs_beneath
def test_usr_that_is_a_file_system_of_its_own_is_the_base(world: World) -> None:
    source = world.source("s", {"new": "new"})
    manager = world.manager()
    app = world.base("app", FILES)
    world.apply("first", source, app, manager=manager)
    manager.reset("first", 1)
    manager.remove("first")  # nothing more has to be imported, once /usr is another
    sc.umount2(str(PLAY))
    mount("own", "/usr", "tmpfs", "mode=755")
    try:
        Path("/usr/theirs").write_text("theirs")
        world.apply("all", source, "/usr", manager=manager, allow_critical=True)
        Path("/usr/edited").write_text("edited")
        manager.reset("all", 1)
        shown = sorted(os.listdir("/usr"))
        manager.reset("all", 0)
        shown_of_base = sorted(os.listdir("/usr"))
        manager.remove("all")
        left = sorted(os.listdir("/usr"))
    finally:
        sc.umount2("/usr", sc.MNT_DETACH)
    assert shown == ["new", "theirs"]
    assert shown_of_base == left == ["theirs"]
    assert world.leftovers() == []


def test_usr_that_something_is_stacked_on_is_refused(world: World) -> None:
    as_ostree_mounts_usr()
    source = world.source("s", {"new": "new"})
    mount("other", "/usr", "overlay", "lowerdir=/usr:/etc")
    with pytest.raises(RefusedError, match=r"/usr is a mount point: .*\(overlay of other"):
        world.apply("all", source, "/usr", allow_critical=True)
    sc.umount2("/usr", sc.MNT_DETACH)
    assert world.leftovers() == []
