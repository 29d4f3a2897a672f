# SPDX-License-Identifier: LGPL-2.1-or-later
"""A person at a terminal of the machine: runs a command there, and types a password when asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from harness.machine import Machine

# Runs in the machine, as the user: a terminal of its own for the command; what is typed is typed
# when the text before it has shown up.
_TYPIST: Final = r"""
import json, os, pty, select, sys, time
argv, typed = json.load(sys.stdin)
pid, fd = pty.fork()
if pid == 0:
    os.environ["TERM"] = "dumb"
    os.execvp(argv[0], argv)
said, seen, deadline = b"", 0, time.monotonic() + 100
while time.monotonic() < deadline:
    if select.select([fd], [], [], 0.5)[0]:
        try:
            data = os.read(fd, 4096)
        except OSError:
            break
        if not data:
            break
        said += data
        if typed and typed[0][0].encode() in said[seen:]:
            seen = len(said)
            time.sleep(0.2)
            os.write(fd, typed.pop(0)[1].encode() + b"\n")
else:
    os.kill(pid, 9)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps({"status": status, "said": said.decode("utf-8", "replace"), "untyped": typed}))
"""


@dataclass(frozen=True)
class Said:
    """What came of a command at a terminal; ``untyped`` is what nobody asked for."""

    status: int
    said: str
    untyped: list[list[str]]


def at_terminal(machine: Machine, user: str, argv: list[str], typed: list[tuple[str, str]]) -> Said:
    """Run *argv* as *user*; type each answer of *typed* when the text before it was asked."""
    result = machine.run(
        ["python3", "-c", _TYPIST],
        user=user,
        cwd="/",
        stdin=json.dumps([argv, typed]).encode(),
        timeout=120,
    )
    return Said(**json.loads(result.out))
