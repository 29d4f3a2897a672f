# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a reader in another process sees while an overlay is exchanged again and again.

The file that it opens is in the layer and, with other content, in the base.  Every reset goes to
the version as applied, so only the layer's content is right: anything else is a gap.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

from benchmarks import baseline, world
from benchmarks.measure import GapRow, timed
from overlayd import syscalls as sys
from overlayd.overlayfs import Exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Meter

_NAME: Final = "gap"
_LAYER: Final = b"layer"
_BASE: Final = b"base!"
_PR_SET_PDEATHSIG: Final = 1
_READY_AFTER: Final = 100
_READY_SECONDS: Final = 10.0


class Reader:
    """A process that opens and reads a file in a tight loop until the body of the with ends."""

    def __init__(self, path: str) -> None:
        """Read *path*."""
        self._path = path
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self._pid = -1
        self._answer = -1
        self.seen = {"opens": 0, "failed": 0, "base": 0, "other": 0}

    def __enter__(self) -> Reader:  # noqa: PYI034
        self._answer, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its parent says so
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # or when that is gone
            try:
                os.write(writing, json.dumps(self._look()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        deadline = time.monotonic() + _READY_SECONDS
        while self._shared[1] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        return self

    def __exit__(self, *_: object) -> None:
        self._shared[0] = 1
        with open(self._answer, "rb") as answer:
            self.seen = json.loads(answer.read() or "{}") or self.seen
        os.waitpid(self._pid, 0)

    def _look(self) -> dict[str, int]:
        """Look until told to stop; the loop holds nothing but what it is about."""
        path, shared = self._path, self._shared
        opens = failed = base = other = 0
        while not shared[0]:
            opens += 1
            if opens == _READY_AFTER:
                shared[1] = 1
            try:
                fd = os.open(path, os.O_RDONLY)
                text = os.read(fd, 16)
                os.close(fd)
            except OSError:
                failed += 1
                continue
            if text == _LAYER:
                continue
            if text == _BASE:
                base += 1
            else:
                other += 1
        return {"opens": opens, "failed": failed, "base": base, "other": other}


@contextlib.contextmanager
def _no_beneath() -> Iterator[None]:
    """Have the kernel's own call refuse MOVE_MOUNT_BENEATH, as it does before Linux 6.5."""
    real = sys.move_mount

    def refuse(from_fd: int, to_fd: int, flags: int = 0) -> None:
        if flags & sys.MOVE_MOUNT_BENEATH:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), "move_mount")
        real(from_fd, to_fd, flags)

    with mock.patch.object(sys, "move_mount", refuse):
        yield


def rows(ground: str, temporary: str, meter: Meter, rounds: int, plain: int) -> list[GapRow]:
    """Exchange *rounds* times in each of overlayd's ways, and *plain* times the plain way."""
    source = f"{temporary}/gap"
    os.mkdir(source)
    Path(source, "file").write_bytes(_LAYER)
    target = f"{ground}/gap"
    os.mkdir(target)
    Path(target, "file").write_bytes(_BASE)

    def own(name: str, title: str, way: Exchange | None, times: int = rounds) -> GapRow:
        manager = world.make_manager(way)
        world.apply(manager, _NAME, source, target)
        try:
            return _measure(
                (name, title),
                lambda _: manager.reset(_NAME, world.APPLIED),
                f"{target}/file",
                meter,
                times,
                gapless=True,
            )
        finally:
            manager.remove(_NAME, lazy=True)

    found = [own("beneath", "overlayd reset, MOVE_MOUNT_BENEATH", Exchange.BENEATH)]
    found.append(own("tuck", "overlayd reset, by propagation", Exchange.TUCK))
    with _no_beneath():
        found.append(own("fallback", "overlayd reset, the kernel refuses BENEATH", None))
    sys.mount_propagation(ground, sys.MS_PRIVATE)
    title = "overlayd reset, by propagation, private parent"
    found.append(own("tuck-private", title, Exchange.TUCK, rounds // 5))
    sys.mount_propagation(ground, sys.MS_SHARED)
    baseline.apply(source, target, _NAME)
    try:
        found.append(
            _measure(
                ("plain", "umount, then mount"),
                lambda number: baseline.reset(target, _NAME, number, beneath=False),
                f"{target}/file",
                meter,
                plain,
                gapless=False,
            )
        )
    finally:
        baseline.remove(target, _NAME, plain + 1)
    return found


def _measure(  # noqa: PLR0913  # all of it differs between the rows
    name: tuple[str, str],
    exchange: Callable[[int], object],
    path: str,
    meter: Meter,
    rounds: int,
    *,
    gapless: bool,
) -> GapRow:
    seconds = 0.0
    with Reader(path) as reader:
        for number in range(1, rounds + 1):
            seconds += timed(lambda: exchange(number))  # noqa: B023  # called at once
            if number % 100 == 0:
                meter.step(number, rounds)
    return GapRow(
        name=name[0],
        way=name[1],
        rounds=rounds,
        seconds=seconds,
        opens=reader.seen["opens"],
        failed=reader.seen["failed"],
        base=reader.seen["base"],
        other=reader.seen["other"],
        must_be_gapless=gapless,
    )
