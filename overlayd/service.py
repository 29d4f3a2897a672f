# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service on the bus: takes calls, finds out who calls, and has them done in turn.

One thread reads from the bus and never waits for anything else.  What a call does is in
:mod:`overlayd.duties`.  The process goes when nobody has called for a minute; overlays and records
outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from jeepney import (
    HeaderFields,
    MessageFlag,
    MessageType,
    new_error,
    new_method_call,
    new_method_return,
)

from overlayd import interface, wire
from overlayd.bus import BUS, Connection, GoneError, notify
from overlayd.calls import Call, Caller
from overlayd.duties import Duties
from overlayd.errors import OverlaydError, ServiceError
from overlayd.framing import MAX_BODY
from overlayd.turns import Turns
from overlayd.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jeepney.low_level import Message

    from overlayd.framing import Incoming
    from overlayd.interface import Method


IDLE: Final = 60.0
"""Seconds without a call after which the service ends."""
_ENDING: Final = 20.0
"""Seconds that changes under way have to stop and to be undone."""
_LAST: Final = 5.0
"""Seconds for those that are still under way after that."""
_KNOWN: Final = 1024
"""Callers whose uid is remembered."""
_MAX_UNKNOWN: Final = 64
"""Calls of one caller that wait until it is known who that is."""
_FAILED: Final = "org.freedesktop.DBus.Error."
_M_ARENA_MAX: Final = -8
_M_MMAP_THRESHOLD: Final = -3
"""From ``malloc.h``."""
_LARGE: Final = 64 << 10
"""Bytes from which on memory is given back as soon as it is free."""


