# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels taken out of made-up bzImages."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from harness.errors import BuildError
from harness.vmlinux import unpacked

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = b"\x7fELF" + bytes(range(256)) * 40
SETUP_SECTORS = 3


def bzimage(path: Path, payload: bytes) -> Path:
    """Write a file that has the fields of the boot protocol, and something before the payload."""
    offset = 100
    setup = bytearray((SETUP_SECTORS + 1) * 512)
    setup[0x1F1] = SETUP_SECTORS
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, offset, len(payload) + 4)
    size = struct.pack("<I", len(KERNEL))
    path.write_bytes(bytes(setup) + bytes(offset) + payload + size + b"what follows")
    return path


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
        pytest.param(
            zstd, marks=pytest.mark.skipif(not shutil.which("zstd"), reason="no zstd here")
        ),
    ],
    ids=["gzip", "xz", "zstd"],
)
def test_kernel_comes_out_as_it_went_in(tmp_path: Path, compress: type[bytes]) -> None:
    assert unpacked(bzimage(tmp_path / "vmlinuz", compress(KERNEL))) == KERNEL


@pytest.mark.parametrize(
    "payload",
    [b"\x02\x21L\x18 lz4", gzip.compress(KERNEL)[:60], b""],
    ids=["lz4", "cut", "empty"],
)
def test_what_cannot_be_unpacked_is_none(tmp_path: Path, payload: bytes) -> None:
    assert unpacked(bzimage(tmp_path / "vmlinuz", payload)) is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "vmlinuz"
    other.write_bytes(bytes(4096))
    with pytest.raises(BuildError, match="vmlinuz is no kernel for x86"):
        unpacked(other)
