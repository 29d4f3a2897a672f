# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop many operations of overlayd at its own trace points; runs in the machine under test.

    python3 -I stop.py SOURCE EVERY FIRST

For each kind of operation a process is stopped, by SIGSTOP, at the FIRST of its points and at each
EVERY further ones; they stay so.  One operation at most can stand where it holds the lock of all:
an apply, the last, whose point is FIRST modulo the number of those.  Prints what stands where.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from overlayd import batch, config
from overlayd.executor import Operation
from overlayd.manager import Manager
from overlayd.model import Request
from overlayd.progress import Progress

TARGETS = "/usr/share/doc"
LOCKED = "Reserve"


class Stops:
    """Operations on one target after another, and where they stand."""

    def __init__(self, source: str) -> None:
        """Have *source* for all overlays."""
        self.source = source
        self.targets = iter(
            sorted(e.path for e in os.scandir(TARGETS) if e.is_dir(follow_symlinks=False))
        )
        self.settings = config.load()
        self.work: dict[str, Callable[[Manager, str], object]] = {
            "apply": self.apply,
            "batch": self.batch,
            "reset": lambda m, name: m.reset(name, 0),
            "reset-applied": lambda m, name: m.reset(name, 1),
            "remove": lambda m, name: m.remove(name),
            "remove-lazy": lambda m, name: m.remove(name, lazy=True),
        }

    def manager(self, trace: Callable[[str, Operation], None] | None = None) -> Manager:
        """Return one that calls *trace* at each point."""
        return Manager(lambda: self.settings, warn=lambda _text: None, trace=trace)

    def request(self, name: str) -> Request:
        """Return what to apply, on the next target."""
        return Request(name, self.source, next(self.targets))

    def apply(self, manager: Manager, name: str) -> object:
        """Apply an overlay."""
        return manager.apply(self.request(name), Progress())

    def batch(self, manager: Manager, name: str) -> object:
        """Apply two overlays that are shown together."""
        requests = [self.request(f"{name}-{number}") for number in (1, 2)]
        done = batch.run(requests, lambda: manager, Progress(), jobs=1, atomic=lambda: manager)
        if error := batch.worst(done):
            raise error
        return done

    def points(self, verb: str) -> list[tuple[str, str]]:
        """Return the points of an operation, having done it."""
        seen: list[tuple[str, str]] = []
        self.prepare(verb, "trial")
        self.work[verb](
            self.manager(lambda when, step: seen.append((when, name_of(step)))), "trial"
        )
        for overlay in self.manager().list():
            if overlay.record.name.startswith("trial"):
                self.manager().remove(overlay.record.name)
        return seen

    def prepare(self, verb: str, name: str) -> None:
        """Have an overlay, edited, for what changes one."""
        if verb.startswith("re"):
            overlay = self.manager().apply(self.request(name), Progress())
            (Path(overlay.record.mount_point) / "edit").write_text("edit")

    def stop(self, verb: str, point: int) -> None:
        """Leave an operation at a point."""
        name = f"{verb}-{point}"
        self.prepare(verb, name)
        seen = -1

        def trace(when: str, step: Operation) -> None:
            nonlocal seen
            seen += 1
            if seen == point:
                sys.stdout.write(json.dumps([verb, when, name_of(step)]) + "\n")
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGSTOP)

        if (pid := os.fork()) == 0:
            os.setsid()  # or it would be continued when this process ends
            self.work[verb](self.manager(trace), name)
            os._exit(1)
        for _ in range({"apply": 1, "batch": 2}.get(verb, 0)):
            next(self.targets)  # the child has them
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            sys.exit(f"{name} was not stopped")


def name_of(step: Operation) -> str:
    """Return what kind of step it is."""
    return type(step).__name__


def main(source: str, every: int, first: int) -> None:
    """Stop one operation after another, the one that holds the lock of all at the end."""
    stops = Stops(source)
    points = {verb: stops.points(verb) for verb in stops.work}
    for verb, seen in points.items():
        for point in range(first % every, len(seen), every):
            if seen[point][1] != LOCKED:
                stops.stop(verb, point)
    locked = [point for point, (_, name) in enumerate(points["apply"]) if name == LOCKED]
    stops.stop("apply", locked[first % len(locked)])


if __name__ == "__main__":
    os.chdir("/")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
