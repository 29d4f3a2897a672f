# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to the message bus for whoever answers calls.

jeepney knows the format of messages, and how to log in; reading from the socket is done here and in
:mod:`overlayd.framing`, since callers are hostile.  One thread reads; any may send and call.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import threading
import time
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, Final

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call
from jeepney.bus import get_bus
from jeepney.io.blocking import prep_socket

from overlayd.errors import ServiceError
from overlayd.framing import Framer, close

if TYPE_CHECKING:
    from collections.abc import Callable

    from jeepney.low_level import Message

    from overlayd.framing import Incoming

_MAX_FDS: Final = 253
"""As many as the kernel passes at once (SCM_MAX_FD)."""
_MAX_WAITING: Final = 32 << 20
"""Bytes that are not sent because the bus does not take them; then the connection is given up."""
_MAX_CAME: Final = 64
"""Messages that are read before those that came are looked at."""
_CHUNK: Final = 64 << 10
BUS: Final = DBusAddress(
    "/org/freedesktop/DBus", bus_name="org.freedesktop.DBus", interface="org.freedesktop.DBus"
)


class GoneError(Exception):
    """The connection is closed."""


class CallError(Exception):
    """A call was answered by an error, or not at all; ``name`` is the error's on the bus."""

    def __init__(self, name: str, message: str) -> None:
        """Keep both."""
        super().__init__(message)
        self.name = name


