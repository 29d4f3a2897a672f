# SPDX-License-Identifier: LGPL-2.1-or-later
"""Machines for the tests of the plugin: this host through a real agent, with logs of their own."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, ClassVar

from harness.errors import CapabilityError, HostError
from harness.logs import LogEvent
from harness.machine import Capability
from harness.provider import MachineKind
from harness.timings import Phase, phase
from tests.harness.agents import LocalMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from harness.machine import Machine
    from harness.provider import Case

LOGGER = """
shift 6
printf 'harness: %s\\n' "$*" >> "{log}"
"""


class FakeMachine(LocalMachine):
    """Its console and its journal are files in its work directory, which tests write to."""

    lacks: ClassVar[Mapping[Capability, str]] = {
        Capability.POWER_CUT: "nobody may cut the power of this host"
    }

    def __init__(self, workdir: Path, name: str = "fake-1") -> None:
        super().__init__(workdir, frozenset({Capability.CONSOLE, Capability.REBOOT}))
        self.name = name
        self.screen = workdir / "console.log"
        self.log = workdir / "journal.log"
        self.screen.touch()
        self.log.touch()
        self.program("logger", LOGGER.format(log=self.log))
        self.program("dmesg", "echo nothing")
        self.program("write", f'printf "[    1.000000] %s\\n" "$*" >> "{self.screen}"')
        if self.agent.process is not None:
            (workdir / "agent.pid").write_text(str(self.agent.process.pid))
        self._end = threading.Event()

    def console(self) -> str:
        return self.screen.read_text()

    def follow(self, callback: Callable[[LogEvent], None]) -> None:
        def tail() -> None:
            with self.log.open() as lines:
                while not self._end.wait(0.02):
                    for line in lines:
                        identifier, _, message = line.rstrip("\n").partition(": ")
                        callback(LogEvent("journal", message, identifier=identifier))

        threading.Thread(target=tail, daemon=True).start()

    def unfollow(self, callback: Callable[[LogEvent], None]) -> None:
        del callback
        self._end.set()


class FakeProvider:
    """Makes fake machines beneath *root* and writes there what was made."""

    def __init__(self, root: Path) -> None:
        self.root = root

        root.mkdir(exist_ok=True)

    @property
    def kinds(self) -> Sequence[MachineKind]:
        return (
            MachineKind("vm", kernels=("image", "6.1", "6.12")),
            MachineKind("container", own_kernel=False),
            MachineKind("odd", own_kernel=False, usual=False),
            MachineKind("broken", own_kernel=False, usual=False),
        )

    def prepare(self, case: Case) -> None:
        """Need nothing."""

    def acquire(self, case: Case) -> Machine:
        if case.machine == "odd":
            raise CapabilityError("odd machines cannot be had on this host: no reason at all")
        if case.machine == "broken":
            raise HostError("no program for this machine", hint="apt install it")
        name = f"{case.id}-{os.getpid()}-{time.monotonic_ns()}"
        with phase(Phase.BOOT):
            time.sleep(0.05)
            workdir = self.root / name
            workdir.mkdir()
            machine = FakeMachine(workdir, name)
            machine.greet(20)
        return machine

    def enter(self, machine: Machine) -> str:
        return f"look-into {machine.name}"

    def close(self) -> None:
        (self.root / f"closed-{os.getpid()}").touch()
