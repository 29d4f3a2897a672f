# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling the bus what happens to overlays, whoever does it: root's own commands send no signals.

The kernel tells when the mount table changes; then the overlays are listed and held against what
was there before.  Everybody hears the signals, so they say only what everybody may know.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from jeepney import DBusAddress
from jeepney.wrappers import new_signal

from overlayd import wire
from overlayd.bus import GoneError
from overlayd.errors import OverlaydError
from overlayd.interface import OBJECTS, PROPERTIES
from overlayd.observer import Observer

if TYPE_CHECKING:
    from collections.abc import Callable

    from jeepney.low_level import Message

    from overlayd.wire import Variant

_LATER: Final = 0.5
"""Seconds after which a record is written whose mount is there already."""
_SETTLE: Final = 0.05
"""Seconds that a change may take: an apply changes the table several times."""
_NOT_TOLD: Final = ["Version", "MountId", "Storage"]


@dataclass(frozen=True, slots=True)
class _Known:
    """An overlay as everybody may know it, and what tells that it is another tree (a reset)."""

    told: dict[str, Variant]
    tree: tuple[object, ...]


class Watcher(threading.Thread):
    """Watches, and has signals sent."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        """Watch nothing before :meth:`start`."""
        super().__init__(name="watch", daemon=True)
        self._send = send
        self._known: dict[str, _Known] = {}
        self._end_out, self._end_in = os.pipe2(os.O_CLOEXEC)

    def close(self) -> None:
        """End, for good."""
        os.close(self._end_in)  # which the other end sees
        if self.ident is not None:
            self.join(5)

    def run(self) -> None:
        """Watch until :meth:`close`."""
        observer = Observer(warn=lambda _text: None)
        # Opened first: of what changes from here on the kernel tells.
        table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OverlaydError):
            self._known = self._present(observer)
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        poll.register(self._end_out, select.POLLIN)
        ending = select.poll()
        ending.register(self._end_out, select.POLLIN)
        try:
            while not any(fd == self._end_out for fd, _ in poll.poll()):
                if ending.poll(_SETTLE * 1000):
                    return
                # Once more later: an apply attaches first, and then writes its record.
                for pause in (0.0, _LATER):
                    if ending.poll(pause * 1000):
                        return
                    with contextlib.suppress(OverlaydError):
                        self._tell(self._present(observer))
        except GoneError:
            return
        finally:
            os.close(table)

    @staticmethod
    def _present(observer: Observer) -> dict[str, _Known]:
        return {
            o.record.uuid: _Known(wire.to_wire(o, full=False), (o.mount_id, o.record.tree))
            for o in observer.list()
        }

    def _tell(self, present: dict[str, _Known]) -> None:
        before, self._known = self._known, present
        for uuid in before.keys() - present.keys():
            name, path = before[uuid].told["Name"][1], wire.path_of(uuid)
            self._signal(wire.PATH, wire.MANAGER, "OverlayRemoved", "os", (path, name))
            self._signal(wire.PATH, OBJECTS, "InterfacesRemoved", "oas", (path, [wire.OVERLAY]))
        for uuid, known in present.items():
            path = wire.path_of(uuid)
            if uuid not in before:
                body = (path, *(known.told[key][1] for key in ("Name", "Target", "Owner")))
                self._signal(wire.PATH, wire.MANAGER, "OverlayAdded", "ossu", body)
                added = (path, {wire.OVERLAY: known.told})
                self._signal(wire.PATH, OBJECTS, "InterfacesAdded", "oa{sa{sv}}", added)
            elif known != before[uuid]:
                told = before[uuid].told
                changed = {k: v for k, v in known.told.items() if told.get(k) != v}
                # What is not for everybody is asked for by those for whom it is.
                news = (wire.OVERLAY, changed, _NOT_TOLD)
                self._signal(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", news)

    def _signal(
        self, path: str, interface: str, name: str, signature: str, body: tuple[object, ...]
    ) -> None:
        emitter = DBusAddress(path, interface=interface)
        self._send(new_signal(emitter, name, signature, body))
