# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of overlayd as types: names, sizes, requests and what is known of an overlay.

Pure values; nothing here touches the system.  The words are those of ``ARCHITECTURE.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from overlayd.errors import RefusedError, shown

TAG_PREFIX: Final = "overlayd:"
"""``source`` of every overlay mount that overlayd makes is this and the overlay's uuid."""

BASE: Final = 0
APPLIED: Final = 1
"""Versions that have a name."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_SIZE: Final = re.compile(r"([0-9]{1,15})([KMG])", re.ASCII)
_UNIT: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Scope(StrEnum):
    """Who sees the overlay."""

    SYSTEM = "system"
    PRIVATE = "private"
    """The processes of its owner that he starts inside."""


class Phase(StrEnum):
    """What overlayd was doing when it last wrote the record."""

    PREPARING = "preparing"
    ACTIVE = "active"
    REMOVING = "removing"
    DRAINING = "draining"


class State(StrEnum):
    """What record and mount table say together; shown to users."""

    ACTIVE = "active"
    LOST = "lost"
    COVERED = "covered"
    DRAINING = "draining"
    REMOVED = "removed"
    """Only in the answer to a removal."""


class SourceKind(StrEnum):
    """What SOURCE is, after the one symlink that the caller may have named."""

    DIRECTORY = "directory"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``apply`` that stay with the overlay."""

    read_only: bool = False
    allow_other: bool = False
    default_permissions: bool = False
    preserve_owner: bool = False
    allow_critical: bool = False
    writable_dirs: tuple[str, ...] = ()
    """Directories of a private overlay's base, beneath the target, that are to be the owner's."""


DIRECTORIES: Final = "writable_dirs"
FLAGS: Final = tuple(key for key in Options.__dataclass_fields__ if key != DIRECTORIES)
"""The options that are true or false."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller of ``apply`` asks for; paths are absolute, ``size`` is in bytes."""

    name: str
    source: str
    target: str
    options: Options = field(default_factory=Options)
    size: int | None = None
    private: bool = False
    """Whether nobody else is to see it, though root asks for it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A read-only tree of an overlay; ``size`` in bytes as stored, in pages of 4 KiB.

    ``digest`` is that of the stream it came as (:mod:`overlayd.stream`), in hexadecimal; empty for
    what root copied.
    """

    version: int
    source: str
    entries: int
    size: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Tree:
    """One overlay mount as the kernel knows it.

    ``st_dev`` and ``fsid`` identify its superblock; ``upper`` is the number of its topmost storage;
    ``version`` what it shows beneath that.
    """

    version: int
    upper: int
    st_dev: int = 0
    fsid: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What overlayd believes of one overlay; the mount table is what is true.

    ``tree`` is the mount that counts, ``pending`` the one that an unfinished apply or reset was
    about to show.  ``entry`` is the single file of the layer that is shown when a file lies over
    a file, else empty.  Sizes in bytes.
    """

    uuid: str
    name: str
    phase: Phase
    boot_id: str
    owner: int
    session_id: int | None
    scope: Scope
    source: str
    target: str
    mount_point: str
    entry: str
    created_at: str
    options: Options
    size: int
    inodes: int
    layers: tuple[Layer, ...]
    tree: Tree | None
    pending: Tree | None
    deployment: str | None

    def with_(self, **changes: object) -> Record:
        """Return the record with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Storage:
    """Figures of an overlay's writable storage, in bytes and inodes; zeros where it has none."""

    size_bytes: int
    used_bytes: int
    inodes: int
    used_inodes: int


@dataclass(frozen=True, slots=True)
class Overlay:
    """A record beside what the mount table says of it."""

    record: Record
    state: State
    mount_id: int | None
    storage: Storage | None


def check_name(name: str) -> str:
    """Return *name* if it is a permitted overlay name.

    :raises RefusedError: if it is not.
    """
    if _NAME.fullmatch(name):
        return name
    text = f"{shown(name)!r} is not an overlay name"
    raise RefusedError(
        text,
        hint="1 to 64 of A-Z a-z 0-9 _ -, the first a letter or a digit",
    )


def check_writable_dir(path: str) -> str:
    """Return *path* if it may name a directory beneath a target.

    :raises RefusedError: if it may not.
    """
    if path and "\0" not in path and {"", ".", ".."}.isdisjoint(path.split("/")):
        return path
    message = f"{shown(path)!r} is not a path beneath TARGET"
    raise RefusedError(message, hint="a relative one, without . and ..")


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``512K``, ``64M`` or ``2G`` stands for.

    :raises RefusedError: if it is not a positive whole number with K, M or G.
    """
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        message = f"{shown(text)!r} is not a size"
        raise RefusedError(message, hint="a positive whole number with K, M or G, such as 64M")
    size = int(match[1]) * _UNIT[match[2]]
    if size > 1 << 50:
        message = f"the size {text} is beyond anything a machine holds"
        raise RefusedError(message)
    return size


def human_size(size: int) -> str:
    """Write *size* bytes in the largest unit that leaves at least 1, with one decimal."""
    for unit in "GMK":
        if size >= _UNIT[unit]:
            return f"{size / _UNIT[unit]:.1f}".removesuffix(".0") + unit
    return f"{size} bytes"


def counted(number: int) -> str:
    """Write how many entries there are."""
    return "1 entry" if number == 1 else f"{number} entries"


def is_within(path: str, tree: str) -> bool:
    """Whether the absolute *path* is *tree* or lies in it, by components."""
    return path == tree or path.startswith(tree.rstrip("/") + "/")
