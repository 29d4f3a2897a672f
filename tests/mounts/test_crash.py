# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL and failure at every step: wholly there or wholly gone, and the next command works."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from overlayd.errors import InterruptedByUserError, OverlaydError
from overlayd.model import Request
from overlayd.progress import Progress
from tests.mounts.conftest import COMMAND, EACH_WAY, ROOT, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from overlayd.overlayfs import Exchange
    from tests.mounts.conftest import World

FILES = {"a": "base a", "sub/b": "base b"}
SOURCE = {"a": "new a", "sub/c": "new c"}


def count_points(world: World, work: Callable[[Manager], object]) -> int:
    points = 0

    def trace(_when: str, _operation: Operation) -> None:
        nonlocal points
        points += 1

    work(world.manager(trace=trace))
    return points


def run_and_die_at(
    world: World, point: int, way: Exchange | None, work: Callable[[Manager], object]
) -> None:
    """Do *work* in a child that kills itself at its trace point number *point*."""
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(_when: str, _operation: Operation) -> None:
            nonlocal seen
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        try:
            work(world.manager(trace=trace, way=way))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"no trace point {point}"


CASES: dict[str, tuple[bool, Callable[[Manager, Path, Path], object]]] = {
    "apply": (
        False,
        lambda m, s, b: m.apply(Request("x", str(s), str(b)), Progress()),
    ),
    "apply-file": (
        False,
        lambda m, s, b: m.apply(Request("x", str(s / "a"), str(b / "a")), Progress()),
    ),
    "reset": (True, lambda m, _s, _b: m.reset("x", 0)),
    "reset-applied": (True, lambda m, _s, _b: m.reset("x", 1)),
    "remove": (True, lambda m, _s, _b: m.remove("x")),
    "remove-lazy": (True, lambda m, _s, _b: m.remove("x", lazy=True)),
}


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_step_it_is_wholly_there_or_wholly_gone(
    either_world: World, case: str, way: Exchange
) -> None:
    world = either_world
    present, work = CASES[case]
    base = world.base("app", FILES)
    neighbour = world.base("other", FILES)
    source = world.source("s", SOURCE)
    before = snapshot(base)
    beside = world.apply("beside", source, neighbour)
    if present:
        world.apply("x", source, base)
        (base / "a").write_text("edited")
    points = count_points(world, lambda m: work(m, source, base))
    if any(overlay.record.name == "x" for overlay in world.manager().list()):
        world.manager().remove("x")
    assert points > 3
    for point in range(points):
        if present:
            world.apply("x", source, base)
            (base / "a").write_text("edited")
        run_and_die_at(world, point, way, lambda m: work(m, source, base))
        overlays = {overlay.record.name: overlay for overlay in world.manager().list()}
        world.check_invariants()
        assert overlays["beside"].mount_id == beside.mount_id
        shown = (base / "a").read_text()
        if "x" not in overlays:
            assert case not in {"reset", "reset-applied"}
            assert shown == "base a"
            assert snapshot(base) == before
        else:
            assert (
                shown
                in {
                    "apply": {"new a"},
                    "apply-file": {"new a"},
                    "reset": {"edited", "base a"},
                    "reset-applied": {"edited", "new a"},
                    "remove": {"edited"},
                    "remove-lazy": {"edited"},
                }[case]
            )
            # The next command of any kind works.
            world.manager().reset("x", 1)
            assert (base / "a").read_text() == "new a"
            world.manager().remove("x")
        world.apply("x", source, base)
        world.manager().remove("x")
        assert snapshot(base) == before
    world.manager().remove("beside")
    assert world.leftovers() == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", CASES)
def test_failing_at_any_step_everything_is_undone_or_done(
    either_world: World, case: str, when: str
) -> None:
    world = either_world
    present, work = CASES[case]
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    before = snapshot(base)
    point = 0
    while True:
        if present:
            world.apply("x", source, base)
            (base / "a").write_text("edited")
        seen = 0

        def trace(moment: str, operation: Operation) -> None:
            nonlocal seen
            if moment == when:
                if seen == point:  # noqa: B023  # called within this round
                    raise OSError(errno.ENOSPC, "injected", operation.describe())
                seen += 1

        try:
            work(world.manager(trace=trace), source, base)
        except OverlaydError as error:
            assert error.code == "space"  # noqa: PT017  # the loop ends where nothing fails
        else:
            break
        world.manager().list()
        world.check_invariants()
        if any(overlay.record.name == "x" for overlay in world.manager().list()):
            world.manager().remove("x")
        assert snapshot(base) == before
        assert world.leftovers() == []
        point += 1
    assert point > 3


def test_interrupted_at_any_step_of_apply_nothing_is_left(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    world.apply("x", source, base)
    world.manager().remove("x")
    point = 0
    while True:
        progress = Progress()
        seen = 0

        def trace(_moment: str, _operation: Operation) -> None:
            nonlocal seen
            if seen == point:  # noqa: B023
                progress.stop()  # noqa: B023  # called within this round
            seen += 1

        try:
            world.manager(trace=trace).apply(Request("x", str(source), str(base)), progress)
        except InterruptedByUserError:
            assert world.leftovers() == []
        else:
            break
        point += 1
    assert point > 8


def test_killed_at_random_moments_the_command_line_leaves_nothing_half_done(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", {f"d{n % 7}/f{n}": "x" * 5000 for n in range(400)})
    before = snapshot(base)
    generator = random.Random(7)
    start = time.monotonic()
    world.run("apply", "x", source, base)
    whole = time.monotonic() - start
    world.manager().remove("x")
    for _ in range(25):
        process = subprocess.Popen(
            [*COMMAND, "apply", "x", str(source), str(base)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        time.sleep(generator.uniform(whole * 0.4, whole * 1.1))
        process.kill()
        process.wait()
        names = [overlay.record.name for overlay in world.manager().list()]
        if names:
            world.check_invariants()
            assert (base / "d3/f3").read_text() == "x" * 5000
            world.manager().remove("x")
        assert snapshot(base) == before
        assert world.leftovers() == []


NEXT: dict[str, Callable[[World, Path], object]] = {
    "apply of another": lambda w, s: w.run("apply", "y", s, w.base("other", FILES)),
    "list": lambda w, _s: w.run("list"),
    "doctor": lambda w, _s: w.run("doctor"),
    "cleanup": lambda w, _s: w.run("cleanup"),
    "dump": lambda w, _s: w.run("dump"),
}


@pytest.mark.parametrize("command", NEXT)
def test_whatever_command_comes_next_it_frees_what_a_killed_apply_held(
    world: World, command: str
) -> None:
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    # The sixth point is after the copying.
    run_and_die_at(
        world,
        5,
        None,
        lambda m: m.apply(Request("x", str(source), str(base)), Progress()),
    )
    assert world.leftovers()
    assert "cut short" in world.run("cleanup", "--dry-run").stdout
    assert world.leftovers()
    NEXT[command](world, source)
    world.check_invariants()
    assert not any(overlay.record.name == "x" for overlay in world.manager().list())
