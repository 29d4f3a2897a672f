# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two commands at the same moment: exactly one wins, and nobody waits for another's copying."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from overlayd import mountinfo, observer, store, targets
from overlayd.errors import BusyError, ExistsError, NotFoundError, OverlaydError
from overlayd.model import Phase, Request
from overlayd.progress import Progress
from overlayd.store import Store
from tests.mounts.conftest import PLAY, World, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from overlayd.executor import Operation
    from overlayd.manager import Manager

_fork = multiprocessing.get_context("fork")


def race(works: list[Callable[[], object]]) -> list[str]:
    """Run *works* in processes that start at the same moment; return what each came to."""
    barrier = _fork.Barrier(len(works))
    answers = _fork.Queue()

    def one(number: int, work: Callable[[], object]) -> None:
        barrier.wait()
        try:
            work()
            answers.put((number, "done"))
        except OverlaydError as error:
            answers.put((number, error.code))
        except BaseException as error:  # noqa: BLE001  # the test compares it
            answers.put((number, repr(error)))

    processes = [_fork.Process(target=one, args=pair) for pair in enumerate(works)]
    for process in processes:
        process.start()
    got = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [got[number] for number in range(len(works))]


def test_of_two_applies_with_one_name_exactly_one_wins(world: World) -> None:
    source = world.source("s", {"a": "new"})
    for name in ("t0", "t1", "t2", "t3"):
        world.base(name, {"a": "base"})
    for _ in range(10):
        got = race(
            [
                lambda t=t: World().apply("same", source, PLAY / t)  # type: ignore[misc]
                for t in ("t0", "t1", "t2", "t3")
            ]
        )
        assert sorted(got) == ["done", "exists", "exists", "exists"]
        world.check_invariants()
        world.manager().remove("same")
    assert world.leftovers() == []


def test_of_applies_on_the_same_or_nested_targets_exactly_one_wins(world: World) -> None:
    source = world.source("s", {"a": "new"})
    base = world.base("t", {"inner/deep/a": "base"})
    targets = [base, base, base / "inner", base / "inner/deep"]
    for _ in range(10):
        got = race(
            [
                lambda n=n, t=t: World().apply(f"n{n}", source, t)  # type: ignore[misc]
                for n, t in enumerate(targets)
            ]
        )
        assert sorted(got) == ["done", "exists", "exists", "exists"]
        world.check_invariants()
        (overlay,) = world.manager().list()
        world.manager().remove(overlay.record.name)
    assert world.leftovers() == []


def test_a_long_copy_delays_no_other_command(world: World) -> None:
    source = world.source("s", {"a": "new"})
    for name in ("slow", "quick"):
        world.base(name, {"a": "base"})
    copying, release = threading.Event(), threading.Event()

    def trace(when: str, operation: Operation) -> None:
        if when == "before" and type(operation).__name__ == "FillLayer":
            copying.set()
            assert release.wait(30)

    slow = world.manager(trace=trace)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            slow.apply(Request("slow", str(source), str(PLAY / "slow")), Progress())
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert copying.wait(30)
    world.apply("quick", source, PLAY / "quick")
    assert [o.record.name for o in world.manager().list()] == ["quick"]
    world.manager().reset("quick", 1)
    world.manager().remove("quick")
    with pytest.raises(ExistsError, match="another command is applying it"):
        world.apply("slow", source, PLAY / "quick")
    release.set()
    thread.join()
    assert errors == []
    world.check_invariants()


@pytest.mark.parametrize("target", ["t/inner", "t/inner/a", "t/inner/new"])
def test_target_opened_through_an_overlay_that_goes_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    source = world.source("s", {"a": "new"})
    base = world.base("t", {"inner/a": "base"})
    world.apply("outer", world.source("o", {"inner/gone": "gone"}), base)
    genuine = targets.open_target

    def and_then_it_goes(path: str, opened: targets.OpenSource) -> targets.OpenPlace:
        place = genuine(path, opened)
        World().manager().remove("outer", lazy=True)
        return place

    monkeypatch.setattr(targets, "open_target", and_then_it_goes)
    with pytest.raises(BusyError, match="changed while it was looked at"):
        world.apply("x", source / "a" if target.endswith("/a") else source, PLAY / target)
    monkeypatch.undo()
    assert world.manager().list(draining=True) == []  # it was held open by the apply itself
    assert world.leftovers() == []
    world.apply("x", source, base / "inner")
    assert not (base / "inner/gone").exists()


