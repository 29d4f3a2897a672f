# SPDX-License-Identifier: LGPL-2.1-or-later
"""overlayd on a booted image: fixtures on top of those of the harness (``harness.plugin``)."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.crash.tried import Proof, proving, pytest_runtest_makereport  # noqa: F401  # a hook
from tests.system import project
from tests.system.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness.findings import Allow
    from harness.machine import Machine
    from harness.provider import Provider


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the matrix ask for more."""
    parser.addoption(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="how many reboots of each kind, and power cuts (two at least); 1 unless said",
    )
    parser.addoption(
        "--tried", default="", metavar="FILE", help="file to which what was tried is added"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Build anew what is to be built anew: once, for all the processes of this run."""
    if config.getoption("no_cache", default=False) and not hasattr(config, "workerinput"):
        stack = ExitStack()
        stack.enter_context(project.fresh_cache())
        config.add_cleanup(stack.close)


def pytest_harness_provider(config: pytest.Config) -> Provider:
    """Give machines with the tree as it is."""

    def say(line: str) -> None:
        sys.__stderr__.write(f"{line}\n") if sys.__stderr__ else None

    return project.fleet(accelerator=config.getoption("accel"), say=say)


def pytest_harness_allow() -> Sequence[Allow]:
    """Let pass what overlayd's own trial writes."""
    return project.ALLOWED


def pytest_harness_leaks(machine: Machine) -> list[str]:
    """Name what of overlayd's is left, and take it away, lest later tests fail for it, too."""
    guest = Guest(machine)
    if left := guest.leftovers():
        guest.tidy()
    return left


def pytest_harness_collect() -> dict[str, str]:
    """Say what is kept of a machine in which a test failed."""
    return {
        "overlayd-list": "overlayd list --all --json",
        "overlayd-doctor": "overlayd doctor",
        "overlayd-records": "tail -n +1 /run/overlayd/records/* /run/overlayd/quarantine/*",
        "ostree-status": "ostree admin status",
    }


@pytest.fixture
def guest(machine_module: Machine) -> Guest:
    """Give the machine that the tests of a module share; each leaves it without an overlay."""
    return Guest(machine_module)


@pytest.fixture
def fresh(machine: Machine) -> Guest:
    """Give a machine of the test's own."""
    return Guest(machine)


@pytest.fixture
def proof(request: pytest.FixtureRequest, rounds: int) -> Iterator[Proof]:
    """Give what a test counts faults in; with more rounds than one it tries all there are."""
    yield from proving(request, whole=rounds > 1)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """Give how often something is to be done that is worth doing often."""
    count = request.config.getoption("rounds", 1)
    assert isinstance(count, int)
    return count
