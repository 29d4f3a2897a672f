# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel as it is after it has unpacked itself.

QEMU starts such a file directly (PVH, Xen's boot protocol); under TCG that saves the second or two
in which a guest would unpack it.
"""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib
from typing import TYPE_CHECKING, Final

from harness.errors import BuildError
from harness.host import need

if TYPE_CHECKING:
    from pathlib import Path

# Documentation/arch/x86/boot.rst
_SIGNATURE: Final = (0x202, b"HdrS")
_SETUP_SECTORS: Final = 0x1F1
_PAYLOAD: Final = struct.Struct("<II")
_PAYLOAD_AT: Final = 0x248
_SECTOR: Final = 512
_SIZE: Final = 4  # the payload ends with its unpacked size, however it is packed

_ELF: Final = b"\x7fELF"
_XZ: Final = b"\xfd7zXZ\x00"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_GZIP: Final = b"\x1f\x8b"


def unpacked(vmlinuz: Path) -> bytes | None:
    """Return the kernel in *vmlinuz*, or None where its compression is an unusual one.

    :raises BuildError: if it is no kernel for x86.
    """
    data = vmlinuz.read_bytes()
    at, signature = _SIGNATURE
    if data[at : at + len(signature)] != signature:
        raise BuildError(f"{vmlinuz.name} is no kernel for x86")
    offset, length = _PAYLOAD.unpack_from(data, _PAYLOAD_AT)
    start = ((data[_SETUP_SECTORS] or 4) + 1) * _SECTOR + offset
    payload = data[start : start + length]
    kernel = _decompressed(payload)
    whole = len(kernel).to_bytes(_SIZE, "little") == payload[-_SIZE:]
    return kernel if whole and kernel.startswith(_ELF) else None


def _decompressed(payload: bytes) -> bytes:
    try:
        if payload.startswith(_XZ):
            return lzma.LZMADecompressor().decompress(payload)
        if payload.startswith(_GZIP):
            return zlib.decompressobj(wbits=31).decompress(payload)
        if payload.startswith(_ZSTD):
            need({"zstd": "zstd"})
            command = ["zstd", "--decompress", "--stdout"]
            return subprocess.run(  # noqa: S603
                command, input=payload[:-_SIZE], capture_output=True, check=True
            ).stdout
    except (lzma.LZMAError, zlib.error, subprocess.CalledProcessError):
        pass
    return b""
