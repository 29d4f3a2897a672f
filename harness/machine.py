# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one interface of every machine: what tests see of a VM, a container or a bare kernel.

A backend subclasses :class:`Machine`, gives it a ``channel`` and fills in the hooks at the end of
the class (``_reboot``, ``_power_cut``, ``_start``, ``console``, ``close``); what it cannot do it
leaves out of its capabilities.  All that goes through the agent is here, so that it is the same for
all.  Once a machine broke, every later call raises the first cause.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

from harness import mounts, units
from harness.channel import Result
from harness.errors import CapabilityError, ChannelError, MachineError, UnitError
from harness.logs import LogEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.channel import Channel, Hello

__all__ = ["Capability", "LogEvent", "Machine", "RebootMode", "Result", "UserView"]

RebootMode = Literal["system", "soft"]
BOOT_TIMEOUT: Final = 180.0
"""Seconds for a boot until the agent answers: a cold boot under TCG on a busy host takes 50."""
_LINES: Final = 20


class Capability(StrEnum):
    """What not every kind of machine can do."""

    REBOOT = "reboot"
    SOFT_REBOOT = "soft-reboot"
    POWER_CUT = "power-cut"
    OWN_KERNEL = "own-kernel"
    CONSOLE = "console"
    SYSTEMD = "systemd"
    OWN_CLOCK = "own-clock"
    FREEZE = "freeze"
    OSTREE = "ostree"


