# SPDX-License-Identifier: LGPL-2.1-or-later
"""A seed for cloud-init's NoCloud: a read-only disk with the label ``cidata``.

Written without help, and the same, byte for byte, whenever the files are.  It is an ISO 9660 file
system of the plainest kind.  Linux shows its names in lower case, which is how cloud-init knows
them (``user-data``, ``meta-data``, ``vendor-data``, ``network-config``).
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Final

from harness.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

NAMES: Final = ("user-data", "meta-data", "vendor-data", "network-config")
LABEL: Final = "CIDATA"  # cloud-init takes it in either case

_SECTOR: Final = 2048
_RESERVED: Final = 16  # sectors at the beginning, for whatever boots from it
_NAME: Final = re.compile(r"[A-Z0-9_-]{1,28}", re.ASCII)
# ECMA-119; numbers come in both byte orders.  A time of zeros is "not specified".
_DATE: Final = b"0" * 16 + b"\0"
_NO_TIME: Final = bytes(7)


def write(files: Mapping[str, bytes], image: Path) -> None:
    """Write *files*, names and contents, to *image*.

    :raises BuildError: if there is no user-data and meta-data, or a name is not one of
        :data:`NAMES`.
    """
    if unknown := sorted(set(files) - set(NAMES)):
        raise BuildError(f"not a file of cloud-init's: {', '.join(unknown)}")
    if missing := [name for name in NAMES[:2] if name not in files]:
        raise BuildError(f"a seed without {' and '.join(missing)}", hint="cloud-init needs both")
    image.write_bytes(iso9660(LABEL, files))


def read(directory: Path) -> dict[str, bytes]:
    """Return the files of a seed that lie in *directory*; others there are left alone."""
    return {name: (directory / name).read_bytes() for name in NAMES if (directory / name).is_file()}


def iso9660(label: str, files: Mapping[str, bytes]) -> bytes:
    """Return the image of a file system with these files, all in its root."""
    table, root, first = _RESERVED + 2, _RESERVED + 4, _RESERVED + 5
    records, contents, sector = [], [], first
    for name, data in sorted((_name(name), data) for name, data in files.items()):
        records.append(_record(name, sector, len(data)))
        contents.append(_padded(data))
        sector += len(contents[-1]) // _SECTOR
    here = [_record(special, root, _SECTOR, directory=True) for special in (b"\0", b"\1")]
    directory = b"".join([*here, *records])
    if len(directory) > _SECTOR:
        raise BuildError(f"too many files for one directory of {_SECTOR} bytes: {len(files)}")
    paths = [
        struct.pack(f"{order}BBIH", 1, 0, root, 1) + bytes(2)
        for order in "<>"  # a path table each
    ]
    volume = _volume(label, sector, len(paths[0]), table, here[0])
    parts = [volume, b"\xffCD001\1", *paths, directory]
    return bytes(_RESERVED * _SECTOR) + b"".join([*map(_padded, parts), *contents])


def _volume(label: str, sectors: int, path_table: int, table: int, root: bytes) -> bytes:
    """Return the primary volume descriptor."""
    names: Iterable[tuple[str, int]] = (
        *(("", 128), ("", 128), ("", 128), ("", 128)),  # volume set, publisher, preparer, program
        *(("", 37), ("", 37), ("", 37)),  # copyright, abstract, bibliography
    )
    return b"".join(
        (
            b"\1CD001\1\0",
            _text("", 32),
            _text(label, 32),
            bytes(8),
            _both(sectors, 4),
            bytes(32),
            _both(1, 2),  # a set of one volume
            _both(1, 2),  # and this is it
            _both(_SECTOR, 2),
            _both(path_table, 4),
            struct.pack("<II", table, 0),
            struct.pack(">II", table + 1, 0),
            root,
            *(_text(text, length) for text, length in names),
            _DATE * 4,
            b"\1",
        )
    )


def _record(name: bytes, sector: int, size: int, *, directory: bool = False) -> bytes:
    """Return a directory's record of a file or directory, of even length."""
    body = b"".join(
        (
            b"\0",
            _both(sector, 4),
            _both(size, 4),
            _NO_TIME,
            bytes((2 if directory else 0, 0, 0)),
            _both(1, 2),
            bytes((len(name),)),
            name,
        )
    )
    body += bytes((len(body) + 1) % 2)
    return bytes((len(body) + 1,)) + body


def _name(name: str) -> bytes:
    upper = name.upper()
    if not _NAME.fullmatch(upper):
        raise BuildError(f"not a name for a file on a seed: {name!r}")
    return f"{upper}.;1".encode("ascii")


def _both(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little") + number.to_bytes(size, "big")


def _text(text: str, length: int) -> bytes:
    return text.encode("ascii").ljust(length)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _SECTOR)
