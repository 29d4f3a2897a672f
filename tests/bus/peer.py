# SPDX-License-Identifier: LGPL-2.1-or-later
"""A caller on the bus that says what it likes: any user, any message, any stream."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from jeepney import DBusAddress, HeaderFields, MessageFlag, MessageType, new_method_call
from jeepney.fds import FileDescriptor
from jeepney.io.blocking import open_dbus_connection

from overlayd import stream, wire
from overlayd.model import SourceKind
from overlayd.stream import Entry, Header, Type
from overlayd.walker import pages
from tests.bus.conftest import USERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from jeepney.io.blocking import DBusConnection
    from jeepney.low_level import Message

ALLOW_OTHER: Final = {"allow-other": ("b", True)}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: results, or the last word of an error's name and its text."""

    error: str
    body: tuple[object, ...]
    seconds: float = field(compare=False)

    @property
    def text(self) -> str:
        """The text of an error."""
        return str(self.body[0]) if self.body else ""

    def properties(self, at: int = -1) -> dict[str, object]:
        """Return the values of a dictionary among the results."""
        assert not self.error, (self.error, self.text)
        found = self.body[at]
        assert isinstance(found, dict)
        return {key: value for key, (_, value) in found.items()}

    def listed(self) -> dict[str, dict[str, object]]:
        """Return the overlays of a list, by name."""
        assert not self.error, (self.error, self.text)
        found = self.body[0]
        assert isinstance(found, list)
        each = [{key: value for key, (_, value) in one.items()} for one in found]
        return {str(one["Name"]): one for one in each}


@contextlib.contextmanager
def being(user: str) -> Iterator[None]:
    """Let this process be *user* as far as a socket's other end sees."""
    uid = USERS[user]
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


class Peer:
    """A connection of *user*'s."""

    def __init__(self, user: str) -> None:
        self.user = user
        with being(user):
            self.connection: DBusConnection = open_dbus_connection("SYSTEM", enable_fds=True)
        self.name = self.connection.unique_name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def send(
        self,
        member: str,
        signature: str = "",
        body: tuple[object, ...] = (),
        *,
        at: tuple[str, str] = (wire.PATH, wire.MANAGER),
        interactive: bool = False,
    ) -> int:
        """Send a call; return its serial number."""
        address = DBusAddress(at[0], bus_name=wire.NAME, interface=at[1] or None)
        message = new_method_call(address, member, signature or None, body)
        if interactive:
            message.header.flags |= MessageFlag.allow_interactive_authorization
        serial: int = next(self.connection.outgoing_serial)
        self.connection.send(message, serial)
        return serial

    def receive(self, serial: int, timeout: float = 30.0) -> Answer:
        """Wait for the answer to a call."""
        began = time.monotonic()
        while True:
            left = began + timeout - time.monotonic()
            message: Message = self.connection.receive(timeout=max(0.0, left))
            if message.header.fields.get(HeaderFields.reply_serial) == serial:
                break
        error = ""
        if message.header.message_type is MessageType.error:
            error = message.header.fields[HeaderFields.error_name].rpartition(".")[2]
        return Answer(error, tuple(message.body), time.monotonic() - began)

    def call(  # noqa: PLR0913  # what a call consists of
        self,
        member: str,
        signature: str = "",
        body: tuple[object, ...] = (),
        *,
        at: tuple[str, str] = (wire.PATH, wire.MANAGER),
        interactive: bool = False,
        timeout: float = 30.0,
    ) -> Answer:
        """Call, and wait for the answer."""
        serial = self.send(member, signature, body, at=at, interactive=interactive)
        return self.receive(serial, timeout)

    # -- what is called often --------------------------------------------------------------------

    def open_stream(self) -> tuple[int, int]:
        """Call OpenStream; return the line's number, and the end to write to."""
        answer = self.call("OpenStream")
        assert not answer.error, answer
        number, far = answer.body
        assert isinstance(number, int)
        assert isinstance(far, FileDescriptor)
        return number, far.to_raw_fd()

    def begin_apply(  # noqa: PLR0913  # what an apply consists of
        self,
        name: str,
        target: object,
        number: int,
        options: Mapping[str, tuple[str, object]] | None = None,
        *,
        source: str = "/claimed",
        interactive: bool = False,
    ) -> int:
        """Call Apply with the number of a line; return the call's serial number."""
        said = ALLOW_OTHER if options is None else dict(options)
        body = (name, source, str(target), number, said)
        return self.send("Apply", "sssta{sv}", body, interactive=interactive)

    def apply(  # noqa: PLR0913  # what an apply consists of
        self,
        name: str,
        target: object,
        files: Mapping[str, str] | None = None,
        options: Mapping[str, tuple[str, object]] | None = None,
        *,
        source: str = "/claimed",
        interactive: bool = False,
        data: bytes | None = None,
        timeout: float = 30.0,
    ) -> Answer:
        """Apply *files*, a flat directory, or the stream *data*: all of it fits into a socket."""
        number, writing = self.open_stream()
        # It waits in the socket, or is taken while the call is under way.
        os.write(writing, directory(files or {"motd": self.user}) if data is None else data)
        os.close(writing)
        serial = self.begin_apply(
            name, target, number, options, source=source, interactive=interactive
        )
        return self.receive(serial, timeout)

    def reset(self, name: str, version: int = 1, *, interactive: bool = False) -> Answer:
        """Call Reset."""
        return self.call("Reset", "su", (name, version), interactive=interactive)

    def remove(self, name: str, *, lazy: bool = False, interactive: bool = False) -> Answer:
        """Call Remove."""
        return self.call("Remove", "sb", (name, lazy), interactive=interactive)

    def list(self, *, timeout: float = 30.0) -> Answer:
        """Call List."""
        return self.call("List", "a{sv}", ({},), timeout=timeout)


def directory(files: Mapping[str, str]) -> bytes:
    """Return the stream of a directory of text files."""
    size = sum(pages(len(text.encode())) for text in files.values())
    parts = [
        stream.pack_header(Header(SourceKind.DIRECTORY, len(files) + 1, size)),
        stream.pack_enter(Entry(b"root", 0o755, 0)),
    ]
    for name, text in sorted(files.items()):
        data = text.encode()
        parts.append(stream.pack_file(Entry(os.fsencode(name), 0o644, 0, size=len(data))))
        if data:
            parts += [stream.pack_data(0, len(data)), data]
    return b"".join([*parts, stream.pack(Type.LEAVE), stream.pack_end(len(files) + 1, size)])


def waits_beside(storms: Iterable[Callable[[], object]], seconds: float = 4.0) -> list[float]:
    """Return how long carol waited for each List while others did what they liked, and after.

    Each of *storms* goes on for ever, in a process of its own.  The times are sorted.
    """
    children = []
    for storm in storms:
        if not (pid := os.fork()):
            try:
                storm()
            finally:
                os._exit(0)
        children.append(pid)
    waits = []
    with Peer("carol") as carol:

        def look() -> None:
            began = time.monotonic()
            assert not carol.list(timeout=60).error
            waits.append(time.monotonic() - began)

        try:
            ended = time.monotonic() + seconds
            while time.monotonic() < ended:
                look()
                time.sleep(0.11)  # she may not call more often
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        look()
    return sorted(waits)


def threads_and_fds(pid: int) -> tuple[int, int]:
    """Return how many threads and descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int, what: str = "VmRSS") -> int:
    """Return the bytes of memory that a process has; VmHWM are the most it ever had."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    raise AssertionError(what)
