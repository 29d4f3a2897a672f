# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boot once, restore for every test.

A template is a machine that was booted, prepared and frozen; every test gets a machine of its own
that goes on from there.  What a template is made of lies in one entry of the cache:

    kernel, initrd      links to what it was booted from
    diskN.0             a link to the disk that it was booted from, which nothing writes to
    diskN.1 …           what it wrote itself, one qcow2 overlay for each level
    memory              its memory, sparse; every machine maps it privately
    state               its devices
    console             what it wrote on its serial console, for people
    template.json       how it was frozen, and why not better

The memory file is what makes a restore fast: QEMU maps it instead of reading it, and machines share
what they do not change.  Where QEMU refuses that, the template is a snapshot inside its disks, and
where it refuses that too, its disks alone: then every machine is booted.  ``Template.how`` says so.

A template can be made from another one, with something more installed: nothing is booted then.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import accel, qemu
from harness.errors import HostError, MachineError
from harness.qemu import Accelerator, Spec
from harness.vm import QemuMachine, alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from harness.cache import Cache
    from harness.machine import Capability

    Part = bytes | str | Path
    Prepare = Callable[[QemuMachine], None]

KIND: Final = "template"
_FORMAT: Final = "2"
_TAG: Final = "frozen"
_META: Final = "template.json"
_MEMORY: Final = "memory"
_STATE: Final = "state"
_CONSOLE: Final = "console"


class Method(StrEnum):
    """How a template is kept, the best way first."""

    MEMORY = "memory file"
    SNAPSHOT = "savevm"
    COLD = "cold boot"


