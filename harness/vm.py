# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine in QEMU: its life from the first boot or restore to the end.

One object is one machine, whose QEMU comes and goes with power cuts.  All of it lies in its
working directory: the disks' overlays, the sockets, ``console.log`` and ``qemu.err``; the last two
stay when the machine is closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import qemu
from harness.channel import Channel
from harness.child import spawn
from harness.errors import ChannelError, MachineError
from harness.machine import BOOT_TIMEOUT, Capability, Machine
from harness.qemu import Accelerator, Spec
from harness.qmp import Qmp, RefusedError, connect_unix
from harness.timings import Phase, phase

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.machine import RebootMode
    from harness.qmp import Json

CAPABILITIES: Final = frozenset(
    {
        Capability.REBOOT,
        Capability.POWER_CUT,
        Capability.OWN_KERNEL,
        Capability.OWN_CLOCK,
        Capability.CONSOLE,
        Capability.FREEZE,
    }
)
"""What every machine of this kind can do; what its system can do comes in addition."""

ERRORS: Final = "qemu.err"
_ERROR_LINES: Final = 5
_CONSOLE_LINES: Final = 20
_LAST_WORDS: Final = 1.0
"""Seconds between the end of QEMU's sockets and that of its process."""
_MIGRATION: Final = 60.0
_POLL: Final = 0.002
# Without a service manager there is nobody to ask but the kernel; the agent is to answer before.
_KERNEL_REBOOT: Final = "sync; { sleep 0.1; echo b > /proc/sysrq-trigger; } >/dev/null 2>&1 &"


@dataclass
class _Running:
    """One QEMU; *expected* is set before it is ended on purpose."""

    process: subprocess.Popen[bytes]
    monitor: Qmp
    expected: bool = False


