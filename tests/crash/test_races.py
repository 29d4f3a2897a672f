# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another process acts between two exact steps of a command, at each of them in turn."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from overlayd.errors import OverlaydError
from overlayd.model import Request
from overlayd.progress import Progress
from tests.crash.forked import forked
from tests.crash.scenes import Stage
from tests.mounts.conftest import PLAY, SOURCES, tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.executor import Operation
    from overlayd.manager import Manager
    from tests.crash.tried import Proof
    from tests.mounts.conftest import World

_MOMENT: Final = 0.15
"""Seconds that the command stands still for the other one, which may be waiting for it."""
_EVIL: Final = {"a": "evil", "sub/c": "evil", "evil": "evil"}


@dataclass
class Other:
    """Something that another process does meanwhile; what it raises is told."""

    pid: int
    told: int

    @classmethod
    def begin(cls, work: Callable[[], object]) -> Other:
        """Do *work* in a child."""
        reading, writing = os.pipe2(os.O_CLOEXEC)

        def told() -> None:
            said = "done"
            # A lock is its description's, which the child would share.
            os.closerange(3, writing)
            os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))
            try:
                work()
            except OverlaydError as error:
                said = error.code
            except BaseException as error:  # noqa: BLE001  # it is told
                said = repr(error)
            os.write(writing, json.dumps(said).encode())

        pid = forked(told)
        os.close(writing)
        return cls(pid, reading)

    def ended(self, seconds: float) -> bool:
        """Whether it ends within some seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(0.002)
        return False

    def said(self) -> str:
        """Wait for its end; return 'done', or the code of its error."""
        with open(self.told, encoding="ascii") as file:
            told = file.read()
        os.waitpid(self.pid, 0)
        return str(json.loads(told))


def _apply(name: str, target: str = "app", source: str = "s") -> Callable[[Stage], object]:
    request = Request(name, str(SOURCES / source), str(PLAY / target))
    return lambda stage: stage.world.manager().apply(request, Progress())


def _swap_source(stage: Stage) -> None:
    """Put another directory where the source was."""
    os.rename(stage.source, SOURCES / "away")
    tree(stage.source, _EVIL)


def _link_source(stage: Stage) -> None:
    """Put a link to a directory of somebody else's where the source was."""
    os.rename(stage.source, SOURCES / "away")
    tree(SOURCES / "other", _EVIL)
    stage.source.symlink_to(SOURCES / "other")


def _exchange_below(stage: Stage) -> None:
    """Put a link where a directory of the source was."""
    tree(SOURCES / "other", _EVIL)
    os.rename(stage.source / "sub", SOURCES / "away-sub")
    (stage.source / "sub").symlink_to(SOURCES / "other")


MEANWHILE: Final[dict[str, Callable[[Stage], object]]] = {
    "takes the name": _apply("x", "second"),
    "takes the place": _apply("y"),
    "lays one inside": _apply("y", "app/sub"),
    "resets it": lambda stage: stage.world.manager().reset("x", 0),
    "removes it": lambda stage: stage.world.manager().remove("x"),
    "removes it lazily": lambda stage: stage.world.manager().remove("x", lazy=True),
    "lists": lambda stage: stage.world.manager().list(),
    "cleans up": lambda stage: stage.world.manager().cleanup(),
    "swaps the source": _swap_source,
    "links the source": _link_source,
    "exchanges a part of the source": _exchange_below,
}
WORK: Final[dict[str, Callable[[Manager, Stage], object]]] = {
    "apply": lambda manager, stage: manager.apply(
        Request("x", str(stage.source), str(stage.root)), Progress()
    ),
    "reset": lambda manager, _stage: manager.reset("x", 1),
    "remove": lambda manager, _stage: manager.remove("x"),
}


def _restore(stage: Stage) -> None:
    """Give the source back what it had."""
    for away, place in (("away", stage.source), ("away-sub", stage.source / "sub")):
        if (SOURCES / away).exists():
            if place.is_symlink():
                place.unlink()
            elif place.exists():
                for path in sorted(place.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                place.rmdir()
            os.rename(SOURCES / away, place)


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("work", WORK)
def test_other_process_acts_at_each_step(
    world: World, proof: Proof, work: str, meanwhile: str
) -> None:
    """Another process acts between two steps of a command."""
    stage = Stage(world)
    if work != "apply" and "source" in meanwhile:
        return  # it is copied already
    step = 1 if proof.whole else 4
    for number in itertools.count(proof.seed % step, step):
        stage.clear()
        if work != "apply":
            stage.apply()
        points = itertools.count()
        others: list[Other] = []

        def trace(_when: str, _operation: Operation) -> None:
            if next(points) == number:  # noqa: B023  # called within this round
                other = Other.begin(lambda: MEANWHILE[meanwhile](stage))
                others.append(other)  # noqa: B023
                other.ended(_MOMENT)

        code = "done"
        try:
            WORK[work](world.manager(trace=trace), stage)
        except OverlaydError as error:
            code = error.code
        said = [other.said() for other in others]
        _restore(stage)
        if not others:
            assert code == "done"
            break
        proof.count()
        allowed = {"done", "exists", "refused", "busy", "not-found"}
        assert {code, *said} <= allowed, (number, code, said)
        assert "done" in {code, *said}, (number, code, said)
        world.check_invariants()
        shown = {path.read_text() for path in stage.root.rglob("*") if path.is_file()}
        # Nothing comes of what was put in the source's place after it was opened.
        assert "evil" not in shown, (number, shown)
    stage.clear()
