# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can be called over the bus, as one table: nothing is answered that is not in it.

Each method says who may call it, and one without that cannot be made.  The introspection data is
written from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import quoteattr

from overlayd.wire import MANAGER, OVERLAY, PATH

if TYPE_CHECKING:
    from collections.abc import Iterable

PROPERTIES: Final = "org.freedesktop.DBus.Properties"
OBJECTS: Final = "org.freedesktop.DBus.ObjectManager"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"
OVERLAYS: Final = f"{PATH}/overlay"


class Access(Enum):
    """Who may call a method."""

    ANYONE = "anyone"
    """It shows to each caller what he may see, and changes nothing."""
    APPLY = "apply"
    """polkit is asked: by the action for applying, or the one for critical targets."""
    OWNER = "owner"
    """The owner of the overlay; for others polkit is asked."""
    MANAGE = "manage"
    """polkit is asked whether the caller may manage other people's overlays."""


class Place(Enum):
    """Which objects have a method."""

    MANAGER = "manager"
    OVERLAY = "overlay"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Method:
    """A method; arguments and results are pairs of name and type."""

    interface: str
    name: str
    arguments: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str], ...]
    access: Access
    place: Place

    def __post_init__(self) -> None:
        """Insist on an access, whatever the type checker was told.

        :raises TypeError: if there is none.
        """
        if not isinstance(self.access, Access):
            raise TypeError(f"{self.interface}.{self.name} does not say who may call it")

    @property
    def takes(self) -> str:
        """The signature of the arguments."""
        return "".join(kind for _, kind in self.arguments)

    @property
    def gives(self) -> str:
        """The signature of the results."""
        return "".join(kind for _, kind in self.results)


def _method(  # noqa: PLR0913, PLR0917  # a row of the table
    interface: str, name: str, arguments: str, results: str, access: Access, place: Place
) -> Method:
    def pairs(text: str) -> tuple[tuple[str, str], ...]:
        words = text.split()
        return tuple(zip(words[::2], words[1::2], strict=True))

    return Method(interface, name, pairs(arguments), pairs(results), access, place)


_M: Final = Place.MANAGER
METHODS: Final = (
    _method(
        *(MANAGER, "Apply", "name s source s target s stream t options a{sv}"),
        *("path o overlay a{sv} warnings as", Access.APPLY, _M),
    ),
    _method(MANAGER, "OpenStream", "", "stream t socket h", Access.ANYONE, _M),
    _method(MANAGER, "List", "options a{sv}", "overlays aa{sv}", Access.ANYONE, _M),
    _method(MANAGER, "Status", "name s", "overlay a{sv}", Access.ANYONE, _M),
    _method(MANAGER, "Reset", "name s version u", "overlay a{sv}", Access.OWNER, _M),
    _method(MANAGER, "Remove", "name s lazy b", "overlay a{sv}", Access.OWNER, _M),
    _method(MANAGER, "Cleanup", "dry_run b", "actions a(ssss)", Access.MANAGE, _M),
    _method(MANAGER, "Limits", "", "limits a{s(tt)}", Access.ANYONE, _M),
    _method(MANAGER, "History", "options a{sv}", "attempts aa{sv}", Access.ANYONE, _M),
    _method(OVERLAY, "Reset", "version u", "overlay a{sv}", Access.OWNER, Place.OVERLAY),
    _method(OVERLAY, "Remove", "lazy b", "overlay a{sv}", Access.OWNER, Place.OVERLAY),
    _method(OBJECTS, "GetManagedObjects", "", "objects a{oa{sa{sv}}}", Access.ANYONE, _M),
    _method(PROPERTIES, "Get", "interface s name s", "value v", Access.ANYONE, Place.ANY),
    _method(PROPERTIES, "GetAll", "interface s", "properties a{sv}", Access.ANYONE, Place.ANY),
    _method(INTROSPECTABLE, "Introspect", "", "xml s", Access.ANYONE, Place.ANY),
    _method(PEER, "Ping", "", "", Access.ANYONE, Place.ANY),
    _method(PEER, "GetMachineId", "", "id s", Access.ANYONE, Place.ANY),
)
"""Every method there is."""

