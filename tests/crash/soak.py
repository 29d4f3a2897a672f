# SPDX-License-Identifier: LGPL-2.1-or-later
"""A long, ordinary life, watched: nothing may grow, and a reader must never see a gap.

    python -m tests.crash.soak --minutes N [--out FILE.svg]

In a mount namespace of its own, as root: a manager that stays, commands, and where there are
dbus-daemon and polkitd the service with a user's calls do their work in rounds.  After each round
all rest with what they made removed, and the figures are taken.  Those of processes and of the
namespace are judged; those of the whole machine, in which others have a share, are shown.
The exit code is 1 if something grew, a command failed or the reader saw anything but old or new.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import gap
from overlayd import mountinfo
from overlayd.errors import BusyError
from overlayd.model import Request
from overlayd.observer import Observer
from overlayd.progress import Progress
from tests.bus.conftest import Bus, furnish
from tests.bus.peer import Peer, resident, threads_and_fds
from tests.crash.flatness import LEAST, Series, draw
from tests.crash.forked import forked
from tests.mounts.conftest import PLAY, RUN, SOURCES, World, enter_new_world, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_NEEDED: Final = ("dbus-daemon", "busctl", "/usr/lib/polkit-1/polkitd")
_TOLD: Final = Path("/run/told/log")
_STEADY, _CYCLED, _COMMANDS, _HERS = (str(PLAY / name) for name in "abcd")
_SOURCE: Final = str(SOURCES / "soak")
_BASE, _LAYER, _EDIT = b"base", b"layer", b"edit"
_SEEN: Final = {f"{_STEADY}/file": {_LAYER, _EDIT}, f"{_CYCLED}/file": {_BASE, _LAYER, _EDIT}}
"""What may be read: the first overlay stays, and is only edited and reset to what was applied."""
_TYPED: Final = (
    *(("list",), ("status", "typed"), ("reset", "typed", "--to", "applied"), ("dump",)),
    *(("cleanup",), ("list", "--all"), ("reset", "typed"), ("doctor",)),
)
_PATIENCE: Final = 60.0
_END: Final = b"end"
_SLABS: Final = ("ovl_inode", "dentry", "shmem_inode_cache")
_MIB: Final = 1 << 20


def say(text: str) -> None:
    """Tell people."""
    print(text, flush=True)  # noqa: T201  # a program


class Reader(gap.Reader):
    """A process that reads files again and again and compares what it reads."""

    def __init__(self, allowed: Mapping[str, set[bytes]]) -> None:
        super().__init__("")
        self._allowed = allowed

    def _look(self) -> dict[str, int]:
        opens = failed = other = 0
        while not self._shared[0]:
            for path, allowed in self._allowed.items():
                opens += 1
                try:
                    fd = os.open(path, os.O_RDONLY)
                    other += os.read(fd, 16) not in allowed
                    os.close(fd)
                except OSError:
                    failed += 1
            self._shared[1] = 1
            time.sleep(0.0005)  # others want to run
        return {"opens": opens, "failed": failed, "base": 0, "other": other}


class Worker:
    """A process that does its work again and again for a while whenever told to, and then rests."""

    def __init__(self, name: str, begin: Callable[[], Callable[[], None]]) -> None:
        """Call *begin* in the process, and whatever that returns as often as there is time for."""
        self.name = name
        self.rounds = 0
        waking, self._wake = os.pipe()
        self._rest, resting = os.pipe()

        def work() -> None:
            os.close(self._wake)  # or the end of whoever wakes it would not be noticed
            os.close(self._rest)
            cycle = begin()
            os.write(resting, b"0")
            while (seconds := os.read(waking, 20)) not in {_END, b""}:
                count, until = 0, time.monotonic() + float(seconds)
                while not count or time.monotonic() < until:
                    cycle()
                    count += 1
                os.write(resting, b"%d" % count)

        self.pid = forked(work)
        os.close(waking)
        os.close(resting)
        self.wait()

    def wake(self, seconds: float) -> None:
        """Let it work for about so long."""
        os.write(self._wake, str(seconds).encode())

    def wait(self) -> None:
        """Wait until it rests.

        :raises AssertionError: if it failed, or takes too long.
        """
        ready, _, _ = select.select([self._rest], [], [], _PATIENCE)
        answer = os.read(self._rest, 20) if ready else b""
        assert answer, f"{self.name} {'failed, see above' if ready else 'hangs'}"
        self.rounds += int(answer)

    def end(self) -> None:
        """Let it end, and wait for it."""
        os.write(self._wake, _END)
        os.waitpid(self.pid, 0)


def _edit(target: str) -> None:
    """Exchange a file by one with other content, as editors do."""
    fresh = Path(target, ".fresh")
    fresh.write_bytes(_EDIT)
    fresh.rename(Path(target, "file"))


def manager_that_stays(world: World, leak: list[int]) -> Callable[[], None]:
    """Begin with an overlay that stays; then apply, edit, look, reset and remove another."""
    manager = world.manager()
    observer = Observer(warn=world.warnings.append)
    manager.apply(Request("steady", _SOURCE, _STEADY), Progress())

    def cycle() -> None:
        manager.apply(Request("cycled", _SOURCE, _CYCLED), Progress())
        _edit(_CYCLED)
        _edit(_STEADY)
        assert {overlay.state for overlay in observer.list()} == {"active"}
        manager.reset("steady", 1)
        manager.reset("cycled", 0)
        _edit(_CYCLED)
        assert observer.status("cycled").storage is not None
        manager.reset("cycled", 1)
        try:
            manager.remove("cycled")
        except BusyError:  # by the reader
            manager.remove("cycled", lazy=True)
        if leak:
            leak.append(os.dup(0))
        assert not world.warnings, world.warnings
        time.sleep(0.01)

    return cycle


def user_of_the_bus() -> Callable[[], None]:
    """Begin with a connection of a user's; then call all that she may."""
    alice = Peer("alice")

    def cycle() -> None:
        assert not alice.apply("hers", _HERS, {"file": "layer"}).error
        _edit(_HERS)
        assert "hers" in alice.list().listed()
        for version in (1, 0):
            assert not alice.reset("hers", version).error
        assert not alice.remove("hers").error
        time.sleep(0.005)

    return cycle


