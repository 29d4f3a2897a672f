# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the pytest plugin knows in one process: where machines come from, and which are guarded."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest

from harness.console import KNOWN_NOISE
from harness.errors import CapabilityError, HarnessError
from harness.guard import Guard
from harness.provider import HOST_KERNEL, IMAGE_KERNEL, Case
from harness.timings import Phase, phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from harness.findings import Allow
    from harness.machine import Capability, Machine
    from harness.provider import MachineKind, Provider


class State:
    """What the plugin knows in one process."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.guards: list[Guard] = []
        self.known: dict[Case, tuple[frozenset[Capability], Mapping[Capability, str]]] = {}
        self.sat = False
        self._provider: Provider | None = None

    @property
    def provider(self) -> Provider:
        """Where machines come from.

        :raises pytest.UsageError: if the project does not say.
        """
        if self._provider is None:
            try:
                self._provider = self.config.hook.pytest_harness_provider(config=self.config)
            except HarnessError as error:
                raise pytest.UsageError(str(error), *notes_of(error)) from None
            if self._provider is None:
                raise pytest.UsageError(
                    "no machines: implement pytest_harness_provider in a conftest.py"
                )
        return self._provider

    def close(self) -> None:
        """Give back what the provider shares."""
        if self._provider is not None:
            self._provider.close()
            self._provider = None

    def cases(self) -> list[Case]:
        """Return every machine with every kernel that the options ask for.

        :raises pytest.UsageError: if there is no such machine.
        """
        kinds = {kind.name: kind for kind in self.provider.kinds}
        kernels = _words(self.config.getoption("--kernel")) or [IMAGE_KERNEL]
        chosen = self._chosen(kinds)
        for kind in chosen:
            unknown = [name for name in kernels if kind.kernels and name not in kind.kernels]
            if unknown and kind.own_kernel:
                raise pytest.UsageError(
                    f"--kernel: no {', '.join(unknown)} here, but {', '.join(kind.kernels)}"
                )
        return [
            Case(kind.name, kernel)
            for kind in chosen
            for kernel in (kernels if kind.own_kernel else [HOST_KERNEL])
        ]

    def prepare(self, case: Case) -> None:
        """Have what machines of this case are made of; the tests report why it cannot be had."""
        with phase(Phase.BUILD), suppress(HarnessError):
            self.provider.prepare(case)

    def _chosen(self, kinds: Mapping[str, MachineKind]) -> list[MachineKind]:
        names = _words(self.config.getoption("--machine"))
        if not names or names == ["both"]:
            return [kind for kind in kinds.values() if kind.usual]
        if unknown := [name for name in names if name not in kinds]:
            raise pytest.UsageError(
                f"--machine: no {', '.join(unknown)} here, but both, {', '.join(kinds)}"
            )
        return [kinds[name] for name in names]

    def acquire(self, case: Case, *, shared: bool) -> Guard:
        """Return a fresh machine under guard; a test fails if there is none.

        :raises CapabilityError: if this host cannot have such a machine.
        """
        machine = None
        try:
            with phase(Phase.RESTORE):
                machine = self.provider.acquire(case)
                self.known[case] = (machine.capabilities, machine.lacks)
                guard = Guard(machine, case, shared=shared, allowed=self.allowed())
        except BaseException as error:
            if machine is not None:
                machine.close()
            if isinstance(error, HarnessError) and not isinstance(error, CapabilityError):
                text = "\n".join([f"no machine ({case.id}): {error}", *notes_of(error)])
                raise pytest.fail.Exception(text, pytrace=False) from error
            raise
        self.guards.append(guard)
        return guard

    def release(self, guard: Guard) -> None:
        """Close the machine."""
        self.guards.remove(guard)
        with phase(Phase.TEARDOWN):
            guard.close()

    def allowed(self) -> tuple[Allow, ...]:
        """Return what is all right in every test."""
        answers: list[Iterable[Allow]] = self.config.hook.pytest_harness_allow(config=self.config)
        return (*KNOWN_NOISE, *(allow for answer in answers for allow in answer))

    def guards_of(self, item: pytest.Item) -> list[Guard]:
        """Return the guards whose machines this test uses."""
        shared = "machine_module" in getattr(item, "fixturenames", ())
        return [guard for guard in self.guards if shared or not guard.shared]

    def missing(self, case: Case, wanted: Iterable[Capability]) -> str:
        """Return why a machine cannot do what is *wanted*, as far as is known by now."""
        if case in self.known:
            capabilities, lacks = self.known[case]
            for capability in wanted:
                if capability not in capabilities:
                    why = lacks.get(capability, "not with this kind of machine")
                    return f"{case.machine} cannot do {capability}: {why}"
        return ""


STATE: Final = pytest.StashKey[State]()


def notes_of(error: BaseException) -> list[str]:
    """Return what was added to an error."""
    return getattr(error, "__notes__", [])


def _words(option: str | None) -> list[str]:
    return [word.strip() for word in (option or "").split(",") if word.strip()]


def leaks_of(item: pytest.Item) -> Callable[[Machine], tuple[str, ...]]:
    """Return the check for what a test left in a machine, as the projects' hooks have it."""

    def check(machine: Machine) -> tuple[str, ...]:
        answers: list[Iterable[str]] = item.ihook.pytest_harness_leaks(machine=machine)
        return tuple(line for answer in answers for line in answer)

    return check


def case_of(item: pytest.Item) -> Case | None:
    """Return what the test runs on, if it takes a machine."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("machine_case") if callspec is not None else None
    return case if isinstance(case, Case) else None


def in_order(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return tests in the order in which they had better run.

    What takes long begins early, so that the processes of a run end together.  First come machines
    with a kernel of their own, which may well be emulated, and of these tests that have a machine
    for themselves: often it is since they reboot it.  Then machines with many tests come before
    those with few.
    """
    groups = {item: _group(item) for item in items}
    sizes = Counter(groups.values())

    def place(item: pytest.Item) -> tuple[int, bool, int]:
        case, shared, _ = groups[item]
        kind = 2 if case is None else int(case.kernel == HOST_KERNEL)
        return kind, shared, -sizes[groups[item]] if shared else 0

    return sorted(items, key=place)


def _group(item: pytest.Item) -> tuple[Case | None, bool, str]:
    """Return what is the same for tests that share a machine."""
    shared = "machine_module" in getattr(item, "fixturenames", ())
    return case_of(item), shared, item.nodeid.partition("::")[0]


def name_of(item: pytest.Item) -> str:
    """Return the test's name without what it runs on in its brackets."""
    case = case_of(item)
    base, bracket, inside = item.nodeid.rpartition("]")[0].partition("[")
    if case is None or not bracket:
        return item.nodeid
    words = re.split(rf"(?:^|-){re.escape(case.id)}(?:-shared)?(?:-|$)", inside, maxsplit=1)
    rest = "-".join(word for word in words if word)
    return f"{base}[{rest}]" if rest else base
