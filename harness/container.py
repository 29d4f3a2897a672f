# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine in a container: the deployment of a VM's disk, booted by systemd-keeper.

It is the same system as in the VM, up in a second.  Systemd-nspawn or podman boots it, whichever
the host has.  Everything it may write is on a tmpfs of its own: each machine begins afresh, several
boot from one sysroot at once, and nothing of it is left on the host when it ends or when this
process does (:mod:`harness.keeper`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from harness import host, keeper, kmsg, quickboot, seed
from harness.channel import AGENT, Channel
from harness.child import spawn
from harness.errors import ChannelError, HostError, MachineError
from harness.image import NOCLOUD
from harness.machine import BOOT_TIMEOUT, Capability, Machine
from harness.qmp import connect_unix
from harness.timings import Phase, phase
from harness.trees import remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness.cache import Cache
    from harness.machine import RebootMode


class Engine(StrEnum):
    """What runs the container, the one to be preferred first."""

    NSPAWN = keeper.NSPAWN
    PODMAN = keeper.PODMAN


PACKAGES: Final = {
    Engine.NSPAWN: {"systemd-nspawn": "systemd-container", "mount": "mount", "tar": "tar"},
    Engine.PODMAN: {"podman": "podman", "crun": "crun", "mount": "mount", "tar": "tar"},
}
"""Programs that are needed, and Debian's packages."""
CAPABILITIES: Final = frozenset(
    {
        Capability.REBOOT,
        Capability.SOFT_REBOOT,
        Capability.CONSOLE,
        Capability.SYSTEMD,
        Capability.OSTREE,
    }
)
_AGENT: Final = f"{keeper.GUEST_DIRECTORY}/{AGENT.name}"
_SAVED: Final = "state"
_UNIT_NAME: Final = "harness-agent-container.service"
_KEEPER: Final = Path(__file__).with_name("keeper.py")
_ENDING: Final = 10.0  # seconds for the keeper to remove what it made
_LINES: Final = 20
_LAST_WORDS: Final = 1.0  # seconds between the end of the channel and that of the keeper
_POWER_OFF: Final = 60.0


# As the one of the image, but with the agent of this harness and whatever the image.
_UNIT: Final = f"""\
[Unit]
Description=Agent of the test harness, in a container
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target sysinit.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=/usr/bin/python3 -IS {_AGENT} unix:{keeper.GUEST_DIRECTORY}/{keeper.SOCKET}
Restart=always
RestartSec=100ms
OOMScoreAdjust=-900
TasksMax=infinity
IgnoreSIGPIPE=no
"""


@dataclass(frozen=True, kw_only=True)
class System:
    """What a container boots.

    :ivar sysroot: holds an OSTree deployment: a directory, or the raw image of a disk with a file
        system and no partitions.  It is never written to.
    :ivar seed: a directory with the files of a NoCloud seed for cloud-init.
    :ivar state: what :meth:`ContainerMachine.save` wrote; it takes the place of the sysroot's own
        ``/etc`` and ``/var``.
    :ivar append: is added to the command line of the boot loader's entry.
    :ivar quick: whether to mask what :mod:`harness.quickboot` does in a VM.
    :ivar engine: what runs it; None: what the host has.
    """

    sysroot: Path
    seed: Path | None = None
    state: Path | None = None
    append: tuple[str, ...] = ()
    quick: bool = True
    engine: Engine | None = None

    def boot(self, workdir: Path, *, name: str = "machine") -> ContainerMachine:
        """Return a machine of its own in *workdir*, booted: its jobs are done.

        :raises HostError: if the host cannot run containers.
        :raises MachineError: if it does not answer.
        """
        machine = ContainerMachine(self, workdir=workdir, name=name)
        try:
            machine.start()
            # Not all may have worked: that is for whoever watches the journal.
            wait = ["systemctl", "is-system-running", "--wait"]
            machine.run(wait, check=False, timeout=BOOT_TIMEOUT)
        except BaseException:
            machine.close()
            raise
        return machine


@contextlib.contextmanager
def prepared(  # noqa: PLR0913 - the same as of a VM's template
    cache: Cache,
    system: System,
    prepare: Callable[[ContainerMachine], None] = lambda _machine: None,
    *,
    identity: Sequence[bytes | str | Path],
    label: str = "",
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[System]:
    """Give *system* as it is after a first boot and *prepare*, for as long as the block.

    What that wrote to ``/etc`` and ``/var`` is kept in *cache*; *identity* stands for what is in
    the sysroot and what *prepare* does.  If there is a seed, cloud-init has run and is not started
    again.

    :raises MachineError: if the system does not boot.
    """
    seed_files = sorted(seed.read(system.seed).items()) if system.seed else []
    parts = [part for file in seed_files for part in file]
    name = cache.key(
        *("container", str(system.quick), "\n".join(system.append), *identity, *parts),
        *(_KEEPER, Path(__file__), Path(quickboot.__file__)),
    )

    def build(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as workdir:
            machine = system.boot(Path(workdir), name=label or "container")
            with machine:
                prepare(machine)
                machine.save(directory / _SAVED)

    after = ("cloud-init=disabled",) if system.seed else ()
    with cache.entry("container", name, build, say, label=label) as entry:
        yield dataclasses.replace(
            system, seed=None, state=entry / _SAVED, append=(*system.append, *after)
        )


class ContainerMachine(Machine):
    """A container with *system*, off at first; once it was on, it cannot be started again."""

    lacks: ClassVar[Mapping[Capability, str]] = {
        Capability.POWER_CUT: "it has no power of its own, and no disk that could lose something",
        Capability.OWN_KERNEL: "a container runs on the host's kernel",
        Capability.OWN_CLOCK: "its clock is the host's",
        Capability.FREEZE: "its processes cannot be kept",
    }
    kernel_log = kmsg.DEVICE

    def __init__(self, system: System, *, workdir: Path, name: str = "machine") -> None:
        super().__init__(name, workdir=workdir, capabilities=CAPABILITIES)
        self.system = system
        self._run = workdir / keeper.SHARED
        self._channel = Channel(lambda: connect_unix(self._run / keeper.SOCKET))
        self._keeper: subprocess.Popen[bytes] | None = None
        self._expected = False
        self._off = True

    @property
    def channel(self) -> Channel:
        """The way to the agent."""
        return self._channel

    @property
    def pid(self) -> int | None:
        """The process that all others of the container end with, while there is one."""
        return self._keeper.pid if self._keeper else None

    def enter(self) -> list[str]:
        """Return the beginning of a command on the host that runs something in the container.

        For people, who want a terminal; all else has :meth:`run`.
        """
        self.raise_if_broken()
        # The process that is 1 in the innermost of the process namespaces.
        inits = [each for pid in _descendants(self.pid) if (each := _numbers(pid))[-1:] == ["1"]]
        return ["nsenter", "--all", "--target", max(inits, key=len)[0], "--"]

    def console(self) -> str:
        """Return what the system wrote on its console, all boots one after another."""
        return _text(self.workdir / keeper.CONSOLE)

    def start(self, *, timeout: float = BOOT_TIMEOUT) -> None:
        """Boot; return when the agent answers."""
        with phase(Phase.BOOT):
            super().start(timeout=timeout)

    def reboot(self, mode: RebootMode = "system", *, timeout: float = BOOT_TIMEOUT) -> None:
        """Reboot from within and return when the agent answers again."""
        with phase(Phase.BOOT):
            super().reboot(mode, timeout=timeout)

    def close(self) -> None:
        """End all its processes at once; the logs stay."""
        self._off = self._expected = True
        self._channel.close()
        if self._keeper is not None:
            self._keeper.terminate()
            try:
                self._keeper.wait(_ENDING)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
        remove_tree(self._run)

    def save(self, state: Path) -> None:
        """Power off for good; *state*, a new directory, gets all that the system has written.

        It is for :class:`System`, with the same sysroot.

        :raises MachineError: if it does not power off.
        """
        self.raise_if_broken()
        kept = self.workdir / keeper.STATE
        kept.mkdir()
        self._expected = True
        try:
            with contextlib.suppress(ChannelError):  # the agent may be ended before it answers
                self.channel.run(["systemctl", "--no-block", "poweroff"], timeout=30)
            if self._keeper is None or self._keeper.wait(_POWER_OFF) != 0:
                raise self._death()
            kept.rename(state)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name} does not power off") from None
        finally:
            self.close()

    # Hooks of the interface.

    def _start(self) -> None:
        engine = choose(self.system.engine)
        if self._keeper is not None:
            raise MachineError(f"{self.name} was on before, and its state is gone")
        self._run.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(AGENT, self._run / AGENT.name)
        _write_early(self._run / keeper.EARLY, quick=self.system.quick)
        system = self.system
        spec = keeper.Spec(
            name="harness",
            sysroot=str(system.sysroot.absolute()),
            workdir=str(self.workdir.absolute()),
            state=str(system.state.absolute()) if system.state else "",
            seed=str(system.seed.absolute()) if system.seed else "",
            engine=engine,
            append=" ".join([*system.append, *([NOCLOUD] if system.seed else [])]),
        )
        command = [sys.executable, "-IS", os.fspath(_KEEPER), json.dumps(dataclasses.asdict(spec))]
        with (self.workdir / keeper.ERRORS).open("ab") as errors:
            self._keeper = spawn(command, cwd=self.workdir, stderr=errors)
        threading.Thread(target=self._watch, name=f"watch {self.name}", daemon=True).start()

    def _watch(self) -> None:
        """Note when the container ends, also while nobody asks anything of it."""
        if self._keeper is not None:
            self._keeper.wait()
            if not self._expected:
                self.break_(self._death())

    def _diagnose(self, error: ChannelError) -> MachineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._keeper is not None:
                self._keeper.wait(_LAST_WORDS)
                return self._death()
        self._add_notes(error)
        return error

    def _death(self) -> MachineError:
        """Return how the container ended."""
        status = self._keeper.returncode if self._keeper else 0
        last = (_text(self.workdir / keeper.ERRORS).strip().splitlines() or [""])[-1]
        if status == 0:
            message = "powered itself off"
        elif status < 0:
            message = f"its keeper was killed by signal {-status}"
        else:
            message = last or f"its keeper ended with status {status}"
        return self._add_notes(MachineError(f"{self.name}: {message}"))

    def _add_notes(self, error: MachineError) -> MachineError:
        for what, file in (("complaints", keeper.ERRORS), ("end of the console", keeper.CONSOLE)):
            if lines := _text(self.workdir / file).strip().splitlines()[-_LINES:]:
                error.add_note(f"{what} ({self.workdir / file}):\n" + "\n".join(lines))
        return error


def _write_early(directory: Path, *, quick: bool) -> None:
    """Write to *directory* what is in ``/run`` before the system starts."""
    units = directory / "systemd/system"
    wants = units / "sysinit.target.wants"
    wants.mkdir(parents=True)
    (units / _UNIT_NAME).write_text(_UNIT)
    (wants / _UNIT_NAME).symlink_to(f"../{_UNIT_NAME}")
    if not quick:
        return
    generators = directory / "systemd/system-generators"
    generators.mkdir()
    masked = [units / unit for unit in quickboot.MASKED]
    masked += [generators / f"{name}-generator" for name in quickboot.GENERATORS]
    for path in masked:
        path.symlink_to("/dev/null")
    for name, text in quickboot.FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def choose(engine: Engine | None = None) -> Engine:
    """Return what runs containers here: *engine*, or the first that is there, or can be installed.

    :raises HostError: if there is nothing, or we may not use it.
    """
    if os.geteuid() != 0:
        raise HostError("a container needs root", hint="run it as root, or use a VM")
    there = [each for each in Engine if all(map(host.which, PACKAGES[each]))]
    engine = engine or (there or list(Engine))[0]
    host.need(PACKAGES[engine])
    return engine


def _descendants(pid: int | None) -> Iterator[int]:
    with contextlib.suppress(OSError):  # it is gone
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from _descendants(int(child))


def _numbers(pid: int) -> list[str]:
    """Return the numbers of a process, ours first, in all process namespaces that it is in."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[1:]
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