class QemuMachine(Machine):
    """A machine as *spec* describes it, off at first: :meth:`start` boots it, or restores it.

    It is restored if there is a *state*, which :meth:`freeze` wrote, or *spec* names a snapshot;
    that once: after a power cut it boots.  *capabilities* are those of its system, in addition to
    what every such machine has.  Paths in *spec* must be absolute, and its disks are written to.

    :ivar spec: what it is, and how it will be started next.
    :ivar command: QEMU's command line as of the last start, to be run in ``workdir``.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        workdir: Path,
        binary: Path = Path("qemu-system-x86_64"),
        capabilities: frozenset[Capability] = frozenset(),
        state: Path | None = None,
    ) -> None:
        super().__init__(spec.name, workdir=workdir, capabilities=CAPABILITIES | capabilities)
        workdir.mkdir(parents=True, exist_ok=True)
        self.spec = spec
        self.binary = binary
        self.command: tuple[str, ...] = ()
        self._state = state
        self._shared = False
        self._running: _Running | None = None
        self._channel = Channel(lambda: connect_unix(workdir / qemu.AGENT))
        self._off = True

    @property
    def channel(self) -> Channel:
        """The way to the agent."""
        return self._channel

    @property
    def monitor(self) -> Qmp:
        """The connection to QEMU's monitor.

        :raises MachineError: if the machine is off.
        """
        if self._running is None:
            raise MachineError(f"{self.name} is off", hint="start() it")
        return self._running.monitor

    @property
    def pid(self) -> int | None:
        """QEMU's process, while there is one."""
        return self._running.process.pid if self._running else None

    def console(self) -> str:
        """Return what the machine wrote on its serial console, all boots one after another."""
        return _text(self.workdir / qemu.CONSOLE)

    # Its life.

    def start(self, *, timeout: float = BOOT_TIMEOUT) -> None:
        """Start the machine; return when the agent answers.

        After a restore the clock is put right and the random numbers are seeded anew.
        """
        if self._state is None and not self.spec.snapshot:
            with phase(Phase.BOOT), self._turn():
                super().start(timeout=timeout)
            return
        with phase(Phase.RESTORE):
            super().start(timeout=timeout)
            with self._working():
                self.channel.set_clock()

    def reboot(self, mode: RebootMode = "system", *, timeout: float = BOOT_TIMEOUT) -> None:
        """Reboot from within and return when the agent answers again."""
        with phase(Phase.BOOT), self._turn():
            super().reboot(mode, timeout=timeout)

    def close(self) -> None:
        """End the machine at once, as it stands; the logs stay."""
        self._off = True
        self._channel.close()
        self._end()
        for name in qemu.SOCKETS:
            (self.workdir / name).unlink(missing_ok=True)

    def freeze(self, state: Path) -> None:
        """Stop the machine for good, its state in *state*, its memory file and its disks.

        The memory file must be shared.  A machine of the same shape goes on from there.

        :raises MachineError: if QEMU cannot do that; the machine is stopped then.
        """
        self.need(Capability.FREEZE)
        self.raise_if_broken()
        if not self._shared:
            raise MachineError(f"{self.name} cannot be frozen: its memory is in no file")
        self.monitor.command("stop")
        self._ignore_shared_memory()
        self.monitor.command("migrate", {"channels": _file(state)})
        self._migrated()
        self._quit()

    def freeze_snapshot(self, tag: str) -> None:
        """Stop the machine for good, all of it in snapshots called *tag* in its qcow2 disks.

        :raises MachineError: if QEMU cannot do that; the machine is stopped then.
        """
        self.need(Capability.FREEZE)
        self.raise_if_broken()
        self.monitor.command("stop")
        with contextlib.suppress(RefusedError):
            self._ignore_shared_memory(on=False)  # if it was restored that way
        said = self.monitor.command(
            "human-monitor-command", {"command-line": f"savevm {tag}"}, timeout=_MIGRATION
        )
        if isinstance(said, str) and said.strip():  # it says nothing when it succeeds
            raise MachineError(f"{self.name} cannot be frozen: {said.strip()}")
        self._quit()

    def halt(self) -> None:
        """Stop the machine for good, with all that it wrote on its disks."""
        self.raise_if_broken()
        self.monitor.command("stop")
        self._quit()

    # Hooks of the interface.

    def _start(self) -> None:
        spec, state = self.spec, self._state
        self._state, self._shared = None, spec.memory_file is not None and spec.share
        # Only the first start is a restore.
        self.spec = replace(spec, memory_file=None, share=False, incoming=False, snapshot="")
        try:
            self._launch(spec)
            if state is not None:
                self._restore(state)
        except MachineError as error:
            cause = self._cause() or error
            self.break_(cause)
            raise cause from None

    def _power_cut(self) -> None:
        self._end()

    def _reboot(self, mode: RebootMode) -> None:
        if Capability.SYSTEMD in self.capabilities:
            super()._reboot(mode)
        else:
            with contextlib.suppress(ChannelError):  # it may be gone before it answers
                self.channel.run(_KERNEL_REBOOT, timeout=30)

    def _diagnose(self, error: ChannelError) -> MachineError:
        if cause := self._cause():
            return cause
        self._add_notes(error)
        return error

    # QEMU.

    def _launch(self, spec: Spec) -> None:
        """Start QEMU and connect to its monitor."""
        for name in qemu.SOCKETS:
            (self.workdir / name).unlink(missing_ok=True)
        self.command = tuple(qemu.argv(spec, self.binary))
        with (self.workdir / ERRORS).open("ab") as errors:
            process = spawn(self.command, cwd=self.workdir, stderr=errors)
        try:
            monitor = Qmp.open(self.workdir / qemu.MONITOR, alive=lambda: process.poll() is None)
        except MachineError:
            cause = self._death(process)
            process.kill()
            process.wait()
            if cause is not None:
                raise cause from None
            raise
        self._running = running = _Running(process, monitor)
        threading.Thread(
            target=self._watch, args=(running,), name=f"watch {self.name}", daemon=True
        ).start()

    def _watch(self, running: _Running) -> None:
        """Note when QEMU dies, also while nobody asks anything of the machine."""
        running.process.wait()
        if not running.expected and (cause := self._death(running.process)) is not None:
            self.break_(cause)

    def _restore(self, state: Path) -> None:
        """Take over a frozen machine's state and run."""
        self._ignore_shared_memory()
        self.monitor.command("migrate-incoming", {"channels": _file(state)})
        self._migrated()
        self.monitor.command("cont")

    def _ignore_shared_memory(self, *, on: bool = True) -> None:
        capability: Json = {"capability": "x-ignore-shared", "state": on}
        self.monitor.command("migrate-set-capabilities", {"capabilities": [capability]})

    def _migrated(self) -> None:
        """Wait until the state is written or read."""
        deadline = time.monotonic() + _MIGRATION
        while True:
            found = self.monitor.command("query-migrate")
            status = found.get("status") if isinstance(found, dict) else None
            if status == "completed":
                return
            if status in {"failed", "cancelled"}:
                reason = found.get("error-desc") if isinstance(found, dict) else None
                raise MachineError(f"{self.name}: the migration failed: {reason or 'no reason'}")
            if time.monotonic() > deadline:
                raise MachineError(f"{self.name}: the migration does not end: {status}")
            time.sleep(_POLL)

    def _quit(self) -> None:
        """Have QEMU end by itself, so that it writes out what it keeps of the disks."""
        running = self._running
        if running is None:
            return
        running.expected = self._off = True
        running.monitor.command("quit")
        try:
            running.process.wait(30)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name}: QEMU does not end") from None
        finally:
            self.close()

    def _end(self) -> None:
        """Kill QEMU if there is one."""
        running, self._running = self._running, None
        if running is not None:
            running.expected = True
            running.process.kill()
            running.process.wait()
            running.monitor.close()

    # What went wrong.

    def _cause(self) -> MachineError | None:
        """Return why nothing can come from the machine, as far as QEMU tells."""
        running = self._running
        if running is None or running.expected:
            return None
        try:
            found = running.monitor.command("query-status", timeout=5)
        except MachineError:  # it is gone, or about to be
            return self._death(running.process)
        status = found.get("status") if isinstance(found, dict) else None
        if status == "running":
            return None
        return self._add_notes(MachineError(f"{self.name} stands still: {status}"))

    def _death(self, process: subprocess.Popen[bytes]) -> MachineError | None:
        """Return how QEMU died, if it did."""
        try:
            status = process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            return None
        last = (_text(self.workdir / ERRORS).strip().splitlines() or [""])[-1]
        if status < 0:
            message = f"QEMU died, killed by {_signal(-status)}"
        elif status == 0 and "terminating on signal" not in last:
            message = "powered itself off"
        else:
            message = f"QEMU died, exit status {status}: {last or 'it does not say why'}"
        return self._add_notes(MachineError(f"{self.name}: {message}"))

    def _add_notes(self, error: MachineError) -> MachineError:
        for what, file, count in (
            ("QEMU's last words", ERRORS, _ERROR_LINES),
            ("end of the console", qemu.CONSOLE, _CONSOLE_LINES),
        ):
            if lines := _text(self.workdir / file).strip().splitlines()[-count:]:
                error.add_note(f"{what} ({self.workdir / file}):\n" + "\n".join(lines))
        return error

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Boot alone where two boots at once would starve each other: on few processors."""
        enough = 2 * self.spec.cpus <= len(os.sched_getaffinity(0))
        if enough or self.spec.accelerator is not Accelerator.TCG:
            yield
            return
        with alone("boot"):
            yield


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """Be the only one of this user's processes and threads on this host that does *what*.

    Nothing but time depends on it: where there is no lock to be had, it does without.
    """
    path = Path(tempfile.gettempdir(), f"harness-{what}-{os.getuid()}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def _file(path: Path) -> Json:
    """Return the migration channel to a file; as a URI its name could not have every character."""
    address: Json = {"transport": "file", "filename": str(path), "offset": 0}
    return [{"channel-type": "main", "addr": address}]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
