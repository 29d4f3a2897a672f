# SPDX-License-Identifier: LGPL-2.1-or-later
"""testinfra on a machine: ``get_host(machine).file("/etc/passwd").mode`` and all its modules.

What testinfra gets wrong for stacked mounts (it takes the first line for a path) is in
:meth:`harness.machine.Machine.mounts`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

from testinfra.backend.base import (  # type: ignore[import-untyped]
    BaseBackend,
    CommandResult,
)
from testinfra.host import Host  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from harness.machine import Machine

COMMAND_TIMEOUT: Final = 120.0
"""Seconds for a command of testinfra's; they are short, but a package manager may be slow."""

_hosts: weakref.WeakKeyDictionary[Machine, dict[str | None, Host]] = weakref.WeakKeyDictionary()


class MachineBackend(BaseBackend):  # type: ignore[misc]  # testinfra has no py.typed
    """Runs testinfra's commands by the machine's agent, as root or as one of its users."""

    NAME = "harness"

    def __init__(self, machine: Machine, *, user: str | None = None) -> None:
        """Run on *machine* as *user*."""
        super().__init__(machine.name if user is None else f"{user}@{machine.name}")
        self._machine: Final = weakref.ref(machine)
        self._user: Final = user

    def run(self, command: str, *args: str, **_: object) -> CommandResult:
        """Run a command with ``sh -c``; *args* are quoted into it.

        Within ``host.sudo(...)`` it is run as root or that user: the agent can be anybody.
        """
        machine = self._machine()
        if machine is None:
            raise LookupError("the machine of this host is gone")
        line, user = self.get_command(command, *args), self._user
        while line.startswith("\0"):  # the innermost counts
            _, user, line = line.split("\0", 2)
        result = machine.run(line, user=user, timeout=COMMAND_TIMEOUT, check=False)
        return self.result(result.returncode, line.encode(), result.stdout, result.stderr)

    def get_sudo_command(self, command: str, sudo_user: str | None) -> str:
        """Mark the command for :meth:`run`, which can do without sudo."""
        return f"\0{sudo_user or 'root'}\0{command}"

    def get_encoding(self) -> str:
        """Return UTF-8, which the agent sets: asking would cost a start of Python."""
        return "utf-8"


def get_host(machine: Machine, *, user: str | None = None) -> Host:
    """Return testinfra's host for *machine*, the same one each time."""
    hosts = _hosts.setdefault(machine, {})
    if user not in hosts:
        backend = MachineBackend(machine, user=user)
        hosts[user] = host = Host(backend)
        backend.set_host(host)
    return hosts[user]
