# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands that faults are thrown at, what there is before, and what has to hold afterwards."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from overlayd import cli
from overlayd import syscalls as sc
from overlayd.errors import NotFoundError
from tests.crash import tracing
from tests.mounts.conftest import PLAY, RUN, SOURCES, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.crash.tracing import Act, Outcome, Point
    from tests.mounts.conftest import World

BASE: Final = {"a": "base a", "sub/b": "base b", "old": "base old", "link": "-> a"}
SOURCE: Final = {"a": "new a", "sub/c": "new c", "more/deep/d": "new d"}
BATCH: Final = SOURCES / "batch.toml"
View = dict[str, dict[str, tuple[object, ...]]]


@dataclass
class Stage:
    """A world with two bases for what is tried, and a neighbour that nothing may happen to."""

    world: World
    root: Path = PLAY / "app"
    second: Path = PLAY / "second"
    lost: bool = False
    """Whether there is one for 'cleanup' to remove."""
    source: Path = SOURCES / "s"
    _bases: View = field(default_factory=dict)
    _beside: tuple[object, ...] = ()
    _fds: int = 0

    def __post_init__(self) -> None:
        """Make all that, and remember how it is."""
        for base in (self.root, self.second, PLAY / "beside"):
            self.world.base(base.name, BASE)
        self.world.source("s", SOURCE)
        BATCH.write_text(
            "".join(
                f'[[overlay]]\nname = "{name}"\nsource = "{self.source}"\ntarget = "{target}"\n'
                for name, target in (("x", self.root), ("y", self.second))
            )
        )
        self._bases = {str(base): snapshot(base) for base in (self.root, self.second)}
        self.world.apply("beside", self.source, PLAY / "beside")
        (PLAY / "beside" / "edit").write_text("edit")
        self._beside = self._neighbour()
        self._fds = len(os.listdir("/proc/self/fd"))

    def _neighbour(self) -> tuple[object, ...]:
        overlay = self.world.manager().status("beside")
        return overlay.mount_id, overlay.state, overlay.record, snapshot(PLAY / "beside")

    def view(self) -> View:
        """Return what the two bases show, but for times."""
        return {
            str(base): {path: (*facts[:3], facts[4]) for path, facts in snapshot(base).items()}
            for base in (self.root, self.second)
        }

    def inventory(self) -> list[str]:
        """Name all that there is of overlays, whatever state it is in."""
        return sorted(place for place in self.world.leftovers() if "/.new-" not in place)

    def apply(self, name: str = "x", *, read_only: bool = False) -> None:
        """Apply what is tried, and edit it."""
        base = self.root if name == "x" else self.second
        self.world.apply(name, self.source, base, read_only=read_only)
        if not read_only:
            (base / "sub/c").write_text("edited")
            (base / "old").unlink()

    def clear(self) -> None:
        """Remove what is tried; nothing of it may be left then."""
        manager = self.world.manager()
        for overlay in manager.list():
            if overlay.record.name != "beside":
                manager.remove(overlay.record.name)
        manager.cleanup()
        uuid = manager.status("beside").record.uuid
        left = [place for place in self.world.leftovers() if uuid not in place]
        assert left == [str(PLAY / "beside")], left
        assert {str(base): snapshot(base) for base in (self.root, self.second)} == self._bases

    def check(self, *views: View) -> None:
        """Assert that each base shows what it does in one of *views*, and all else is as it was."""
        self._check_view(views)
        self.world.manager().list()  # the next command, which settles what was begun
        if self.lost:
            self.world.manager().cleanup()
        self.world.check_invariants()
        self._check_view(views)
        assert self._neighbour() == self._beside
        assert len(os.listdir("/proc/self/fd")) == self._fds
        assert not os.path.exists(RUN / "quarantine") or not os.listdir(RUN / "quarantine")

    def _check_view(self, views: tuple[View, ...]) -> None:
        for base, found in self.view().items():
            assert found in [view[base] for view in views], base

    def use(self, turn: int) -> None:
        """Do what somebody may do next: it has to work, whatever is there."""
        manager = self.world.manager()
        there = any(overlay.record.name == "x" for overlay in manager.list())
        commands: list[Callable[[], object]] = [
            lambda: manager.reset("x", 0),
            lambda: manager.reset("x", 1),
            lambda: manager.remove("x"),
            lambda: manager.remove("x", lazy=True),
            lambda: manager.status("x"),
        ]
        with contextlib.nullcontext() if there else _not_found():
            commands[turn % len(commands)]()
        if all(overlay.record.name != "x" for overlay in manager.list()):
            self.apply()
        self.world.check_invariants()


@contextlib.contextmanager
def _not_found() -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        return
    raise AssertionError("what is not there was found")


@dataclass(frozen=True)
class Scene:
    """A command, what it finds, and the exit code that it has if nothing happens."""

    arguments: tuple[str, ...]
    prepare: Callable[[Stage], object] = lambda _stage: None
    code: int = 0

    def extent(
        self, stage: Stage, calls: dict[int, str] | None = None
    ) -> tuple[View, View, list[Point]]:
        """Return what is shown before and after the command, and its points."""
        for _ in range(2):  # the first time it makes what stays, such as the history
            stage.clear()
            self.prepare(stage)
            before = stage.view()
            outcome = self.run(stage, calls=calls)
            assert outcome.code == self.code, outcome.said
        return before, stage.view(), outcome.points

    def run(
        self,
        stage: Stage,
        act: Callable[[Point], Act] = tracing.nothing,
        calls: dict[int, str] | None = None,
    ) -> Outcome:
        """Run the command in a child, as its program does."""
        words = {"SOURCE": stage.source, "BASE": stage.root, "BATCH": BATCH}
        argv = ["overlayd", *(argument.format(**words) for argument in self.arguments)]

        def work() -> None:
            sys.argv = argv
            cli.main()

        return tracing.run(work, act, calls=calls)


def _lose(stage: Stage) -> None:
    """Leave what 'cleanup' is for: an overlay that somebody unmounted."""
    stage.apply("y")
    stage.lost = True
    sc.umount2(str(stage.second))


SCENES: Final = {
    "apply": Scene(("apply", "x", "{SOURCE}", "{BASE}")),
    "apply a file": Scene(("apply", "x", "{SOURCE}/a", "{BASE}/a")),
    "apply read-only": Scene(("apply", "x", "{SOURCE}", "{BASE}", "--read-only")),
    "reset": Scene(("reset", "x"), Stage.apply),
    "reset to applied": Scene(("reset", "x", "--to", "applied"), Stage.apply),
    "remove": Scene(("remove", "x"), Stage.apply),
    "remove lazily": Scene(("remove", "x", "--lazy"), Stage.apply),
    "batch": Scene(("batch", "{BATCH}", "--jobs", "1")),
    "batch of threads": Scene(("batch", "{BATCH}", "--jobs", "2")),
    "atomic batch": Scene(("batch", "{BATCH}", "--atomic")),
    "cleanup": Scene(("cleanup",), _lose),
}
