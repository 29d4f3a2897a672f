# SPDX-License-Identifier: LGPL-2.1-or-later
"""What locks are for, one by one: somebody else comes exactly where it matters."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from overlayd import mountinfo
from overlayd import store as storing
from overlayd.errors import BusyError, ExistsError
from overlayd.model import Request
from overlayd.progress import Progress
from overlayd.store import STAGE, Store
from tests.mounts.conftest import RUN, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from overlayd.executor import Operation
    from overlayd.manager import Prepared
    from overlayd.model import Record


@pytest.fixture
def source(world: World) -> Path:
    return world.source("s", {"a": "new"})


def once(work: Callable[[], object]) -> Callable[[], None]:
    """Return what does *work* when it is called first."""
    todo = [work]

    def call() -> None:
        while todo:
            todo.pop()()

    return call


def prepared(world: World, source: Path, name: str) -> Prepared:
    request = Request(name, str(source), str(world.base(name, {"a": "base"})))
    return world.manager().prepare(request, Progress())


def test_first_commands_of_a_boot_make_one_world(world: World, source: Path) -> None:
    base = world.base("t", {"a": "base"})
    RUN.mkdir(0o700)
    beneath = os.open(RUN, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(beneath, fcntl.LOCK_EX)
    thread = threading.Thread(target=world.apply, args=("x", source, base))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    assert not os.listdir(RUN)
    Store(world.warnings.append)._make(beneath)
    os.close(beneath)
    thread.join()
    assert [mount.mount_point for mount in mountinfo.read()].count(str(RUN)) == 1
    world.check_invariants()


def test_stage_is_made_under_the_lock_of_all(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply("x", source, world.base("t", {"a": "base"}))
    monkeypatch.setattr(storing, "WORLD_PATIENCE", 0.1)
    with Store(world.warnings.append).locked(), pytest.raises(BusyError):
        Store(world.warnings.append).stage("one")
    monkeypatch.undo()
    genuine = storing._is_mount
    other = once(lambda: Store(world.warnings.append).stage("other"))

    def and_then_another_makes_it(path: str) -> bool:
        found = genuine(path)
        if path == STAGE:
            other()
        return found

    monkeypatch.setattr(storing, "_is_mount", and_then_another_makes_it)
    Store(world.warnings.append).stage("one")
    assert [mount.mount_point for mount in mountinfo.read()].count(STAGE) == 1
    assert sorted(os.listdir(STAGE)) == ["one", "other"]


def test_lock_of_what_was_removed_meanwhile_is_not_given(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uuid = world.apply("x", source, world.base("t", {"a": "base"})).record.uuid
    genuine = fcntl.flock
    removed = once(lambda: World().manager().remove("x"))

    def and_first_it_goes(fd: int, operation: int) -> None:
        removed()
        genuine(fd, operation)

    monkeypatch.setattr(fcntl, "flock", and_first_it_goes)
    assert Store(world.warnings.append).try_lock(uuid) is None
    assert world.leftovers() == []


def test_what_is_finished_before_its_lock_is_free_is_not_settled(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = prepared(world, source, "x")
    finished = once(apply.commit)
    genuine = Store.try_lock

    def and_first_it_ends(store: Store, uuid: str) -> storing.Lock | None:
        finished()
        return genuine(store, uuid)

    monkeypatch.setattr(Store, "try_lock", and_first_it_ends)
    assert [overlay.record.name for overlay in world.manager().list()] == ["x"]
    assert world.warnings == []
    world.check_invariants()


def test_mounts_are_looked_at_once_the_lock_is_free(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.base("t", {"a": "base"})
    reading, writing = os.pipe()
    halted_reading, halted_writing = os.pipe()

    def trace(when: str, operation: Operation) -> None:
        if type(operation).__name__ == "Attach":
            if when == "before":
                os.write(halted_writing, b"!")
                os.read(reading, 1)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            world.apply("x", source, base, manager=world.manager(trace=trace))
        finally:
            os._exit(1)

    def attach_and_die() -> None:
        os.write(writing, b"!")
        os.waitpid(child, 0)

    assert os.read(halted_reading, 1) == b"!"
    attached = once(attach_and_die)
    genuine = Store.try_lock

    def and_first_it_is_attached(store: Store, uuid: str) -> storing.Lock | None:
        attached()
        return genuine(store, uuid)

    monkeypatch.setattr(Store, "try_lock", and_first_it_is_attached)
    assert [overlay.state for overlay in world.manager().list()] == ["active"]
    world.check_invariants()
    for fd in (reading, writing, halted_reading, halted_writing):
        os.close(fd)


def test_what_is_being_prepared_is_nobody_else_s(world: World, source: Path) -> None:
    apply = prepared(world, source, "x")
    assert world.manager().list() == []
    assert world.manager().cleanup(dry_run=True) == []
    assert world.manager().cleanup() == []
    apply.commit()
    assert world.warnings == []
    world.check_invariants()


def test_cleanup_settles_under_the_lock_of_all(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply("x", source, world.base("t", {"a": "base"}))
    monkeypatch.setattr(storing, "WORLD_PATIENCE", 0.1)
    with Store(world.warnings.append).locked(), pytest.raises(BusyError):
        world.manager().cleanup()


def test_what_is_reset_meanwhile_is_not_said_to_be_lost(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply("x", source, world.base("t", {"a": "base"}))
    genuine = mountinfo.read
    other = once(lambda: World().manager().reset("x", 0))

    def and_first_it_changes(process: str = "self") -> mountinfo.Table:
        monkeypatch.undo()
        other()
        return genuine(process)

    monkeypatch.setattr(mountinfo, "read", and_first_it_changes)
    assert world.manager().cleanup(dry_run=True) == []
    assert mountinfo.read is genuine, "it was read"


def test_process_that_stays_hears_what_others_do(world: World, source: Path) -> None:
    bases = [world.base(name, {"a": "base"}) for name in ("one", "two", "three")]
    stays = world.manager()
    world.apply("one", source, bases[0], manager=stays)
    world.apply("two", source, bases[1])
    for name, base in (("two", bases[2]), ("three", bases[1])):
        with pytest.raises(ExistsError):
            world.apply(name, source, base, manager=stays)
    assert stays.status("two").record.tree is not None
    world.manager().reset("two", 0)
    overlay = stays.status("two")
    assert overlay.state == "active"
    assert overlay.record.tree is not None
    assert overlay.record.tree.version == 0
    world.manager().reset("two", 1)
    assert stays.reset("two", 0).record.tree is not None
    world.manager().remove("two")
    world.apply("two", source, bases[2], manager=stays)
    assert sorted(overlay.record.name for overlay in stays.list()) == ["one", "two"]
    world.check_invariants()


def test_change_waits_for_the_lock_of_the_overlay_and_looks_again(
    world: World, source: Path
) -> None:
    base = world.base("t", {"a": "base"})
    record = world.apply("x", source, base).record
    store = Store(world.warnings.append)
    lock = store.lock(record)
    with pytest.raises(BusyError, match="another command is working on x"):
        Store(world.warnings.append).lock(record, 0.1)
    works: list[Callable[[], object]] = [
        lambda: World().manager().reset("x", 0),
        lambda: World().manager().remove("x"),
    ]
    for work in works:
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.2)
        assert thread.is_alive()
        assert (base / "a").read_text() == "new"
        lock.release()
        thread.join()
        assert (base / "a").read_text() == "base"
        if world.manager().list():
            world.manager().reset("x", 1)
            lock = store.lock(record)
    assert world.leftovers() == []


def test_change_is_of_the_overlay_as_it_is_once_it_is_locked(
    world: World, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = world.base("t", {"a": "base"})
    world.apply("x", source, base)
    genuine = Store.lock
    other = once(lambda: World().manager().reset("x", 0))

    def and_first_another_is_done(
        store: Store, record: Record, patience: float = 1.0
    ) -> storing.Lock:
        other()
        return genuine(store, record, patience)

    monkeypatch.setattr(Store, "lock", and_first_another_is_done)
    world.manager().reset("x", 1)
    assert (base / "a").read_text() == "new"
    world.check_invariants()
