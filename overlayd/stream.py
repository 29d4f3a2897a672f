# SPDX-License-Identifier: LGPL-2.1-or-later
"""The form in which a source is sent: a header, then frames, each with its type and length.

::

    header     magic, kind (directory or file), entries, bytes       as its sender measured them
    ENTER      mode, mtime, attributes, name                         go down into a directory
    LEAVE                                                            and up again
    FILE       mode, mtime, size, attributes, name                   its data follows
    DATA       offset, bytes                                         of the file before; the rest
                                                                     are holes
    SYMLINK    mtime, length of the name, name, text
    LINK       length of the name, name, path of an earlier file     a hard link
    END        entries, bytes                                        nothing may follow

In each directory names ascend, byte by byte: first of all that is no directory, then of the
directories.  So do the names of attributes.  A path begins at the root, and is of the first link
that was sent; links outside the source leave no trace.  So equal trees make equal streams, whose
SHA-256 is the digest of a source: it covers names, kinds, modes, times of change, ``user.*``
attributes, links, holes and data.  Owners, set-id bits, devices and other attributes cannot be
said.

Times in nanoseconds since 1970, sizes in bytes, all numbers little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from overlayd.errors import RefusedError, shown
from overlayd.model import SourceKind
from overlayd.walker import PAGE, pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    Attributes = Sequence[tuple[bytes, bytes]]

MAGIC: Final = b"overlayd stream 1\n"
DATA_MAX: Final = 1 << 20
"""Bytes of data in a frame."""
_TEXT_MAX: Final = 4095
_NAME_MAX: Final = 255
ATTRIBUTES_MAX: Final = 32
"""Attributes of a file."""
_VALUE_MAX: Final = 65536
"""Bytes of an attribute's value, as the kernel has it (XATTR_SIZE_MAX)."""
_PATH_MAX: Final = 64 << 10
"""Bytes of a path: more than limits.source_depth allows."""
FRAME_MAX: Final = DATA_MAX + _PATH_MAX + ATTRIBUTES_MAX * (_VALUE_MAX + 512)
TIME_MAX: Final = (1 << 63) - 1
"""The latest time, in nanoseconds; the earliest is as far from 1970."""
_SIZE_MAX: Final = (1 << 63) - 1
_MODE: Final = 0o777
_STICKY: Final = 0o1000

HEADER: Final = struct.Struct(f"<{len(MAGIC)}sBQQ")
FRAME: Final = struct.Struct("<BI")
_ENTER: Final = struct.Struct("<HqH")
_FILE: Final = struct.Struct("<HqQH")
_OFFSET: Final = struct.Struct("<Q")
_SYMLINK: Final = struct.Struct("<qB")
_LINK: Final = struct.Struct("<B")
_END: Final = struct.Struct("<QQ")
_ATTRIBUTE: Final = struct.Struct("<BI")
_KINDS: Final = (SourceKind.DIRECTORY, SourceKind.FILE)


class Type(IntEnum):
    """What a frame is."""

    ENTER = 1
    LEAVE = 2
    FILE = 3
    DATA = 4
    SYMLINK = 5
    LINK = 6
    END = 7


