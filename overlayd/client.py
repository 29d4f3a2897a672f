# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands do for callers other than root: they ask the service.

The caller reads his source himself, with his own rights and in his own mount namespace, and sends
what he reads; the service never opens a path of his.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from jeepney import (
    DBusAddress,
    HeaderFields,
    MessageFlag,
    MessageType,
    new_method_call,
)
from jeepney.fds import FileDescriptor
from jeepney.io.blocking import open_dbus_connection

from overlayd import caller, examine, mountinfo, polkit, sender, wire
from overlayd.bus import BUS
from overlayd.cleanup import Action
from overlayd.errors import (
    NoPermissionError,
    OverlaydError,
    RefusedError,
    ServiceError,
    shown,
)
from overlayd.progress import Progress
from overlayd.targets import OpenSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jeepney.io.blocking import DBusConnection
    from jeepney.low_level import Message

    from overlayd.config import Config
    from overlayd.history import Attempt
    from overlayd.model import Overlay, Request
    from overlayd.walker import Measure

SERVICE: Final = DBusAddress(wire.PATH, bus_name=wire.NAME, interface=wire.MANAGER)
_PROPERTIES: Final = SERVICE.with_interface("org.freedesktop.DBus.Properties")
_AGENT: Final = "/usr/bin/pkttyagent"
_AGENT_PATIENCE: Final = 5.0
"""Seconds that the agent for a terminal has to be ready."""
_LOOK: Final = 0.2
"""Seconds after which a signal is noticed while nothing comes."""
_FAILED: Final = "org.freedesktop.DBus.Error."
_UTF8: Final = "only root can name it"


