# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults of every kind, on real overlays; each test counts what it tried.

By default a quick form of everything.  ``--whole`` tries all there is, ``--seed N`` begins what is
random elsewhere, and ``--minutes N`` lets what has no end go on for so long.  With ``--tried FILE``
a line of JSON for each kind of fault goes to a file, of which ``docs/proof.md`` is made.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.bus.conftest import MARK, Bus, bus, furnish  # noqa: F401  # a fixture
from tests.crash import tracing
from tests.crash.private_scenes import Users
from tests.crash.tried import Tried
from tests.mounts.conftest import either_world, enter_new_world, world  # noqa: F401  # fixtures

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPORT = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the docstring above."""
    group = parser.getgroup("faults")
    group.addoption("--whole", action="store_true", help="try all there is, not a quick form")
    group.addoption("--seed", type=int, default=1, help="of what is random")
    group.addoption("--minutes", type=float, default=0.0, help="for what has no end; 0: a little")
    group.addoption("--tried", default="", help="file to which what was tried is added")


@dataclass
class Proof:
    """What a test tried: *fault* is the kind, ``tried`` how many; ``whole`` and so on as asked."""

    fault: str
    whole: bool
    seed: int
    minutes: float
    tried: int = 0
    random: bool = False
    """Whether the seed was used."""
    remarks: list[str] = field(default_factory=list)

    def count(self, number: int = 1) -> None:
        """Note that so many more were tried, before it is known whether they hold."""
        self.tried += number

    def remark(self, text: str) -> None:
        """Note something for people, such as a rate."""
        self.remarks.append(text)


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Iterator[Proof]:
    """Give what a test counts in; the kind of fault is the first line of its docstring."""
    option = request.config.option
    doc = (request.function.__doc__ or request.node.name).strip().split("\n")[0]
    made = Proof(doc.rstrip("."), option.whole, option.seed, option.minutes)
    start = time.monotonic()
    yield made
    held = request.node.stash.get(_REPORT, False)
    if made.tried:
        case = request.node.name.partition("[")[2].rstrip("]")
        tried = Tried(
            fault=made.fault,
            case=case,
            tried=made.tried,
            held=made.tried if held else made.tried - 1,
            seed=made.seed if made.random else None,
            seconds=time.monotonic() - start,
            whole=made.whole,
            remarks=made.remarks,
        )
        text = ", ".join([f"{made.tried} tried", *made.remarks])
        request.node.add_report_section("call", "tried", text)
        if option.tried:
            tried.add(option.tried)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep whether the test held."""
    report = yield
    if report.when == "call":  # type: ignore[attr-defined]
        item.stash[_REPORT] = report.passed  # type: ignore[attr-defined]
    return report


@pytest.fixture
def users() -> Iterator[Users]:
    """Give a world of users without a bus, as private overlays need none."""
    tracing.need()
    enter_new_world()
    furnish()
    world_of_users = Bus()
    os.environ[MARK] = world_of_users.mark
    try:
        yield Users(world_of_users)
    finally:
        world_of_users.close()
        os.chdir("/")
