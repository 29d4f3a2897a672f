# SPDX-License-Identifier: LGPL-2.1-or-later
"""A call over the bus, and who makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jeepney import HeaderFields, MessageFlag

from overlayd import caller
from overlayd.progress import Progress

if TYPE_CHECKING:
    from overlayd.framing import Incoming
    from overlayd.interface import Method


@dataclass(slots=True)
class Caller:
    """Who calls, as the bus attests: a unique name is never given to anybody else."""

    name: str
    uid: int
    pid: int
    progress: set[Progress] = field(default_factory=set)
    """Of each of his calls; what stops them."""

    def number(self, which: str) -> int | None:
        """Return what the kernel says of the caller's process: ``sessionid`` or ``loginuid``."""
        try:
            return caller.attested(which, self.pid, self.uid)
        except (OSError, ValueError):  # he is gone
            return None


@dataclass(slots=True)
class Call:
    """A call that is being answered."""

    message: Incoming
    method: Method
    caller: Caller
    body: tuple[object, ...] = ()
    progress: Progress = field(default_factory=Progress)
    facts: dict[str, str] = field(default_factory=dict)
    """What becomes known of it, for the history."""

    @property
    def path(self) -> str:
        """The object that is called."""
        return self.message.field(HeaderFields.path)

    @property
    def interactive(self) -> bool:
        """Whether the caller is ready to be asked for a password."""
        flags = self.message.header.flags
        return bool(flags & MessageFlag.allow_interactive_authorization)

    def stopped(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.progress.stopped
