# SPDX-License-Identifier: LGPL-2.1-or-later
"""How overlays look: the JSON that is documented in ``docs/json.md``, and text for people."""

from __future__ import annotations

import json
import pwd
import sys
import time
from typing import TYPE_CHECKING, Final

from overlayd.errors import shown
from overlayd.model import Scope, counted, human_size
from overlayd.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from overlayd.errors import OverlaydError
    from overlayd.model import Overlay, Storage

_PATIENCE: Final = 0.5
"""Seconds before a copy is long enough to be shown."""
_INTERVAL: Final = 0.1


def overlay_object(overlay: Overlay) -> dict[str, object]:
    """Return the documented JSON object of an overlay."""
    record = overlay.record
    return {
        "name": record.name,
        "uuid": record.uuid,
        "target": record.target,
        "source": record.source or None,
        "owner": record.owner,
        "session_id": record.session_id,
        "scope": record.scope,
        "state": overlay.state,
        "version": None if record.tree is None else record.tree.version,
        "created_at": record.created_at or None,
        "mount_point": record.mount_point or None,
        "mount_id": overlay.mount_id,
        "layers": [
            {
                "version": layer.version,
                "source": layer.source,
                "entries": layer.entries,
                "size_bytes": layer.size,
                "digest": layer.digest or None,
            }
            for layer in record.layers
        ],
        "options": {
            "read_only": record.options.read_only,
            "allow_other": record.options.allow_other,
            "default_permissions": record.options.default_permissions,
            "writable_dirs": [*record.options.writable_dirs],
        }
        if record.mount_point
        else None,  # it is somebody else's, and not for us to see
        "storage": None if overlay.storage is None else _storage_object(overlay.storage),
        "deployment": record.deployment,
    }


def _storage_object(storage: Storage) -> dict[str, int]:
    return {
        "size_bytes": storage.size_bytes,
        "used_bytes": storage.used_bytes,
        "inodes": storage.inodes,
        "used_inodes": storage.used_inodes,
    }


def error_object(error: OverlaydError) -> dict[str, object]:
    """Return the documented JSON object of an error."""
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


def as_json(value: object) -> str:
    """Return *value* as JSON; a byte of a path that is not UTF-8 becomes a lone surrogate."""
    return json.dumps(value, indent=2)


def user_name(uid: int) -> str:
    """Return the user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _used(overlay: Overlay) -> str:
    if overlay.record.options.read_only:
        return "read-only"
    if overlay.storage is None:
        return "-"
    return f"{human_size(overlay.storage.used_bytes)} of {human_size(overlay.storage.size_bytes)}"


def overlay_table(overlays: Sequence[Overlay]) -> str:
    """Return the table that ``list`` prints; one line per overlay."""
    if not overlays:
        return "no overlays"
    scoped = any(overlay.record.scope is Scope.PRIVATE for overlay in overlays)
    rows = [("NAME", *(["SCOPE"] * scoped), "STATE", "VERSION", "OWNER", "EDITS", "TARGET")]
    for overlay in overlays:
        record = overlay.record
        rows.append(
            (
                record.name,
                *([record.scope] * scoped),
                overlay.state,
                "-" if record.tree is None else str(record.tree.version),
                user_name(record.owner),
                _used(overlay),
                shown(record.target),
            )
        )
    return columns(rows)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Align the cells of *rows*."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def overlay_details(overlay: Overlay) -> str:
    """Return what ``status`` prints."""
    record = overlay.record
    rows = [
        ("name", record.name),
        ("state", overlay.state),
        ("scope", "private" if record.scope is Scope.PRIVATE else ""),
        ("target", shown(record.target)),
        ("source", shown(record.source)),
        ("version", "-" if record.tree is None else str(record.tree.version)),
        ("owner", user_name(record.owner)),
        ("created", record.created_at),
        ("mounted on", shown(record.mount_point)),
        ("edits", _used(overlay)),
    ]
    rows += [
        (
            f"layer {layer.version}",
            f"{counted(layer.entries)}, {human_size(layer.size)}, from {shown(layer.source)}",
        )
        for layer in record.layers
    ]
    if record.deployment is not None:
        rows.append(("deployment", record.deployment))
    rows.append(("uuid", record.uuid))
    return columns((f"{key}:", value) for key, value in rows if value)


_LIMITS: Final = {
    "overlays": "overlays",
    "bytes": "their storage",
    "inodes": "files in it",
    "source_size": "largest source",
    "source_entries": "entries of a source",
    "source_depth": "depth of a source",
    "copies": "sources at a time",
    "queued": "calls that wait",
    "calls": "calls in ten seconds",
    "bytes_of_all": "storage of everybody",
    "overlays_of_all": "overlays of everybody",
}


def limits_table(limits: Mapping[str, tuple[int | None, int]]) -> str:
    """Return what ``status --limits`` prints."""
    rows = [("LIMIT", "USED", "OF")]
    for key, (used, limit) in limits.items():
        write = human_size if "bytes" in key or "size" in key else str
        rows.append((_LIMITS.get(key, key), "-" if used is None else write(used), write(limit)))
    return columns(rows)


def applied(overlay: Overlay) -> str:
    """Return the one line that ``apply`` prints, and a second if more is covered than asked."""
    record = overlay.record
    layer = record.layers[0]
    how = "read-only" if record.options.read_only else "writable"
    line = (
        f"{record.name}: {shown(record.target)} shows {shown(record.source)},"
        f" {counted(layer.entries)}, {human_size(layer.size)}, {how}"
    )
    if record.mount_point != record.target:
        line += f"\nthe overlay covers {shown(record.mount_point)}, the nearest that exists"
    return line


class TerminalProgress(Progress):
    """A line on standard error, on a terminal, for copies that take a while."""

    def __init__(self, *, enabled: bool) -> None:
        """Show something only if *enabled*."""
        super().__init__()
        self._start = time.monotonic()
        self._next = self._start + _PATIENCE if enabled else float("inf")
        self._drawn = False

    def advance(self, entries: int, size: int) -> None:
        """Count, and draw the line if it is time."""
        super().advance(entries, size)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL
            self._draw(now)

    def _draw(self, now: float) -> None:
        rate = int(self.size / max(now - self._start, 0.001))
        text = (
            f"{human_size(self.size)} of {human_size(self.total_size)},"
            f" {self.entries} of {self.total_entries} entries, {human_size(rate)}/s"
        )
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
        self._drawn = True

    def close(self) -> None:
        """Clear the line."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False
