# SPDX-License-Identifier: LGPL-2.1-or-later
"""The world moves underneath: between commands, and at every trace point of each.

Whatever was done to mounts, storage and records, only errors of the tree come out, mounts of others
stay, the neighbour is not touched, and what overlayd has itself (remove, cleanup) ends with a clean
machine as soon as what others mounted is gone.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING

import pytest

from overlayd import batch, doctor, mountinfo
from overlayd.errors import KernelError, OverlaydError
from overlayd.model import Request
from overlayd.progress import Progress
from tests.crash.meddling import (
    FOREIGN,
    MEDDLINGS,
    Scene,
)
from tests.mounts.conftest import (
    PLAY,
    WAYS,
    World,
    defaults,
    enter_new_world,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.config import Config
    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from overlayd.overlayfs import Exchange
    from tests.crash.tried import Proof

    Meddle = Callable[[Scene], Callable[[], object] | None]

FILES = {"a": "base a", "sub/b": "base b"}
NEW = {"a": "new a", "sub/c": "new c"}
CODES = {2, 3, 4, 5, 6, 8, 9}
"""Exit codes that may come; 1 would be a fault of overlayd's own, and 7 a matter of rights."""


@functools.cache
def settings() -> Config:
    """Return the default configuration, read once."""
    return defaults()


def manager(
    world: World,
    *,
    trace: Callable[[str, Operation], None] | None = None,
    way: Exchange | None = None,
) -> Manager:
    """Return a manager that does not read the configuration anew."""
    return world.manager(settings=settings(), trace=trace, way=way)


def apply(manager: Manager, scene: Scene) -> object:
    return manager.apply(Request("x", str(scene.source), str(scene.place)), Progress())


def apply_both(manager: Manager, scene: Scene) -> None:
    """Apply two overlays, both or none."""
    both = [
        Request("x", str(scene.source), str(scene.place)),
        Request("y", str(scene.source), str(PLAY / "more")),
    ]
    done = batch.run(both, lambda: manager, Progress(), jobs=1, atomic=lambda: manager)
    if error := batch.worst(done):
        raise error


CASES: dict[str, tuple[str, bool, Callable[[Manager, Scene], object]]] = {
    "apply": ("", False, apply),
    "apply-file": ("a", False, apply),
    "batch": ("", False, apply_both),
    "reset": ("", True, lambda m, _s: m.reset("x", 0)),
    "reset-file": ("a", True, lambda m, _s: m.reset("x", 1)),
    "remove": ("", True, lambda m, _s: m.remove("x")),
    "remove-lazy": ("", True, lambda m, _s: m.remove("x", lazy=True)),
}
BETWEEN: dict[str, Callable[[Manager, Scene], object]] = {
    **{name: work for name, (_, present, work) in CASES.items() if present},
    "list": lambda m, _s: m.list(draining=True),
    "status": lambda m, _s: m.status("x"),
    "apply": apply,
    "apply-of-another": lambda m, s: m.apply(
        Request("y", str(s.source), str(PLAY / "more")), Progress()
    ),
    "cleanup": lambda m, _s: m.cleanup(),
    "reset-applied": lambda m, _s: m.reset("x", 1),
}


def stage(entry: str, *, shared: bool, present: bool) -> Scene:
    """Make a fresh world with the overlays of a :class:`Scene`."""
    enter_new_world(shared=shared)
    world = World()
    base = world.base("outer/app", FILES)
    world.base("more", FILES)
    source = world.source("s", NEW)
    beside = world.apply(
        "beside", source, world.base("beside", FILES), size=1 << 20, manager=manager(world)
    )
    other = world.apply(
        "other", source, world.base("other", FILES), size=1 << 20, manager=manager(world)
    )
    before = snapshot(base)
    scene = Scene(world, base / entry, source / entry, beside, other, before)
    if present:
        world.apply("x", scene.source, scene.place, size=1 << 20, manager=manager(world))
        (base / "a").write_text("edited")
    return scene


def tried(work: Callable[[], object], context: object) -> OverlaydError | None:
    """Do it; whatever comes out is of the error tree, with a documented code."""
    try:
        work()
    except OverlaydError as error:
        assert error.exit_code in CODES, (context, repr(error))  # noqa: PT017
        return error
    except Exception as error:
        text = f"{context}: {error!r} is not of the tree"
        raise AssertionError(text) from error
    return None


def foreign_stands(scene: Scene, context: object) -> None:
    """Insist on what others mounted being where they mounted it."""
    table = mountinfo.read()
    for place in scene.foreign:
        top = next(m for m in table if m.mount_id == mountinfo.top_mount_id(str(place)))
        assert (top.source == FOREIGN, top.mount_point) == (place.is_dir(), str(place)), (
            context,
            top,
        )


def come_back(scene: Scene, back: Callable[[], object] | None, context: object) -> None:
    """Check all that is promised, with what is meddled with still as it is, and then without."""
    world, beside = scene.world, scene.beside
    manages = manager(world)
    foreign_stands(scene, context)
    for look in (
        manages.list,
        lambda: manages.list(draining=True),
        lambda: manages.cleanup(dry_run=True),
        manages.cleanup,
    ):
        tried(look, (context, look))
    foreign_stands(scene, context)
    if back is not None:
        back()
    names = [overlay.record.name for overlay in manages.list()]  # two may have been given one
    for name in sorted(names):
        if name != "beside":
            manager(world).remove(name)
    failed = [action for action in manager(world).cleanup() if action.failed is not None]
    assert not failed, (context, failed)
    manager(world).list(draining=True)
    left = [line for line in world.leftovers() if beside.record.uuid not in line]
    left = [line for line in left if line != beside.record.mount_point]
    assert not left, (context, left)
    (only,) = manager(world).list()
    assert (only.record.name, only.state, only.mount_id) == (
        "beside",
        "active",
        beside.mount_id,
    ), context


