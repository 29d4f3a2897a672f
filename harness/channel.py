# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's way to the agent: what can be asked of a machine.

A :class:`Channel` finds its own way there by a function that connects a socket: that of a VM's
serial port or of a container.  :meth:`~harness.conversation.Conversation.hello` begins a
conversation and may be called again at any time: after a boot, a restore, or when the connection
was lost.  All else needs one, and raises ChannelError when it is lost meanwhile.
"""

from __future__ import annotations

import os
import threading
import time
from binascii import a2b_base64, b2a_base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from harness import logs, transfer
from harness.conversation import AGENT, JSON, SLACK, Conversation, Hello, number
from harness.errors import ChannelError, CommandError, CommandTimeoutError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["AGENT", "Channel", "Hello", "Result"]


@dataclass(frozen=True)
class Result:
    """What came of a command; ``seconds`` are those of the machine's clock."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def out(self) -> str:
        """Standard output as text; what is no UTF-8 is replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def err(self) -> str:
        """Standard error as text; what is no UTF-8 is replaced."""
        return self.stderr.decode("utf-8", "replace")

    def check(self) -> Self:
        """Return itself.

        :raises CommandError: if the status is not 0.
        """
        if self.returncode != 0:
            raise CommandError(self.argv, self.returncode, self.stdout, self.stderr)
        return self


class Channel(Conversation):
    """What can be asked of a machine, by any number of threads."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """Use *connect* whenever a connection is needed; it raises OSError while there is none."""
        super().__init__(connect)
        self._callback: Callable[[logs.LogEvent], None] | None = None
        self._dispatcher: threading.Thread | None = None

    def run(  # noqa: PLR0913  # what a command can be given
        self,
        argv: Sequence[str] | str,
        *,
        user: str | None = None,
        stdin: bytes = b"",
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        live: Callable[[str, bytes], object] | None = None,
    ) -> Result:
        """Run a command (a string: with ``sh -c``), as root or *user*, whatever its status.

        *live* gets the output as it comes: ``out`` or ``err`` and a piece; on another thread, and
        it must not ask anything of the channel.

        :raises CommandTimeoutError: after *timeout* seconds; its process group was killed.
        :raises RemoteError: if there is no such user.
        :raises ChannelError: if the agent answers what makes no sense.
        """
        words = ["sh", "-c", argv] if isinstance(argv, str) else list(argv)
        out, err = bytearray(), bytearray()

        def take(message: JSON) -> None:
            for name, buffer in (("out", out), ("err", err)):
                if isinstance(data := message.get(name), str):
                    buffer.extend(piece := _bytes(data))
                    if live is not None:
                        live(name, piece)

        answer = self.request(
            "run",
            within=timeout + SLACK,
            on_line=take,
            more=[*transfer.data_lines(stdin), {"op": "end"}] if stdin else (),
            argv=words,
            user=user,
            env=dict(env or {}),
            cwd=cwd,
            input=bool(stdin),
            live=live is not None,
            timeout=timeout,
        )
        rc = int(number(answer, "rc"))
        if answer.get("expired"):
            what = f"still running after {timeout:g} s"
            raise CommandTimeoutError(words, rc, bytes(out), bytes(err), what=what)
        return Result(tuple(words), rc, bytes(out), bytes(err), number(answer, "seconds"))

    def put(
        self, source: Path | bytes, target: str, *, mode: int | None = None, user: str | None = None
    ) -> None:
        """Make *target* in the machine a copy of *source*; ``Machine.copy_in`` has the contract.

        :raises RemoteError: if it cannot be written.
        :raises OSError: if *source* cannot be read.
        """
        self.request("put", within=600, more=transfer.lines(source, mode), path=target, user=user)

    def get(self, source: str, target: Path, *, user: str | None = None) -> tuple[str, ...]:
        """Make *target* on the host a copy of *source*; return what was left out.

        :raises RemoteError: if it cannot be read.
        :raises OSError: if *target* cannot be written.
        """
        receiver = transfer.Receiver(target)
        try:
            answer = self.request("get", within=600, on_line=receiver.take, path=source, user=user)
        finally:
            receiver.close()
        skipped = answer.get("skipped")
        return tuple(map(str, skipped)) if isinstance(skipped, list) else ()

    def set_clock(self) -> None:
        """Give the machine the host's time and new randomness: a restored one has old of both.

        :raises RemoteError: if the machine may not set its clock, as containers may not.
        """
        seed = b2a_base64(os.urandom(64), newline=False).decode()
        self.request("clock", now=time.time_ns(), seed=seed)

    def follow(self, callback: Callable[[logs.LogEvent], None]) -> None:
        """Have *callback* called with all that is logged from now on, in this conversation.

        On a thread of its own, one call after another; it may ask things of the machine.

        :raises RemoteError: if nothing is logged there that could be read.
        """
        self._callback = callback
        if self._dispatcher is None:
            self._dispatcher = threading.Thread(
                target=self._dispatch, name="agent's events", daemon=True
            )
            self._dispatcher.start()
        self.request("follow")

    def _dispatch(self) -> None:
        while (item := self.events.get()) is not None:
            kind, entry = item
            if self._callback is None:
                continue
            if kind == "kmsg" and isinstance(entry, str):
                self._callback(logs.from_kmsg(entry))
            elif isinstance(entry, dict):
                self._callback(logs.from_journal(entry))


def _bytes(data: str) -> bytes:
    try:
        return a2b_base64(data)
    except ValueError as error:
        raise ChannelError(f"the agent sent what makes no sense: {error}") from None
