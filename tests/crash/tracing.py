# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run something in a child and stop it at each system call that changes anything.

A seccomp filter picks the calls, so that all others cost nothing, and ptrace stops at them: there
the child is killed, before or after the call, or the call fails with an errno without being made.
Calls are told by number, since python-ptrace's table ends before the new mount API.  The child is
forked from this interpreter, which has everything loaded.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import importlib
import os
import pkgutil
import platform
import signal
import struct
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from ptrace.binding import func

import overlayd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _calls(text: str) -> dict[int, str]:
    return {int(number): name for name, _, number in (word.partition("=") for word in text.split())}


CHANGING: Final = _calls(
    """write=1 pwrite64=18 writev=20 sendfile=40 sendto=44 sendmsg=46 flock=73 fsync=74 fdatasync=75
    truncate=76 ftruncate=77 rename=82 mkdir=83 rmdir=84 link=86 unlink=87 symlink=88 chmod=90
    fchmod=91 chown=92 fchown=93 lchown=94 mount=165 umount2=166 setxattr=188 lsetxattr=189
    fsetxattr=190 removexattr=197 lremovexattr=198 fremovexattr=199 openat=257 mkdirat=258
    fchownat=260 unlinkat=263 renameat=264 linkat=265 symlinkat=266 fchmodat=268 unshare=272
    utimensat=280 fallocate=285 setns=308 renameat2=316 copy_file_range=326 pidfd_send_signal=424
    open_tree=428 move_mount=429 fsopen=430 fsconfig=431 fsmount=432 fspick=433
    mount_setattr=442"""
)
"""System calls by their numbers on x86-64; of openat those that create or truncate."""
LOOKING: Final = _calls(
    """read=0 fstat=5 pread64=17 getdents=78 readlink=89 statfs=137 fstatfs=138 getxattr=191
    fgetxattr=193 listxattr=194 flistxattr=196 getdents64=217 newfstatat=262 readlinkat=267
    statx=332 openat2=437 statmount=457 listmount=458"""
)
"""Calls that only look; they can fail, too."""
_OPENAT: Final = 257
_CONDITIONS: Final = {_OPENAT: (2, os.O_CREAT | os.O_TRUNC)}
"""Argument of a call, and the bits of which one has to be set."""

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_EVENT_SECCOMP, _EVENT_STOP = 7, 128
_OPTIONS: Final = (
    func.PTRACE_O_TRACESYSGOOD
    | func.PTRACE_O_TRACEFORK
    | func.PTRACE_O_TRACEVFORK
    | func.PTRACE_O_TRACECLONE
    | func.PTRACE_O_TRACEEXEC
    | 1 << _EVENT_SECCOMP
    | 1 << 20  # whatever is traced is killed with this process
)
_WALL: Final = 0x40000000
_ARCH: Final = 0xC000003E  # AUDIT_ARCH_X86_64
_ALLOW, _TRACE = 0x7FFF0000, 0x7FF00000
_LD, _JEQ, _JSET, _RET = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # in struct seccomp_data
_libc = ctypes.CDLL(None, use_errno=True)


class Do(Enum):
    """What is done at a point beside failing it."""

    KILL = "killed before"
    KILL_AFTER = "killed after"


@dataclass(frozen=True, slots=True)
class Point:
    """A call that is about to be made; ``number`` counts from 0 over all processes."""

    number: int
    call: str
    arguments: tuple[int, ...]
    process: int
    main: bool
    """Whether the process is the one that was begun with."""

    def text(self, argument: int) -> str:
        """Return the string that an argument points to; it is the child's."""
        with open(f"/proc/{self.process}/mem", "rb", buffering=0) as memory:
            memory.seek(self.arguments[argument])
            return memory.read(256).partition(b"\0")[0].decode(errors="replace")


Act = Do | int | None
"""What to do, or an errno, or nothing."""


@dataclass
class Outcome:
    """How a child ended: its exit code (negative: the signal), and what it said."""

    code: int
    said: str
    points: list[Point]
    acted: Point | None


def need() -> None:
    """Skip the test where this is no machine for it; load what a command loads late."""
    import pytest  # noqa: PLC0415  # a machine under test has none

    load()
    if platform.machine() != "x86_64":
        pytest.skip("numbers and registers of system calls are known for x86-64 alone")


def load() -> None:
    """Load what a command loads late: a child would do it each time."""
    late = ("encodings.ascii", "json", "pwd", "shutil", "sqlite3", "subprocess", "traceback")
    own = {module.name for module in pkgutil.iter_modules(overlayd.__path__)} - {"__main__"}
    for name in (*late, *(f"overlayd.{name}" for name in own)):
        importlib.import_module(name)
    codecs.lookup("ascii")


