# SPDX-License-Identifier: LGPL-2.1-or-later
"""A reader in another process sees the overlay through every reset: never the base, no gap."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

import pytest

from overlayd import mountinfo, overlayfs, syscalls
from overlayd.overlayfs import Exchange
from tests.mounts.conftest import EACH_WAY, PLAY, WAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.mounts.conftest import World

RESETS = 200
ENOUGH = 4.0
"""Seconds after which it is enough, on an emulated processor that the reader keeps busy."""
FEWEST = 20


def watched(path: Path, work: Callable[[], None]) -> tuple[int, int, int]:
    """Do *work* while a child opens and reads *path*; return opens, failures, other contents."""
    reading, writing = os.pipe()
    stop_reading, stop_writing = os.pipe()
    os.set_blocking(stop_reading, False)
    child = os.fork()
    if child == 0:
        name = str(path)
        opens = failures = others = 0
        while True:
            try:
                fd = os.open(name, os.O_RDONLY)
                others += os.read(fd, 64) != b"overlay"
                os.close(fd)
            except OSError:
                failures += 1
            opens += 1
            if opens == 1:
                os.write(writing, b"!")
            if opens % 64 == 0:
                try:
                    os.read(stop_reading, 1)
                    break
                except BlockingIOError:
                    continue
        os.write(writing, f"{opens} {failures} {others}".encode())
        os._exit(0)
    assert os.read(reading, 1) == b"!"
    try:
        work()
    finally:
        os.write(stop_writing, b"!")
        os.waitpid(child, 0)
    opens, failures, others = map(int, os.read(reading, 100).split())
    for fd in (reading, writing, stop_reading, stop_writing):
        os.close(fd)
    return opens, failures, others


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("way", [*EACH_WAY, "kernel without MOVE_MOUNT_BENEATH"])
def test_reset_leaves_no_gap(
    either_world: World, way: Exchange | str, monkeypatch: pytest.MonkeyPatch, *, read_only: bool
) -> None:
    world = either_world
    base = world.base("t", {"a": "base"})
    chosen = way if isinstance(way, Exchange) else None
    if chosen is None:
        genuine = syscalls.move_mount

        def older(from_fd: int, to_fd: int, flags: int = 0) -> None:
            if flags & syscalls.MOVE_MOUNT_BENEATH:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "move_mount")
            genuine(from_fd, to_fd, flags)

        monkeypatch.setattr(syscalls, "move_mount", older)
    manager = world.manager(way=chosen)
    world.apply(
        "x", world.source("s", {"a": "overlay"}), base, manager=manager, read_only=read_only
    )

    def resets() -> None:
        end = time.monotonic() + ENOUGH
        for done in range(RESETS):
            manager.reset("x", 1)
            if done > FEWEST and time.monotonic() > end:
                break

    opens, failures, others = watched(base / "a", resets)
    assert opens > 10
    assert (failures, others) == (0, 0)
    world.check_invariants()
    manager.remove("x")
    assert (base / "a").read_text() == "base"
    assert world.leftovers() == []


def test_reset_works_where_layers_must_be_attached(
    either_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.15 a layer on a detached mount is EINVAL."""
    world = either_world
    base = world.base("t", {"a": "base", "sub/b": "base"})
    genuine = overlayfs.make_overlay

    def older(
        tag: str, lowers: Sequence[int], upper_work: tuple[int, int] | None, attributes: int
    ) -> int:
        attached = {mount.mount_id for mount in mountinfo.read()}
        if any(syscalls.statx(fd).mnt_id not in attached for fd in lowers):
            raise OSError(errno.EINVAL, "failed to clone lowerpath", "fsconfig")
        return genuine(tag, lowers, upper_work, attributes)

    monkeypatch.setattr(overlayfs, "make_overlay", older)
    monkeypatch.setattr(overlayfs, "takes_detached_layers", lambda _: False)
    source = world.source("s", {"a": "overlay"})
    world.apply("x", source, base)
    world.apply("y", source / "a", world.base("u", {"f": "base"}) / "f", read_only=True)
    for version, text in ((0, "base"), (1, "overlay")):
        for name, file in (("x", base / "a"), ("y", PLAY / "u/f")):
            world.manager().reset(name, version)
            assert file.read_text() == text
    world.check_invariants()
    for name in ("x", "y"):
        world.manager().remove(name)
    assert world.leftovers() == []


def test_private_parent_is_private_again_after_an_exchange(either_world: World) -> None:
    world = either_world
    before = shared()
    base = world.base("t", {"a": "base"})
    world.apply("x", world.source("s", {"a": "overlay"}), base)
    world.manager(way=Exchange.TUCK).reset("x", 0)
    world.manager().remove("x")
    assert shared() == before


def shared() -> set[str]:
    return {mount.mount_point for mount in mountinfo.read().within(str(PLAY)) if mount.shared}


def test_the_watcher_would_see_a_gap(world: World) -> None:
    base = world.base("t", {"a": "base"})
    manager = world.manager()
    source = world.source("s", {"a": "overlay"})
    world.apply("x", source, base, manager=manager)

    def gaps() -> None:
        for _ in range(20):
            manager.remove("x", lazy=True)
            time.sleep(0.005)
            world.apply("x", source, base, manager=manager)

    _, failures, others = watched(base / "a", gaps)
    assert failures + others > 0


def test_other_namespaces_follow_every_exchange(world: World) -> None:
    base = world.base("t", {"a": "base"})
    manager = world.manager()
    world.apply("x", world.source("s", {"a": "overlay"}), base, manager=manager)
    reading, writing = os.pipe()
    go_reading, go_writing = os.pipe()
    child = os.fork()
    if child == 0:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount_propagation("/", syscalls.MS_REC | syscalls.MS_SLAVE)
        os.write(writing, b"!")
        while os.read(go_reading, 1) == b"?":
            table = open("/proc/self/mountinfo").read()  # noqa: SIM115
            count = table.count(" overlayd:")
            os.write(writing, f"{count} {(base / 'a').read_text()}\n".encode())
        os._exit(0)

    def ask() -> str:
        os.write(go_writing, b"?")
        return os.read(reading, 100).decode().strip()

    assert os.read(reading, 1) == b"!"
    try:
        for way in WAYS:
            for _ in range(20):
                world.manager(way=way).reset("x", 1)
            assert ask() == "1 overlay"
            world.manager(way=way).reset("x", 0)
            assert ask() == "1 base"
            world.manager(way=way).reset("x", 1)
        manager.remove("x")
        assert ask() == "0 base"
        with open(f"/proc/{child}/mountinfo") as file:
            assert "overlayd/storage" not in file.read()
    finally:
        os.write(go_writing, b"!")
        os.waitpid(child, 0)
