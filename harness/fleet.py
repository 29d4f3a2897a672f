# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machines of a project's image: what most projects give the pytest plugin as its provider.

Nothing is built before the first machine of its kind is asked for; then it is the image, the first
boot, which is frozen (:mod:`harness.template`) or saved (:mod:`harness.container`), and what is
handed out goes on from there.  All of it lies in the cache; several processes make it once.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import accel, container, host, image, kernels, shell
from harness.errors import HarnessError, MachineError
from harness.machine import Capability
from harness.provider import IMAGE_KERNEL, MachineKind
from harness.qemu import Disk, Spec
from harness.template import Templates
from harness.timings import Phase, phase

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from harness.accel import Wanted
    from harness.cache import Cache
    from harness.container import ContainerMachine, System
    from harness.image import Image, ImageInputs
    from harness.machine import Machine
    from harness.provider import Case
    from harness.template import Template
    from harness.vm import QemuMachine

VM: Final = "vm"
CONTAINER: Final = "container"
KINDS: Final = (MachineKind(VM), MachineKind(CONTAINER, own_kernel=False))
SYSTEM: Final = frozenset({Capability.SYSTEMD, Capability.OSTREE, Capability.SOFT_REBOOT})
MEMORY: Final = 1024
"""Mebibytes of a VM."""
_BOOTED: Final = 240.0
"""Seconds for all units of the first boot, cloud-init's among them: 60 under TCG, 2 cores busy."""


class Fleet:
    """Machines with the image of *inputs*, built in *cache*.

    *inputs* is called when an image is needed: it may build something itself, and keep it as long
    as its block.  *warm_up* is run as root in the first boot of each image, before that is kept:
    what every test would load again.  *say* gets a line for each step that takes long.
    """

    def __init__(
        self,
        inputs: Callable[[], AbstractContextManager[ImageInputs]],
        cache: Cache,
        *,
        accelerator: Wanted = "auto",
        warm_up: str = "true",
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._inputs = inputs
        self._known: ImageInputs | None = None
        self._cache = cache
        self._accelerator = accelerator
        self._warm_up = warm_up
        self._say = say
        self._stack = ExitStack()
        self._images: dict[str, Image] = {}
        self._templates: dict[str, Template] = {}
        self._system: System | None = None
        self._numbers = itertools.count(1)
        self._workdir: Path | None = None

    @property
    def kinds(self) -> Sequence[MachineKind]:
        """The kinds there are."""
        return KINDS

    def image(self, kernel: str = IMAGE_KERNEL) -> Image:
        """Return the image with *kernel*, built if need be.

        :raises HarnessError: if it cannot be built.
        """
        if kernel not in self._images:
            with phase(Phase.BUILD):
                other = None
                if kernel != IMAGE_KERNEL:
                    fetched = kernels.fetch(kernel, self._cache, say=self._say)
                    other = self._stack.enter_context(fetched)
                built = image.build(self.inputs, self._cache, kernel=other, say=self._say)
                self._images[kernel] = self._stack.enter_context(built)
        return self._images[kernel]

    @property
    def inputs(self) -> ImageInputs:
        """What the images are made of."""
        if self._known is None:
            self._known = self._stack.enter_context(self._inputs())
        return self._known

    def prepare(self, case: Case) -> None:
        """Build and boot what machines of this case go on from.

        :raises HarnessError: if that fails.
        """
        if case.machine == CONTAINER:
            self._container()
        elif case.machine == VM:
            self.template(case.kernel)

    def acquire(self, case: Case) -> Machine:
        """Return a fresh machine that answers; whoever asked closes it.

        :raises HarnessError: if there is none to be had.
        """
        name = f"{case.id}-{next(self._numbers)}"
        with phase(Phase.RESTORE):
            if case.machine == CONTAINER:
                return self._container().boot(self._room() / name, name=name)
            if case.machine == VM:
                return self.template(case.kernel).restore(self._room() / name, name=name)
        raise HarnessError(f"there are no machines of the kind {case.machine}")

    def template(self, kernel: str = IMAGE_KERNEL) -> Template:
        """Return what VMs with *kernel* are restored from, booted if need be.

        :raises HarnessError: if it does not boot.
        """
        if kernel not in self._templates:
            made = self.image(kernel)
            binary = host.qemu()
            verdicts = self._cache.root / "accel"
            verdicts.mkdir(parents=True, exist_ok=True)
            spec = Spec(
                kernel=made.quick.kernel,
                initrd=made.quick.initrd,
                append=made.quick.arguments,
                disks=disks(made),
                memory_mib=MEMORY,
                accelerator=accel.choose(
                    self._accelerator, made.quick.kernel, verdicts, binary=binary, say=self._say
                ),
            )
            templates = Templates(self._cache, binary=binary, capabilities=SYSTEM, say=self._say)
            with phase(Phase.BOOT):
                booted = templates.booted(
                    spec,
                    self._settle,
                    identity=[made.fingerprint, self._warm_up],
                    label=f"{made.name} {made.release}",
                )
                self._templates[kernel] = self._stack.enter_context(booted)
        return self._templates[kernel]

    def _container(self) -> System:
        if self._system is None:
            made = self.image()
            plain = container.System(sysroot=made.disk, seed=self.inputs.seed)
            with phase(Phase.BOOT):
                saved = container.prepared(
                    self._cache,
                    plain,
                    self._settle,
                    identity=[made.fingerprint, self._warm_up],
                    label=made.name,
                    say=self._say,
                )
                self._system = self._stack.enter_context(saved)
        return self._system

    def _settle(self, machine: QemuMachine | ContainerMachine) -> None:
        """Wait for the end of the first boot, and load what tests need."""
        wait = ["systemctl", "is-system-running", "--wait"]
        state = machine.run(wait, check=False, timeout=_BOOTED).out.strip()
        if state != "running":
            failed = machine.run(["systemctl", "--failed", "--no-legend"], check=False).out.strip()
            raise MachineError(f"the image boots to the state {state!r}: {failed}")
        machine.run(self._warm_up, timeout=_BOOTED)

    def enter(self, machine: Machine) -> str:
        """Return the command that a developer types in another terminal to look around."""
        if isinstance(machine, container.ContainerMachine):
            return shlex.join([*machine.enter(), "bash", "--login"])
        shell.serve(machine)
        return shell.command(machine.workdir)

    def _room(self) -> Path:
        if self._workdir is None:
            self._workdir = Path(tempfile.mkdtemp(prefix="harness-"))  # short: sockets lie there
        return self._workdir

    def close(self) -> None:
        """Give back what the machines share; all of them are closed."""
        self._stack.close()
        if self._workdir is not None:
            shutil.rmtree(self._workdir, ignore_errors=True)


def disks(made: Image) -> tuple[Disk, ...]:
    """Return the disks that an image boots from; the first is to get an overlay."""
    found = [Disk(path=made.disk, format="raw", serial="root")]
    if made.seed is not None:
        found.append(Disk(path=made.seed, format="raw", serial="seed", read_only=True))
    return tuple(found)
