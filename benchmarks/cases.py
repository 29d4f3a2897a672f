# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is measured: one function per line (or few lines) of the table.

Every case leaves its world as it found it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys as python
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import baseline, world
from benchmarks.measure import Meter, Row, paired, run_quietly, timed
from overlayd import homes
from overlayd import syscalls as sys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from overlayd.manager import Manager

_FEW: Final = 10
_MANY: Final = 500
_LOOKS: Final = 100
_FILE_SIZE: Final = 4096
_PYTHON: Final = (python.executable, "-c")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a case runs and how thoroughly."""

    ground: str
    temporary: str
    meter: Meter
    quick: bool

    def times(self, full: int, quick: int) -> int:
        """Return how often to do something."""
        return quick if self.quick else full

    def directory(self, name: str) -> str:
        """Make a directory on the ground that can be a target."""
        path = f"{self.ground}/{name}"
        os.mkdir(path)
        return path

    def source(self, name: str) -> str:
        """Make a source of ten files."""
        return world.small_source(f"{self.temporary}/{name}")


def cycle(here: Setting) -> Iterator[Row]:
    """Apply and remove a small source."""
    source, target, other = (
        here.source("cycle"),
        here.directory("cycle"),
        here.directory("straight"),
    )
    manager = world.make_manager()

    def ours() -> None:
        world.apply(manager, "cycle", source, target)
        manager.remove("cycle")

    pair = paired(
        lambda: timed(ours),
        lambda: timed(lambda: baseline.apply_and_remove(source, other)),
        here.meter,
        rounds=here.times(20, 5),
        inner=here.times(50, 20),
    )
    yield Row("cycle", "apply + remove, 10 files", "the same bare system calls", pair, 1.5)


def copy(here: Setting) -> Iterator[Row]:
    """Apply a large source."""
    files, size = here.times(20_000, 4_000), here.times(400, 80) * 10**6
    source = world.large_source(f"{here.temporary}/large", files, size)
    target, other = here.directory("large"), f"{here.ground}/copy"
    os.mkdir(other)
    manager = world.make_manager()
    room = size + files * 4096

    def ours() -> float:
        seconds = timed(lambda: world.apply(manager, "large", source, target))
        manager.remove("large")
        return seconds

    def against() -> float:
        world.attach_tmpfs(other, room, files * 2)
        seconds = timed(lambda: run_quietly("cp", "-a", f"{source}/.", other))
        sys.umount2(other)
        return seconds

    try:
        pair = paired(ours, against, here.meter, rounds=here.times(9, 3), inner=1)
    finally:
        shutil.rmtree(source)
    what = f"apply, {files:,} files, {size // 10**6} MB"
    yield Row("copy", what, "cp -a to a like tmpfs", pair, 0.6)


def reset(here: Setting) -> Iterator[Row]:
    """Reset to the state as applied."""
    source, target, other = here.source("reset"), here.directory("reset"), here.directory("moved")
    manager = world.make_manager()
    world.apply(manager, "reset", source, target)
    baseline.apply(source, other, "reset")
    numbers = itertools.count(1)
    pair = paired(
        lambda: timed(lambda: manager.reset("reset", world.APPLIED)),
        lambda: timed(lambda: baseline.reset(other, "reset", next(numbers))),
        here.meter,
        rounds=here.times(20, 5),
        inner=here.times(50, 20),
    )
    manager.remove("reset")
    baseline.remove(other, "reset", next(numbers))
    yield Row("reset", "reset --to applied", "the same bare system calls", pair, 2)


def _command(*flags: str) -> tuple[str, ...]:
    """Return the command line of overlayd in this environment, with flags for Python."""
    script = Path(python.executable).with_name("overlayd")
    how = (str(script),) if script.exists() else ("-m", "overlayd")
    return (python.executable, *flags, *how)


def start(here: Setting) -> Iterator[Row]:
    """List ten overlays, as a process."""
    manager = world.make_manager()
    with world.overlays(manager, here.source("start"), here.ground, _FEW):
        for name, flags, goal in (("list", (), 1.5), ("list-isolated", ("-I",), None)):
            ours = (*_command(*flags), "list")
            against = (python.executable, *flags, "-c", "import click")
            pair = paired(
                lambda: timed(lambda: run_quietly(*ours)),  # noqa: B023  # called at once
                lambda: timed(lambda: run_quietly(*against)),  # noqa: B023
                here.meter,
                rounds=here.times(15, 3),
                inner=here.times(6, 5),
            )
            note = " ".join((", python", *flags)) if flags else ""
            yield Row(
                name,
                f"overlayd list, {_FEW} overlays{note}",
                "import click",
                pair,
                goal,
            )


def private(here: Setting) -> Iterator[Row]:
    """Start a program that sees private overlays: a live one, and one made for it."""
    source, target = here.source("private"), here.directory("private")
    command = _command()
    run_quietly(*command, "apply", "private", source, target, "--private")
    with homes.opened() as home:
        holder = homes.find(home)
    nsenter = ("nsenter", "--mount", f"--target={holder}", "true")
    bubble = ("--bind", "/", "/", "--overlay-src", target, "--overlay-src", source)
    bwrap = ("bwrap", *bubble, "--tmp-overlay", target, "true")
    enter = ("enter", "private", "--", "true")
    shots: list[tuple[str, tuple[str, ...], str, tuple[tuple[str, ...], ...], float | None]] = [
        ("enter", enter, "nsenter, and python -c pass", (nsenter, (*_PYTHON, "pass")), 2),
    ]
    if _has_overlays("bwrap"):
        once = ("run", f"{source}:{target}", "--", "true")
        shots.append(("run", once, "bwrap --overlay-src …", (bwrap,), None))
    try:
        for name, words, what, against, goal in shots:
            pair = paired(
                lambda: timed(lambda: run_quietly(*command, *words)),  # noqa: B023  # called at once
                lambda: sum(timed(lambda: run_quietly(*each)) for each in against),  # noqa: B023
                here.meter,
                rounds=here.times(15, 3),
                inner=here.times(6, 5),
            )
            yield Row(name, f"overlayd {words[0]} … -- true", what, pair, goal)
    finally:
        run_quietly(*command, "remove", "private")


def _has_overlays(program: str) -> bool:
    """Whether this bwrap knows overlays (0.11)."""
    if shutil.which(program) is None:
        return False
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    return "--overlay-src" in done.stdout


def many(here: Setting) -> Iterator[Row]:
    """Apply with many overlays present and with one; each in a world of its own."""
    source = here.source("many")

    def setup(present: int) -> Callable[[str], dict[str, Callable[[], float]]]:
        def works(ground: str) -> dict[str, Callable[[], float]]:
            manager = world.make_manager()
            target = f"{ground}/target"
            os.mkdir(target)
            for number in range(present):
                os.mkdir(f"{ground}/{number}")
                world.apply(manager, f"many{number}", source, f"{ground}/{number}")

            def one_more(manager: Manager) -> float:
                seconds = timed(lambda: world.apply(manager, "one-more", source, target))
                manager.remove("one-more")
                return seconds

            def fresh() -> float:
                start = timed(world.make_manager)
                return start + one_more(world.make_manager())

            return {"known": lambda: one_more(manager), "fresh": fresh}

        return works

    with world.Worker(setup(_MANY)) as crowd, world.Worker(setup(1)) as alone:
        for name, what, goal in (
            ("known", "", 1.5),
            ("fresh", ", new manager", None),
        ):
            pair = paired(
                lambda: crowd.do(name),  # noqa: B023  # called at once
                lambda: alone.do(name),  # noqa: B023
                here.meter,
                rounds=here.times(20, 5),
                inner=here.times(15, 8),
            )
            yield Row(
                f"many-{name}",
                f"apply, {_MANY} overlays present{what}",
                "1 overlay present",
                pair,
                goal,
            )


def list_many(here: Setting) -> Iterator[Row]:
    """List many overlays, as a process."""
    manager = world.make_manager()
    with world.overlays(manager, here.source("list-many"), here.ground, _MANY):
        ours = (*_command(), "list")
        pair = paired(
            lambda: timed(lambda: run_quietly(*ours)),
            lambda: timed(lambda: run_quietly("findmnt", "-l")),
            here.meter,
            rounds=here.times(10, 3),
            inner=here.times(5, 2),
        )
    yield Row("list-many", f"overlayd list, {_MANY} overlays", "findmnt -l", pair)


def access(here: Setting) -> Iterator[Row]:
    """Look at the base's files, and files of the layer, through the target."""
    target, source = here.directory("access"), f"{here.temporary}/access"
    os.mkdir(source)
    names = [f"file{number}" for number in range(_LOOKS)]
    for number, name in enumerate(names):
        Path(target, name).write_bytes(b"b" * _FILE_SIZE)
        if number % 2:
            Path(source, name).write_bytes(b"l" * _FILE_SIZE)
    base = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    manager = world.make_manager()
    world.apply(manager, "access", source, target)
    top = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def read(directory: int) -> None:
        for name in names:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            os.read(fd, _FILE_SIZE)
            os.close(fd)

    def stat(directory: int) -> None:
        for name in names:
            os.stat(name, dir_fd=directory)

    try:
        for name, work, look in (
            ("read", f"open+read, {_LOOKS} files", read),
            ("stat", f"stat, {_LOOKS} files", stat),
            ("readdir", f"readdir, {_LOOKS} files", os.listdir),
        ):
            pair = paired(
                lambda: timed(lambda: look(top)),  # noqa: B023  # called at once
                lambda: timed(lambda: look(base)),  # noqa: B023
                here.meter,
                rounds=here.times(20, 5),
                inner=here.times(200, 50),
            )
            yield Row(name, f"{work} in the target", "the base itself", pair)
    finally:
        os.close(top)
        os.close(base)
        manager.remove("access")


CASES: Final[dict[str, Callable[[Setting], Iterator[Row]]]] = {
    "cycle": cycle,
    "copy": copy,
    "reset": reset,
    "list": start,
    "private": private,
    "many": many,
    "list-many": list_many,
    "access": access,
}
