# SPDX-License-Identifier: LGPL-2.1-or-later
"""File systems in files, mounted through a loop device that is gone with the mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from overlayd import syscalls as sc
from tests.mounts.conftest import mount

if TYPE_CHECKING:
    from collections.abc import Iterator

# <linux/loop.h>
LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A
MS_NOATIME: Final = 1024  # what is only read is not written
LO_FLAGS_AUTOCLEAR = 4
_CONFIG: Final = struct.Struct("<II52xI176x64x")
"""``struct loop_config``: the descriptor, the size of a block, and far within it the flags."""


@contextlib.contextmanager
def mounted(file: Path, target: Path) -> Iterator[None]:
    """Mount the ext4 in *file* on *target* for the block, at whose end it has found no error."""
    number, device = _attached(file)
    try:
        mount(f"/dev/loop{number}", target, "ext4", flags=MS_NOATIME)
    finally:
        os.close(device)
    try:
        yield
        errors = Path(f"/sys/fs/ext4/loop{number}/errors_count").read_text()
        assert errors == "0\n", "the kernel's log says what ext4 has found"
    finally:
        sc.umount2(str(target))


def _attached(file: Path) -> tuple[int, int]:
    """Return the number of a loop device with *file*, and the descriptor that keeps it."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    behind = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    os.posix_fadvise(behind, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read that nobody waits for
    try:
        while True:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            fd = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, _CONFIG.pack(behind, 0, LO_FLAGS_AUTOCLEAR))
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:  # somebody else took it meanwhile
                    raise
            else:
                return number, fd
    finally:
        os.close(behind)
        os.close(control)