def commands(world: World, number: int) -> None:
    """Run what an administrator types, each time something else in the middle."""
    world.run("apply", "typed", _SOURCE, _COMMANDS)
    _edit(_COMMANDS)
    world.run(*_TYPED[number % len(_TYPED)])
    world.run("remove", "typed")


class Figures:
    """All that is measured."""

    def __init__(self, processes: Mapping[str, int], memory: float) -> None:
        """Measure these *processes*, whose memory may grow by so many MiB, and what is around."""
        self._memory = memory
        self._processes = processes
        self._namespace = mountinfo.namespace()
        self.all: dict[str, Series] = {}

    def _take(self, series: Series, value: float) -> None:
        self.all.setdefault(series.name, series).values.append(value)

    def take(self) -> None:
        """Take a value of each."""
        for name, pid in self._processes.items():
            # polkitd's memory is its JavaScript engine's, which collects when it likes.
            memory = Series(f"{name}: memory", "MiB", self._memory, 0.02, judged=name != "polkit")
            self._take(memory, resident(pid) / _MIB)
            _, files = threads_and_fds(pid)
            self._take(Series(f"{name}: descriptors"), files)
        self._take(Series("mounts in the namespace"), len(list(mountinfo.read())))
        self._take(Series("processes in the namespace"), self._count_processes())
        for place, spare in ((RUN, 0.0), (Path("/run"), 64.0)):
            facts = os.statvfs(place)
            used = (facts.f_blocks - facts.f_bfree) * facts.f_frsize / 1024
            self._take(Series(f"{place}: bytes used", "KiB", spare), used)
            self._take(Series(f"{place}: inodes used"), facts.f_files - facts.f_ffree)
        kept = os.statvfs("/var/lib")
        history = (kept.f_blocks - kept.f_bfree) * kept.f_frsize / 1024
        self._take(Series("history, up to its limit", "KiB", judged=False), history)
        for name, value in _of_the_machine():
            self._take(Series(f"whole machine: {name}", "MiB", judged=False), value)

    def _count_processes(self) -> int:
        found = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                found += mountinfo.namespace(pid) == self._namespace
        return found