class _UnusableError(Exception):
    """This method does not work here."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A frozen machine in *directory*; *why* says what spoke against better methods.

    *spec* has the paths of what is in there; *level* is that of the disks' last overlay.
    """

    directory: Path
    fingerprint: str
    spec: Spec
    level: int
    method: Method
    why: str
    binary: Path
    capabilities: frozenset[Capability]
    kind: type[QemuMachine]

    @property
    def how(self) -> str:
        """How machines are made of it, in one line for people."""
        return f"{self.method} ({self.why})" if self.why else str(self.method)

    @property
    def memory(self) -> Path:
        """The memory file, if that is the method."""
        return self.directory / _MEMORY

    def restore(self, workdir: Path, *, name: str = "machine") -> QemuMachine:
        """Return a machine of its own in *workdir* that goes on from here, running.

        :raises MachineError: if it does not answer.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        disks = []
        for number, disk in enumerate(self.spec.disks):
            path = workdir / f"disk{number}.qcow2"
            if disk.read_only:
                path = disk.path
            elif self.method is Method.SNAPSHOT:  # they are inside the file: an overlay has none
                _copy(disk.path, path)
                for level in range(self.level):  # it names them without their directory
                    below = _disk(number, level)
                    (workdir / below).unlink(missing_ok=True)
                    (workdir / below).symlink_to(self.directory / below)
            else:
                path.unlink(missing_ok=True)
                qemu.create_overlay(path, str(disk.path))
            disks.append(replace(disk, path=path))
        machine = self.thaw(replace(self.spec, name=name, disks=tuple(disks)), workdir)
        try:
            machine.start()
        except BaseException:
            machine.close()
            raise
        return machine

    def thaw(self, spec: Spec, workdir: Path) -> QemuMachine:
        """Return a machine that will go on from here, still off; *spec* has disks of its own.

        If *spec* has a memory file, that is a copy of the template's.
        """
        state = None
        if self.method is Method.MEMORY:
            memory = spec.memory_file or self.memory
            spec = replace(spec, memory_file=memory, incoming=True)
            state = self.directory / _STATE
        elif self.method is Method.SNAPSHOT:
            spec = replace(spec, snapshot=_TAG)
        return self.kind(
            spec,
            workdir=workdir,
            binary=self.binary,
            capabilities=self.capabilities,
            state=state,
        )


class Templates:
    """Makes templates and keeps them in *cache*, one being made at a time.

    *capabilities* are those of the systems, as :class:`QemuMachine` takes them, and *kind* is the
    class of the machines; *say* is told in one line what takes long; *methods* are the ones to try.
    """

    def __init__(  # noqa: PLR0913 - what machines are made with
        self,
        cache: Cache,
        *,
        binary: Path = Path("qemu-system-x86_64"),
        capabilities: frozenset[Capability] = frozenset(),
        kind: type[QemuMachine] = QemuMachine,
        say: Callable[[str], None] = lambda _line: None,
        methods: Sequence[Method] = tuple(Method),
    ) -> None:
        self.cache = cache
        self.binary = binary
        self.capabilities = capabilities
        self.kind = kind
        self.say = say
        self.methods = tuple(methods)

    @contextlib.contextmanager
    def booted(
        self,
        spec: Spec,
        prepare: Prepare = lambda _machine: None,
        *,
        identity: Sequence[Part] = (),
        label: str = "",
    ) -> Iterator[Template]:
        """Give the template of *spec*, booted and then handed to *prepare*, as long as the block.

        *identity* stands for what *spec* does not show: what the disks hold (without it they are
        read from end to end), and what *prepare* does.  Kernel and initramfs count by content.

        :raises MachineError: if the machine does not boot.
        """
        yield from self._give(spec, prepare, self.fingerprint(spec, identity), label)

    @contextlib.contextmanager
    def derived(
        self,
        base: Template,
        prepare: Prepare,
        *,
        identity: Sequence[Part],
        label: str = "",
    ) -> Iterator[Template]:
        """Give the template of *base* after *prepare*, of which *identity* tells all.

        :raises MachineError: if the machine breaks.
        """
        name = self.cache.key(_FORMAT, base.fingerprint, *self.methods, *identity)
        yield from self._give(base, prepare, name, label)

    def fingerprint(self, spec: Spec, identity: Sequence[Part] = ()) -> str:
        """Return what the frozen state of *spec* depends on, as one key."""
        parts: list[Part] = [_FORMAT, qemu.version(self.binary), qemu.shape(spec), spec.kernel]
        parts += [spec.initrd] if spec.initrd else []
        parts += identity or [disk.path for disk in spec.disks]
        if spec.accelerator is Accelerator.KVM:
            parts += accel.host()  # the guest has seen the processor
        return self.cache.key(*parts, *self.methods)

    def _give(
        self, source: Spec | Template, prepare: Prepare, name: str, label: str
    ) -> Iterator[Template]:
        def build(directory: Path) -> None:
            with alone("template"):
                self._build(directory, source, prepare, name)

        with self.cache.entry(KIND, name, build, self.say, label=label) as directory:
            template = self._load(directory, source, name)
            if template.why:
                self.say(f"machines are made by {template.how}")
            yield template

    def _load(self, directory: Path, source: Spec | Template, name: str) -> Template:
        """Return the template that lies in *directory*."""
        found = json.loads((directory / _META).read_text(encoding="utf-8"))
        spec = source.spec if isinstance(source, Template) else source
        level = int(found["level"])
        template = Template(
            directory=directory,
            fingerprint=name,
            spec=_placed(spec, directory, level),
            level=level,
            method=Method(found["method"]),
            why=found["why"],
            binary=self.binary,
            capabilities=self.capabilities,
            kind=self.kind,
        )
        if template.method is Method.MEMORY:
            with template.memory.open("rb") as file:  # soon every machine wants pages of it
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return template

    def _build(self, directory: Path, source: Spec | Template, prepare: Prepare, name: str) -> None:
        """Fill *directory*, by the best method that works."""
        against = [source.why] if isinstance(source, Template) and source.why else []
        for method in self._methods(source):
            _empty(directory)
            spec, level = _lay_out(directory, source, method)
            try:
                self._freeze(directory, source, spec, prepare, method)
                why = "; ".join(against)
                found = {"method": method, "level": level, "why": why}
                (directory / _META).write_text(json.dumps(found) + "\n", encoding="utf-8")
                if method is not Method.COLD:
                    self._prove(self._load(directory, source, name))
            except _UnusableError as error:
                against.append(f"{method} does not work: {error}")
                self.say(f"template: {against[-1]}")
            else:
                return
        raise HostError(f"no template can be made: {'; '.join(against) or 'no method is left'}")

    def _methods(self, source: Spec | Template) -> list[Method]:
        """Return the methods to try: none that is better than the one of a template's base."""
        order = list(Method)
        best = source.method if isinstance(source, Template) else order[0]
        return [method for method in self.methods if order.index(method) >= order.index(best)]

    def _freeze(
        self,
        directory: Path,
        source: Spec | Template,
        spec: Spec,
        prepare: Prepare,
        method: Method,
    ) -> None:
        """Start the machine *spec*, whose files are laid out, prepare it, and freeze it."""
        if method is Method.SNAPSHOT and all(disk.read_only for disk in spec.disks):
            raise _UnusableError("there is no disk to keep a snapshot in")
        with tempfile.TemporaryDirectory(prefix="harness-template-") as work:
            if isinstance(source, Template):
                machine = source.thaw(spec, Path(work))
            else:
                machine = self.kind(
                    spec,
                    workdir=Path(work),
                    binary=self.binary,
                    capabilities=self.capabilities,
                )
            with machine:
                machine.start()
                prepare(machine)
                machine.run("sync")
                (directory / _CONSOLE).write_text(machine.console(), encoding="utf-8")
                try:
                    if method is Method.MEMORY:
                        machine.freeze(directory / _STATE)
                    elif method is Method.SNAPSHOT:
                        machine.freeze_snapshot(_TAG)
                    else:
                        machine.halt()
                except MachineError as error:
                    raise _UnusableError(error.message) from error
        if method is Method.MEMORY:
            # Pages that the guest freed or never used are zeros; they take no room in a cache.
            _run("fallocate", "--dig-holes", str(directory / _MEMORY))

    def _prove(self, template: Template) -> None:
        """Restore a machine: better now than in every test."""
        with tempfile.TemporaryDirectory(prefix="harness-template-") as work:
            try:
                template.restore(Path(work), name="proof").close()
            except MachineError as error:
                raise _UnusableError(error.message) from error


