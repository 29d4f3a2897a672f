# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults of every kind, on real overlays; each test counts what it tried.

By default a quick form of everything.  ``--whole`` tries all there is, ``--seed N`` begins what is
random elsewhere, and ``--minutes N`` lets what has no end go on for so long.  With ``--tried FILE``
a line of JSON for each kind of fault goes to a file, of which ``docs/proof.md`` is made.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.bus.conftest import MARK, Bus, bus, furnish  # noqa: F401  # a fixture
from tests.crash import tracing
from tests.crash.private_scenes import Users
from tests.crash.tried import Proof, proving, pytest_runtest_makereport  # noqa: F401  # a hook
from tests.mounts.conftest import either_world, enter_new_world, world  # noqa: F401  # fixtures

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the docstring above."""
    group = parser.getgroup("faults")
    group.addoption("--whole", action="store_true", help="try all there is, not a quick form")
    group.addoption("--seed", type=int, default=1, help="of what is random")
    group.addoption("--minutes", type=float, default=0.0, help="for what has no end; 0: a little")
    group.addoption("--tried", default="", help="file to which what was tried is added")


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Iterator[Proof]:
    """Give what a test counts in."""
    option = request.config.option
    yield from proving(request, whole=option.whole, seed=option.seed, minutes=option.minutes)


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