def held() -> list[str]:
    """Return what this process has open."""
    folder = "/proc/self/fd"
    found = [f"{folder}/{name}" for name in os.listdir(folder)]
    return sorted(os.readlink(name) for name in found if os.path.lexists(name))


def stays_clean(scene: Scene, context: object) -> None:
    """Insist on the base being as it was, and the next apply working as if nothing had been."""
    assert snapshot(PLAY / "outer/app") == scene.before, context
    apply(manager(scene.world), scene)
    scene.world.check_invariants()
    manager(scene.world).remove("x")


@functools.cache
def points(case: str, *, shared: bool) -> int:
    """Return how many trace points a command has."""
    entry, present, work = CASES[case]
    scene = stage(entry, shared=shared, present=present)
    seen: list[str] = []
    work(manager(scene.world, trace=lambda when, _operation: seen.append(when)), scene)
    return len(seen)


@functools.cache
def undone(case: str, *, shared: bool) -> tuple[int, int]:
    """Return the last point at which a failure undoes a command, and in how many steps."""
    entry, present, work = CASES[case]
    for point in reversed(range(points(case, shared=shared))):
        scene = stage(entry, shared=shared, present=present)
        seen: list[str] = []

        def trace(when: str, _operation: Operation) -> None:
            seen.append(when)  # noqa: B023  # called within this round
            if len(seen) == point + 1:  # noqa: B023
                raise KernelError("a failure")

        with contextlib.suppress(KernelError):
            work(manager(scene.world, trace=trace), scene)
        if "undo" in seen:
            return point, seen.count("undo")
    raise AssertionError(case)


def meddled_at(  # noqa: PLR0913  # what tells one from another
    case: str,
    point: int,
    meddle: Meddle,
    *,
    shared: bool,
    way: Exchange | None = None,
    failing: int | None = None,
) -> bool:
    """Meddle at one trace point of one command; say whether there was anything to do it to.

    If it fails, at point *failing*, the points are those of undoing it.
    """
    entry, present, work = CASES[case]
    scene = stage(entry, shared=shared, present=present)
    context = (case, point, meddle.__name__, "shared" if shared else "private", way, failing)
    seen, begun, back, done = 0, 0, None, False
    before = held()

    def trace(when: str, _operation: Operation) -> None:
        nonlocal seen, begun, done, back
        if when != "undo":
            begun += 1
            if begun - 1 == failing:
                raise KernelError("a failure")
        if (when == "undo") == (failing is None):
            return
        if seen == point:
            with contextlib.suppress(OSError):  # there is nothing yet to do it to
                back = meddle(scene)
                done = True
        seen += 1

    tried(lambda: work(manager(scene.world, trace=trace, way=way), scene), context)
    assert held() == before, context
    if done:
        come_back(scene, back, context)
        stays_clean(scene, context)
    return done


def chosen(number: int, proof: Proof, stride: int) -> bool:
    """Whether case *number* is tried: all of them, or every so many in the quick form."""
    return proof.whole or number % stride == 0


@pytest.mark.parametrize("meddle", MEDDLINGS, ids=lambda meddle: meddle.__name__)
def test_world_moves_during_a_command(proof: Proof, meddle: Meddle) -> None:
    """The world moves during a command, at each trace point."""
    number = MEDDLINGS.index(meddle)  # so that each point has its turn, in the quick form as well
    for case in CASES:
        for shared in (True, False):
            for way in WAYS if proof.whole and case.startswith("reset") else (None,):
                for point in range(points(case, shared=shared)):
                    number += 1
                    if chosen(number, proof, 20):
                        proof.count(meddled_at(case, point, meddle, shared=shared, way=way))
    assert proof.tried


@pytest.mark.parametrize("meddle", MEDDLINGS, ids=lambda meddle: meddle.__name__)
def test_world_moves_while_a_command_is_undone(proof: Proof, meddle: Meddle) -> None:
    """The world moves while a command that failed is undone, at each trace point."""
    number = MEDDLINGS.index(meddle)
    for case in CASES:
        for shared in (True, False):
            failing, steps = undone(case, shared=shared)
            for point in range(steps):
                number += 1
                if chosen(number, proof, 20):
                    done = meddled_at(case, point, meddle, shared=shared, failing=failing)
                    proof.count(done)
    assert proof.tried


@pytest.mark.parametrize("meddle", MEDDLINGS, ids=lambda meddle: meddle.__name__)
def test_world_moves_between_commands(proof: Proof, meddle: Meddle) -> None:
    """The world moves between commands."""
    number = MEDDLINGS.index(meddle)
    for shared in (False, True):
        for name, work in BETWEEN.items():
            number += 1
            if not chosen(number, proof, 8):
                continue
            scene = stage("a" if "file" in name else "", shared=shared, present=True)
            context = (name, meddle.__name__, shared)
            with contextlib.suppress(OSError):  # such as a move of what lies on a shared mount
                back = meddle(scene)
                proof.count()
                tried(lambda: work(manager(scene.world), scene), context)  # noqa: B023
                tried(lambda: doctor.examine(settings), context)
                come_back(scene, back, context)
                stays_clean(scene, context)
    assert proof.tried