class _Reply:
    """What a call waits for."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.message: Incoming | None = None


class Connection:
    """A connection to the system bus, or to the bus at *address*.

    :raises ServiceError: if there is no bus.
    """

    def __init__(self, address: str | None = None) -> None:
        """Log in."""
        try:
            self.socket = prep_socket(get_bus(address or "SYSTEM"), enable_fds=True, timeout=10.0)
        except (OSError, ValueError, RuntimeError) as error:
            message = f"the system bus cannot be reached: {error}"
            raise ServiceError(message, hint="systemctl status dbus.service") from None
        self.socket.settimeout(0.0)
        self._serials = count(1)
        self._outgoing: deque[tuple[memoryview, array.array[int]]] = deque()
        self._waiting = 0
        self._lock = threading.Lock()
        self._replies: dict[int, _Reply | Callable[[Incoming | None], None]] = {}
        self._framer = Framer()
        self._wake_out, self._wake_in = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.settimeout(0.0)
        self._gone = False
        self.name = ""

    def hello(self) -> None:
        """Say hello, which comes before everything else; another thread must not read yet.

        :raises GoneError: if the bus does not answer.
        """
        answer: list[Incoming | None] = []
        self.call_later(new_method_call(BUS, "Hello"), answer.append)
        deadline = time.monotonic() + 25
        while not answer:
            self.turn(max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                raise GoneError("the bus does not answer")
        if answer[0] is None or answer[0].header.message_type is not MessageType.method_return:
            raise GoneError("the bus does not answer")
        self.name = str(answer[0].parse()[0])

    # -- sending -------------------------------------------------------------------------------

    def send(self, message: Message, serial: int | None = None) -> None:
        """Send, now or as soon as the bus takes it; from any thread.

        :raises GoneError: if the connection is closed.
        """
        fds = array.array("i")
        data = message.serialise(serial or next(self._serials), fds=fds)
        with self._lock:
            if self._gone:
                raise GoneError("the connection to the bus is closed")
            if self._waiting > _MAX_WAITING:
                self._gone = True
                self.wake()
                raise GoneError("the bus takes nothing any more")
            # They are sent later, maybe, and closed then.
            own = array.array("i", [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in fds])
            self._outgoing.append((memoryview(data), own))
            self._waiting += len(data)
            self._flush()
        if self._outgoing:
            self.wake()

    def _flush(self) -> None:
        """Send what the socket takes; the caller holds the lock."""
        while self._outgoing:
            data, fds = self._outgoing[0]
            extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
            try:
                sent = self.socket.sendmsg([data], extra)
            except BlockingIOError:
                return
            except OSError:
                self._gone = True
                return
            self._waiting -= sent
            for fd in fds:
                os.close(fd)
            if sent == len(data):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = (data[sent:], array.array("i"))

    @property
    def sending(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._outgoing)

    def wake(self) -> None:
        """Make :meth:`turn` return."""
        with contextlib.suppress(BlockingIOError):
            self._wake_out.send(b"w")

    def call_later(self, message: Message, done: Callable[[Incoming | None], None]) -> int:
        """Call, and have *done* called with the reply by the reading thread; None if it is gone.

        Returns the call's serial number, by which it can be forgotten.
        """
        serial = next(self._serials)
        self._replies[serial] = done
        self.send(message, serial)
        return serial

    def call(
        self,
        message: Message,
        timeout: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[object, ...]:
        """Call and return the reply's body; not from the thread that reads.

        *timeout* is in seconds; *stopped* is asked five times a second whether to go on waiting.

        :raises CallError: if the answer is an error, or there is none in time.
        :raises GoneError: if the connection is closed.
        """
        serial, reply = next(self._serials), _Reply()
        self._replies[serial] = reply
        try:
            self.send(message, serial)
            deadline = time.monotonic() + timeout
            while not reply.there.wait(0.2):
                if self._gone:
                    raise GoneError("the connection to the bus is closed")
                if stopped():
                    raise CallError("org.freedesktop.DBus.Error.NoReply", "nobody waits any more")
                if time.monotonic() > deadline:
                    raise CallError("org.freedesktop.DBus.Error.NoReply", "no answer in time")
            if reply.message is None:
                raise GoneError("the connection to the bus is closed")
            return unwrap(reply.message)
        finally:
            self._replies.pop(serial, None)
            if reply.message is not None:
                reply.message.close()

    # -- reading -------------------------------------------------------------------------------

    def turn(self, timeout: float | None) -> list[Incoming]:
        """Wait up to *timeout* seconds, then return the messages that came and are no replies.

        Returns early when :meth:`wake` was called, or something was sent.

        :raises GoneError: if the connection is closed.
        """
        poll = select.poll()
        poll.register(self.socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        poll.register(self._wake_in, select.POLLIN)
        ready = dict(poll.poll(None if timeout is None else timeout * 1000))
        if self._wake_in.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_in.recv(4096)
        with self._lock:
            self._flush()
        came: list[Incoming] = []
        if ready.get(self.socket.fileno(), 0) & ~select.POLLOUT:
            while len(came) < _MAX_CAME and (some := self._read()) is not None:
                came += [message for message in some if not self._is_reply(message)]
                if self._gone:
                    break
        if self._gone:
            self._drop_all()
            for message in came:
                message.close()
            raise GoneError("the connection to the bus is closed")
        return came

    def _read(self) -> list[Incoming] | None:
        """Read once and return the messages that are whole now; None if there was nothing."""
        try:
            data, extra, _, _ = self.socket.recvmsg(
                _CHUNK, socket.CMSG_SPACE(_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError:
            self._gone = True
            return None
        fds = array.array("i")
        for level, kind, value in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
        # Descriptors for which there was no room are missed by whoever looks for them.
        try:
            came = self._framer.feed(data, fds)
        except ValueError:
            came = []
            self._gone = True
        self._gone = self._gone or not data
        return came

    def _is_reply(self, message: Incoming) -> bool:
        if message.header.message_type not in {MessageType.method_return, MessageType.error}:
            return False
        serial = message.header.fields.get(HeaderFields.reply_serial)
        waiting = self._replies.pop(serial, None) if isinstance(serial, int) else None
        if isinstance(waiting, _Reply):
            waiting.message = message
            waiting.there.set()
            return True
        try:
            if waiting is not None:
                waiting(message)
        finally:
            message.close()
        return True

    def _drop_all(self) -> None:
        replies, self._replies = self._replies, {}
        for waiting in replies.values():
            if isinstance(waiting, _Reply):
                waiting.there.set()
            else:
                waiting(None)

    def close(self) -> None:
        """Close the connection."""
        self._gone = True
        self._drop_all()
        with self._lock:
            for _, fds in self._outgoing:
                close(fds)
            self._outgoing.clear()
            self._framer.close()
        for end in (self.socket, self._wake_in, self._wake_out):
            end.close()


def unwrap(message: Incoming) -> tuple[object, ...]:
    """Return the body of a reply.

    :raises CallError: if it is an error's.
    """
    body = message.parse()
    if message.header.message_type is MessageType.error:
        text = str(body[0]) if body else ""
        raise CallError(message.field(HeaderFields.error_name), text)
    return body


def notify(text: str) -> None:
    """Tell systemd of a change of state (sd_notify); nothing happens where it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.settimeout(1.0)
        sock.sendto(text.encode(), address)