def run(
    work: Callable[[], object],
    act: Callable[[Point], Act],
    *,
    calls: dict[int, str] | None = None,
    seconds: float = 60.0,
) -> Outcome:
    """Do *work* in a child; at each of *calls* ask *act* what shall happen, once.

    :raises TimeoutError: if it does not end in time; it is killed then.
    """
    with tempfile.TemporaryFile() as output:
        tracer = _Tracer(act, CHANGING if calls is None else calls)
        with _alarm(seconds):
            code = tracer.trace(_child(work, tracer.calls, output.fileno()))
        output.seek(0)
        said = output.read().decode(errors="replace")
    return Outcome(code, said, tracer.points, tracer.acted)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        message = f"still running after {seconds} s"
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _child(work: Callable[[], object], calls: dict[int, str], output: int) -> tuple[int, int]:
    """Fork what waits at a gate; return its pid and the gate."""
    reading, gate = os.pipe2(os.O_CLOEXEC)
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads, which xdist has; the child needs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(reading)
        return pid, gate
    code = 1
    try:
        os.close(gate)
        os.read(reading, 1)
        os.close(reading)
        for fd in (1, 2):
            os.dup2(output, fd)
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        _filter(calls)
        try:
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    except BaseException:  # noqa: BLE001  # it is told, and the child ends
        import traceback  # noqa: PLC0415

        with contextlib.suppress(OSError):
            os.write(2, traceback.format_exc().encode())
        code = 70
    finally:
        os._exit(code)


def _filter(calls: dict[int, str]) -> None:
    """Have the tracer asked before each of *calls*."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    program = [step(_LD, _ARCHITECTURE), step(_JEQ, _ARCH, 1, 0), step(_RET, _ALLOW)]
    for number in calls:
        program.append(step(_LD, _NUMBER))
        if number in _CONDITIONS:
            argument, bits = _CONDITIONS[number]
            program += [
                step(_JEQ, number, 0, 3),
                step(_LD, _ARGUMENTS + 8 * argument),
                step(_JSET, bits, 0, 1),
                step(_RET, _TRACE),
            ]
        else:
            program += [step(_JEQ, number, 0, 1), step(_RET, _TRACE)]
    program.append(step(_RET, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    )
    pr_set_seccomp, filter_mode = 22, 2
    if _libc.prctl(pr_set_seccomp, filter_mode, ctypes.byref(header), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


@dataclass
class _Tracer:
    act: Callable[[Point], Act]
    calls: dict[int, str]
    points: list[Point] = field(default_factory=list)
    acted: Point | None = None
    _traced: set[int] = field(default_factory=set)
    _programs: set[int] = field(default_factory=set)
    """Processes that became another program: they may stay."""
    _ending: set[int] = field(default_factory=set)
    """Threads that are killed when the call that they are in returns."""

    def trace(self, begun: tuple[int, int]) -> int:
        """Let a child run to its end; return its exit code, negative for a signal."""
        main, gate = begun
        code: int | None = None
        try:
            func.ptrace(_SEIZE, main, 0, _OPTIONS)
            self._traced.add(main)
            os.close(gate)
            while code is None or self._traced - self._programs:
                try:
                    thread, status = os.waitpid(-1, _WALL)
                except ChildProcessError:
                    break
                if os.WIFSTOPPED(status):
                    self._stopped(thread, status, main)
                    continue
                self._traced.discard(thread)
                self._programs.discard(thread)
                if thread == main:
                    code = os.waitstatus_to_exitcode(status)
            self._let_go()
        finally:
            for thread in self._traced:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(thread, signal.SIGKILL)
            for thread in self._traced:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(thread, _WALL)
        assert code is not None
        return code

    def _stopped(self, thread: int, status: int, main: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        self._traced.add(thread)
        with contextlib.suppress(func.PtraceError):  # it was killed meanwhile
            if event == _EVENT_SECCOMP:
                self._at_point(thread, main)
                return
            if event == func.PTRACE_EVENT_EXEC:
                self._programs.add(thread)
            if number == signal.SIGTRAP | 0x80 and thread in self._ending:
                os.kill(thread, signal.SIGKILL)
            delivered = 0 if event or number in {signal.SIGTRAP, signal.SIGTRAP | 0x80} else number
            func.ptrace(func.PTRACE_CONT, thread, 0, delivered)

    def _at_point(self, thread: int, main: int) -> None:
        registers = func.ptrace_getregs(thread)
        point = Point(
            number=len(self.points),
            call=self.calls[registers.orig_rax],
            arguments=(registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8),
            process=thread,
            main=thread == main,
        )
        self.points.append(point)
        act = self.act(point)
        if act is not None:
            self.acted = self.acted or point
        if act is Do.KILL:
            os.kill(thread, signal.SIGKILL)
            return
        if act is Do.KILL_AFTER:
            self._ending.add(thread)
            func.ptrace(func.PTRACE_SYSCALL, thread, 0, 0)
            return
        if isinstance(act, int):
            registers.orig_rax = ctypes.c_ulong(-1).value
            registers.rax = ctypes.c_ulong(-act).value
            func.ptrace_setregs(thread, registers)
        func.ptrace(func.PTRACE_CONT, thread, 0, 0)

    def _let_go(self) -> None:
        """Let programs that stay go on by themselves."""
        for thread in [*self._traced]:
            with contextlib.suppress(func.PtraceError):
                func.ptrace(_INTERRUPT, thread, 0, 0)
        deadline = time.monotonic() + 5
        while self._traced and time.monotonic() < deadline:
            try:
                thread, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                return
            if not os.WIFSTOPPED(status):
                self._traced.discard(thread)
                continue
            event, number = status >> 16, os.WSTOPSIG(status)
            with contextlib.suppress(func.PtraceError):
                func.ptrace(_DETACH, thread, 0, 0 if event or number == signal.SIGTRAP else number)
            self._traced.discard(thread)


def nothing(_point: Point) -> Act:
    """Let everything happen."""
    return None


def at(number: int, act: Act) -> Callable[[Point], Act]:
    """Do *act* at point *number*."""
    return lambda point: act if point.number == number else None