def test_remove_twice_at_once_removes_once(world: World) -> None:
    source = world.source("s", {"a": "new"})
    base = world.base("t", {"a": "base"})
    for _ in range(10):
        world.apply("x", source, base)
        got = race([lambda: World().manager().remove("x")] * 3)
        assert sorted(got) == ["done", "not-found", "not-found"]
        assert world.leftovers() == []


def test_resets_and_readers_at_once_all_succeed(world: World) -> None:
    source = world.source("s", {"a": "new"})
    base = world.base("t", {"a": "base"})
    world.apply("x", source, base)

    def resets() -> None:
        for _ in range(20):
            World().manager().reset("x", 1)

    def lists() -> None:
        for _ in range(50):
            (overlay,) = World().manager().list()
            assert overlay.state == "active", overlay

    assert race([resets, resets, lists]) == ["done", "done", "done"]
    world.check_invariants()


def test_a_storm_of_random_commands_ends_consistent(world: World) -> None:
    source = world.source("s", {"a": "new"})
    targets: list[Path] = [world.base(f"t{n}", {"in/a": "base"}) for n in range(4)]
    targets += [target / "in" for target in targets]
    before = snapshot(PLAY)
    allowed = {"exists", "not-found", "busy"}

    def storm(seed: int) -> None:
        generator = random.Random(seed)
        manager = World().manager()
        for _ in range(60):
            name = f"n{generator.randrange(5)}"
            try:
                match generator.randrange(5):
                    case 0 | 1:
                        target = generator.choice(targets)
                        manager.apply(Request(name, str(source), str(target)), Progress())
                    case 2:
                        manager.remove(name, lazy=generator.random() < 0.3)
                    case 3:
                        manager.reset(name, generator.randrange(2))
                    case _:
                        manager.list()
            except OverlaydError as error:
                if error.code not in allowed:
                    os.write(2, f"storm: {error.code}: {error}\n".encode())
                    raise

    assert race([lambda seed=seed: storm(seed) for seed in range(4)]) == ["done"] * 4  # type: ignore[misc]
    world.check_invariants()
    for overlay in world.manager().list():
        world.manager().remove(overlay.record.name)
    assert snapshot(PLAY) == before
    assert world.leftovers() == []


def test_command_that_hangs_in_the_middle_does_not_keep_others_from_looking(world: World) -> None:
    base = world.base("app", {"a": "base"})
    source = world.source("s", {"a": "new"})
    world.apply("hangs", source, base)
    world.apply("other", source, world.base("other", {"a": "base"}))
    other = Store(world.warnings.append)
    (record,) = [known for known in other.records() if known.name == "hangs"]
    lock = other.lock(record)
    other.write(record.with_(phase=Phase.REMOVING))
    started = time.monotonic()
    listed = {o.record.name: o.state for o in world.manager().list()}
    assert time.monotonic() - started < 9, "as long as a change would wait"
    assert listed == {"hangs": "active", "other": "active"}
    assert world.warnings == ["another command is working on hangs"]
    lock.release()
    assert len(world.manager().list()) == 2, "its removal had not begun"


def test_command_stopped_with_the_lock_of_all_delays_others_for_a_bounded_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = world.source("s", {"a": "new"})
    world.apply("one", source, world.base("one", {"a": "base"}))
    two = world.base("two", {"a": "base"})
    monkeypatch.setattr(store, "WORLD_PATIENCE", 0.2)
    monkeypatch.setattr(observer, "_WORLD_PATIENCE", 0.2)
    other = Store(world.warnings.append)
    with other.locked():
        (record,) = other.records()
        other.write(record.with_(phase=Phase.REMOVING))  # so that every command wants the lock
        with pytest.raises(BusyError, match="another command keeps the lock") as caught:
            world.apply("two", source, two)
        assert "fuser -v /run/overlayd/lock" in str(caught.value.hint)
        assert [o.record.name for o in world.manager().list()] == ["one"]
        assert any("keeps the lock" in text for text in world.warnings)
    assert [o.state for o in world.manager().list()] == ["active"]
    world.manager().remove("one")
    assert world.leftovers() == []


