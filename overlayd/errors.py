# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one error tree.

Everything that overlayd refuses or fails at is an :class:`OverlaydError` with one line that
says what is wrong, an optional hint that says what to do, and an exit code.  Only the edges
translate: the CLI to exit codes and text, nothing else.  ``code`` and ``exit_code`` are part of
the documented interface (``docs/exit-codes.md``) and do not change.
"""

from __future__ import annotations

import errno

TYPE_CHECKING = False  # see overlayd.entrance
if TYPE_CHECKING:
    from typing import ClassVar


class OverlaydError(Exception):
    """Root of the tree; raised itself only for faults of overlayd's own (exit code 1)."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep the one-line *message* and the optional *hint*."""
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OverlaydError):
    """The command line does not parse."""

    code = "usage"
    exit_code = 2


class NotFoundError(OverlaydError):
    """No overlay of this name, no such version, no such source."""

    code = "not-found"
    exit_code = 3


class ExistsError(OverlaydError):
    """The name or the place is taken by another overlay."""

    code = "exists"
    exit_code = 4


class RefusedError(OverlaydError):
    """Policy or bad input: names, targets, sources, configuration."""

    code = "refused"
    exit_code = 5


class BusyError(OverlaydError):
    """Somebody uses the overlay, or another command works on it at this moment."""

    code = "busy"
    exit_code = 6


class NoPermissionError(OverlaydError):
    """The caller may not do this."""

    code = "no-permission"
    exit_code = 7


class SpaceError(OverlaydError):
    """A limit of bytes, entries, overlays or memory is reached."""

    code = "space"
    exit_code = 8


class KernelError(OverlaydError):
    """The kernel refused a call that overlayd needs."""

    code = "kernel"
    exit_code = 9


class ServiceError(OverlaydError):
    """The service that does it for callers other than root cannot be reached."""

    code = "no-service"
    exit_code = 10


class InterruptedByUserError(OverlaydError):
    """A signal asked the running command to stop; what it had done is undone."""

    code = "interrupted"
    exit_code = 130


def from_oserror(error: OSError, doing: str, *, hint: str | None = None) -> OverlaydError:
    """Give *error*, met while *doing* something, its place in the tree.

    The only place that gives an errno its meaning when the caller has nothing more precise to say.
    """
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    text = f"{doing}: {error.strerror or error} ({name})"
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE}:
        return SpaceError(text, hint=hint)
    if error.errno in {errno.EACCES, errno.EPERM}:
        return NoPermissionError(text, hint=hint)
    if error.errno == errno.EBUSY:
        return BusyError(text, hint=hint)
    if error.errno == errno.ENOENT:
        return NotFoundError(text, hint=hint)
    if error.errno == errno.ENOSYS:
        return KernelError(text, hint=hint or "overlayd needs Linux 6.1 or newer")
    return KernelError(text, hint=hint)


def not_found(name: str) -> NotFoundError:
    """Return the error for a name that no overlay has."""
    message = f"there is no overlay {shown(name)!r}"
    return NotFoundError(message, hint="'overlayd list' shows what there is")


def shown(text: str) -> str:
    """Make any path or name safe to print on one line of a terminal.

    Control characters, bytes that are not UTF-8 and characters that change the direction of the
    text are escaped the way Python writes them.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable()
        else f"\\x{ord(char) - 0xDC00:02x}"
        if 0xDC80 <= ord(char) <= 0xDCFF  # noqa: PLR2004  # surrogateescape's range
        else char.encode("unicode_escape").decode()
        for char in text
    )
