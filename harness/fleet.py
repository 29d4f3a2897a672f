# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machines of a project's image: what most projects give the pytest plugin as its provider.

Nothing is built before the first machine of its kind is asked for; then it is the image, the first
boot, which is frozen (:mod:`harness.template`) or saved (:mod:`harness.container`), and what is
handed out goes on from there.  All of it lies in the cache; several processes make it once.

What changes most, the packages, costs a VM no boot: the image without them is booted and frozen,
and they are put into a machine that goes on from there (:mod:`harness.live`), which is frozen
again.  So whatever comes with a package is there as after a boot, but was not there during one.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import accel, container, host, image, kernels, live, shell
from harness.console import KNOWN_NOISE
from harness.errors import HarnessError, MachineError
from harness.machine import Capability
from harness.provider import IMAGE_KERNEL, MachineKind
from harness.qemu import Accelerator, Disk, Spec, create_overlay
from harness.template import Templates
from harness.timings import Phase, phase
from harness.vm import QemuMachine
from harness.watch import boot_findings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from harness.accel import Wanted
    from harness.cache import Cache
    from harness.container import ContainerMachine, System
    from harness.findings import Allow
    from harness.image import Boot, Image, ImageInputs
    from harness.machine import Machine
    from harness.provider import Case
    from harness.template import Template

VM: Final = "vm"
CONTAINER: Final = "container"
KINDS: Final = (
    MachineKind(VM, kernels=(IMAGE_KERNEL, *kernels.SUITES)),
    MachineKind(CONTAINER, own_kernel=False),
)
SYSTEM: Final = frozenset({Capability.SYSTEMD, Capability.OSTREE, Capability.SOFT_REBOOT})
MEMORY: Final = 1024
"""Mebibytes of a VM."""
CPUS: Final = {Accelerator.TCG: 1, Accelerator.KVM: 2}
"""Processors of a VM.  A single one is emulated a third faster, as nothing need be atomic."""
_BOOTED: Final = 240.0
"""Seconds for all units of the first boot, cloud-init's among them: 60 under TCG, 2 cores busy."""


