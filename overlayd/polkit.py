# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking polkit.  Whatever is not a clear yes is a no."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING, Final

from jeepney import DBusAddress, new_method_call

from overlayd.bus import CallError, GoneError
from overlayd.errors import NoPermissionError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from overlayd.bus import Connection

NAME: Final = "org.freedesktop.PolicyKit1"
AUTHORITY: Final = DBusAddress(
    "/org/freedesktop/PolicyKit1/Authority",
    bus_name=NAME,
    interface="org.freedesktop.PolicyKit1.Authority",
)
_USUAL: Final = 25.0
"""Seconds for an answer that nobody is asked for."""
AT_ONCE: Final = 1.0
"""Seconds for one that others wait for."""
PATIENCE: Final = 300.0
"""Seconds for one that somebody has to type a password for."""
_INTERACTIVE: Final = 1
_numbers: Final = count(1)


class Action(StrEnum):
    """What polkit is asked about; ``data/polkit/`` says of each who may."""

    APPLY = "org.projectatomic.aptostree.usroverlay"
    CRITICAL = "org.projectatomic.aptostree.usroverlay.critical"
    MANAGE_OTHERS = "org.projectatomic.aptostree.usroverlay.manage-others"


@dataclass(frozen=True, slots=True)
class Answer:
    """What polkit says; a ``challenge`` may become a yes if somebody is asked."""

    authorized: bool
    challenge: bool
    dismissed: bool = False


def ask(  # noqa: PLR0913  # what the question consists of
    bus: Connection,
    caller: str,
    action: Action,
    details: Mapping[str, str],
    *,
    interactive: bool,
    quick: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Ask whether *caller*, a unique name on the bus, may do *action*.

    :raises NoPermissionError: if polkit cannot be asked, or gives no answer that makes sense.
    """
    ticket = f"overlayd-{next(_numbers)}"
    body = (
        ("system-bus-name", {"name": ("s", caller)}),
        str(action),
        dict(details),
        _INTERACTIVE if interactive else 0,
        ticket,
    )
    call = new_method_call(AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", body)
    try:
        timeout = PATIENCE if interactive else AT_ONCE if quick else _USUAL
        reply = bus.call(call, timeout, stopped)
        return _read(reply)
    except CallError as error:
        if error.name == "org.freedesktop.DBus.Error.NoReply":
            _cancel(bus, ticket)
        message = f"polkit does not say that this is permitted: {shown(str(error))}"
        hint = "systemctl status polkit.service"
        raise NoPermissionError(message, hint=hint) from None
    except (ValueError, TypeError):
        message = "polkit gave an answer that makes no sense"
        raise NoPermissionError(message, hint="systemctl status polkit.service") from None


def _read(reply: tuple[object, ...]) -> Answer:
    """Take the answer apart.

    :raises ValueError: if it is none.
    """
    (result,) = reply
    if not isinstance(result, tuple):
        raise TypeError
    authorized, challenge, details = result
    if not (isinstance(authorized, bool) and isinstance(challenge, bool)):
        raise TypeError
    dismissed = isinstance(details, dict) and "polkit.dismissed" in details
    return Answer(authorized, challenge and not authorized, dismissed)


def _cancel(bus: Connection, ticket: str) -> None:
    """Take a question back, lest somebody answers what nobody waits for."""
    call = new_method_call(AUTHORITY, "CancelCheckAuthorization", "s", (ticket,))
    try:
        bus.call_later(call, lambda _reply: None)
    except GoneError:
        return
