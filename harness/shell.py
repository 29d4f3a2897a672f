# SPDX-License-Identifier: LGPL-2.1-or-later
"""A terminal in a VM, for people: ``python -m harness.shell WORKDIR``.

The agent starts a login shell on a port of its own; here the terminal is handed through to that
port's socket.  Ctrl-] leaves; the shell and what runs in it stay for the next to come.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import sys
import termios
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness import qemu
from harness.errors import HarnessError, HostError
from harness.qmp import connect_unix

if TYPE_CHECKING:
    import socket

    from harness.machine import Machine

LEAVE: Final = b"\x1d"  # Ctrl-]
_GUEST: Final = """
import os, pty, select, signal, sys
port = os.open("/dev/virtio-ports/" + sys.argv[1], os.O_RDWR)
while True:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(os.path.expanduser("~root"))
        os.environ.update(TERM=sys.argv[2], HOME=os.path.expanduser("~root"))
        os.execvp("bash", ["bash", "--login"])
    try:
        while True:
            ready = select.select([port, terminal], [], [])[0]
            if terminal in ready:
                data = os.read(terminal, 65536)
                while data:
                    data = data[os.write(port, data):]
            if port in ready:
                data = os.read(port, 65536)
                if data:
                    os.write(terminal, data)
                else:
                    select.select([], [], [], 0.2)  # nobody is there
    except OSError:
        os.close(terminal)
        os.waitpid(pid, 0)
"""


def serve(machine: Machine) -> None:
    """Have a shell on *machine*'s port for people; one is enough."""
    terminal = os.environ.get("TERM", "linux")
    guest = shlex.join(["python3", "-c", _GUEST, qemu.SHELL_PORT, terminal])
    once = "mkdir /run/harness-shell 2>/dev/null || exit 0; "
    machine.run(f"{once}setsid {guest} >/dev/null 2>&1 </dev/null &")


def command(workdir: Path) -> str:
    """Return what a developer types to get to the shell of the machine in *workdir*."""
    root = Path(__file__).parents[1]
    return f"cd {shlex.quote(str(root))} && " + shlex.join(
        [sys.executable, "-m", "harness.shell", str(workdir)]
    )


def attach(workdir: Path) -> None:
    """Hand this terminal through to the shell of the machine in *workdir*, until Ctrl-].

    :raises HostError: if there is none, or this is no terminal.
    """
    try:
        connection = connect_unix(workdir / qemu.SHELL)
    except OSError as error:
        raise HostError(f"no machine runs in {workdir}: {error.strerror}") from None
    with connection:
        if not sys.stdin.isatty():
            raise HostError("a shell needs a terminal", hint="commands can be given instead")
        size = shutil.get_terminal_size()
        connection.sendall(f" stty rows {size.lines} cols {size.columns}; clear\n".encode())
        before = termios.tcgetattr(sys.stdin)
        sys.stderr.write("(Ctrl-] leaves)\r\n")
        try:
            tty.setraw(sys.stdin)
            _hand_through(connection)
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
            sys.stderr.write("\n")


def _hand_through(connection: socket.socket) -> None:
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    while True:
        ready = select.select([keyboard, connection], [], [])[0]
        if connection in ready:
            data = connection.recv(65536)
            if not data:
                return  # the machine is gone
            while data:
                data = data[os.write(screen, data) :]
        if keyboard in ready:
            data = os.read(keyboard, 4096)
            if not data or LEAVE in data:
                return
            connection.sendall(data)


def main() -> int:
    """Run as a program."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):  # noqa: PLR2004
        sys.stderr.write("usage: python -m harness.shell WORKDIR\n")
        return 2
    try:
        attach(Path(sys.argv[1]))
    except HarnessError as error:
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"{error}{hint}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