# -- files of a template ---------------------------------------------------------------------


def _lay_out(directory: Path, source: Spec | Template, method: Method) -> tuple[Spec, int]:
    """Put into *directory* what the machine to be frozen runs on; return it and the disks' level.

    Backing files are named without their directory, which is going to be renamed.
    """
    if isinstance(source, Template):
        spec = source.spec
        for file in source.directory.glob("disk*"):
            changes = source.method is Method.SNAPSHOT and file.suffix == f".{source.level}"
            (_copy if changes else _link)(file, directory / file.name)
        level = source.level + (source.method is not Method.SNAPSHOT)
    else:
        spec = source
        for number, disk in enumerate(spec.disks):
            _link(disk.path, directory / _disk(number, 0))
        level = 1
    for number, disk in enumerate(spec.disks):
        path = directory / _disk(number, level)
        if not disk.read_only and not path.exists():
            format_ = disk.format if level == 1 else "qcow2"
            qemu.create_overlay(path, _disk(number, level - 1), backing_format=format_)
    _link(spec.kernel, directory / "kernel")
    if spec.initrd is not None:
        _link(spec.initrd, directory / "initrd")
    placed = _placed(spec, directory, level)
    if method is Method.MEMORY:
        placed = replace(placed, memory_file=directory / _MEMORY, share=True)
        if isinstance(source, Template) and source.method is Method.MEMORY:
            _copy(source.memory, directory / _MEMORY)
    return placed, level


def _placed(spec: Spec, directory: Path, level: int) -> Spec:
    """Return *spec* with the files that a template in *directory* has."""
    disks = tuple(
        replace(disk, path=directory / _disk(number, 0))
        if disk.read_only
        else replace(disk, path=directory / _disk(number, level), format="qcow2")
        for number, disk in enumerate(spec.disks)
    )
    return replace(
        spec,
        kernel=directory / "kernel",
        initrd=spec.initrd and directory / "initrd",
        disks=disks,
    )


def _disk(number: int, level: int) -> str:
    return f"disk{number}.{level}"


def _empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def _link(source: Path, target: Path) -> None:
    """Give *source* another name, so that it stays when the entry it comes from is pruned."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or another user's file
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its holes, without any copying where the file system can share."""
    _run("cp", "--reflink=auto", "--sparse=auto", "--", str(source), str(target))


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    except subprocess.CalledProcessError as error:
        raise HostError(f"{command[0]} failed: {error.stderr.strip()}") from error
    except OSError as error:
        raise HostError(f"cannot run {command[0]}: {error.strerror}") from error
