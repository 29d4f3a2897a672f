# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole directory trees: what they weigh, what they are, and how they go away.

Build trees are hostile to plain tools: sparse disk images, hard links, directories without write
permission, OSTree's immutable flags, and mounts that a killed build left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
from typing import TYPE_CHECKING

from harness.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# <linux/fs.h>; the argument is a long on every 64-bit machine, of which the kernel uses 32 bits.
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10
FS_APPEND_FL = 0x20

IGNORED_NAMES = frozenset({"__pycache__"})  # what Python writes beside sources is no input


def disk_usage(path: Path, seen: set[tuple[int, int]] | None = None) -> int:
    """Return the bytes of disk that *path* and all beneath it take.

    Blocks are counted, not lengths (sparse files), and a file with several links once.  What
    vanishes meanwhile counts nothing.

    :param seen: files with several links that were counted elsewhere, and get counted here.
    """
    seen = set() if seen is None else seen
    total = 0
    pending = [os.fspath(path)]
    while pending:
        current = pending.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            status = os.lstat(current)
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                identity = (status.st_dev, status.st_ino)
                if identity in seen:
                    continue
                seen.add(identity)
            total += status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(current) as entries:
                    pending.extend(entry.path for entry in entries)
    return total


def describe(path: Path) -> Iterator[bytes]:
    """Yield bytes that are equal for two trees of equal names, modes, content and links.

    Times, owners and the name of *path* itself do not count, nor do :data:`IGNORED_NAMES`.  A file
    comes as its content, so feed a hash.  Devices and the like count by type and number; they are
    never opened.

    :raises OSError: if something cannot be read.
    """
    yield from _describe(os.fspath(path), os.stat(path))


def _describe(path: str, status: os.stat_result) -> Iterator[bytes]:
    mode = status.st_mode
    yield b"%06o " % mode
    if stat.S_ISDIR(mode):
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        for entry in entries:
            if entry.name in IGNORED_NAMES:
                continue
            name = os.fsencode(entry.name)
            yield b"%d:%s " % (len(name), name)
            yield from _describe(entry.path, entry.stat(follow_symlinks=False))
        yield b"/"
    elif stat.S_ISLNK(mode):
        target = os.fsencode(os.readlink(path))
        yield b"%d:%s " % (len(target), target)
    elif stat.S_ISREG(mode):
        with open(path, "rb") as file:
            yield b"%d:" % status.st_size
            while block := file.read(1 << 20):
                yield block
    else:
        yield b"%d " % status.st_rdev


def remove_tree(path: Path) -> None:
    """Remove *path*, a directory or anything else, and all beneath it; absent is fine.

    :raises HostError: if something is mounted beneath it: then nothing is removed, since deleting
        through a mount that a killed build left behind would delete what is mounted.
    :raises OSError: if something cannot be removed.
    """
    if mounts := mounts_beneath(path):
        message = f"not removing {path}: {mounts[0]} is a mount point"
        raise HostError(message, hint=f"umount -R {mounts[0]}")
    try:
        _remove(path)
    except PermissionError:
        _unlock(path)
        _remove(path)


def _remove(path: Path) -> None:
    try:
        directory = stat.S_ISDIR(os.lstat(path).st_mode)
        if directory:
            shutil.rmtree(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        if os.path.lexists(path):  # something else is removing it, too: once more, from the start
            _remove(path)


def _unlock(path: Path) -> None:
    """Make every directory beneath *path* writable, and everything mutable, as far as we may."""
    pending = [os.fspath(path)]
    while pending:
        directory = pending.pop()
        _clear_flags(directory)
        with contextlib.suppress(OSError):
            os.chmod(directory, 0o700)
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        _clear_flags(entry.path)


def _clear_flags(path: str) -> None:
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(mode := os.lstat(path).st_mode) and not stat.S_ISDIR(mode):
            return
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            (flags,) = struct.unpack("l", fcntl.ioctl(fd, FS_IOC_GETFLAGS, struct.pack("l", 0)))
            if flags & (FS_IMMUTABLE_FL | FS_APPEND_FL):
                flags &= ~(FS_IMMUTABLE_FL | FS_APPEND_FL)
                fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))
        finally:
            os.close(fd)


def mounts_beneath(path: Path) -> list[str]:
    """Return the mount points at or beneath *path* in this mount namespace, topmost first."""
    top = os.path.realpath(path)
    prefix = top.rstrip("/") + "/"
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            point = _unescape(line.split(" ")[4])
            if point == top or point.startswith(prefix):
                found.append(point)
    return found


def _unescape(field: str) -> str:
    # The kernel writes blank, tab, newline and backslash as octal.
    for octal, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        field = field.replace(f"\\{octal}", character)
    return field
