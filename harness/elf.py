# SPDX-License-Identifier: LGPL-2.1-or-later
"""What little must be known of ELF files: the libraries a program needs, what a module says.

Only 64-bit little-endian files, as of amd64.  Whatever else a file is, it has no sections here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from harness.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_MAGIC: Final = b"\x7fELF\x02\x01"
_HEADER: Final = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_DT_NEEDED: Final = 1


def sections(data: bytes) -> dict[str, bytes]:
    """Return the contents of a file's sections by their names; nothing for other files."""
    if not data.startswith(_MAGIC):
        return {}
    header = _HEADER.unpack_from(data)
    offset, size, count, names_index = header[5], header[10], header[11], header[12]
    found = [_SECTION.unpack_from(data, offset + index * size) for index in range(count)]
    if not found:
        return {}
    names = data[found[names_index][4] :]
    return {
        _text(names, section[0]): data[section[4] : section[4] + section[5]] for section in found
    }


def needed(data: bytes) -> list[str]:
    """Return the names of the shared libraries that a program or library asks for."""
    parts = sections(data)
    entries, strings = parts.get(".dynamic", b""), parts.get(".dynstr", b"")
    return [_text(strings, at) for tag, at in _DYNAMIC.iter_unpack(entries) if tag == _DT_NEEDED]


def libraries(programs: Iterable[Path], directories: Sequence[Path]) -> dict[str, Path]:
    """Return the shared libraries that *programs* need, directly or not, as found by name.

    :raises BuildError: if one is in none of the *directories*.
    """
    found: dict[str, Path] = {}
    pending = list(programs)
    while pending:
        program = pending.pop()
        for name in needed(program.read_bytes()):
            if name in found:
                continue
            places = (directory / name for directory in directories)
            place = next((place for place in places if place.exists()), None)
            if place is None:
                raise BuildError(f"{program.name} needs {name}, which is not there")
            found[name] = place
            pending.append(place)
    return found


def modinfo(data: bytes) -> dict[str, str]:
    """Return what a kernel module says of itself (``name``, ``depends``, …), last value each."""
    lines = sections(data).get(".modinfo", b"").split(b"\0")
    pairs = (line.decode("utf-8", "replace").partition("=") for line in lines if line)
    return {key: value for key, _, value in pairs}


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()
