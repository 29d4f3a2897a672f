# SPDX-License-Identifier: LGPL-2.1-or-later
"""Overlays and errors as they travel over the bus."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Final, TypeVar

from overlayd.errors import OverlaydError, shown
from overlayd.history import Attempt
from overlayd.model import Layer, Options, Overlay, Phase, Record, Scope, State, Storage, Tree

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAME: Final = "org.projectatomic.aptostree.Overlay1"
PATH: Final = "/org/projectatomic/aptostree/Overlay1"
MANAGER: Final = f"{NAME}.Manager"
OVERLAY: Final = f"{NAME}.Overlay"
ERROR: Final = f"{NAME}.Error."
_HINT: Final = "\nhint: "
_NOT_COUNTED: Final = 0xFFFFFFFFFFFFFFFF
"""What stands for a limit of which nothing is counted."""
_NONE: Final = 0xFFFFFFFF
"""What stands for no session."""

Variant = tuple[str, object]
_T = TypeVar("_T")


def path_of(uuid: str) -> str:
    """Return the object of an overlay."""
    return f"{PATH}/overlay/{uuid.replace('-', '_')}"


def to_wire(overlay: Overlay, *, full: bool) -> dict[str, Variant]:
    """Return an overlay's properties: all, or what everybody may know of other people's."""
    record = overlay.record
    known: dict[str, Variant] = {
        "Name": ("s", record.name),
        "Uuid": ("s", record.uuid),
        "Target": ("s", shown(record.target)),
        "Owner": ("u", record.owner),
        "Scope": ("s", str(record.scope)),
        "State": ("s", str(overlay.state)),
    }
    if not full:
        return known
    session = _NONE if record.session_id is None else record.session_id
    layers = [
        (layer.version, shown(layer.source), layer.entries, layer.size, layer.digest)
        for layer in record.layers
    ]
    known |= {
        "Source": ("s", shown(record.source)),
        "SessionId": ("u", session),
        "Version": ("i", -1 if record.tree is None else record.tree.version),
        "CreatedAt": ("s", record.created_at),
        "MountPoint": ("s", shown(record.mount_point)),
        "MountId": ("t", overlay.mount_id or 0),
        "ReadOnly": ("b", record.options.read_only),
        "AllowOther": ("b", record.options.allow_other),
        "DefaultPermissions": ("b", record.options.default_permissions),
        "Layers": ("a(ustts)", layers),
        "Deployment": ("s", shown(record.deployment or "")),
    }
    if (storage := overlay.storage) is not None:
        figures = (storage.size_bytes, storage.used_bytes, storage.inodes, storage.used_inodes)
        known["Storage"] = ("(tttt)", figures)
    return known


def from_wire(properties: Mapping[str, Variant]) -> Overlay:
    """Return the overlay that has these properties; what was not told is empty or None.

    :raises ValueError: if they are none of an overlay's.
    """

    def get(name: str, kind: type[_T], default: _T) -> _T:
        value = properties.get(name, ("", default))[1]
        if not isinstance(value, kind):
            raise TypeError(name)
        return value

    try:
        version, session = get("Version", int, -1), get("SessionId", int, _NONE)
        layers = tuple(Layer(*layer) for layer in get("Layers", list, []))
        record = Record(
            uuid=get("Uuid", str, ""),
            name=get("Name", str, ""),
            phase=Phase.ACTIVE,
            boot_id="",
            owner=get("Owner", int, 0),
            session_id=None if session == _NONE else session,
            scope=Scope(get("Scope", str, "")),
            source=get("Source", str, ""),
            target=get("Target", str, ""),
            mount_point=get("MountPoint", str, ""),
            entry="",
            created_at=get("CreatedAt", str, ""),
            options=Options(
                read_only=get("ReadOnly", bool, False),
                allow_other=get("AllowOther", bool, False),
                default_permissions=get("DefaultPermissions", bool, False),
            ),
            size=0,
            inodes=0,
            layers=layers,
            tree=None if version < 0 else Tree(version=version, upper=0),
            pending=None,
            deployment=get("Deployment", str, "") or None,
        )
        storage = Storage(*get("Storage", tuple, ())) if "Storage" in properties else None
        if storage is not None:
            record = record.with_(size=storage.size_bytes, inodes=storage.inodes)
        state = State(get("State", str, ""))
        return Overlay(record, state, get("MountId", int, 0) or None, storage)
    except (TypeError, IndexError) as error:
        raise ValueError(str(error)) from None


def limits_to_wire(limits: Mapping[str, tuple[int | None, int]]) -> dict[str, tuple[int, int]]:
    """Return limits as they travel."""
    return {k: (_NOT_COUNTED if used is None else used, most) for k, (used, most) in limits.items()}


def limits_from_wire(found: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int | None, int]]:
    """Return limits as they were before they travelled."""
    return {k: (None if used == _NOT_COUNTED else used, most) for k, (used, most) in found.items()}


_SEEN: Final = {"float": "d", "str": "s", "bool": "b", "int": "x", "int | None": "x"}


def attempt_to_wire(attempt: Attempt) -> dict[str, Variant]:
    """Return what is noted of an attempt; what is not known is not there."""
    return {
        field.name: (_SEEN[str(field.type)], shown(value) if isinstance(value, str) else value)
        for field in fields(Attempt)
        if (value := getattr(attempt, field.name)) is not None
    }


def attempt_from_wire(properties: Mapping[str, Variant]) -> Attempt:
    """Return the attempt of which this is noted.

    :raises ValueError: if it is none.
    """
    values: dict[str, object] = {}
    for field in fields(Attempt):
        kind, value = properties.get(field.name, ("", None))
        if kind != _SEEN[str(field.type)] and not (value is None and "None" in str(field.type)):
            raise ValueError(field.name)
        values[field.name] = value
    return Attempt(**values)  # type: ignore[arg-type]


def error_name(error: OverlaydError) -> str:
    """Return what an error is called on the bus: ``….Error.NotFound``."""
    return ERROR + "".join(word.capitalize() for word in error.code.split("-"))


def error_text(error: OverlaydError) -> str:
    """Return the text of an error's message on the bus: one line, and one with the hint."""
    text = error.message if error.hint is None else f"{error.message}{_HINT}{error.hint}"
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def to_error(name: str, text: str) -> OverlaydError | None:
    """Return the error of the tree that is called *name* on the bus; None if none is."""
    message, _, hint = text.partition(_HINT)
    for kind in _tree(OverlaydError):
        made = kind(message, hint=hint or None)
        if error_name(made) == name:
            return made
    return None


def _tree(kind: type[OverlaydError]) -> Iterator[type[OverlaydError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _tree(each)