SIGNALS: Final = (
    (MANAGER, "OverlayAdded", (("path", "o"), ("name", "s"), ("target", "s"), ("owner", "u"))),
    (MANAGER, "OverlayRemoved", (("path", "o"), ("name", "s"))),
    (OBJECTS, "InterfacesAdded", (("path", "o"), ("interfaces", "a{sa{sv}}"))),
    (OBJECTS, "InterfacesRemoved", (("path", "o"), ("interfaces", "as"))),
)
_CHANGED: Final = (("interface", "s"), ("changed", "a{sv}"), ("invalidated", "as"))

MANAGER_PROPERTIES: Final = (("Version", "s"),)
OVERLAY_PROPERTIES: Final = (
    *(("Name", "s"), ("Uuid", "s"), ("Target", "s"), ("Owner", "u"), ("Scope", "s")),
    *(("State", "s"), ("Source", "s"), ("SessionId", "u"), ("Version", "i"), ("CreatedAt", "s")),
    *(("MountPoint", "s"), ("MountId", "t"), ("ReadOnly", "b"), ("AllowOther", "b")),
    *(("DefaultPermissions", "b"), ("Layers", "a(ustts)"), ("Deployment", "s")),
    ("Storage", "(tttt)"),
)


def uuid_of(path: str) -> str | None:
    """Return the uuid of the overlay whose object *path* is; None if it is none's."""
    if not path.startswith(f"{OVERLAYS}/"):
        return None
    return path.removeprefix(f"{OVERLAYS}/").replace("_", "-")


def _places(path: str) -> frozenset[Place]:
    if uuid_of(path) is not None:
        return frozenset({Place.ANY, Place.OVERLAY})
    if path == PATH:
        return frozenset({Place.ANY, Place.MANAGER})
    leads_there = path in {"/", OVERLAYS} or PATH.startswith(f"{path}/")
    return frozenset({Place.ANY}) if leads_there else frozenset()


def find(path: str, interface: str, name: str) -> Method | None:
    """Return the method that a call means; without an *interface* the first of that name."""
    places = _places(path)
    for method in METHODS:
        if method.name == name and interface in {"", method.interface} and method.place in places:
            return method
    return None


def introspect(path: str, children: Iterable[str]) -> str:
    """Return the introspection data of the object at *path*, which has these *children*."""
    places = _places(path)
    lines = [
        '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"',
        ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">',
        "<node>",
    ]
    there = [method for method in METHODS if method.place in places]
    for interface in dict.fromkeys(method.interface for method in there):
        lines.append(f"  <interface name={quoteattr(interface)}>")
        for method in there:
            if method.interface == interface:
                lines += _member("method", method.name, method.arguments, method.results)
        for owner, name, arguments in SIGNALS:
            if owner == interface:
                lines += _member("signal", name, (), arguments)
        if interface == PROPERTIES:
            lines += _member("signal", "PropertiesChanged", (), _CHANGED)
        known = {MANAGER: MANAGER_PROPERTIES, OVERLAY: OVERLAY_PROPERTIES}.get(interface, ())
        for name, kind in known:
            lines.append(f'    <property name="{name}" type="{kind}" access="read"/>')
        lines.append("  </interface>")
    lines += [f"  <node name={quoteattr(child)}/>" for child in children]
    return "\n".join([*lines, "</node>", ""])


def _member(
    kind: str,
    name: str,
    arguments: Iterable[tuple[str, str]],
    results: Iterable[tuple[str, str]],
) -> list[str]:
    lines = [f'    <{kind} name="{name}">']
    lines += [f'      <arg name="{n}" type="{t}" direction="in"/>' for n, t in arguments]
    direction = ' direction="out"' if kind == "method" else ""
    lines += [f'      <arg name="{n}" type="{t}"{direction}/>' for n, t in results]
    return [*lines, f"    </{kind}>"]
