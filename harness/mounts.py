# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mount table of a machine: a pure parser of ``/proc/PID/mountinfo`` and what is asked of it.

Which of several mounts at one place is the one that is seen, neither the order of the lines nor the
ids tell: a mount can be put beneath another (MOVE_MOUNT_BENEATH), or lie under a mount on a
directory above it.  It follows from who is whose parent, as the kernel walks a path.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_FIXED_FIELDS: Final = 6


@dataclass(frozen=True, slots=True)
class Mount:
    """One line (proc_pid_mountinfo(5)); paths have their escapes resolved.

    :ivar device: ``major:minor``.
    :ivar root: what of the file system is mounted.
    :ivar options: of this mount; ``fs_options`` are those of the file system.
    :ivar propagation: ``shared:N``, ``master:N``, …
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    fstype: str
    source: str
    fs_options: tuple[str, ...]

    def option(self, name: str) -> str | None:
        """Return the value of an option, "" for one without a value, None if it is not there.

        The mount's own options come first.
        """
        for each in (*self.options, *self.fs_options):
            key, _, value = each.partition("=")
            if key == name:
                return value
        return None

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written by way of this mount."""
        return "ro" in self.options or "ro" in self.fs_options

    @property
    def what(self) -> tuple[str, str, str, str]:
        """What stays the same over a reboot: place, type, source and root."""
        return self.mount_point, self.fstype, self.source, self.root


@dataclass(frozen=True)
class Table:
    """A mount table, in the order of its lines."""

    mounts: tuple[Mount, ...]

    def __iter__(self) -> Iterator[Mount]:
        return iter(self.mounts)

    def at(self, path: str) -> tuple[Mount, ...]:
        """Return every mount at *path*, the lowest first; also what nobody can see."""
        here = {mount.mount_id: mount for mount in self.mounts if mount.mount_point == path}
        return tuple(sorted(here.values(), key=lambda mount: self._height(mount, here)))

    def top(self, path: str) -> Mount | None:
        """Return the mount that one sees at *path* if it is a mount point."""
        mount = self.shown(path)
        return mount if mount.mount_point == path else None

    def shown(self, path: str) -> Mount:
        """Return the mount that the absolute *path* (no symlinks, no ``..``) leads into.

        :raises LookupError: if the table has no root.
        """
        mount = self._climb(self._root, "/")
        parts = [part for part in path.split("/") if part]
        for count in range(1, len(parts) + 1):
            mount = self._climb(mount, "/" + "/".join(parts[:count]))
        return mount

    def below(self, path: str) -> tuple[Mount, ...]:
        """Return the mounts at *path* and inside it, by path components, in the table's order."""
        prefix = path.rstrip("/") + "/"
        return tuple(m for m in self.mounts if (m.mount_point + "/").startswith(prefix))

    def added_since(self, before: Table) -> tuple[Mount, ...]:
        """Return the mounts that *before* has not, each as often as it is there more often.

        They are told apart by what they are, not by their ids.
        """
        known = Counter(mount.what for mount in before)
        added = []
        for mount in self.mounts:
            if known[mount.what] > 0:
                known[mount.what] -= 1
            else:
                added.append(mount)
        return tuple(added)

    @cached_property
    def _on(self) -> dict[tuple[int, str], Mount]:
        """What is mounted on a mount at a path: there is at most one."""
        return {
            (mount.parent_id, mount.mount_point): mount
            for mount in self.mounts
            if mount.parent_id != mount.mount_id
        }

    @cached_property
    def _root(self) -> Mount:
        ids = {mount.mount_id for mount in self.mounts}
        for mount in self.mounts:
            orphan = mount.parent_id not in ids or mount.parent_id == mount.mount_id
            if orphan and mount.mount_point == "/":
                return mount
        raise LookupError("a mount table without a root")

    def _climb(self, mount: Mount, path: str) -> Mount:
        """Return the highest of the mounts that are stacked on *mount* at *path*."""
        while (above := self._on.get((mount.mount_id, path))) is not None:
            mount = above
        return mount

    @staticmethod
    def _height(mount: Mount, here: dict[int, Mount]) -> int:
        height = 0
        while (below := here.get(mount.parent_id)) is not None and below is not mount:
            mount = below
            height += 1
        return height


def parse(text: bytes | str) -> Table:
    """Parse what was read from ``/proc/PID/mountinfo``.

    :raises ValueError: if it is something else.
    """
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    table = Table(tuple(_line(line) for line in raw.split(b"\n") if line))
    _check_parents(table)
    return table


def _check_parents(table: Table) -> None:
    """Insist that each mount leads to a root, as whoever climbs from one to the next believes."""
    parents = {mount.mount_id: mount.parent_id for mount in table}
    if len(parents) < len(table.mounts):
        raise ValueError("not a table of mountinfo: two mounts with one id")
    done: set[int] = set()
    for mount in table:
        at, way = mount.mount_id, set[int]()
        while at in parents and at not in done and parents[at] != at:
            done.add(at)
            way.add(at)
            at = parents[at]
        if at in way:
            raise ValueError("not a table of mountinfo: mounts on one another")


def _line(line: bytes) -> Mount:
    head, separator, tail = line.partition(b" - ")
    fields, fs = head.split(b" "), tail.split(b" ")
    if not separator or len(fields) < _FIXED_FIELDS or len(fs) < 2:  # noqa: PLR2004  # the format
        raise ValueError(f"not a line of mountinfo: {line!r}")
    return Mount(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=_text(fields[2]),
        root=_text(fields[3]),
        mount_point=_text(fields[4]),
        options=_options(fields[5]),
        propagation=tuple(_text(each) for each in fields[6:] if each),
        fstype=_text(fs[0]),
        source=_text(fs[1]),
        fs_options=_options(b" ".join(fs[2:])),
    )


def _options(field: bytes) -> tuple[str, ...]:
    return tuple(_text(each) for each in field.split(b",") if each)


def _text(field: bytes) -> str:
    raw = _ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)
    return raw.decode("utf-8", "surrogateescape")
