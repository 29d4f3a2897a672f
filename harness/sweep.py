# SPDX-License-Identifier: LGPL-2.1-or-later
r"""One command on several bare kernels, side by side, and one table at the end.

    python -m harness.sweep --kernel 6.1,6.12,unstable --library DIR --copy src=/project/src \
        --cwd /work -- python3 -m pytest

Each line of what the command prints begins with the kernel's name if there are several.  ``--jobs``
says how many machines run at a time.

With pytest, ``--junit`` tells the table of each test instead of the command alone, and
``--precompile`` with arguments that collect the tests saves a minute on each kernel without KVM.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import threading
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import accel, host, kernels, report, results
from harness.bare import Content, Hardware, machine
from harness.cache import Cache, default_root
from harness.console import scan
from harness.errors import CommandError, HarnessError, MachineError
from harness.figures import seconds_text
from harness.findings import Allow
from harness.initramfs import Archive
from harness.results import Outcome, Record
from harness.timings import Phase
from harness.userland import Userland

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.bare import BareMachine

MACHINE: Final = "bare"
"""What the table calls this kind of machine."""
JUNIT: Final = "junit.xml"
_LOG: Final = "kernel.log"
_PLACE: Final = f"/run/{JUNIT}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done on each kernel.

    :ivar timeout: in seconds.
    :ivar junit: whether the command is one of pytest's.
    :ivar allowed: what its kernel log may have.
    """

    argv: tuple[str, ...]
    content: Content
    timeout: float = 900.0
    junit: bool = False
    allowed: tuple[Allow, ...] = ()

    @property
    def command(self) -> list[str]:
        """The command as it is run."""
        return [*self.argv, f"--junitxml={_PLACE}"] if self.junit else list(self.argv)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where it is done.

    :ivar directory: for what is left of it: consoles, kernel logs and results, by kernel.
    """

    cache: Cache
    directory: Path
    hardware: Hardware
    accelerator: accel.Wanted = "auto"


def run(name: str, job: Job, place: Place, write: Callable[[bytes], object]) -> list[Record]:
    """Do the job on one kernel; *write* gets what the command prints, as it comes.

    A machine that breaks is a failure of the job's.

    :raises HarnessError: if there is no such kernel, or no machine can be made.
    """
    workdir = place.directory / name
    with contextlib.ExitStack() as stack:
        kernel = stack.enter_context(kernels.fetch(name, place.cache, say=say))
        binary = place.hardware.binary or host.qemu()
        chosen = accel.choose(
            place.accelerator, kernel.vmlinuz, place.cache.root, binary=binary, say=say
        )
        hardware = replace(place.hardware, binary=binary, accelerator=chosen)
        found = stack.enter_context(
            machine(kernel, job.content, place.cache, workdir=workdir, hardware=hardware, say=say)
        )
        whole = Record(
            test=shlex.join(job.argv),
            machine=MACHINE,
            kernel=name,
            release=kernel.release,
            outcome=Outcome.PASSED,
            artefacts=str(workdir),
        )
        started = time.monotonic()
        try:
            found.start()
            booted = time.monotonic() - started
            say(f"{kernel.release}: answers {seconds_text(booted)} after its start")
            records = _done(found, job, whole, write)
        except (MachineError, CommandError) as error:
            reason = "\n".join([str(error), *getattr(error, "__notes__", ())])
            say(f"{kernel.release}: {reason}")
            records = [replace(whole, outcome=Outcome.FAILED, reason=str(error), details=reason)]
        say(f"{kernel.release}: {seconds_text(time.monotonic() - started)} in all")
    return records


def _done(
    found: BareMachine, job: Job, whole: Record, write: Callable[[bytes], object]
) -> list[Record]:
    """Run the command; return what came of it, test by test if it tells."""
    started = time.monotonic()
    status = found.stream(
        job.command, write, timeout=job.timeout, cwd=job.content.cwd, env={"TERM": "dumb"}
    )
    seconds = {Phase.TEST.value: time.monotonic() - started}
    log = found.run(["dmesg"]).out
    (found.workdir / _LOG).write_text(log, encoding="utf-8")
    records: list[Record] = []
    if job.junit and found.run(["test", "-e", _PLACE], check=False).returncode == 0:
        found.copy_out(_PLACE, found.workdir / JUNIT)
        records = tests(found.workdir / JUNIT, whole)
    findings = tuple(map(str, scan(log, job.allowed)))
    failed = status != 0 and not any(record.outcome is Outcome.FAILED for record in records)
    if failed or findings or not records:
        reason = f"exit status {status}" if status else "what the kernel logged" if findings else ""
        outcome = Outcome.FAILED if failed or findings else Outcome.PASSED
        for finding in findings:
            say(finding)
        records.append(
            replace(whole, outcome=outcome, reason=reason, phases=seconds, findings=findings)
        )
    return records


def tests(file: Path, whole: Record) -> list[Record]:
    """Return the tests in a file of pytest's in JUnit's format, on the machine of *whole*."""
    found: list[Record] = []
    for case in ET.parse(file).iter("testcase"):  # noqa: S314  # our own guest's
        outcome, reason, details = Outcome.PASSED, "", ""
        for kind in ("failure", "error", "skipped"):
            for element in case.iter(kind):
                outcome = Outcome.SKIPPED if kind == "skipped" else Outcome.FAILED
                reason, details = element.get("message", ""), element.text or ""
        found.append(
            replace(
                whole,
                test=f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}",
                outcome=outcome,
                reason=reason.partition("\n")[0],
                details=details if outcome is Outcome.FAILED else "",
                phases={Phase.TEST.value: float(case.get("time", 0))},
            )
        )
    return found


def say(line: str) -> None:
    """Print a line about the work itself, apart from what the command prints."""
    sys.stderr.write(f"sweep: {line}\n")
    sys.stderr.flush()


class Printer:
    """Prints what comes from one of several machines, line by line, each with *name* before it."""

    _lock = threading.Lock()

    def __init__(self, name: str) -> None:
        self._name = name
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        """Print the lines that are complete by now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._print(lines)

    def end(self) -> None:
        """Print what is left."""
        self._print([self._rest] if self._rest else [])
        self._rest = b""

    def _print(self, lines: list[bytes]) -> None:
        head = f"{self._name:8}  ".encode() if self._name else b""
        with self._lock:
            for line in lines:
                sys.stdout.buffer.write(head + line + b"\n")
            sys.stdout.buffer.flush()


