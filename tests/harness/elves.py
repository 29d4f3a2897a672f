# SPDX-License-Identifier: LGPL-2.1-or-later
"""ELF files for tests: nothing but sections."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def elf(sections: Mapping[str, bytes]) -> bytes:
    """Return a file with these sections."""
    names = ["", *sections, ".shstrtab"]
    table = b"\0".join(name.encode() for name in names) + b"\0"
    contents = [b"", *sections.values(), table]
    start = 64
    body, headers = b"", b""
    for name, content in zip(names, contents, strict=True):
        at = table.index(name.encode() + b"\0") if name else 0
        place = start + len(body)
        headers += struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, place, len(content), 0, 0, 1, 0)
        body += content
    head = struct.pack(
        *("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 0, start + len(body), 0),
        *(64, 0, 0, 64, len(names), len(names) - 1),
    )
    return head + body + headers


def module(*depends: str) -> bytes:
    """Return a kernel module that needs others."""
    text = f"license=GPL\0depends={','.join(depends)}\0name=it\0"
    return elf({".modinfo": text.encode()})


def program(*libraries: str) -> bytes:
    """Return a program that needs libraries."""
    strings, entries = b"\0", b""
    for library in libraries:
        entries += struct.pack("<qQ", 1, len(strings))
        strings += library.encode() + b"\0"
    entries += struct.pack("<qQ", 0, 0)
    return elf({".dynamic": entries, ".dynstr": strings})
