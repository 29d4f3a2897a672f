# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the benchmarks run: a private mount namespace with ``/run``, ``/var/lib`` and a ground.

The machine's own ``/usr``, ``/run`` and ``/var`` are neither changed nor seen.  The namespace ends
with its last process, and every mount with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys as python
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overlayd import config, overlayfs
from overlayd import syscalls as sys
from overlayd.manager import Manager
from overlayd.model import Request, is_within
from overlayd.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from overlayd.overlayfs import Exchange

_GROUNDS: Final = ("/usr/src", "/usr/games", "/usr/local/src")
_SIZE: Final = 256 << 20
_INODES: Final = 100_000
FILES: Final = 10
"""Files of a small source."""
APPLIED: Final = 1
"""The version that an apply made."""


def enter() -> str:
    """Move this process into a world of its own; return the directory to play in.

    The ground is a *shared* mount, as systemd makes all of them.

    :raises OSError: if the kernel does not permit it.
    """
    sys.unshare(sys.CLONE_NEWNS)
    sys.mount_propagation("/", sys.MS_REC | sys.MS_PRIVATE)
    ground = _ground()
    for path in ("/run", "/var/lib", ground):
        attach_tmpfs(path)
        sys.mount_propagation(path, sys.MS_SHARED)
    return ground


def _ground() -> str:
    """Return a directory under /usr that nothing this process may still import lies in."""
    needed = [os.getcwd(), __file__, python.prefix, python.base_prefix]
    for path in _GROUNDS:
        if os.path.isdir(path) and not any(is_within(os.path.realpath(n), path) for n in needed):
            return path
    message = f"none of {', '.join(_GROUNDS)} can be covered"
    raise SystemExit(message)


def attach_tmpfs(path: str, size: int = _SIZE, inodes: int = _INODES) -> None:
    """Mount a tmpfs like that of a layer, but readable by all, at *path*."""
    mount = overlayfs.make_tmpfs(size, inodes, mode=0o755, folios=True)
    try:
        place = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sys.move_mount(mount, place)
        finally:
            os.close(place)
    finally:
        os.close(mount)


def make_manager(way: Exchange | None = None) -> Manager:
    """Return a manager with the machine's configuration; warnings go to standard error."""
    return Manager(config.load, warn=lambda text: print(text, file=python.stderr), way=way)


def apply(manager: Manager, name: str, source: str, target: str) -> None:
    """Apply *source* over *target* as a program would."""
    manager.apply(Request(name, source, target), Progress())


@contextlib.contextmanager
def overlays(manager: Manager, source: str, ground: str, count: int) -> Iterator[None]:
    """Have *count* overlays while the body runs, each on a directory of its own."""
    made: list[str] = []
    try:
        for name in (f"many{number}" for number in range(count)):
            os.mkdir(f"{ground}/{name}")
            apply(manager, name, source, f"{ground}/{name}")
            made.append(name)
        yield
    finally:
        for name in made:
            manager.remove(name)
            os.rmdir(f"{ground}/{name}")


def small_source(path: str) -> str:
    """Make a source of ten small files at *path*; return the path."""
    os.mkdir(path)
    for number in range(FILES):
        Path(path, f"file{number}").write_bytes(b"layer\n" * 100)
    return path


def large_source(path: str, files: int, size: int) -> str:
    """Make a source of *files* files at *path*, *size* bytes in all; return the path.

    Sizes vary as those of real trees do: many small ones, a few large; the same at every run.
    """
    rng = random.Random(7)
    weights = [rng.lognormvariate(0, 1.5) for _ in range(files)]
    unit = size / sum(weights)
    noise = os.urandom(1 << 20)
    for number, weight in enumerate(weights):
        folder = f"{path}/{number % 20}/{number // 20 % 20}"
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/{number}", "wb") as file:
            left = round(weight * unit)
            while left > 0:
                left -= file.write(noise[:left])
    os.sync()  # or its write-back would run beside what is measured
    return path


class Worker:
    """A child with a world of its own that does named work when told, and says how long it took."""

    def __init__(self, setup: Callable[[str], dict[str, Callable[[], float]]]) -> None:
        """Start it; *setup* runs in the child, is told its ground and returns the works."""
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its orders do
            status = 1
            try:
                os.close(down_write)
                os.close(up_read)
                _serve(setup, down_read, up_write)
                status = 0
            except BaseException as error:  # noqa: BLE001  # the child ends here, whatever it is
                print(f"worker: {error!r}", file=python.stderr)
            finally:
                os._exit(status)
        os.close(down_read)
        os.close(up_write)
        self._orders = open(down_write, "w", buffering=1, encoding="ascii")  # noqa: SIM115
        self._answers = open(up_read, encoding="ascii")  # noqa: SIM115

    def __enter__(self) -> Worker:  # noqa: PYI034
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._orders.close()
        self._answers.close()
        os.waitpid(self._pid, 0)

    def do(self, name: str) -> float:
        """Have the work *name* done once; return the seconds that the child measured."""
        self._orders.write(f"{name}\n")
        return self._answer()

    def _answer(self) -> float:
        line = self._answers.readline()
        if not line:
            message = "a worker died"
            raise RuntimeError(message)
        return float(json.loads(line))


def _serve(
    setup: Callable[[str], dict[str, Callable[[], float]]], orders_fd: int, answers_fd: int
) -> None:
    works = setup(enter())
    with (
        open(orders_fd, encoding="ascii") as orders,
        open(answers_fd, "w", buffering=1, encoding="ascii") as answers,
    ):
        answers.write("0\n")
        answers.writelines(f"{works[line.strip()]()!r}\n" for line in orders)
