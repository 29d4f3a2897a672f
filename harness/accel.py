# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM or TCG, by proof.

That ``/dev/kvm`` opens proves nothing: in a nested or restricted virtual machine it may be there,
create machines and run firmware, and then die in the middle of a kernel's start.  So the kernel
that is going to run is booted, without any root file system, until it panics for the lack of one;
the verdict is kept for this QEMU, kernel and processor.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from harness import qemu
from harness.cache import key
from harness.child import spawn
from harness.qemu import Accelerator, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Wanted = Literal["auto", "kvm", "tcg"]

DEVICE: Final = Path("/dev/kvm")
REACHED: Final = "Kernel panic - not syncing: VFS"
"""What a kernel says once all of it is initialised and there is no root file system."""
PATIENCE: Final = 20.0
"""Seconds for a boot to that point: with KVM it takes one, and three with TCG."""
FILE: Final = "accelerators.json"
_APPEND: Final = "console=ttyS0 panic=-1 quiet loglevel=3 8250.nr_uarts=1"
_FORMAT: Final = "1"
_POLL: Final = 0.02


@dataclass(frozen=True)
class Verdict:
    """Whether KVM works here, and if not, why in a few words."""

    works: bool
    why: str = ""


def choose(
    wanted: Wanted,
    kernel: Path,
    directory: Path,
    *,
    binary: Path = Path("qemu-system-x86_64"),
    say: Callable[[str], None] = lambda _line: None,
) -> Accelerator:
    """Return what is to run *kernel*: what is *wanted*, or with ``auto`` KVM where it works.

    Verdicts are kept in *directory*.  *say* gets one line if it is TCG though nobody asked for it.

    :raises HostError: if QEMU cannot be run.
    """
    if wanted != "auto":
        return Accelerator(wanted)
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        verdict = Verdict(works=False, why=_missing())
        again = ""
    else:
        file = directory / FILE
        verdict = _remembered(file, kernel, binary)
        again = f", and {file} remembers it"
    if verdict.works:
        return Accelerator.KVM
    say(f"accelerator: TCG, several times slower than KVM: {verdict.why}{again}")
    return Accelerator.TCG


def probe(
    kernel: Path,
    *,
    binary: Path = Path("qemu-system-x86_64"),
    accelerator: Accelerator = Accelerator.KVM,
    patience: float = PATIENCE,
) -> Verdict:
    """Boot *kernel* and return whether it got to the end of its initialisation.

    :raises HostError: if QEMU cannot be run.
    """
    spec = Spec(
        kernel=kernel.absolute(),
        append=_APPEND,
        memory_mib=512,
        accelerator=accelerator,
        name="probe",
        reboot=False,
    )
    with tempfile.TemporaryDirectory(prefix="harness-probe-") as name:
        work = Path(name)
        console, errors = work / qemu.CONSOLE, work / "qemu.err"
        with errors.open("wb") as stderr:
            process = spawn(qemu.argv(spec, binary), cwd=work, stderr=stderr)
        try:
            deadline = time.monotonic() + patience
            while True:
                # In this order: what QEMU wrote before it ended counts.
                status = process.poll()
                said = _text(errors)
                if REACHED in _text(console):
                    return Verdict(works=True)
                for line in said.splitlines():
                    if "internal error" in line:
                        return Verdict(works=False, why=f"a kernel dies with {line.strip()!r}")
                if status is not None:
                    return Verdict(works=False, why=_complaint(said, status))
                if time.monotonic() > deadline:
                    return Verdict(works=False, why=f"no kernel starts within {patience:.0f} s")
                time.sleep(_POLL)
        finally:
            process.kill()
            process.wait()


def fingerprint(kernel: Path, binary: Path) -> str:
    """Return what a verdict depends on, as one key.

    :raises HostError: if QEMU cannot be run.
    """
    return key(_FORMAT, qemu.version(binary), kernel, _APPEND, *host())


def host() -> tuple[str, ...]:
    """Return this machine's kernel and processor: what a guest under KVM gets to see of it."""
    system = os.uname()
    lines = _text(Path("/proc/cpuinfo")).partition("\n\n")[0].splitlines()
    told = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    processor = [line for line in lines if line.partition("\t")[0].strip() in told]
    return (system.release, system.version, *processor)


def _remembered(file: Path, kernel: Path, binary: Path) -> Verdict:
    """Return the verdict from *file*, or find it out and put it there."""
    name = fingerprint(kernel, binary)
    with _lock(file):
        verdicts = _read(file)
        if name in verdicts:
            return verdicts[name]
        verdict = verdicts[name] = probe(kernel, binary=binary)
        with contextlib.suppress(OSError):  # then the next run finds out again
            _write(file, verdicts)
        return verdict


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process at a time find out."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read(file: Path) -> dict[str, Verdict]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {
            name: Verdict(works=bool(entry["works"]), why=str(entry["why"]))
            for name, entry in found.items()
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}  # not there yet, or not ours


def _write(file: Path, verdicts: dict[str, Verdict]) -> None:
    plain = {name: {"works": one.works, "why": one.why} for name, one in verdicts.items()}
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def _complaint(said: str, status: int) -> str:
    """Return the line that says most of why QEMU ended: the first error, not what follows it."""
    lines = [line.strip().removeprefix("qemu-system-x86_64: ") for line in said.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    best = [*errors, *reversed(lines), f"status {status}"][0]
    return f"QEMU ends with {best.removeprefix('error: ')!r}"


def _missing() -> str:
    if not DEVICE.exists():
        return f"there is no {DEVICE}"
    return f"{DEVICE} may not be opened by this user"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
