# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages out of what is read from a bus, with the descriptors that belong to each.

Callers are hostile, and the bus passes on as many calls without a reply as they send: what a
message costs before it is refused is what a flood of them costs everybody.  So reads are large, and
the header is taken apart here, in a fifth of the time that jeepney takes.  Its size and signature
are known before a body is looked at, and what is too large is passed over instead of being kept.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from jeepney import HeaderFields
from jeepney.low_level import Array, Endianness, Header, Struct, Variant, parse_signature

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_BODY: Final = 128 << 10
"""Bytes of a message's body that are worth reading; nothing that is to be said here is longer."""
_MAX_HEADER: Final = 16 << 10
"""The same of a header.  The bus passes much longer ones, as paths of objects have no end."""
_FIXED: Final = 16
"""Bytes of a message that tell its length."""
_FIELDS: Final = {field.value: field for field in HeaderFields}
_ORDERS: Final = {
    ord("l"): (Endianness.little, struct.Struct("<I"), struct.Struct("<xBBBIII")),
    ord("B"): (Endianness.big, struct.Struct(">I"), struct.Struct(">xBBBIII")),
}
_MALFORMED: Final = (
    *(AssertionError, IndexError, KeyError, RecursionError, TypeError, struct.error),
)
"""What jeepney raises for it, besides ValueError."""
_TEXT_OF_TYPE: Final = parse_signature(["g"])
_STRINGS: Final = b"os"
_SIGNATURE: Final = b"g"[0]
_NUMBER: Final = b"u"[0]


@dataclass(slots=True)
class Incoming:
    """A message with its body not looked at yet; *fds* are open, and whoever gets it closes them.

    ``length`` is the body's; a body longer than ``MAX_BODY`` is empty.
    """

    header: Header
    body: bytes
    length: int
    fds: list[int]

    def field(self, which: HeaderFields) -> str:
        """Return a text of the header; empty if it is not there."""
        value = self.header.fields.get(which, "")
        return value if isinstance(value, str) else ""

    def parse(self) -> tuple[object, ...]:
        """Return what the body holds; descriptors as their numbers.

        :raises ValueError: if it is none of its signature.
        """
        signature = self.field(HeaderFields.signature)
        if not signature:
            return ()
        try:
            kind = _reader(f"({signature})")
            value, _ = kind.parse_data(self.body, 0, self.header.endianness, fds=self.fds)
        except _MALFORMED as error:
            raise ValueError(str(error)) from None
        return tuple(value)

    def close(self) -> None:
        """Close the descriptors that came with it."""
        close(self.fds)
        self.fds = []


class _Variant:
    """A variant whose signature is as hostile as its value, in the place of jeepney's."""

    alignment = 1

    @staticmethod
    def parse_data(
        buf: bytes, pos: int, endianness: Endianness, fds: Sequence[int] = ()
    ) -> tuple[tuple[str, object], int]:
        """Return signature and value, and where they end."""
        signature, pos = _TEXT_OF_TYPE.parse_data(buf, pos, endianness)
        value, pos = _reader(signature).parse_data(buf, pos, endianness, fds=fds)
        return (signature, value), pos


def _reader(signature: str) -> Array | Struct:
    """Return jeepney's reader of the one type that *signature* names.

    :raises ValueError: for structures of nothing: an array of those has no end.
    """
    if "()" in signature:
        raise ValueError("a structure of nothing")
    rest = list(signature)
    found = _guarded(parse_signature(rest))
    if rest:
        raise ValueError("more than one type")
    return found


def _guarded(kind: Array | Struct) -> Array | Struct:
    """Put our variants in the place of jeepney's."""
    if isinstance(kind, Variant):
        return _Variant()
    if isinstance(kind, Array):
        kind.elt_type = _guarded(kind.elt_type)
    elif isinstance(kind, Struct):
        kind.fields = [_guarded(each) for each in kind.fields]
    return kind


class Framer:
    """The messages of one connection."""

    def __init__(self) -> None:
        """Begin with the first byte of a message."""
        self._data = bytearray()
        self._fds: list[int] = []
        self._skip = 0

    def feed(self, data: bytes, fds: Sequence[int]) -> list[Incoming]:
        """Take what was read at once, and return the messages that are whole now.

        The kernel ends a read with the message that the descriptors came with, or within it.

        :raises ValueError: if it is no message, and nobody knows where the next begins.
        """
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._data += data[skipped:] if skipped else data
        came: list[Incoming] = []
        start, last = 0, None
        try:
            while (size := self._whole(start)) is not None:
                last = self._message(start, size)
                start = min(start + size, len(self._data))
                if last is not None:
                    came.append(last)
        except ValueError:
            close([*fds, *(fd for message in came for fd in message.fds)])
            raise
        del self._data[:start]
        if self._data:
            self._fds += fds
        elif last is not None:
            last.fds += fds
        else:
            close(fds)
        return came

    def _whole(self, start: int) -> int | None:
        """Return the size of the message at *start* if it can be dealt with, else None."""
        there = len(self._data) - start
        if there < _FIXED:
            return None
        head, body = _lengths(self._data, start)
        worth = 0 if head > _MAX_HEADER else head if body > MAX_BODY else head + body
        return head + body if there >= worth else None

    def _message(self, start: int, size: int) -> Incoming | None:
        """Return the message there; None if it is not for us, or too long to be anything."""
        self._skip = max(0, start + size - len(self._data))
        fds, self._fds = self._fds, []
        head, body = _lengths(self._data, start)
        if head <= _MAX_HEADER:
            end = start + (head if body > MAX_BODY else size)
            whole = bytes(memoryview(self._data)[start:end])
            try:
                return Incoming(_header(whole), whole[head:], body, fds)
            except (KeyError, IndexError, ValueError, struct.error):
                pass  # a type or a field that is not known: to be passed over, says D-Bus
        close(fds)
        return None

    def close(self) -> None:
        """Close the descriptors of a message that is not whole."""
        close(self._fds)
        self._fds = []


def close(fds: Sequence[int]) -> None:
    """Close all of them."""
    for fd in fds:
        os.close(fd)


def _lengths(data: bytearray, start: int) -> tuple[int, int]:
    """Return the length of a message's header with its padding, and of its body, in bytes.

    :raises ValueError: if no message begins there.
    """
    try:
        _, _, whole = _ORDERS[data[start]]
    except KeyError:
        raise ValueError("no message of D-Bus") from None
    _, _, _, body, _, fields = whole.unpack_from(data, start)
    return _FIXED + fields + -fields % 8, body


def _header(data: bytes) -> Header:
    """Take the header of a message apart.

    :raises ValueError: if it has anything unknown; or another error for one that is malformed.
    """
    endianness, number, whole = _ORDERS[data[0]]
    kind, flags, version, body, serial, length = whole.unpack_from(data)
    fields: dict[HeaderFields, object] = {}
    position, end = _FIXED, _FIXED + length
    while position < end:
        position += -position % 8
        code, size, of, _ = data[position : position + 4]
        value: object
        position += 4
        if size != 1:
            raise ValueError("a field of no single type")
        if of in _STRINGS:
            (size,) = number.unpack_from(data, position)
            value = data[position + 4 : position + 4 + size].decode()
            position += 5 + size
        elif of == _SIGNATURE:
            size = data[position]
            value = data[position + 1 : position + 1 + size].decode()
            position += 2 + size
        elif of == _NUMBER:
            (value,) = number.unpack_from(data, position)
            position += 4
        else:
            raise ValueError("a field of an unknown type")
        fields[_FIELDS[code]] = value
    return Header(endianness, kind, flags, version, body, serial, fields)
