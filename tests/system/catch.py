# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop an overlayd command in the middle of its work; runs in the machine under test.

    python3 -IS catch.py NAME SYSCALL COUNT COMMAND…

The command is stopped, by SIGSTOP, as soon as it has made the system call for the COUNTth time, and
stays so; nobody traces it any more.  Prints its pid, and the record of the overlay NAME as it is
then.  A seccomp filter tells of these calls alone, so that the command runs at full speed up to
there, which strace(1) has no way to do.
"""

import ctypes
import glob
import json
import os
import signal
import struct
import sys
import time

RECORDS = "/run/overlayd/records/*.json"
SYSCALLS = {
    "sendfile": 40,
    "fdatasync": 75,
    "rename": 82,
    "umount2": 166,
    "move_mount": 429,
    "fsmount": 432,
}
"""Their numbers on x86-64."""

# <linux/ptrace.h>, <linux/seccomp.h>, <linux/filter.h>
PTRACE_TRACEME, PTRACE_CONT, PTRACE_DETACH, PTRACE_SYSCALL = 0, 7, 17, 24
PTRACE_SETOPTIONS, PTRACE_O_TRACESECCOMP, PTRACE_EVENT_SECCOMP = 0x4200, 0x80, 7
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
SECCOMP_RET_TRACE, SECCOMP_RET_ALLOW = 0x7FF00000, 0x7FFF0000
BPF_LD_W_ABS, BPF_JEQ_K, BPF_RET_K = 0x20, 0x15, 0x06

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise what a call failed with."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


def ptrace(request: int, pid: int, data: int) -> None:
    """Ask something of the kernel about a process that is traced."""
    arguments = (ctypes.c_long(request), ctypes.c_long(pid), None, ctypes.c_void_p(data))
    check(libc.ptrace(*arguments), "ptrace")


def tell_of(call: str) -> None:
    """Have this process and what it becomes stop for its tracer at each such call."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (BPF_LD_W_ABS, 0, 0, 0),  # the number of the call
            (BPF_JEQ_K, 0, 1, SYSCALLS[call]),
            (BPF_RET_K, 0, 0, SECCOMP_RET_TRACE),
            (BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)), 16)
    arguments = (PR_SET_SECCOMP, ctypes.c_long(SECCOMP_MODE_FILTER), whole)
    check(libc.prctl(*arguments), "prctl")


def start(call: str, command: list[str]) -> int:
    """Start the command, to be traced from its first instruction on; return its pid."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        ptrace(PTRACE_TRACEME, 0, 0)
        tell_of(call)
        os.execvp(command[0], command)
    os.waitpid(pid, 0)
    ptrace(PTRACE_SETOPTIONS, pid, PTRACE_O_TRACESECCOMP)
    return pid


def record_of(name: str) -> object:
    """Return the overlay's record."""
    for path in glob.glob(RECORDS):
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if record["name"] == name:
            return record
    return None


def stopped(pid: int) -> bool:
    """Return whether the process stands still, and for nobody's sake."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def main(name: str, call: str, count: int, command: list[str]) -> int:
    """Run the command, and stop it."""
    pid = start(call, command)
    calls, pending = 0, 0
    while True:
        ptrace(PTRACE_CONT, pid, pending)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            sys.stderr.write(f"{command} has called {call} {calls} times: status {status:#x}")
            return 1
        # What is no signal of the command's own ends here: an exec, or such a call.
        pending = 0 if os.WSTOPSIG(status) == signal.SIGTRAP else os.WSTOPSIG(status)
        if status >> 8 == signal.SIGTRAP | PTRACE_EVENT_SECCOMP << 8:
            calls += 1
            if calls == count:
                break
    ptrace(PTRACE_SYSCALL, pid, 0)
    os.waitpid(pid, 0)  # it is done
    ptrace(PTRACE_DETACH, pid, signal.SIGSTOP)
    while not stopped(pid):
        time.sleep(0.005)
    sys.stdout.write(json.dumps({"pid": pid, "record": record_of(name)}))
    return 0


if __name__ == "__main__":
    os.chdir("/")
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