class Service:
    """The service, on a connection of its own."""

    def __init__(self, connection: Connection, *, idle: float = IDLE) -> None:
        """Take the connection; nothing is answered before :meth:`run`."""
        self._bus = connection
        self._idle = idle
        self._callers: dict[str, Caller] = {}
        self._unknown: dict[str, list[tuple[Incoming, Method]]] = {}
        self._stop = self._named = False
        self._last = time.monotonic()
        self._duties = Duties(connection)
        self._turns = Turns(self._duties.limits, connection.wake)
        self._watcher = Watcher(connection.send)

    def stop(self) -> None:
        """Ask :meth:`run` to end; safe in a signal handler."""
        self._stop = True
        with contextlib.suppress(OSError):
            self._bus.wake()

    def run(self) -> None:
        """Answer calls until nobody has called for a while, or the bus is gone.

        :raises OverlaydError: if the service's name cannot be had, or the bus is gone before it is.
        """
        try:
            self._bus.hello()
            rule = "type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"
            self._bus.call_later(_on_bus("AddMatch", "s", (rule,)), lambda _reply: None)
            self._take_name()
            notify("READY=1")
            self._watcher.start()
            self._serve()
        except GoneError:
            # Else the bus starts it again when it is back, and somebody calls.
            if not self._named:
                message = "the connection to the bus broke before the service had its name"
                raise ServiceError(message) from None
        finally:
            notify("STOPPING=1")
            self._stop_everybody()
            self._turns.end(_LAST)
            self._watcher.close()
            self._duties.lines.close()
            self._bus.close()

    def _take_name(self) -> None:
        answer: list[object] = []

        def taken(reply: Incoming | None) -> None:
            answer.append(reply is not None and reply.parse()[:1] == (1,))

        do_not_queue = 4
        self._bus.call_later(_on_bus("RequestName", "su", (wire.NAME, do_not_queue)), taken)
        while not answer and not self._stop:
            self._turn(1.0)
        if answer == [False]:
            text = f"the name {wire.NAME} cannot be had: another service has it, or a policy"
            raise OverlaydError(text)
        self._named = True

    def _serve(self) -> None:
        """Answer calls; at the end lose none.

        The name is given up, and what the bus sent before it did so is answered.  systemd is told
        first: it then starts the service again for whoever calls in this very moment.
        """
        while not self._stop:
            left = self._last + self._idle - time.monotonic()
            busy = self._turns.busy or bool(self._unknown)
            if not busy and left <= 0:
                break
            self._turn(1.0 if busy else min(1.0, max(0.0, left)))
        notify("STOPPING=1")
        if self._stop:
            self._stop_everybody()
        released: list[object] = []
        self._bus.call_later(_on_bus("ReleaseName", "s", (wire.NAME,)), released.append)
        deadline = time.monotonic() + _ENDING
        while not released or self._turns.busy or self._unknown or self._bus.sending:
            self._turn(0.2)
            if self._stop:
                self._stop_everybody()  # those too who called in the meantime
                if time.monotonic() > deadline:
                    return

    def _turn(self, timeout: float) -> None:
        for message in self._bus.turn(timeout):
            self._take(message)
        if self._turns.busy:
            self._last = time.monotonic()

    # -- calls ---------------------------------------------------------------------------------

    def _take(self, message: Incoming) -> None:
        kind = message.header.message_type
        if kind is MessageType.signal:
            self._signal(message)
        elif kind is MessageType.method_call:
            self._last = time.monotonic()
            if (method := self._meant(message)) is not None:
                self._ascribe(message, method)
            return
        message.close()

    def _meant(self, message: Incoming) -> Method | None:
        """Return the method that is called; what the table has no place for is refused at once."""
        path, member = message.field(HeaderFields.path), message.field(HeaderFields.member)
        method = interface.find(path, message.field(HeaderFields.interface), member)
        if method is None:
            self._refuse(message, "UnknownMethod", "this object has no such method")
        elif message.length > MAX_BODY:
            self._refuse(message, "LimitsExceeded", f"more than {MAX_BODY} bytes are too many")
        elif message.field(HeaderFields.signature) != method.takes:
            self._refuse(message, "InvalidArgs", f"{member} takes ({method.takes})")
        else:
            return method
        return None

    def _ascribe(self, message: Incoming, method: Method) -> None:
        """Find out who calls, and begin."""
        sender = message.field(HeaderFields.sender)
        if sender in self._callers:
            self._begin(message, method, self._callers[sender])
        elif sender not in self._unknown:
            self._unknown[sender] = [(message, method)]
            ask = _on_bus("GetConnectionCredentials", "s", (sender,))
            self._bus.call_later(ask, partial(self._known, sender))
        elif len(self._unknown[sender]) < _MAX_UNKNOWN:
            self._unknown[sender].append((message, method))
        else:
            self._refuse(message, "LimitsExceeded", "too many calls at once")

    def _known(self, sender: str, reply: Incoming | None) -> None:
        """Take the bus's word for who *sender* is, and begin what he called."""
        waiting = self._unknown.pop(sender, [])
        caller = None
        if reply is not None and reply.header.message_type is MessageType.method_return:
            facts = reply.parse()[0]
            assert isinstance(facts, dict)  # noqa: S101  # by the bus's own interface
            uid, pid = facts.get("UnixUserID"), facts.get("ProcessID")
            if uid is not None:
                caller = Caller(sender, int(uid[1]), int(pid[1]) if pid is not None else 0)
                if len(self._callers) >= _KNOWN:
                    self._forget_some()
                self._callers[sender] = caller
        for message, method in waiting:
            if caller is None:
                self._refuse(message, "AccessDenied", "the bus does not say who is calling")
            else:
                self._begin(message, method, caller)

    def _forget_some(self) -> None:
        idle = [name for name, caller in self._callers.items() if not caller.progress]
        for name in idle[: _KNOWN // 2]:
            del self._callers[name]

    def _begin(self, message: Incoming, method: Method, caller: Caller) -> None:
        """Have a call done when it is its turn."""
        call = Call(message, method, caller)
        job = partial(self._do, call)
        try:
            if method.access is interface.Access.ANYONE:
                self._turns.look(caller.uid, job)
            else:
                caller.progress.add(call.progress)
                self._turns.change(caller.uid, job)
        except OverlaydError as error:
            self._fail(call, error)
            self._end(call)

    def _do(self, call: Call) -> None:
        """Do a call and answer it; on whatever thread."""
        try:
            call.progress.check()
            call.body = call.message.parse()
            result = self._duties.do(call)
            if _awaited(call.message):
                self._send(new_method_return(call.message, call.method.gives, result))
        except ValueError:
            self._refuse(call.message, "InvalidArgs", "the arguments make no sense")
        except OverlaydError as error:
            self._fail(call, error)
        except GoneError:
            pass
        except Exception as error:  # noqa: BLE001  # one call is not to end the others
            print(f"overlayd: {call.method.name}: {error!r}", file=sys.stderr)  # noqa: T201
            self._fail(call, OverlaydError("a fault of overlayd's own; the journal has more"))
        finally:
            self._end(call)

    def _end(self, call: Call) -> None:
        call.message.close()
        call.caller.progress.discard(call.progress)

    def _fail(self, call: Call, error: OverlaydError) -> None:
        if _awaited(call.message):
            name, text = wire.error_name(error), wire.error_text(error)
            self._send(new_error(call.message, name, "s", (text,)))

    def _refuse(self, message: Incoming, name: str, text: str) -> None:
        if _awaited(message):
            self._send(new_error(message, _FAILED + name, "s", (text,)))
        message.close()

    def _send(self, reply: Message) -> None:
        with contextlib.suppress(GoneError):
            self._bus.send(reply)

    # -- callers that go -----------------------------------------------------------------------

    def _signal(self, message: Incoming) -> None:
        """Stop what nobody waits for any more."""
        if message.field(HeaderFields.sender) != "org.freedesktop.DBus":
            return
        if message.field(HeaderFields.member) == "NameOwnerChanged":
            name, _, owner = message.parse()
            caller = self._callers.pop(str(name), None)
            if caller is not None and not owner:
                self._stop_all(caller)
                self._duties.lines.forget(caller.name)

    def _stop_everybody(self) -> None:
        for caller in [*self._callers.values()]:
            self._stop_all(caller)

    @staticmethod
    def _stop_all(caller: Caller) -> None:
        for progress in [*caller.progress]:
            progress.stop()


def _awaited(message: Incoming) -> bool:
    return not message.header.flags & MessageFlag.no_reply_expected


def _on_bus(name: str, signature: str, body: tuple[object, ...]) -> Message:
    return new_method_call(BUS, name, signature, body)


def _keep_memory_whole() -> None:
    """Let all threads allocate from the same memory, and what is large beside it.

    Each change has a thread of its own; glibc would give those arenas of their own, in which the
    holes grow by some hundred bytes with every call.  So they would by the buffers that the mount
    table is read into, once glibc has learnt from the first of them that such are frequent.
    """
    with contextlib.suppress(AttributeError):  # other libraries have no arenas
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def main(argv: Sequence[str]) -> int:
    """Run the service; return the exit code.

    One argument may say after how many seconds without a call it ends.
    """
    os.umask(0o077)
    _keep_memory_whole()
    try:
        idle = float(argv[0]) if argv else IDLE
        service = Service(Connection(), idle=idle)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: service.stop())
        service.run()
    except OverlaydError as error:
        print(f"overlayd: {error.message}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
