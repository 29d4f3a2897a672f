# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a project gives the pytest plugin: its machines, what may be left, what to collect.

A project implements the hooks below in a ``conftest.py``; only ``pytest_harness_provider`` is
needed.  Nothing of the harness is particular to a project beyond this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from harness.findings import Allow
    from harness.machine import Machine

IMAGE_KERNEL = "image"
"""The kernel that is in the image, in place of a version."""
HOST_KERNEL = "host"
"""The kernel of a machine that has none of its own."""


@dataclass(frozen=True)
class MachineKind:
    """A kind of machine that a provider has.

    :ivar own_kernel: whether it can be had with different kernels, and
    :ivar kernels: what they are called, if not all names will do.
    :ivar usual: whether it is among those that are used when none is named.
    """

    name: str
    own_kernel: bool = True
    usual: bool = True
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A kind of machine with a kernel: what every test is run on."""

    machine: str
    kernel: str

    @property
    def id(self) -> str:
        """What stands in the brackets of a test's name."""
        return f"{self.machine}-{self.kernel}"

    @property
    def shared_id(self) -> str:
        """What stands there if the test shares the machine with others of its module."""
        return f"{self.id}-shared"


class Provider(Protocol):
    """Where machines come from.  One is made in each process that runs tests."""

    @property
    def kinds(self) -> Sequence[MachineKind]:
        """The kinds it has, whether this host can run them or not."""

    def prepare(self, case: Case) -> None:
        """Build what its machines are made of; called once, before there are several processes.

        :raises HarnessError: if it cannot be built; :meth:`acquire` raises it again.
        """

    def acquire(self, case: Case) -> Machine:
        """Return a fresh machine that answers; whoever asked closes it.

        :raises HarnessError: if there is none to be had.
        """

    def enter(self, machine: Machine) -> str:
        """Return the command that a developer types in another terminal to look around."""

    def close(self) -> None:
        """Give back what is shared by the machines; all of them are closed."""


class Hooks:
    """The hooks of the plugin."""

    @pytest.hookspec(firstresult=True)
    def pytest_harness_provider(self, config: pytest.Config) -> Provider | None:
        """Return where machines come from; called once, when the first test needs to know."""

    @pytest.hookspec
    def pytest_harness_leaks(self, machine: Machine) -> Iterable[str]:
        """Return one line for each thing that a test may not leave behind in *machine*."""
        raise NotImplementedError

    @pytest.hookspec
    def pytest_harness_collect(self, machine: Machine) -> Mapping[str, str | Sequence[str]]:
        """Return commands whose output is kept of a failed test, by the name of the file."""
        raise NotImplementedError

    @pytest.hookspec
    def pytest_harness_allow(self, config: pytest.Config) -> Iterable[Allow]:
        """Return findings that are all right in every test."""
        raise NotImplementedError