@contextlib.contextmanager
def halted_before(step: str, work: Callable[[Manager], object]) -> Iterator[int]:
    """Do *work* in a child that halts before a step; give its process id, and kill it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:

        def trace(when: str, operation: Operation) -> None:
            if when == "before" and type(operation).__name__ == step:
                os.write(writing, b"h")
                signal.pause()

        try:
            work(World().manager(trace=trace))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"h", f"no {step}"
        yield child
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


CUT_SHORT: dict[str, tuple[str, Callable[[Manager], object]]] = {
    "a reset that is shown": ("DropStorage", lambda m: m.reset("x", 0)),
    "a reset that is not": ("PutBeneath", lambda m: m.reset("x", 0)),
    "a remove that is done": ("DropStorage", lambda m: m.remove("x")),
    "a remove that is not": ("Detach", lambda m: m.remove("x")),
}
WAITING: dict[str, Callable[[Manager], object]] = {
    "list": lambda m: m.list(),
    "status": lambda m: m.status("x"),
    "reset": lambda m: m.reset("x", 1),
    "remove": lambda m: m.remove("x"),
}


@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize("cut_short", CUT_SHORT)
def test_command_that_waits_for_one_that_is_killed_finishes_what_that_began(
    world: World, cut_short: str, waiting: str
) -> None:
    base = world.base("t", {"a": "base"})
    world.apply("x", world.source("s", {"a": "new"}), base)
    there = cut_short != "a remove that is done"
    with halted_before(*CUT_SHORT[cut_short]) as child:

        def kill() -> None:
            time.sleep(0.1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            found = WAITING[waiting](world.manager())
        except NotFoundError:
            assert not there
        else:
            if waiting == "list":
                assert isinstance(found, list)
                assert [o.state for o in found] == ["active"] * there
            else:
                assert there
        killer.join()
    world.check_invariants()
    shown = (base / "a").read_text()
    if waiting == "remove" or not there:
        assert shown == "base"
    elif waiting == "reset" or cut_short != "a reset that is shown":
        assert shown == "new"
    else:
        assert shown == "base"
    for overlay in world.manager().list():
        world.manager().remove(overlay.record.name)
    assert world.leftovers() == []


def test_overlay_that_a_slow_command_has_detached_is_not_called_lost(world: World) -> None:
    world.apply("x", world.source("s", {"a": "new"}), world.base("t", {"a": "base"}))
    with halted_before("DropStorage", lambda m: m.remove("x")):
        assert world.manager().list() == []
        with pytest.raises(NotFoundError):
            world.manager().status("x")
        assert world.manager().cleanup() == []
    assert world.manager().list() == []
    assert world.leftovers() == []


def test_command_that_waits_hears_at_once_that_the_overlay_is_gone(world: World) -> None:
    base = world.base("t", {"a": "base"})
    world.apply("x", world.source("s", {"a": "new"}), base)
    (record,) = Store(world.warnings.append).records()
    with halted_before("Retire", lambda m: m.remove("x")):
        started = time.monotonic()
        with pytest.raises(NotFoundError):
            Store(world.warnings.append).lock(record)
        assert time.monotonic() - started < 1
        assert world.manager().list() == []
        assert world.warnings == [], "nothing was cut short"


def test_overlay_that_goes_while_others_look_is_nothing_left_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply("x", world.source("s", {"a": "new"}), world.base("t", {"a": "base"}))
    (record,) = Store(world.warnings.append).records()
    genuine = Store.storages

    def and_then_it_goes(looking: Store) -> list[str]:
        Store(world.warnings.append).drop(record.uuid)
        return genuine(looking)

    with halted_before("Retire", lambda m: m.remove("x")):
        monkeypatch.setattr(Store, "storages", and_then_it_goes)
        assert world.manager().list() == []
    assert world.warnings == []


BESIDE_CLEANUP: dict[str, Callable[[Manager, Path], object]] = {
    "apply": lambda m, source: m.apply(Request("y", str(source), str(PLAY / "other")), Progress()),
    "reset": lambda m, _: m.reset("x", 0),
    "remove": lambda m, _: m.remove("x"),
}


@pytest.mark.parametrize("change", BESIDE_CLEANUP)
def test_cleanup_leaves_alone_what_is_changed_while_it_looks(
    world: World, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = world.source("s", {"a": "new"})
    for name in ("t", "other"):
        world.base(name, {"a": "base"})
    world.apply("x", source, PLAY / "t")
    genuine = mountinfo.read

    def and_first_it_changes(process: str = "self") -> mountinfo.Table:
        monkeypatch.undo()
        BESIDE_CLEANUP[change](world.manager(), source)
        return genuine(process)

    monkeypatch.setattr(mountinfo, "read", and_first_it_changes)
    assert world.manager().cleanup() == []
    assert mountinfo.read is genuine, "it was read"
    world.check_invariants()
    names = {"apply": {"x", "y"}, "reset": {"x"}, "remove": set()}[change]
    assert {o.record.name for o in world.manager().list()} == names
