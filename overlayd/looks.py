# SPDX-License-Identifier: LGPL-2.1-or-later
"""What calls over the bus show: to each caller what he may see of overlays and of the history.

All of it is done by one thread, so one observer keeps the records in memory for all callers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from overlayd import __version__, history, interface, polkit, wire
from overlayd.errors import NoPermissionError, NotFoundError, RefusedError, not_found, shown
from overlayd.observer import Observer
from overlayd.polkit import Action

if TYPE_CHECKING:
    from collections.abc import Callable

    from overlayd.bus import Connection
    from overlayd.calls import Call
    from overlayd.manager import Manager
    from overlayd.model import Overlay
    from overlayd.wire import Variant

    Result = tuple[object, ...]

_MANAGER_KNOWN: Final = 10.0
"""Seconds for which polkit is not asked again whether a caller may see other people's overlays."""
_SILENT: Final = 5.0
"""Seconds for which polkit is not asked by anybody after it kept one waiting."""
_MAX_ATTEMPTS: Final = 1000
"""Attempts of the history in an answer; more would keep other callers waiting."""


class Looks:
    """What can be looked at, by one thread."""

    def __init__(self, bus: Connection, manager: Callable[[], Manager]) -> None:
        """Look at nothing yet."""
        self._bus = bus
        self._manager = manager
        self._observer: Observer | None = None
        self._managers: dict[str, tuple[float, bool]] = {}
        self._silent_until = 0.0
        self._by_name: dict[tuple[str, str], Callable[[Call], Result]] = {
            (wire.MANAGER, "List"): self._list,
            (wire.MANAGER, "Status"): self._status,
            (wire.MANAGER, "Limits"): self._limits_of,
            (wire.MANAGER, "History"): self._history,
            (interface.OBJECTS, "GetManagedObjects"): self._objects,
            (interface.PROPERTIES, "Get"): self._get,
            (interface.PROPERTIES, "GetAll"): self._get_all,
            (interface.INTROSPECTABLE, "Introspect"): self._introspect,
            (interface.PEER, "Ping"): lambda _call: (),
            (interface.PEER, "GetMachineId"): self._machine_id,
        }

    def do(self, call: Call) -> Result:
        """Do what is called, and return the results.

        :raises OverlaydError: if it is refused or fails.
        """
        return self._by_name[call.method.interface, call.method.name](call)

    def _observe(self) -> Observer:
        if self._observer is None:
            self._observer = Observer(warn=lambda _text: None)
        return self._observer

    def _list(self, call: Call) -> Result:
        (options,) = call.body
        assert isinstance(options, dict)  # noqa: S101  # by its signature
        if unknown := options.keys() - {"draining"}:
            message = f"no such option: {shown(min(unknown))}"
            raise RefusedError(message)
        kind, draining = options.get("draining", ("b", False))
        if kind != "b":
            raise RefusedError("not of this type: draining")
        overlays = self._observe().list(draining=draining)
        return ([self._view(call, overlay) for overlay in overlays],)

    def _status(self, call: Call) -> Result:
        return (self._view(call, self._observe().status(str(call.body[0]))),)

    def _view(self, call: Call, overlay: Overlay) -> dict[str, Variant]:
        own = call.caller.uid in {0, overlay.record.owner}
        return wire.to_wire(overlay, full=own or self._may_manage(call))

    def _may_manage(self, call: Call) -> bool:
        """Return whether polkit lets the caller manage other people's overlays unasked."""
        now, caller = time.monotonic(), call.caller.name
        asked, may = self._managers.get(caller, (0.0, False))
        if (not asked or now - asked > _MANAGER_KNOWN) and now > self._silent_until:
            for name, (when, _) in [*self._managers.items()]:
                if now - when > _MANAGER_KNOWN:
                    del self._managers[name]
            details = {"operation": "look"}
            try:
                answer = polkit.ask(
                    self._bus,
                    caller,
                    Action.MANAGE_OTHERS,
                    details,
                    interactive=False,
                    quick=True,
                )
                may = answer.authorized
            except NoPermissionError:
                may = False
                if (ended := time.monotonic()) - now >= polkit.AT_ONCE:
                    self._silent_until = ended + _SILENT
            self._managers[caller] = (now, may)
        return may

    def _limits_of(self, call: Call) -> Result:
        return (wire.limits_to_wire(self._manager().limits(call.caller.uid)),)

    def _history(self, call: Call) -> Result:
        """Return what was attempted; other people's as an outline."""
        (options,) = call.body
        assert isinstance(options, dict)  # noqa: S101  # by its signature
        known = {"name": "s", "uid": "u", "since": "d", "limit": "u"}
        for key, (kind, _) in options.items():
            if known.get(key) != kind:
                message = f"no such option, or not of this type: {shown(key)}"
                raise RefusedError(message, hint=f"there are {', '.join(known)}")
        asked = {key: value for key, (_, value) in options.items()}
        asked["limit"] = min(asked.get("limit", _MAX_ATTEMPTS), _MAX_ATTEMPTS)
        attempts = history.visible(history.read(**asked), call.caller.uid)
        return ([wire.attempt_to_wire(attempt) for attempt in attempts],)

    def _objects(self, call: Call) -> Result:
        return (
            {
                wire.path_of(overlay.record.uuid): {wire.OVERLAY: self._view(call, overlay)}
                for overlay in self._observe().list()
            },
        )

    def _get(self, call: Call) -> Result:
        name = str(call.body[1])
        properties = self._properties(call)
        if name not in properties:
            message = f"there is no property {shown(name)!r}, or it is not for you to see"
            raise NotFoundError(message)
        return (properties[name],)

    def _get_all(self, call: Call) -> Result:
        return (self._properties(call),)

    def _properties(self, call: Call) -> dict[str, Variant]:
        asked = call.body[0]
        uuid = interface.uuid_of(call.path)
        if uuid is not None and asked in {"", wire.OVERLAY}:
            return self._view(call, with_uuid(self._observe(), uuid))
        if call.path == wire.PATH and asked in {"", wire.MANAGER}:
            return {"Version": ("s", __version__)}
        return {}

    def _introspect(self, call: Call) -> Result:
        if call.path == interface.OVERLAYS:
            uuids = [overlay.record.uuid for overlay in self._observe().list()]
            children = [uuid.replace("-", "_") for uuid in uuids]
        else:
            below = f"{interface.OVERLAYS}/".removeprefix(f"{call.path.rstrip('/')}/")
            children = [below.partition("/")[0]] if not below.startswith("/") else []
        return (interface.introspect(call.path, children),)

    @staticmethod
    def _machine_id(call: Call) -> Result:
        del call
        with open("/etc/machine-id", encoding="ascii") as file:
            return (file.read().strip(),)


def with_uuid(observer: Observer, uuid: str) -> Overlay:
    """Return the overlay with this uuid.

    :raises NotFoundError: if it is gone.
    """
    for overlay in observer.list():
        if overlay.record.uuid == uuid:
            return overlay
    raise not_found(uuid)
