# SPDX-License-Identifier: LGPL-2.1-or-later
"""A storm: processes that do random things with the same overlays at once, and are killed in it.

Each operation is drawn from the seed, the process's number and its own, whatever was killed before;
how they fall together is chance.  A killed process is followed by another that goes on with what is
left to do.  All times are in seconds.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from enum import StrEnum
from mmap import mmap
from typing import TYPE_CHECKING, Final

from overlayd import batch
from overlayd import syscalls as sc
from overlayd.errors import OverlaydError
from overlayd.model import Options, Request
from overlayd.progress import Progress
from tests.crash.forked import adopt_orphans, forked, open_files
from tests.mounts.conftest import PLAY, SOURCES, World, tree

if TYPE_CHECKING:
    from pathlib import Path

    from overlayd.manager import Manager

PROCESSES: Final = 8
NAMES: Final = tuple(f"n{number}" for number in range(20))
FILE: Final = "in/deep/a"
TARGETS: Final = (
    *("t0", "t0/in", "t0/in/deep", "t1", "t1/in", "t2", "t2/in", "t3"),
    *(f"t2/{FILE}", f"t3/{FILE}"),
)
"""Places of which only some can have an overlay at a time."""
EDITED: Final = "edited"
"""The file that is written through overlays, and is in no base and no source."""
ANSWERS: Final = ("done", "exists", "not-found", "busy")
"""How an operation may end: well, or with the code of an error."""
_GAVE_UP: Final = ("keeps the lock of all overlays", "is working on")
"""What an error says that comes of having waited for as long as there is patience."""
_KILL_ONE_IN: Final = 50
_HANGS: Final = 120.0
"""Longer than any command may take by the bounds that are asserted."""


class Kind(StrEnum):
    """What is done."""

    APPLY = "apply"
    BATCH = "batch"
    RESET = "reset"
    REMOVE = "remove"
    EDIT = "edit"
    LIST = "list"
    STATUS = "status"
    CLEANUP = "cleanup"


LOOKS: Final = {Kind.LIST, Kind.STATUS}
_WEIGHTS: Final = {
    Kind.APPLY: 26,
    Kind.BATCH: 5,
    Kind.RESET: 20,
    Kind.REMOVE: 25,
    Kind.EDIT: 8,
    Kind.LIST: 7,
    Kind.STATUS: 5,
    Kind.CLEANUP: 4,
}


def lay_out() -> None:
    """Make the bases and the source."""
    for target in ("t0", "t1", "t2", "t3"):
        tree(PLAY / target, dict.fromkeys(("a", "in/a", FILE), "base"))
    tree(SOURCES / "storm", {"a": "new", "more/b": "new"})


def what_shows(place: Path) -> str:
    """Return the text that tells what shows at a target."""
    return (place / "a" if place.is_dir() else place).read_text()


def _request(generator: random.Random, name: str) -> Request:
    target = generator.choice(TARGETS)
    source = SOURCES / "storm"
    options = Options(read_only=generator.random() < 0.2, writable_dirs=())
    return Request(
        name, str(source / "a" if target.endswith(FILE) else source), str(PLAY / target), options
    )


def _batch(world: World, generator: random.Random) -> str:
    names = generator.sample(NAMES, 3)
    requests = [_request(generator, name) for name in names]
    atomic = world.manager if generator.random() < 0.5 else None
    outcomes = batch.run(requests, world.manager, Progress(), jobs=2, atomic=atomic)
    if atomic is not None:
        assert len({outcome.overlay is None for outcome in outcomes}) == 1, outcomes
    if worst := batch.worst(outcomes):
        raise worst
    return "done"


def _edit(generator: random.Random) -> None:
    """Write a file through an overlay, if there is one; never into the base."""
    try:
        fd = os.open(PLAY / generator.choice(TARGETS), os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError:
        return
    try:
        where = os.fstatvfs(fd)
        if sc.fstatfs(fd).type == sc.OVERLAYFS_SUPER_MAGIC and not where.f_flag & os.ST_RDONLY:
            file = os.open(EDITED, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644, dir_fd=fd)
            os.write(file, b"edited" * generator.randrange(2000))
            os.close(file)
            time.sleep(0.005)  # in which it is in use
    finally:
        os.close(fd)


def _name(kind: Kind, manager: Manager, generator: random.Random) -> str:
    """Return a name; for what needs an overlay more often than not one that there is."""
    if kind in {Kind.RESET, Kind.REMOVE, Kind.STATUS} and generator.random() < 0.7:
        present = {overlay.record.name for overlay in manager.list()} & {*NAMES}
        if present:
            return generator.choice(sorted(present))
    return generator.choice(NAMES)


def _do(world: World, kind: Kind, manager: Manager, generator: random.Random) -> None:
    name = _name(kind, manager, generator)
    match kind:
        case Kind.APPLY:
            manager.apply(_request(generator, name), Progress())
        case Kind.BATCH:
            _batch(world, generator)
        case Kind.RESET:
            manager.reset(name, generator.randrange(2))
        case Kind.REMOVE:
            manager.remove(name, lazy=generator.random() < 0.4)
        case Kind.EDIT:
            _edit(generator)
        case Kind.LIST:
            found = manager.list(draining=generator.random() < 0.3)
            assert {overlay.state for overlay in found} <= {"active", "draining"}, found
        case Kind.STATUS:
            assert manager.status(name).state == "active"
        case Kind.CLEANUP:
            failed = [action for action in manager.cleanup() if action.failed is not None]
            assert not failed, failed


class _Notes:
    """What a process tells of itself in memory that is shared, and outlives it."""

    def __init__(self) -> None:
        self._of = memoryview(mmap(-1, 4096)).cast("d")

    def __getitem__(self, what: str) -> float:
        return self._of[_FIELDS.index(what)]

    def __setitem__(self, what: str, value: float) -> None:
        self._of[_FIELDS.index(what)] = value


_FIELDS: Final = ("passed", "to do", "began", "longest look", "longest change", *ANSWERS)


@dataclass(slots=True)
class _Process:
    """One process, and those that followed it."""

    number: int
    notes: _Notes
    pid: int = 0
    wake: int = -1
    """Writing here lets it work."""
    rest: int = -1
    """It writes here when it is done with what there was to do."""
    resting: bool = True

    def close(self) -> None:
        os.close(self.wake)
        os.close(self.rest)


@dataclass
class Storm:
    """The processes and the one that kills them; use it by ``with``."""

    world: World
    seed: int
    kills: int = 0
    """How many were killed in the middle of an operation."""
    seconds: float = 0.0
    _processes: list[_Process] = field(default_factory=list)
    _generator: random.Random = field(init=False)

    def __enter__(self) -> Storm:  # noqa: PYI034
        self._generator = random.Random(f"{self.seed} kills")
        adopt_orphans(yes=True)
        for number in range(PROCESSES):
            process = _Process(number, _Notes())
            self._processes.append(process)
            self._start(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            self._end(process)
        adopt_orphans(yes=False)

    def most(self, what: str) -> float:
        """Return the largest that a process has noted."""
        return max(process.notes[what] for process in self._processes)

    def sum(self, what: str) -> int:
        """Return what all processes have noted together."""
        return int(sum(process.notes[what] for process in self._processes))

    def blow(self, operations: int) -> None:
        """Let each process do so many operations, kill now and then, and wait until all rest."""
        began = time.monotonic()
        for process in self._processes:
            process.notes["to do"] += operations
            process.resting = False
            os.write(process.wake, b"w")
        until = self._next_kill()
        while not all(process.resting for process in self._processes):
            time.sleep(0.001)
            for process in self._processes:
                self._look_after(process)
            if self.sum("passed") >= until:
                until = self._next_kill()
                self._kill_one()
        self.seconds += time.monotonic() - began

    def _next_kill(self) -> float:
        return self.sum("passed") + self._generator.expovariate(1 / _KILL_ONE_IN)

    def _kill_one(self) -> None:
        busy = [process for process in self._processes if not process.resting]
        if not busy:
            return
        process = self._generator.choice(busy)
        time.sleep(self._generator.uniform(0, 0.02))
        self._end(process)
        if process.notes["began"]:
            self.kills += 1
            process.notes["passed"] += 1
        self._start(process)
        os.write(process.wake, b"w")
        process.resting = False

    def _look_after(self, process: _Process) -> None:
        """See whether a process rests, and that it has neither failed nor hangs."""
        if process.resting:
            return
        try:
            answer = os.read(process.rest, 1)
        except BlockingIOError:
            began = process.notes["began"]
            if began and time.monotonic() - began > _HANGS:
                raise AssertionError(f"process {process.number} hangs") from None
            return
        if not answer:
            raise AssertionError(f"process {process.number} failed, see standard error")
        process.resting = True

    @staticmethod
    def _end(process: _Process) -> None:
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)
        process.close()

    def _start(self, process: _Process) -> None:
        waking, process.wake = os.pipe()
        process.rest, resting = os.pipe()
        os.set_blocking(process.rest, False)
        process.notes["began"] = 0.0

        def work() -> None:
            for each in self._processes:  # else nobody would see another's end
                each.close()
            _work(process, self.seed, waking, resting)

        process.pid = forked(work)
        os.close(waking)
        os.close(resting)


def _work(process: _Process, seed: int, waking: int, resting: int) -> None:
    """Do what there is to do whenever woken; keep the same number of files open."""
    notes = process.notes
    world = World()
    kept = world.manager()
    usual = open_files()
    while os.read(waking, 1):
        while notes["passed"] < notes["to do"]:
            generator = random.Random(f"{seed} {process.number} {int(notes['passed'])}")
            (kind,) = generator.choices(list(_WEIGHTS), [*_WEIGHTS.values()])
            # Now as a service, now as a command that begins.
            manager = kept if generator.random() < 0.5 else world.manager()
            notes["began"] = began = time.monotonic()
            answer = "done"
            try:
                _do(world, kind, manager, generator)
            except OverlaydError as error:
                answer = error.code
                if answer not in ANSWERS or any(text in error.message for text in _GAVE_UP):
                    raise
            took = "longest look" if kind in LOOKS else "longest change"
            notes[took] = max(notes[took], time.monotonic() - began)
            notes[answer] += 1
            notes["passed"] += 1
            notes["began"] = 0.0
        assert open_files() == usual
        assert not any("quarantine" in text for text in world.warnings), world.warnings
        os.write(resting, b"r")