def _of_the_machine() -> Iterator[tuple[str, float]]:
    """Yield what the kernel says of all memory, in MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in {"MemAvailable", "Shmem", "SUnreclaim"}:
            yield name, int(rest.split()[0]) / 1024
    with contextlib.suppress(OSError):
        for line in Path("/proc/slabinfo").read_text().splitlines():
            words = line.split()
            if words[0] in _SLABS:
                yield f"slab {words[0]}", int(words[1]) * int(words[3]) / _MIB


@contextlib.contextmanager
def _bus(world: World) -> Iterator[Bus | None]:
    """Have the service, a bus and polkit, if they are installed."""
    if missing := [name for name in _NEEDED if shutil.which(name) is None]:
        say(f"without the service: {', '.join(missing)} not installed here")
        yield None
        return
    furnish()
    bus = Bus(world.warnings)
    try:
        bus.begin()
        bus.config.write_text('[users]\ncalls = 1000000\n[history]\nsize = "256K"\n')
        bus.serve(idle=1e6)
        yield bus
    finally:
        bus.close()


def soak(minutes: float, *, leak: bool) -> tuple[list[Series], list[str]]:
    """Work, look on and measure for so long; return the figures, and what went wrong."""
    enter_new_world()
    world = World()
    for place in (_STEADY, _CYCLED, _COMMANDS, _HERS):
        tree(Path(place), {"file": _BASE.decode()})
    tree(Path(_SOURCE), {"file": _LAYER.decode(), "sub/other": "x" * 10_000})
    seconds = minutes * 60
    step = min(5.0, max(0.5, seconds / 200))
    memory = 1.0 if minutes >= 1 else 6.0  # at first modules are loaded, and threads begin
    with _bus(world) as bus:
        manager = Worker("manager", lambda: manager_that_stays(World(), [0] * leak))
        workers = [manager]
        processes = {"manager": manager.pid}
        if bus is not None:
            workers.append(Worker("user", user_of_the_bus))
            processes |= {name: each.pid for name, each in bus.processes.items()}
        typed = 0
        with Reader(_SEEN) as reader:
            figures = Figures({**processes, "reader": reader._pid}, memory)
            until = time.monotonic() + seconds
            while typed <= LEAST or time.monotonic() < until:
                for worker in workers:
                    worker.wake(step)
                began = time.monotonic()
                while time.monotonic() < began + step:
                    commands(world, typed)
                    typed += 1
                for worker in workers:
                    worker.wait()
                world.manager().cleanup()
                if bus is not None:
                    os.truncate(_TOLD, 0)
                figures.take()
        for worker in workers:
            worker.end()
    wrong = [f"{name} grows" for name, series in figures.all.items() if series.flat() is False]
    seen = reader.seen
    if not seen["opens"] or seen["failed"] or seen["other"]:
        wrong.append(f"the reader saw a gap: {seen}")
    rounds = {**{worker.name: worker.rounds for worker in workers}, "commands": typed}
    say(f"rounds of work: {rounds}; the reader opened {seen['opens']} files")
    return [*figures.all.values()], wrong


def main() -> None:
    """Soak, print the figures and draw them."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="SVG file for the picture")
    parser.add_argument("--leak", action="store_true", help="leak, to see that it is found")
    given = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root, to mount overlays in a mount namespace of its own")
    series, wrong = soak(given.minutes, leak=given.leak)
    for each in series:
        say(f"{each.name:36} {each.verdict()}")
    if given.out is not None:
        given.out.write_text(draw(series, f"overlayd soaked for {given.minutes:g} minutes"))
    for text in wrong:
        say(f"soak: {text}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
