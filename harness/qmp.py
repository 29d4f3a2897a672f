# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's machine protocol (QEMU's docs/interop/qmp-spec.rst), as far as the harness needs it.

One connection, JSON lines, synchronous.  An answer is matched to its command by id, so that one
given up after a timeout does not confuse the next.  Events are kept until somebody asks for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from harness.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

TIMEOUT: Final = 30.0
"""Seconds for an answer: QEMU answers at once, but a host may be busy."""
_POLL: Final = 0.005
_KEPT_EVENTS: Final = 1000


class RefusedError(MachineError):
    """QEMU answered that it will not do it; it goes on, and so may the machine."""


@dataclass(frozen=True)
class Event:
    """Something that QEMU told unasked, like ``RESET`` or ``STOP``."""

    name: str
    data: dict[str, Json] = field(default_factory=dict)


def connect_unix(path: Path) -> socket.socket:
    """Connect to the unix socket *path*, which may be longer than the 107 bytes of an address.

    :raises OSError: if nobody listens there.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(directory)


class Qmp:
    """One connection to one QEMU; safe in threads, which wait for one another."""

    def __init__(self, connection: socket.socket, *, timeout: float = TIMEOUT) -> None:
        """Read the greeting and leave the negotiation behind; takes over *connection*.

        :raises MachineError: if there is no QEMU at the other end.
        """
        self._connection = connection
        self._lock = threading.RLock()
        self._received = bytearray()
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._last_id = 0
        try:
            self._read(time.monotonic() + timeout)  # the greeting
            self.command("qmp_capabilities", timeout=timeout)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(
        cls, path: Path, *, alive: Callable[[], bool] = lambda: True, timeout: float = TIMEOUT
    ) -> Self:
        """Connect to a QEMU that is being started and will listen at *path*.

        :raises MachineError: once *alive* says no, or after *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return cls(connect_unix(path), timeout=max(0.1, deadline - time.monotonic()))
            if not alive():
                raise MachineError("QEMU ended while it was started")
            if time.monotonic() > deadline:
                raise MachineError(f"QEMU opened no monitor within {timeout:.0f} s")
            time.sleep(_POLL)

    def command(
        self,
        name: str,
        arguments: Mapping[str, Json] | None = None,
        *,
        timeout: float = TIMEOUT,
    ) -> Json:
        """Have QEMU do *name* and return what it answers.

        :raises RefusedError: if it answers with an error.
        :raises MachineError: if it does not answer within *timeout* seconds, or is gone.
        """
        with self._lock:
            self._last_id += 1
            request = {"execute": name, "id": self._last_id, "arguments": dict(arguments or {})}
            deadline = time.monotonic() + timeout
            try:
                self._connection.settimeout(timeout)
                self._connection.sendall(json.dumps(request).encode() + b"\n")
            except OSError as error:
                raise MachineError(f"QEMU takes no commands any more: {error}") from error
            while True:
                try:
                    message = self._read(deadline)
                except TimeoutError:
                    raise MachineError(
                        f"QEMU did not answer {name} within {timeout:.0f} s"
                    ) from None
                if message.get("id") != self._last_id:
                    self._keep(message)
                elif "return" in message:
                    return message["return"]
                else:
                    raise RefusedError(f"QEMU refused {name}: {_reason(message)}")

    def wait_event(self, *names: str, timeout: float) -> Event | None:
        """Return the next event of one of *names*, also one that was kept; None after *timeout*.

        Events of other names that came before it stay for others.

        :raises MachineError: if QEMU is gone and did not tell such an event before.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            while True:
                for event in self._events:
                    if event.name in names:
                        self._events.remove(event)
                        return event
                try:
                    self._keep(self._read(deadline))
                except TimeoutError:
                    return None

    def close(self) -> None:
        """End the connection; QEMU goes on."""
        self._connection.close()

    def _keep(self, message: Mapping[str, Json]) -> None:
        """Keep *message* if it is an event; else it answers a command that was given up."""
        name, data = message.get("event"), message.get("data")
        if isinstance(name, str):
            self._events.append(Event(name, data if isinstance(data, dict) else {}))

    def _read(self, deadline: float) -> dict[str, Json]:
        """Return the next message.

        :raises TimeoutError: at *deadline*; what came until then is kept.
        :raises MachineError: at the end of the file, or if it is no message.
        """
        while (end := self._received.find(b"\n")) < 0:
            # At least an instant: whoever comes with no time left still gets what is there.
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                chunk = self._connection.recv(1 << 16)
            except TimeoutError:  # an OSError too
                raise
            except OSError as error:
                raise MachineError(f"the connection to QEMU's monitor broke: {error}") from error
            if not chunk:
                raise MachineError("QEMU's monitor is gone")
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise MachineError(f"QEMU's monitor said what is no message: {line[:80]!r}")
        return message


def _reason(message: Mapping[str, Json]) -> str:
    error = message.get("error")
    description = error.get("desc") if isinstance(error, dict) else None
    return description if isinstance(description, str) else "no reason given"
