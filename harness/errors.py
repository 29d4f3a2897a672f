# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one error tree of the harness.

Everything that the harness refuses or fails at is a :class:`HarnessError` with one line that says
what is wrong and an optional hint that says what to do.  Which class it is says who is at fault:
the host, the build, the machine, or the command that was run in it.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTE_BYTES: Final = 4096
_ARGV_LENGTH: Final = 120


class HarnessError(Exception):
    """Root of the tree."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep the one-line *message* and the optional *hint*."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")


class HostError(HarnessError):
    """The host lacks something: a program, a right, room on a disk."""


class BuildError(HarnessError):
    """An image, a package or another thing that machines are made of could not be built."""


class MachineError(HarnessError):
    """The machine broke or cannot be reached; whatever is asked of it later fails with the same."""


class ChannelError(MachineError):
    """The conversation with the agent is lost: end of file, silence, or nonsense."""


class CapabilityError(HarnessError):
    """This kind of machine cannot do what was asked for; a test makes a skip of it."""


class RemoteError(HarnessError):
    """The agent answered that it could not do it; the machine itself is well.

    ``errno`` is that of the system call which failed in the machine, if it was one.
    """

    def __init__(self, message: str, *, errno: int | None = None, hint: str | None = None) -> None:
        """Keep the agent's words and the *errno*."""
        super().__init__(message, hint=hint)
        self.errno = errno


class UnitError(HarnessError):
    """A unit failed, or will not become active any more; the notes have its last journal lines."""


class CommandError(HarnessError):
    """A command ended with another status than 0.

    ``rc`` is minus the signal if one ended it.  All output is in ``out`` and ``err``; the notes,
    which pytest prints, have the end of both.
    """

    def __init__(
        self, argv: Sequence[str], rc: int, out: bytes, err: bytes, *, what: str | None = None
    ) -> None:
        """Keep what ran and what came of it; *what* replaces "exit status RC"."""
        ended = what or (f"signal {-rc}" if rc < 0 else f"exit status {rc}")
        super().__init__(f"{ended}: {shown(argv)}")
        self.argv = tuple(argv)
        self.rc = rc
        self.out = out
        self.err = err
        for name, data in (("stdout", out), ("stderr", err)):
            if text := data[-_NOTE_BYTES:].decode("utf-8", "replace").strip():
                self.add_note(f"{name}: {text}")


class CommandTimeoutError(CommandError):
    """A command ran out of time and was killed, with its process group."""


def shown(argv: Sequence[str]) -> str:
    """Return *argv* as one would type it, shortened to one line."""
    words = argv[2:] if list(argv[:2]) == ["sh", "-c"] else [shlex.join(argv)]
    line = " ".join(" ".join(words).split())
    return line if len(line) <= _ARGV_LENGTH else f"{line[: _ARGV_LENGTH - 1]}…"