def run_all(names: Sequence[str], job: Job, place: Place, *, at_once: int) -> list[Record]:
    """Do the job on each kernel, on *at_once* at a time.

    :raises HarnessError: if one of them cannot be had; the others are done all the same.
    """
    found: dict[str, list[Record]] = {}
    errors: list[Exception] = []
    turn = threading.Semaphore(at_once)

    def work(name: str) -> None:
        printer = Printer(name if len(names) > 1 else "")
        with turn:
            try:
                found[name] = run(name, job, place, printer)
            except Exception as error:  # noqa: BLE001  # it is raised below
                errors.append(error)
            finally:
                printer.end()

    # Daemons: an interrupt is not to wait for them, and the machines end with this process.
    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [record for name in names for record in found[name]]


def content(options: argparse.Namespace) -> Content:
    """Return what the options put on the machine."""
    files = Archive()
    for pair in options.copy:
        source, _, target = pair.partition("=")
        path, name = Path(source), target or f"/project/{Path(source).name}"
        if path.is_dir():
            files.tree(path, name, skip=lambda inner: Path(inner).name == "__pycache__")
        else:
            files.copy(path, name)
    return Content(
        files=files,
        userland=Userland(
            libraries=tuple(options.library),
            packages=tuple(options.package),
            programs=tuple(options.program),
        ),
        precompile=tuple(shlex.split(options.precompile)),
        cwd=options.cwd,
    )


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; what stands behind ``--`` is the command."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.sweep", description="Run a command on bare kernels."
    )
    add = parser.add_argument
    add("--kernel", default=",".join(kernels.SUITES), metavar="NAMES", help="default: %(default)s")
    add("--copy", action="append", default=[], metavar="SOURCE[=TARGET]")
    add("--library", action="append", default=[], type=Path, metavar="DIR", help="of pip --target")
    add("--package", action="append", default=[], help="a Debian package to take programs from")
    add("--program", action="append", default=[], help="the name of such a program")
    add("--precompile", default="", metavar="ARGUMENTS", help="of Python, to compile in advance")
    add("--cwd", default="/", help="for the command")
    add("--junit", action="store_true", help="the command takes --junitxml")
    add("--allow", action="append", default=[], metavar="PATTERN", help="in the kernel's log")
    add("--timeout", type=float, default=Job.timeout, metavar="SECONDS")
    add("--jobs", type=int, default=0, metavar="N", help="machines at a time; default: all")
    add("--memory", type=int, default=Hardware.memory_mib, metavar="MIB")
    add("--cpus", type=int, default=Hardware.cpus)
    add("--accel", choices=["auto", "kvm", "tcg"], default="auto")
    add("--out", type=Path, default=Path("build/kernels"), metavar="DIR", help="for logs")
    add("--records", type=Path, metavar="FILE", help="add results to FILE, for harness.report")
    add("command", nargs="+")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command on all kernels; returns 1 if it failed on one, 2 if it could not be run."""
    options = arguments(words)
    job = Job(
        argv=tuple(options.command),
        content=content(options),
        timeout=options.timeout,
        junit=options.junit,
        allowed=tuple(Allow(pattern, "--allow") for pattern in options.allow),
    )
    place = Place(
        cache=Cache(default_root()),
        directory=options.out.absolute(),
        hardware=Hardware(memory_mib=options.memory, cpus=options.cpus),
        accelerator=options.accel,
    )
    names = options.kernel.split(",")
    try:
        records = run_all(names, job, place, at_once=options.jobs or len(names))
        if options.records:
            results.append(options.records, records)
    except HarnessError as error:
        for line in (str(error), *getattr(error, "__notes__", ())):
            say(line)
        return 2
    sys.stdout.write("\n" + report.table(records))
    return int(any(record.outcome is Outcome.FAILED for record in records))


if __name__ == "__main__":
    sys.exit(main())