@dataclass(frozen=True, slots=True)
class Header:
    """What a source is said to be; ``size`` in bytes as stored."""

    kind: SourceKind
    entries: int
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a directory."""

    name: bytes
    mode: int
    mtime: int
    attributes: Attributes = ()
    size: int = 0


class Stored:
    """The storage that stretches of one file's data take, in ascending order."""

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end = 0

    def add(self, start: int, end: int) -> int:
        """Return how many bytes more the stretch from *start* to *end* takes: whole pages."""
        before = max(self._end, start // PAGE * PAGE)
        self._end = pages(end)
        return self._end - before


def _error(what: str) -> RefusedError:
    return RefusedError(f"the source that was sent makes no sense: {what}")


# -- writing ---------------------------------------------------------------------------------------


def pack_header(header: Header) -> bytes:
    """Return the beginning of a stream."""
    return HEADER.pack(MAGIC, _KINDS.index(header.kind), header.entries, header.size)


def pack(kind: Type, *parts: bytes) -> bytes:
    """Return a frame."""
    body = b"".join(parts)
    return FRAME.pack(kind, len(body)) + body


def pack_enter(entry: Entry) -> bytes:
    """Return the frame that goes down into a directory."""
    head = _ENTER.pack(entry.mode, entry.mtime, len(entry.attributes))
    return pack(Type.ENTER, head, _pack_attributes(entry.attributes), entry.name)


def pack_file(entry: Entry) -> bytes:
    """Return the frame that begins a file."""
    count = len(entry.attributes)
    head = _FILE.pack(entry.mode, entry.mtime, entry.size, count)
    return pack(Type.FILE, head, _pack_attributes(entry.attributes), entry.name)


def pack_data(offset: int, size: int) -> bytes:
    """Return the beginning of a frame of *size* bytes of data, ``DATA_MAX`` at most."""
    return FRAME.pack(Type.DATA, _OFFSET.size + size) + _OFFSET.pack(offset)


def pack_symlink(name: bytes, mtime: int, text: bytes) -> bytes:
    """Return the frame of a symlink."""
    return pack(Type.SYMLINK, _SYMLINK.pack(mtime, len(name)), name, text)


def pack_link(name: bytes, first: Sequence[bytes]) -> bytes:
    """Return the frame of one more link to the file that was sent as *first*, its path."""
    return pack(Type.LINK, _LINK.pack(len(name)), name, b"/".join(first))


def pack_end(entries: int, size: int) -> bytes:
    """Return the last frame."""
    return pack(Type.END, _END.pack(entries, size))


def _pack_attributes(attributes: Attributes) -> bytes:
    return b"".join(
        _ATTRIBUTE.pack(len(name), len(value)) + name + value for name, value in attributes
    )


# -- reading: as if somebody hostile had written it ------------------------------------------------


def parse_header(data: bytes | memoryview) -> Header:
    """Read the beginning of a stream, ``HEADER.size`` bytes.

    :raises RefusedError: if it is none.
    """
    magic, kind, entries, size = HEADER.unpack(data)
    if magic != MAGIC or kind >= len(_KINDS):
        raise _error("it does not begin as one")
    return Header(_KINDS[kind], entries, size)


def parse_frame(data: bytes | memoryview) -> tuple[Type, int]:
    """Read type and length of a frame, ``FRAME.size`` bytes.

    :raises RefusedError: if there is no such type, or it is longer than any may be.
    """
    kind, length = FRAME.unpack(data)
    if not Type.ENTER <= kind <= Type.END:
        raise _error(f"type {kind}")
    if length > FRAME_MAX:
        raise _error(f"a frame of {length} bytes")
    return Type(kind), length


def parse_enter(body: bytes) -> Entry:
    """Read what goes down into a directory.

    :raises RefusedError: if it makes no sense.
    """
    mode, mtime, count = _unpack(_ENTER, body)
    attributes, name = _attributes(body[_ENTER.size :], count)
    if mode & ~(_MODE | _STICKY):
        raise _error(f"mode {mode:o} of directory {_shown(name)}")
    return Entry(check_name(name), mode, mtime, attributes)


def parse_file(body: bytes) -> Entry:
    """Read what begins a file.

    :raises RefusedError: if it makes no sense.
    """
    mode, mtime, size, count = _unpack(_FILE, body)
    attributes, name = _attributes(body[_FILE.size :], count)
    if mode & ~_MODE:
        raise _error(f"mode {mode:o} of {_shown(name)}")
    if size > _SIZE_MAX:
        raise _error(f"{size} bytes in {_shown(name)}")
    return Entry(check_name(name), mode, mtime, attributes, size)


def parse_leave(body: bytes) -> None:
    """Read what goes up again: nothing.

    :raises RefusedError: if there is more.
    """
    if body:
        raise _error(f"{len(body)} bytes with the end of a directory")


def parse_data(body: bytes | memoryview) -> tuple[int, memoryview]:
    """Read offset and data.

    :raises RefusedError: if there is none, or too much.
    """
    (offset,) = _unpack(_OFFSET, body)
    data = memoryview(body)[_OFFSET.size :]
    if not 0 < len(data) <= DATA_MAX:
        raise _error(f"{len(data)} bytes of data at a time")
    return offset, data


def parse_symlink(body: bytes) -> tuple[bytes, int, bytes]:
    """Read name, time and text of a symlink.

    :raises RefusedError: if it makes no sense.
    """
    mtime, length = _unpack(_SYMLINK, body)
    name = check_name(body[_SYMLINK.size : _SYMLINK.size + length])
    text = body[_SYMLINK.size + length :]
    if not 0 < len(text) <= _TEXT_MAX or b"\0" in text:
        raise _error(f"where the symlink {_shown(name)} leads")
    return name, mtime, text


def parse_link(body: bytes) -> tuple[bytes, list[bytes]]:
    """Read the name of one more link, and the path of the file.

    :raises RefusedError: if it makes no sense.
    """
    (length,) = _unpack(_LINK, body)
    name = check_name(body[_LINK.size : _LINK.size + length])
    path = body[_LINK.size + length :]
    if len(path) > _PATH_MAX:
        raise _error(f"{_shown(name)} is a link to a path of {len(path)} bytes")
    return name, [check_name(part) for part in path.split(b"/")]


def parse_end(body: bytes) -> tuple[int, int]:
    """Read entries and bytes.

    :raises RefusedError: if it makes no sense.
    """
    if len(body) != _END.size:
        raise _error("its end")
    entries, size = _END.unpack(body)
    return entries, size


def check_name(name: bytes) -> bytes:
    """Return *name* if a file can have it.

    :raises RefusedError: if it could lead elsewhere.
    """
    if not 0 < len(name) <= _NAME_MAX or b"/" in name or b"\0" in name or name in {b".", b".."}:
        raise _error(f"the name {_shown(name[: _NAME_MAX + 1])}")
    return name


def _unpack(layout: struct.Struct, body: bytes | memoryview) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise _error("a frame that is too short")
    return layout.unpack_from(body)


def _attributes(data: bytes, count: int) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return *count* attributes, and what comes after them."""
    if count > ATTRIBUTES_MAX:
        raise _error(f"{count} attributes of a file")
    found: list[tuple[bytes, bytes]] = []
    for _ in range(count):
        name_length, length = _unpack(_ATTRIBUTE, data)
        end = _ATTRIBUTE.size + name_length
        name, value = data[_ATTRIBUTE.size : end], data[end : end + length]
        if len(name) < name_length or len(value) < length or length > _VALUE_MAX:
            raise _error("an attribute that is too long")
        if not name.startswith(b"user.") or name.startswith(b"user.overlay.") or b"\0" in name:
            raise _error(f"the attribute {_shown(name)}")
        if len(name) == len(b"user.") or (found and name <= found[-1][0]):
            raise _error(f"the attribute {_shown(name)}, nameless, twice or too late")
        found.append((name, value))
        data = data[end + length :]
    return found, data


def _shown(name: bytes) -> str:
    return repr(shown(name.decode("utf-8", "surrogateescape")))