class Machine(ABC):
    """One machine under test.  Calls may come from several threads.

    :ivar name: unique among the machines of a run; for messages.
    :ivar workdir: where its sockets, logs and artefacts lie.
    """

    lacks: ClassVar[Mapping[Capability, str]] = {}
    """Why a capability is missing, for skips: ``{Capability.POWER_CUT: "it has no power"}``."""
    kernel_log: ClassVar[Path | None] = None
    """Where this host's kernel logs, if it is the machine's kernel."""

    def __init__(
        self, name: str, *, workdir: Path, capabilities: frozenset[Capability] = frozenset()
    ) -> None:
        """Describe the machine; it need not run yet."""
        self.name = name
        self.workdir = workdir
        self.capabilities = capabilities
        self._hello: Hello | None = None
        self._broken: MachineError | None = None
        self._off = False
        self._followers: list[Callable[[LogEvent], None]] = []

    # What a backend gives.

    @property
    @abstractmethod
    def channel(self) -> Channel:
        """The way to the agent; the same object for as long as the machine lives."""

    @abstractmethod
    def close(self) -> None:
        """End the machine and drop what it used; may be called again, and of a broken one."""

    def console(self) -> str:
        """Return what the machine wrote on its console since it was started."""
        self.need(Capability.CONSOLE)
        raise NotImplementedError

    def _reboot(self, mode: RebootMode) -> None:
        """Ask for the reboot and come back at once; the channel may be lost meanwhile."""
        verb = "soft-reboot" if mode == "soft" else "reboot"
        with contextlib.suppress(ChannelError):  # the agent may be ended before it answers
            self.channel.run(["systemctl", "--no-block", verb], timeout=30).check()

    def _power_cut(self) -> None:
        """Stop the machine as if its power went."""
        raise NotImplementedError

    def _start(self) -> None:
        """Start a machine that is off; :meth:`start` then waits for the agent."""
        raise NotImplementedError

    def _diagnose(self, error: ChannelError) -> MachineError:
        """Return the cause behind a lost channel, for example that QEMU died; else *error*."""
        return error

    # Its state.

    def need(self, *capabilities: Capability) -> None:
        """Insist on *capabilities*.

        :raises CapabilityError: if one is missing.
        """
        for capability in capabilities:
            if capability not in self.capabilities:
                why = self.lacks.get(capability, "not with this kind of machine")
                raise CapabilityError(f"{self.name} cannot do {capability}: {why}")

    @property
    def broken(self) -> MachineError | None:
        """The first cause, once the machine broke."""
        return self._broken

    def break_(self, cause: MachineError) -> None:
        """Note that the machine broke; only the first cause counts.

        Whoever waits for an answer of the agent gets *cause* at once.  For watchers on threads.
        """
        if self._broken is None:
            self._broken = cause
            self.channel.close(cause)

    def raise_if_broken(self) -> None:
        """Raise the first cause if the machine broke, and a refusal if it is off."""
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if self._off:
            raise MachineError(f"{self.name} is off", hint="start() it")

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Do something over the channel; if that is lost, the machine is broken."""
        self.raise_if_broken()
        try:
            yield
        except ChannelError as error:
            if self._off and self._broken is None:
                raise MachineError(f"{self.name} was switched off meanwhile") from None
            self.break_(self._broken or self._diagnose(error))
            if self._broken is error:
                raise
            self.raise_if_broken()

    def greet(self, timeout: float = BOOT_TIMEOUT) -> Hello:
        """Say hello to the agent: a backend calls this after each boot and restore.

        Whatever ran in the machine on behalf of an earlier conversation is ended.
        """
        with self._working():
            return self._greet(timeout)

    def _greet(self, timeout: float) -> Hello:
        self._hello = self.channel.hello(timeout)
        if self._followers:
            self.channel.follow(self._deliver)
        return self._hello

    @property
    def hello(self) -> Hello:
        """What the agent said of itself and the system when greeted last."""
        self.raise_if_broken()
        return self._hello or self.greet()

    @property
    def kernel(self) -> str:
        """The kernel's release, as ``uname -r`` has it."""
        return self._hello.kernel if self._hello else self.hello.kernel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Commands and files.

    def run(  # noqa: PLR0913  # what a command can be given
        self,
        argv: Sequence[str] | str,
        *,
        user: str | None = None,
        stdin: bytes = b"",
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = True,
    ) -> Result:
        """Run a command (a string: with ``sh -c``) and return what came of it.

        It starts in ``/`` with a clean environment, as root or as *user*, and has ended when its
        first process has: what that leaves in the background goes on, unread.

        :raises CommandError: if *check* and its status is not 0; 126 and 127 also stand for what
            could not be started, as in a shell.
        :raises CommandTimeoutError: after *timeout* seconds, whatever *check* says.
        """
        with self._working():
            result = self.channel.run(
                argv, user=user, stdin=stdin, timeout=timeout, env=env, cwd=cwd
            )
        return result.check() if check else result

    def copy_in(
        self,
        source: Path | bytes,
        target: str,
        *,
        mode: int | None = None,
        user: str | None = None,
    ) -> None:
        """Make *target* in the machine a copy of *source*: bytes, a file, or a directory's content.

        Directories that *target* lies in are made.  A file takes its place by a rename; a directory
        is merged into one that is there.  Modes, times and symlinks are kept, owners are not:
        everything is root's, or *user*'s, whose rights then count.  *mode* is for *target* itself.

        :raises RemoteError: if it cannot be written.
        """
        with self._working():
            self.channel.put(source, target, mode=mode, user=user)

    def copy_out(self, source: str, target: Path, *, user: str | None = None) -> tuple[str, ...]:
        """Make *target* on the host a copy of *source*: a file, or a directory's content.

        Return the paths that were left out: sockets, devices, pipes, and what vanished meanwhile.

        :raises RemoteError: if it is not there or cannot be read.
        """
        with self._working():
            return self.channel.get(source, target, user=user)

    def user(self, name: str) -> UserView:
        """Return the machine as *name* may use it."""
        return UserView(self, name)

    # Looking inside.

    def mounts(self, process: str = "self") -> mounts.Table:
        """Return the mount table that *process* sees; stacked mounts are told apart."""
        return mounts.parse(self.run(["cat", f"/proc/{process}/mountinfo"]).stdout)

    def journal(self, *args: str) -> str:
        """Return what ``journalctl`` with *args* prints; without any, this boot's journal."""
        self.need(Capability.SYSTEMD)
        return self.run(["journalctl", "--no-pager", "--quiet", *(args or ("-b",))]).out

    def follow(self, callback: Callable[[LogEvent], None]) -> None:
        """Have *callback* called with everything that is logged from now on, also after reboots.

        It is called on a thread of the channel's, in order, within a second of the entry.
        """
        with self._working():
            if not self._followers:
                self.channel.follow(self._deliver)
            self._followers.append(callback)

    def unfollow(self, callback: Callable[[LogEvent], None]) -> None:
        """Call *callback* no more."""
        self._followers.remove(callback)

    def _deliver(self, event: LogEvent) -> None:
        for callback in tuple(self._followers):
            callback(event)

    def wait_for_unit(self, unit: str, *, timeout: float = 30) -> None:
        """Return when *unit* is active, or has done its work if it is a oneshot service.

        It waits for the service manager's own signals.

        :raises UnitError: at once when it failed, does not exist, is masked, or is inactive with
            nothing queued that could start it; and after *timeout* seconds.
        """
        self.need(Capability.SYSTEMD)
        with self._working():
            state = units.wait(self.channel, unit, timeout)
        if state.reached:
            return
        error = UnitError(f"{unit} on {self.name} {state}")
        lines = self.run(
            [
                "journalctl",
                "-qb",
                "--no-pager",
                "-oshort-monotonic",
                f"-n{_LINES}",
                "-u",
                unit,
            ],
            check=False,
        ).out
        if lines.strip():
            error.add_note(f"journal of {unit}:\n{lines.rstrip()}")
        raise error

    # Its life.

    def reboot(self, mode: RebootMode = "system", *, timeout: float = BOOT_TIMEOUT) -> None:
        """Reboot from within and return when the agent answers again.

        ``system`` goes through the firmware or the container manager and brings a new boot id;
        ``soft`` is systemd's soft-reboot: the kernel and its boot id stay.
        """
        self.need(Capability.SOFT_REBOOT if mode == "soft" else Capability.REBOOT)
        before = self.hello
        deadline = time.monotonic() + timeout
        with self._working():
            self._reboot(mode)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ChannelError(
                        f"{self.name} has not begun a {mode} reboot within {timeout:.0f} s"
                    )
                try:
                    now = self.channel.hello(left)
                    booted = now.boot_id != before.boot_id
                    if now.agent != before.agent and (booted or mode == "soft"):
                        self._greet(max(1.0, deadline - time.monotonic()))
                        break
                except ChannelError:
                    # The old agent was ended amid the conversation: there will be another.
                    if self._broken is not None or self._off or time.monotonic() >= deadline:
                        raise
                time.sleep(0.1)  # the old system still shuts down
            # A container's boot id is mounted over the host's, and does not survive a soft reboot.
            if mode == "soft" and booted and Capability.OWN_KERNEL in self.capabilities:
                raise MachineError(f"{self.name} did a system reboot when asked for a soft one")

    def power_cut(self) -> None:
        """Take the power away at this instant; what was not on the disk is lost."""
        self.need(Capability.POWER_CUT)
        self.raise_if_broken()
        self._off = True
        self._power_cut()

    def start(self, *, timeout: float = BOOT_TIMEOUT) -> None:
        """Start a machine that is off; return when the agent answers."""
        if self._broken is not None:
            self.raise_if_broken()
        self._off = False
        self._start()
        self.greet(timeout)


class UserView:
    """A machine as one of its users may use it; :class:`Machine` has the contracts."""

    def __init__(self, machine: Machine, name: str) -> None:
        """See *machine* as user *name*."""
        self.machine = machine
        self.name = name

    def run(  # noqa: PLR0913  # what a command can be given
        self,
        argv: Sequence[str] | str,
        *,
        stdin: bytes = b"",
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = True,
    ) -> Result:
        """Run a command as the user."""
        return self.machine.run(
            argv, user=self.name, stdin=stdin, timeout=timeout, env=env, cwd=cwd, check=check
        )

    def copy_in(self, source: Path | bytes, target: str, *, mode: int | None = None) -> None:
        """Copy into the machine what the user may write there."""
        self.machine.copy_in(source, target, mode=mode, user=self.name)

    def copy_out(self, source: str, target: Path) -> tuple[str, ...]:
        """Copy out of the machine what the user may read there."""
        return self.machine.copy_out(source, target, user=self.name)
