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
from tests.mounts.conftest import PLAY, bind, mount, snapshot

if TYPE_CHECKING:
    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
WAYS = pytest.mark.parametrize("way", Exchange)


def as_ostree_mounts_usr() -> None:
    """Mount /usr read-only on itself, and as systemd does each mount shared by itself."""
    usr = Path("/usr")
    sc.umount2(str(PLAY))
    bind(usr, usr)
    for path in ("/", "/usr"):
        sc.mount_propagation(path, sc.MS_SHARED)
    mount("none", usr, "none", flags=sc.MS_BIND | 0x20 | 1)  # remount, read-only


@WAYS
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


def test_usr_itself_can_be_edited_reset_and_restored(world: World) -> None:
    as_ostree_mounts_usr()
    names = sorted(os.listdir("/usr"))
    with pytest.raises(OSError, match="Read-only"):
        os.mkdir("/usr/nothing")
    manager = world.manager()
    world.apply("all", world.source("s", {"share/new/file": "new"}), "/usr", allow_critical=True)
    assert mountinfo.read().rebound("/usr") is False
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


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_usr_that_something_else_is_mounted_on_is_refused(world: World, kind: str) -> None:
    as_ostree_mounts_usr()
    options = "" if kind == "tmpfs" else "lowerdir=/usr:/etc"
    source = world.source("s", {"new": "new"})
    mount("other", "/usr", kind, options)
    with pytest.raises(RefusedError, match=rf"/usr is a mount point: /usr .*{kind} of other"):
        world.apply("all", source, "/usr", allow_critical=True)
    sc.umount2("/usr", sc.MNT_DETACH)
    assert world.leftovers() == []
