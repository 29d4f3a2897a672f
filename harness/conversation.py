# SPDX-License-Identifier: LGPL-2.1-or-later
"""The conversation with the agent: connections, lines, requests and their answers.

``agent`` has the protocol, ``channel`` what is asked for in it.  A machine's end of the stream may
be an agent that is not up yet, one in the middle of talking to somebody else, or one of another
boot: what counts is that it answers *our* hello.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import secrets
import select
import threading
import time
import zlib
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Final

from harness.errors import ChannelError, MachineError, RemoteError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator, Mapping

AGENT: Final = Path(__file__).with_name("agent.py")
"""What is installed in the machine."""
PARTS: Final = {
    "files": Path(__file__).with_name("agent_files.py"),
    "watch": Path(__file__).with_name("agent_watch.py"),
}
"""What the agent is sent when it is first greeted."""
VERSION: Final = 1
SLACK: Final = 20.0
"""Seconds that an answer may come later than promised: a guest under TCG on a busy host."""
_HELLO_EVERY: Final = 1.0
_RECONNECT: Final = 0.05
_BATCH: Final = 64 * 1024
_LINE_LIMIT: Final = 64 << 20

JSON = dict[str, object]


@dataclass(frozen=True)
class Hello:
    """What the agent says of itself and its system.

    :ivar agent: another for each process: it changes with every reboot, also a soft one.
    :ivar clock: the machine's time, seconds since 1970.
    :ivar uptime: its monotonic time in seconds.
    :ivar parts: what it has been sent so far, and the checksums.
    """

    agent: str
    boot_id: str
    kernel: str
    clock: float
    uptime: float
    parts: Mapping[str, int] = field(default_factory=dict)


class Request:
    """A request that waits for its answers.

    *on_line* gets each of them on the reader's thread; what it raises ends the request.
    """

    def __init__(self, ident: int, on_line: Callable[[JSON], None] | None) -> None:
        """Wait for answers that carry *ident*."""
        self.ident = ident
        self.answer: JSON | None = None
        self.error: Exception | None = None
        self.over = threading.Event()
        self._on_line = on_line

    def take(self, message: JSON) -> None:
        """Take an answer."""
        if self.error is None and self._on_line is not None:
            try:
                self._on_line(message)
            except Exception as error:  # noqa: BLE001  # of whoever waits, on another thread
                self.fail(error)
        if message.get("done"):
            self.answer = message
            self.over.set()

    def fail(self, error: Exception) -> None:
        """End it with *error*."""
        if self.error is None:
            self.error = error
        self.over.set()


class Conversation:
    """A conversation with an agent, for any number of threads."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        """Use *connect* whenever a connection is needed; it raises OSError while there is none."""
        self._connect = connect
        self._greeting = threading.Lock()
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self._socket: socket.socket | None = None
        self._lost: MachineError | None = ChannelError("no conversation was begun yet")
        self._closed: MachineError | None = None
        self._nonce = ""
        self._hello: Hello | None = None
        self._requests: dict[int, Request] = {}
        self._idents = itertools.count(1)
        self.events: queue.SimpleQueue[tuple[str, object] | None] = queue.SimpleQueue()

    # The conversation.

    def hello(self, timeout: float = 60) -> Hello:
        """Begin a new conversation; who waits for something in the one before, waits in vain.

        Connects if need be, and goes on asking until the agent answers.

        :raises ChannelError: if that takes more than *timeout* seconds, or if it is another agent
            than this harness has.
        """
        with self._greeting:
            deadline = time.monotonic() + timeout
            nonce = secrets.token_hex(8)
            with self._state:
                self._lose(ChannelError("a new conversation was begun meanwhile"))
                self._hello, self._nonce = None, nonce
            hello = self._greet(nonce, deadline, timeout)
            for part, path in PARTS.items():
                source = path.read_text(encoding="utf-8")
                if hello.parts.get(part) != zlib.crc32(source.encode()):
                    left = max(1.0, deadline - time.monotonic())
                    self.request("load", within=left, part=part, source=source)
            return hello

    def _greet(self, nonce: str, deadline: float, timeout: float) -> Hello:
        why = "it does not answer"
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChannelError(f"no agent within {timeout:.0f} s: {why}")
            try:
                self._open()
                self._send([b"\n", _line({"op": "hello", "nonce": nonce})])
            except OSError as error:
                why = error.strerror or str(error)
                time.sleep(min(_RECONNECT, left))
                continue
            with self._state:
                self._state.wait_for(
                    lambda: self._hello or self._closed or self._socket is None,
                    min(left, _HELLO_EVERY),
                )
                if self._closed is not None:
                    raise self._closed.with_traceback(None)
                if self._hello is not None:
                    if self._lost is not None:
                        raise self._lost.with_traceback(None)
                    return self._hello
                if self._socket is None:
                    why = "it hangs up"
            time.sleep(0 if self._socket else _RECONNECT)

    def _open(self) -> None:
        """Connect if there is no connection."""
        with self._state:
            if self._closed is not None:
                raise self._closed.with_traceback(None)
            if self._socket is not None:
                return
        connection = self._connect()
        connection.settimeout(0)
        with self._state:
            self._socket = connection
        threading.Thread(
            target=self._read, args=(connection,), name="agent's answers", daemon=True
        ).start()

    def close(self, cause: MachineError | None = None) -> None:
        """Hang up for good; who waits for an answer, or asks later, gets *cause*."""
        with self._state:
            if self._closed is None:
                self._closed = cause or ChannelError("the channel was closed")
                self._lose(self._closed)
                if self._socket is not None:
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(2)  # the reader then closes it
                self.events.put(None)
            self._state.notify_all()

    def _lose(self, error: MachineError) -> None:
        """End the conversation with *error*."""
        with self._state:
            if self._lost is None:
                self._lost = error
            for request in self._requests.values():
                request.fail(error)
            self._requests.clear()

    # Lines.

    def _read(self, connection: socket.socket) -> None:
        """Take what comes in by *connection* until its end."""
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        buffer = bytearray()
        why = "the other end closed it"
        while True:
            poller.poll()
            try:
                data = connection.recv(1 << 18)
            except BlockingIOError:
                continue
            except OSError as error:
                data, why = b"", error.strerror or str(error)
            if not data:
                break
            buffer += data
            if b"\n" not in data and len(buffer) > _LINE_LIMIT:
                why = "it sends a line that has no end"
                break
            if b"\n" in data:
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    if line.strip():
                        self._take(bytes(line))
        with self._state:
            self._socket = None
            self._lose(ChannelError(f"the connection to the agent is gone: {why}"))
            self._state.notify_all()
        with self._sending:
            connection.close()

    def _take(self, line: bytes) -> None:
        """Take a line; before our hello was answered, whatever it is, it is not for us."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._strange(f"the agent sent what is no message: {_start(line)}")
        elif message.get("hello") == self._nonce:
            self._greeted(message)
        elif self._hello is None:
            return
        elif isinstance(ident := message.get("id"), int):
            if request := self._requests.get(ident):
                request.take(message)
        elif isinstance(event := message.get("event"), str):
            self.events.put((event, message.get("entry")))
        elif "started" in message:
            self._strange("the agent was started anew")
        elif "garbage" in message:
            self._strange(f"the agent got what is no message: {message['garbage']!r}")

    def _strange(self, message: str) -> None:
        if self._hello is not None:
            self._lose(ChannelError(message))

    def _greeted(self, message: JSON) -> None:
        parts = message.get("parts")
        hello = Hello(
            agent=str(message.get("agent")),
            boot_id=str(message.get("boot_id")),
            kernel=str(message.get("kernel")),
            clock=number(message, "clock"),
            uptime=number(message, "uptime"),
            parts=parts if isinstance(parts, dict) else {},
        )
        with self._state:
            if self._hello is None:
                self._hello, self._lost = hello, self._closed
                if message.get("version") != VERSION:
                    self._lose(
                        ChannelError(
                            f"the agent speaks version {message.get('version')}, not {VERSION}",
                            hint="build the image anew",
                        )
                    )
            self._state.notify_all()

    def _send(self, lines: Iterable[bytes]) -> None:
        """Send whole lines.

        :raises OSError: if the connection is gone.
        """
        with self._sending:
            connection = self._socket
            if connection is None:
                raise BrokenPipeError(0, "the connection is gone")
            rest = memoryview(b"".join(lines))
            poller = select.poll()
            poller.register(connection, select.POLLOUT)
            stuck = time.monotonic() + SLACK
            while rest:
                try:
                    rest = rest[connection.send(rest) :]
                    stuck = time.monotonic() + SLACK
                except BlockingIOError:
                    if not poller.poll(1000) and time.monotonic() > stuck:
                        raise TimeoutError(0, "the agent reads nothing") from None

    # Requests.

    def request(
        self,
        op: str,
        *,
        within: float = 60,
        on_line: Callable[[JSON], None] | None = None,
        more: Iterable[JSON] = (),
        **args: object,
    ) -> JSON:
        """Have the agent do *op* and return its last answer; *more* are lines that belong to it.

        :raises RemoteError: if it answers that it could not.
        :raises ChannelError: if the conversation is lost, or none comes within *within* seconds.
        """
        with self.asking(op, on_line=on_line, **args) as request:
            self._send_more(request, more)
            return self.wait(request, within)

    @contextlib.contextmanager
    def asking(
        self, op: str, *, on_line: Callable[[JSON], None] | None = None, **args: object
    ) -> Iterator[Request]:
        """Send a request, and have what runs for it ended on leaving, if it still does."""
        request = Request(next(self._idents), on_line)
        with self._state:
            if self._lost is not None:
                raise self._lost.with_traceback(None)
            self._requests[request.ident] = request
        try:
            self._send_for(request, [{**args, "op": op}])
            yield request
        finally:
            with self._state:
                open_still = self._requests.pop(request.ident, None) is not None
            if open_still and request.answer is None:
                with contextlib.suppress(MachineError):
                    self._send_for(request, [{"op": "abort"}])

    def wait(self, request: Request, timeout: float) -> JSON:
        """Return the last answer to *request*; :meth:`request` says what it raises."""
        if not request.over.wait(timeout):
            error = ChannelError(f"the agent has not answered within {timeout:.0f} s")
            self._lose(error)
            raise error
        if request.error is not None:
            raise request.error.with_traceback(None)
        answer = request.answer or {}
        if "error" in answer:
            errno = answer.get("errno")
            raise RemoteError(str(answer["error"]), errno=errno if isinstance(errno, int) else None)
        return answer

    def _send_for(self, request: Request, messages: Iterable[JSON]) -> None:
        try:
            self._send([_line({**message, "id": request.ident}) for message in messages])
        except OSError as error:
            lost = ChannelError(f"the connection to the agent is gone: {error.strerror}")
            self._lose(lost)
            raise (self._lost or lost).with_traceback(None) from None

    def _send_more(self, request: Request, messages: Iterable[JSON]) -> None:
        """Send many lines, some at a time, until an answer says that they are not wanted."""
        batch: list[JSON] = []
        size = 0
        for message in messages:
            batch.append(message)
            data = message.get("data")
            size += 256 + (len(data) if isinstance(data, str) else 0)
            if size > _BATCH:
                self._send_for(request, batch)
                batch, size = [], 0
                if request.over.is_set():
                    return
        if batch:
            self._send_for(request, batch)


def _line(message: JSON) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def number(message: JSON, key: str) -> float:
    """Return a number of the message's, 0 if it is not there."""
    value = message.get(key)
    return value if isinstance(value, int) or (isinstance(value, float) and isfinite(value)) else 0


def _start(line: bytes) -> str:
    return ascii(line[:60].decode("ascii", "replace"))
