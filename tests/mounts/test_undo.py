# SPDX-License-Identifier: LGPL-2.1-or-later
"""Failure and SIGKILL within an operation, between any two of its changes.

``test_crash.py`` looks from one operation to the next.  Here the calls by which anything changes
are counted, and the n-th fails, or the process ends before it.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest

from overlayd import ops, overlayfs
from overlayd import syscalls as sc
from overlayd.errors import KernelError, OverlaydError
from overlayd.model import Request, State
from overlayd.progress import Progress
from tests.mounts.conftest import RUN, snapshot
from tests.mounts.test_crash import CASES, FILES, SOURCE, count_points, run_and_die_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from tests.mounts.conftest import World

MOUNTING = (
    *("fsopen", "fsconfig", "fsmount", "fspick", "move_mount", "open_tree", "openat2"),
    *("umount2", "umount_fd", "mount_propagation", "mount_setattr_propagation"),
)
MAKING = ("mkdir", "rmdir", "rename", "unlink", "write", "pwrite", "fchmod", "fchown")


def count_calls(patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call *before* with its number before each call that changes something."""
    seen = 0

    def counted(genuine: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal seen
            seen += 1
            before(seen - 1)
            return genuine(*arguments, **options)

        return call

    for module, names in ((sc, MOUNTING), (os, MAKING)):
        for name in names:
            patch.setattr(module, name, counted(getattr(module, name)))


def dies_before(number: int, work: Callable[[], object]) -> bool:
    """Do *work* in a child that kills itself before its change *number*; whether there was one."""
    child = os.fork()
    if child == 0:

        def before(seen: int) -> None:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with pytest.MonkeyPatch.context() as patch:
                count_calls(patch, before)
                work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def look(world: World) -> None:
    """Let the next command come, and check the invariants.

    Of a record that was being written its new version is left, which the next write takes.
    """
    world.manager().list()
    world.warnings.clear()
    world.manager().list()
    assert world.warnings == [], "once is enough"
    for name in os.listdir(RUN / "records"):
        if name.startswith(".new-"):
            (RUN / "records" / name).unlink()
    world.check_invariants()


def remove_if_there(world: World, name: str) -> None:
    if any(overlay.record.name == name for overlay in world.manager().list()):
        world.manager().remove(name)


@dataclass
class Failing:
    """Work that fails at its point number ``point``: ``seen`` is how many came."""

    point: int
    within: bool
    seen: int = 0
    decided: bool = False
    failed: bool = False

    def reach(self, _number: int = 0) -> None:
        """Count a point, and fail if it is the one."""
        self.seen += 1
        if self.seen == self.point:
            raise OSError(errno.EIO, "injected")

    def trace(self, when: str, operation: Operation) -> None:
        """Look at what the executor does; its steps are points unless those lie *within*."""
        self.decided |= when == "after" and operation.decisive
        if when != "undo" and not self.within:
            self.reach()

    def do(self, work: Callable[[], object]) -> None:
        """Do the work."""
        with pytest.MonkeyPatch.context() as patch:
            if self.within:
                count_calls(patch, self.reach)
            try:
                work()
            except OverlaydError:
                self.failed = True


@pytest.mark.parametrize("within", [True, False], ids=["within a step", "between steps"])
@pytest.mark.parametrize("case", CASES)
def test_what_fails_and_is_undone_leaves_nothing_to_finish(
    world: World, monkeypatch: pytest.MonkeyPatch, case: str, *, within: bool
) -> None:
    # As before Linux 6.15, which takes one step more.
    monkeypatch.setattr(overlayfs, "takes_detached_layers", lambda _: False)
    present, work = CASES[case]
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    before = snapshot(base)
    world.apply("x", source, base)  # what is made once is made
    world.manager().remove("x")
    failing = Failing(0, within)
    failures = 0
    while failing.point <= failing.seen:
        if present:
            world.apply("x", source, base)
        world.warnings.clear()
        failing = Failing(failing.point + 1, within)
        descriptors = os.listdir("/proc/self/fd")
        failing.do(partial(work, world.manager(trace=failing.trace), source, base))
        assert os.listdir("/proc/self/fd") == descriptors
        overlays = world.manager().list()
        if failing.failed and not failing.decided:
            failures += 1
            assert world.warnings == [], "something was left to finish"
            assert [overlay.record.name for overlay in overlays] == ["x"] * present
        world.check_invariants()
        remove_if_there(world, "x")
        assert snapshot(base) == before
        assert world.leftovers() == []
    assert failures > 1


@pytest.mark.parametrize("case", [*CASES, "undone"])
def test_killed_within_an_operation_the_next_command_finishes_or_drops_it(
    world: World, case: str
) -> None:
    def undone(manager: Manager, source: Path, base: Path) -> None:
        manager.prepare(Request("x", str(source), str(base)), Progress()).abandon()

    present, work = CASES.get(case, (False, undone))
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    before = snapshot(base)
    # What is made once is made, so that all other points come in turn.
    world.apply("beside", source / "a", world.base("other", FILES) / "a")
    number = 0
    while True:
        if present:
            world.apply("x", source, base)
        died = dies_before(number, lambda: work(world.manager(), source, base))
        look(world)
        remove_if_there(world, "x")
        assert snapshot(base) == before
        if not died:
            break
        number += 1
    assert number > 8
    world.manager().remove("beside")
    assert world.leftovers() == []


@pytest.mark.parametrize("case", ["apply", "reset", "remove"])
def test_killed_while_settling_the_next_command_goes_on_with_it(world: World, case: str) -> None:
    present, work = CASES[case]
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    before = snapshot(base)
    points = count_points(world, lambda m: CASES["apply"][1](m, source, base))
    if present:
        points = count_points(world, lambda m: work(m, source, base))
    remove_if_there(world, "x")
    tried = 0
    for point in range(points):
        number = 0
        while True:
            if present:
                world.apply("x", source, base)
            run_and_die_at(world, point, None, lambda m: work(m, source, base))
            died = dies_before(number, lambda: world.manager().list())
            look(world)
            remove_if_there(world, "x")
            assert snapshot(base) == before
            assert world.leftovers() == []
            if not died:
                break
            number += 1
        tried += number
    assert tried > points


def test_mount_of_somebody_else_stays_when_an_apply_is_undone(world: World) -> None:
    base, source = world.base("app", FILES), world.source("s", SOURCE)
    before = snapshot(base)

    def trace(when: str, operation: Operation) -> None:
        if (when, type(operation)) == ("after", ops.Attach):
            subprocess.run(["mount", "-t", "tmpfs", "foreign", base], check=True)
            raise KernelError("a failure")

    with pytest.raises(KernelError, match="a failure"):
        world.apply("x", source, base, manager=world.manager(trace=trace))
    for _ in range(2):
        (overlay,) = world.manager().list()  # which has finished what could not be undone
        assert overlay.state is State.COVERED
        assert list(base.iterdir()) == []
    sc.umount2(str(base))
    world.manager().remove("x")
    assert snapshot(base) == before
    assert world.leftovers() == []


def test_killed_within_the_first_command_of_a_boot_the_next_begins_anew(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    number = 0
    while dies_before(number, lambda: world.apply("x", source, base)):
        world.apply("y", source, world.base("other", FILES))
        look(world)
        remove_if_there(world, "x")
        world.manager().remove("y")
        assert world.leftovers() == []
        sc.umount2(str(RUN), sc.MNT_DETACH)
        RUN.rmdir()
        number += 1
    assert number > 20


def test_what_was_cut_short_is_not_said_to_be_lost(world: World) -> None:
    base = world.base("app", FILES)
    source = world.source("s", SOURCE)
    run_and_die_at(world, 5, None, lambda m: CASES["apply"][1](m, source, base))
    assert [action.kind for action in world.manager().cleanup(dry_run=True)] == ["unfinished"]
    assert [action.kind for action in world.manager().cleanup()] == ["unfinished"]
    assert world.leftovers() == []