class Fleet:
    """Machines with the image of *inputs*, built in *cache*.

    *inputs* is called when an image is needed: it may build something itself, and keep it as long
    as its block.  *warm_up* is run as root in a machine before that is kept: what every test would
    load again.  What its logs have against it by then it may not be kept with, unless it is
    *allowed*.  *say* gets a line for each step that takes long.
    """

    def __init__(  # noqa: PLR0913 - all by keyword but the obvious
        self,
        inputs: Callable[[], AbstractContextManager[ImageInputs]],
        cache: Cache,
        *,
        accelerator: Wanted = "auto",
        warm_up: str = "true",
        allowed: Iterable[Allow] = (),
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._inputs = inputs
        self._known: ImageInputs | None = None
        self._cache = cache
        self._accelerator = accelerator
        self._warm_up = warm_up
        self._allowed = tuple(allowed)
        self._say = say
        self._stack = ExitStack()
        self._images: dict[tuple[str, bool], Image] = {}
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
        return self._image(kernel, whole=True)

    def _image(self, kernel: str, *, whole: bool) -> Image:
        """Return the image with *kernel*, without the packages unless it is to be the *whole*."""
        if (kernel, whole) not in self._images:
            inputs = self.inputs if whole else replace(self.inputs, packages=())
            with phase(Phase.BUILD):
                other = None
                if kernel != IMAGE_KERNEL:
                    fetched = kernels.fetch(kernel, self._cache, say=self._say)
                    other = self._stack.enter_context(fetched)
                built = image.build(inputs, self._cache, kernel=other, say=self._say)
                self._images[kernel, whole] = self._stack.enter_context(built)
        return self._images[kernel, whole]

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

    def cold(self, kernel: str = IMAGE_KERNEL, *, tuned: bool = False) -> QemuMachine:
        """Return a VM that has never been booted; it is off.

        Unless it is *tuned*, as templates are, it boots by its own initramfs, nothing is masked or
        left out, and it has a network, for which the system waits.  Without KVM that takes a minute
        or two.  cloud-init runs either way.

        :raises HarnessError: if the image cannot be built.
        """
        made = self.image(kernel)
        room = self._room() / f"cold-{next(self._numbers)}"
        room.mkdir()
        disk, *others = disks(made)
        create_overlay(room / "disk.qcow2", str(disk.path), backing_format=disk.format)
        own = replace(disk, path=room / "disk.qcow2", format="qcow2")
        spec = self._spec(made, made.quick if tuned else made.plain)
        return QemuMachine(
            replace(spec, name=room.name, disks=(own, *others), network=not tuned),
            workdir=room,
            binary=host.qemu(),
            capabilities=SYSTEM,
        )

    def _spec(self, made: Image, boot: Boot) -> Spec:
        """Return the VM that boots *made* so."""
        verdicts = self._cache.root / "accel"
        verdicts.mkdir(parents=True, exist_ok=True)
        accelerator = accel.choose(
            self._accelerator, boot.kernel, verdicts, binary=host.qemu(), say=self._say
        )
        return Spec(
            kernel=boot.kernel,
            initrd=boot.initrd,
            append=boot.arguments,
            disks=disks(made),
            memory_mib=MEMORY,
            cpus=CPUS[accelerator],
            accelerator=accelerator,
        )

    def template(self, kernel: str = IMAGE_KERNEL) -> Template:
        """Return what VMs with *kernel* are restored from, made if need be.

        :raises HarnessError: if it does not boot.
        """
        if kernel not in self._templates:
            below = self._image(kernel, whole=False)
            made = Templates(self._cache, binary=host.qemu(), capabilities=SYSTEM, say=self._say)
            label = f"{below.name} {below.release}"
            with phase(Phase.BOOT):
                booted = made.booted(
                    self._spec(below, below.quick),
                    self._come_up,
                    identity=[below.fingerprint],
                    label=label,
                )
                template = self._stack.enter_context(booted)
                self._templates[kernel] = self._with_packages(made, template, label)
        return self._templates[kernel]

    def _with_packages(self, made: Templates, booted: Template, label: str) -> Template:
        """Return what *booted* is once it has the packages and is warm."""
        top = None
        identity = [self._warm_up]
        if self.inputs.packages:
            top = self._stack.enter_context(live.top(self.inputs, self._cache, say=self._say))
            identity.append(top.fingerprint)
            label = f"{label} {top.subject}"

        def prepare(machine: QemuMachine) -> None:
            if top is not None:
                live.put_on(machine, top)
            self._warm(machine)

        derived = made.derived(booted, prepare, identity=identity, label=label)
        return self._stack.enter_context(derived)

    def _container(self) -> System:
        if self._system is None:
            made = self.image()
            plain = container.System(sysroot=made.disk, seed=self.inputs.seed)
            with phase(Phase.BOOT):
                saved = container.prepared(
                    self._cache,
                    plain,
                    self._warm,
                    identity=[made.fingerprint, self._warm_up],
                    label=made.name,
                    say=self._say,
                )
                self._system = self._stack.enter_context(saved)
        return self._system

    def _come_up(self, machine: QemuMachine | ContainerMachine) -> None:
        """Wait for the end of the first boot."""
        self._run_to_the_end(machine)
        self._check(machine)

    def _warm(self, machine: QemuMachine | ContainerMachine) -> None:
        """Load what tests need, in a machine that has started all that it should."""
        self._run_to_the_end(machine)
        machine.run(self._warm_up, timeout=_BOOTED)
        self._check(machine)

    def _run_to_the_end(self, machine: QemuMachine | ContainerMachine) -> None:
        wait = ["systemctl", "is-system-running", "--wait"]
        state = machine.run(wait, check=False, timeout=_BOOTED).out.strip()
        if state != "running":
            failed = machine.run(["systemctl", "--failed", "--no-legend"], check=False).out.strip()
            raise MachineError(f"the image boots to the state {state!r}: {failed}")

    def _check(self, machine: QemuMachine | ContainerMachine) -> None:
        """Insist that nothing speaks against the machine: tests see only what comes later."""
        if found := boot_findings(machine, (*KNOWN_NOISE, *self._allowed)):
            error = MachineError(f"{machine.name}: its first boot is not clean: {found[0].subject}")
            error.add_note("\n\n".join(map(str, found)))
            raise error

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
