# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands of private overlays that faults are thrown at, with a neighbour who has his own."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overlayd import cli
from overlayd.errors import ServiceError
from tests.bus.conftest import PYTHON, USERS
from tests.crash import tracing
from tests.mounts.conftest import PLAY, SOURCES, snapshot
from tests.mounts.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bus.conftest import Bus
    from tests.crash.tracing import Act, Outcome, Point

BASE: Final = {"a": "base a", "sub/b": "base b", "old": "base old"}
SOURCE: Final = {"a": "new a", "sub/c": "new c"}
_PR_SET_DUMPABLE: Final = 4
_libc = ctypes.CDLL(None)
View = dict[str, tuple[object, ...]]


@dataclass
class Users:
    """Alice, whose commands are tried, bob, and what both overlay."""

    bus: Bus
    root: Path = PLAY / "app"
    second: Path = PLAY / "second"
    source: Path = SOURCES / "alice" / "s"
    _plain: View = field(default_factory=dict)
    _base: View = field(default_factory=dict)
    _bob: tuple[object, ...] = ()
    _fds: int = 0
    _env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make all that, and remember how it is."""
        for base in (self.root, self.second):
            self.bus.base(base.name, BASE)
        for user in ("alice", "bob"):
            self.bus.source_of(user, "s", SOURCE)
        self._env = self.bus.environment()
        self._base = snapshot(self.root)
        self._plain = self.view()
        self.do("apply", "own", str(SOURCES / "bob" / "s"), str(self.root), user="bob")
        self._bob = self._neighbour()
        self._fds = len(os.listdir("/proc/self/fd"))

    def _neighbour(self) -> tuple[object, ...]:
        [pid] = self.bus.holders(USERS["bob"])
        mine = [
            line
            for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
            if "overlayd:" in line
        ]
        return pid, mine, snapshot(Path(f"/proc/{pid}/root{self.root}"))

    def run(
        self,
        *arguments: str,
        user: str = "alice",
        act: Callable[[Point], Act] = tracing.nothing,
        calls: dict[int, str] | None = None,
    ) -> Outcome:
        """Run a command as *user* in a child, as its program does."""

        def work() -> None:
            os.environ.clear()
            os.environ.update(self._env)
            # The holder is another program, and the user may not get to this one's files.
            sys.executable = PYTHON[0]
            os.setgroups([])
            os.setresgid(USERS[user], USERS[user], USERS[user])
            os.setresuid(USERS[user], USERS[user], USERS[user])
            _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # as for whoever began as that user
            sys.argv = ["overlayd", *arguments]
            cli.main()

        return tracing.run(work, act, calls=calls)

    def do(self, *arguments: str, user: str = "alice") -> str:
        """Run a command that has to work; return what it said: nothing if it wants the service.

        What is private needs none, and where there is nothing private there is nothing to say.
        """
        outcome = self.run(*arguments, user=user, calls={})
        if outcome.code == ServiceError.exit_code and arguments[0] in {"list", "cleanup"}:
            return ""
        assert outcome.code == 0, outcome.said
        return outcome.said

    def view(self) -> View:
        """Return what alice sees of both bases where she looks at her overlays, but for times."""
        pids = self.bus.holders(USERS["alice"])
        top = f"/proc/{pids[0]}/root" if pids else ""
        return {
            path.removeprefix(top): (*facts[:3], facts[4])
            for base in (self.root, self.second)
            for path, facts in snapshot(Path(f"{top}{base}")).items()
        }

    def names(self) -> list[str]:
        """Return the names of alice's overlays, by the command that lists them."""
        listed = self.do("list", "--json")
        return [each["name"] for each in json.loads(listed[listed.find("[") :] or "[]")]

    def apply(self, name: str = "x") -> None:
        """Apply what is tried."""
        self.do("apply", name, str(self.source), str(self.root if name == "x" else self.second))

    def clear(self) -> None:
        """Remove all of alice's; nothing of it may be left then."""
        for name in self.names():
            self.do("remove", name, "--lazy")
        self.do("cleanup")
        assert eventually(lambda: not self.bus.holders(USERS["alice"]), 10)

    def check(self, *views: View) -> None:
        """Assert that alice sees one of *views*, and that nobody else sees anything of it."""
        assert eventually(lambda: len(self.bus.holders(USERS["alice"])) <= 1, 10)
        shown = self.view()
        assert shown in views, shown
        there = "x" in self.names()  # the next command, which settles what was begun
        shown = self.view()
        assert shown in views, shown
        assert there == any(
            shown[path] != facts
            for path, facts in self._plain.items()
            if path.startswith(str(self.root))
        )
        assert snapshot(self.root) == self._base
        assert self._neighbour() == self._bob
        assert len(os.listdir("/proc/self/fd")) == self._fds
        assert self.bus.leftovers() == []


@dataclass(frozen=True)
class Scene:
    """A command of alice's, and what it finds."""

    arguments: tuple[str, ...]
    prepare: Callable[[Users], object] = lambda _users: None

    def extent(self, users: Users) -> tuple[View, View, list[Point]]:
        """Return what alice sees before and after the command, and its points."""
        users.clear()
        self.prepare(users)
        before = users.view()
        whole = self.run(users)
        assert whole.code == 0, whole.said
        return before, users.view(), whole.points

    def run(self, users: Users, act: Callable[[Point], Act] = tracing.nothing) -> Outcome:
        """Run the command in a child."""
        words = {"SOURCE": users.source, "BASE": users.root}
        return users.run(*(word.format(**words) for word in self.arguments), act=act)


def _both(users: Users) -> None:
    users.apply("y")
    users.apply()


SCENES: Final = {
    "the first": Scene(("apply", "x", "{SOURCE}", "{BASE}")),
    "another": Scene(("apply", "x", "{SOURCE}", "{BASE}"), lambda users: users.apply("y")),
    "reset": Scene(("reset", "x"), Users.apply),
    "remove": Scene(("remove", "x"), _both),
    "the last": Scene(("remove", "x"), Users.apply),
    "once": Scene(("run", "{SOURCE}:{BASE}", "--", "true")),
}