class Client:
    """What :class:`overlayd.manager.Manager` does, done by the service; for one thread."""

    def __init__(self, config: Callable[[], Config], *, warn: Callable[[str], None]) -> None:
        """Connect when something is asked for; report oddities to *warn*."""
        self._load = config
        self._warn = warn
        self._connection: DBusConnection | None = None

    # -- what can be asked ---------------------------------------------------------------------

    def status(self, name: str) -> Overlay:
        """Return one overlay.

        :raises NotFoundError: if there is none of this name.
        """
        (found,) = self._call("Status", "s", (_text(name),))
        return _overlay(found)

    def about(self) -> tuple[str, bool]:
        """Return the service's version, and whether there is a polkit that it can ask.

        :raises OverlaydError: what the service says, or that there is none.
        """
        (found,) = self._call("Get", "ss", (wire.MANAGER, "Version"), at=_PROPERTIES)
        assert isinstance(found, tuple)  # noqa: S101  # a variant
        (there,) = self._call("NameHasOwner", "s", (polkit.NAME,), at=BUS)
        if not there:
            (names,) = self._call("ListActivatableNames", "", (), at=BUS)
            assert isinstance(names, list)  # noqa: S101  # by the bus's own interface
            there = polkit.NAME in names
        return str(found[1]), bool(there)

    def limits(self) -> dict[str, tuple[int | None, int]]:
        """Return what the caller has of each limit, if it is counted, and how much he may.

        :raises OverlaydError: what the service says, or that there is none.
        """
        (found,) = self._call("Limits", "", ())
        assert isinstance(found, dict)  # noqa: S101  # by its signature
        return wire.limits_from_wire(found)

    def history(
        self, *, name: str | None, uid: int | None, since: float | None, limit: int | None
    ) -> list[Attempt]:
        """Return what was attempted, the oldest first; of other people's an outline.

        :raises OverlaydError: what the service says, or that there is none.
        """
        asked = {
            "name": ("s", name),
            "uid": ("u", uid),
            "since": ("d", since),
            "limit": ("u", limit),
        }
        options = {key: option for key, option in asked.items() if option[1] is not None}
        (found,) = self._call("History", "a{sv}", (options,))
        assert isinstance(found, list)  # noqa: S101  # by its signature
        try:
            return [wire.attempt_from_wire(each) for each in found]
        except ValueError as error:
            raise _other_release(error) from None

    def reset(self, name: str, version: int, progress: Progress | None = None) -> Overlay:
        """Take an overlay back to *version*, as :meth:`Manager.reset` does.

        :raises OverlaydError: what the service says.
        """
        (found,) = self._ask("Reset", "su", (_text(name), version), progress)
        return _overlay(found)

    def remove(self, name: str, *, lazy: bool = False, progress: Progress | None = None) -> Overlay:
        """Remove an overlay, as :meth:`Manager.remove` does.

        :raises OverlaydError: what the service says.
        """
        (found,) = self._ask("Remove", "sb", (_text(name), lazy), progress)
        return _overlay(found)

    def cleanup(self, *, dry_run: bool = False) -> list[Action]:
        """Remove what has no use any more, as :meth:`Manager.cleanup` does.

        :raises OverlaydError: what the service says.
        """
        (found,) = self._ask("Cleanup", "b", (dry_run,), None)
        assert isinstance(found, list)  # noqa: S101  # by its signature
        return [
            Action(kind, subject, text, failed or None) for kind, subject, text, failed in found
        ]

    # -- apply ---------------------------------------------------------------------------------

    def describe(self, request: Request, progress: Progress) -> list[str]:
        """Say what an apply would do, as far as the caller can find out.

        :raises OverlaydError: what is wrong with the request.
        """
        seen = self._examine(request, progress)
        seen.close()
        place, measure = seen.place.place, seen.measure
        return [
            f"send {measure.entries} entries of {shown(request.source)} to the service",
            "ask an administrator, by way of polkit"
            + (f", for a critical target: {seen.critical}" if seen.critical else ""),
            f"show them on {shown(place.mount_point)}",
        ]

    def apply(self, request: Request, progress: Progress) -> Overlay:
        """Make an overlay that everybody sees, once an administrator has permitted it.

        :raises OverlaydError: and then nothing is left of it.
        """
        seen = self._examine(request, progress)
        source = seen.source
        assert isinstance(source, OpenSource)  # noqa: S101  # nothing is streamed to us
        try:
            options: dict[str, wire.Variant] = {
                "read-only": ("b", request.options.read_only),
                "allow-other": ("b", request.options.allow_other),
                "default-permissions": ("b", request.options.default_permissions),
                "allow-critical": ("b", request.options.allow_critical),
            }
            if request.size is not None:
                options["size"] = ("t", request.size)
            progress.expect(seen.measure.entries, seen.measure.size)
            number, far = self._call("OpenStream", "", ())
            assert isinstance(far, FileDescriptor)  # noqa: S101  # by its signature
            sending = _Sending(source, far.to_raw_fd(), seen.measure, seen.limits.depth, progress)
            try:
                sending.start()
                target = _text(seen.place.place.target, "TARGET")
                body = (request.name, shown(request.source), target, number, options)
                with _agent():
                    _, found, warnings = self._call(
                        "Apply", "sssta{sv}", body, progress, interactive=True
                    )
            except BaseException:
                sending.stop()
                sending.join()
                if sending.error is not None:  # the cause, of which the service saw the effect
                    raise sending.error from None
                raise
            sending.join()
        finally:
            seen.close()
        assert isinstance(warnings, list)  # noqa: S101  # by its signature
        for text in warnings:
            self._warn(str(text))
        return _overlay(found)

    def _examine(self, request: Request, progress: Progress) -> examine.Examined:
        if not request.options.allow_other:
            message = "an overlay that everybody sees takes --allow-other, unless root makes it"
            raise NoPermissionError(message, hint="an administrator is asked then; or use sudo")
        if request.options.preserve_owner:
            message = "only root can use --preserve-owner"
            raise NoPermissionError(message)
        return examine.examine(
            request,
            self._load(),
            lambda _place: None,
            table=mountinfo.read(),
            progress=progress,
            # The service says it, of what it received.
            warn=lambda _text: None,
            user=True,
        )

    # -- the bus -------------------------------------------------------------------------------

    def _ask(
        self, member: str, signature: str, body: tuple[object, ...], progress: Progress | None
    ) -> tuple[object, ...]:
        """Call; if that takes an administrator, have one asked.

        On a terminal only then, as the agent for it takes a while to start.  Elsewhere a desktop
        may have one.
        """
        on_terminal = _somebody_there()
        try:
            return self._call(member, signature, body, progress, interactive=not on_terminal)
        except NoPermissionError:
            if not on_terminal:
                raise
        with _agent():
            return self._call(member, signature, body, progress, interactive=True)

    def _call(  # noqa: PLR0913  # what a call consists of
        self,
        member: str,
        signature: str,
        body: tuple[object, ...],
        progress: Progress | None = None,
        *,
        interactive: bool = False,
        at: DBusAddress = SERVICE,
    ) -> tuple[object, ...]:
        """Call and wait for the answer.

        :raises OverlaydError: what the service says, or that there is none.
        """
        call = new_method_call(at, member, signature, body)
        if interactive:
            call.header.flags |= MessageFlag.allow_interactive_authorization
        try:
            connection = self._connect()
            serial = next(connection.outgoing_serial)
            connection.send(call, serial)
            reply = _reply(connection, serial, progress or Progress())
        except (struct.error, ValueError):
            message = "a number is larger than anything can be"
            raise RefusedError(message) from None
        except (OSError, RuntimeError) as error:
            message = f"the connection to the system bus broke off: {error}"
            raise ServiceError(message, hint="systemctl status dbus.service") from None
        except BaseException:
            self._drop()
            raise
        if reply.header.message_type is MessageType.error:
            text = str(reply.body[0]) if reply.body else ""
            raise _error(str(reply.header.fields.get(HeaderFields.error_name)), text)
        return tuple(reply.body)

    def _connect(self) -> DBusConnection:
        if self._connection is None:
            try:
                self._connection = open_dbus_connection("SYSTEM", enable_fds=True)
            except (OSError, ValueError, RuntimeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                message = f"the system bus cannot be reached: {reason}"
                hint = "without it only root can use overlayd; systemctl status dbus.service"
                raise ServiceError(message, hint=hint) from None
        return self._connection

    def _drop(self) -> None:
        """Hang up: the service stops what it does for us."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # Last, as the name hides the type within the class from here on.
    def list(self, *, draining: bool = False) -> list[Overlay]:
        """Return every overlay, by name, as much as the caller may know of each.

        :raises OverlaydError: what the service says, or that there is none.
        """
        options = {"draining": ("b", True)} if draining else {}
        (found,) = self._call("List", "a{sv}", (options,))
        assert isinstance(found, list)  # noqa: S101  # by its signature
        return [_overlay(each) for each in found]


class _Sending(threading.Thread):
    """Sends the source, beside the call."""

    def __init__(  # what sending takes
        self,
        source: OpenSource,
        fd: int,
        measure: Measure,
        depth: int,
        progress: Progress,
    ) -> None:
        super().__init__(name="send", daemon=True)
        self._arguments = source, fd, measure, depth
        self._shown = progress
        self._own = _Shared(progress)
        self.error: OverlaydError | None = None

    def stop(self) -> None:
        """Stop at the next step."""
        self._own.stop()

    def run(self) -> None:
        """Send all of it."""
        source, fd, measure, depth = self._arguments
        try:
            sender.send(source, fd, measure, depth=depth, progress=self._own)
        except sender.NobodyReadsError:
            pass  # the answer says why
        except OverlaydError as error:
            self.error = error
        finally:
            os.close(fd)
            self._shown.close()


class _Shared(Progress):
    """A progress that shows on another one, and stops with it or by itself."""

    def __init__(self, shown_on: Progress) -> None:
        super().__init__()
        self._shown_on = shown_on

    def check(self) -> None:
        """Return if the operation may go on."""
        super().check()
        self._shown_on.check()

    def advance(self, entries: int, size: int) -> None:
        """Report, and check."""
        super().advance(entries, size)
        self._shown_on.advance(entries, size)


def _reply(connection: DBusConnection, serial: int, progress: Progress) -> Message:
    while True:
        try:
            message = connection.receive(timeout=_LOOK)
        except TimeoutError:
            progress.check()
            continue
        if message.header.fields.get(HeaderFields.reply_serial) == serial:
            return message


def _error(name: str, text: str) -> OverlaydError:
    """Return what an error of the bus means to somebody who uses the command."""
    if (error := wire.to_error(name, text)) is not None:
        return error
    kind = name.removeprefix(_FAILED)
    if kind == "NoReply":
        message = "the service ended before it answered"
        return ServiceError(message, hint="try again; journalctl --unit overlayd.service")
    if kind == "ServiceUnknown":
        message = "there is no service on the system bus that could do it for you"
        return ServiceError(message, hint="use sudo; is the package installed whole?")
    if kind.startswith("Spawn.") or kind in {"TimedOut", "Timeout"}:
        message = f"the service does not start: {shown(text)}"
        return ServiceError(message, hint="journalctl --unit overlayd.service")
    if kind == "AccessDenied":
        return NoPermissionError(f"the bus refuses it: {shown(text)}")
    return ServiceError(f"the service says {shown(kind)}: {shown(text)}")


def _overlay(found: object) -> Overlay:
    assert isinstance(found, dict)  # noqa: S101  # by its signature
    try:
        return wire.from_wire(found)
    except ValueError as error:
        raise _other_release(error) from None


def _other_release(error: ValueError) -> ServiceError:
    message = f"the service is of another release: {error}"
    return ServiceError(message, hint="systemctl stop overlayd.service")


def _text(text: str, what: str = "NAME") -> str:
    """Return *text* if it can be sent over the bus.

    :raises RefusedError: if it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{what} {shown(text)} is not UTF-8"
        raise RefusedError(message, hint=_UTF8) from None
    return text


def _somebody_there() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


@contextlib.contextmanager
def _agent() -> Iterator[None]:
    """Have polkit's question asked on this terminal, unless a desktop asks it."""
    if not (_somebody_there() and os.access(_AGENT, os.X_OK)):
        yield
        return
    reading, writing = os.pipe2(os.O_CLOEXEC)
    options = ["--notify-fd", str(writing), "--process", str(os.getpid())]
    if caller.session_id() is not None:
        # A desktop's agent comes first; outside of a session polkit does not use a fallback.
        options.append("--fallback")
    try:
        agent = subprocess.Popen([_AGENT, *options], pass_fds=[writing])  # noqa: S603
    except OSError:
        agent = None
    os.close(writing)
    try:
        if agent is not None:
            _wait_for(reading)
        yield
    finally:
        os.close(reading)
        if agent is not None:
            agent.terminate()
            agent.wait()


def _wait_for(fd: int) -> None:
    """Return when the other end is closed, or after a while."""
    import select  # noqa: PLC0415  # only on terminals

    deadline = time.monotonic() + _AGENT_PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0] and not os.read(fd, 64):
            return
