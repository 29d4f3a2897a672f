# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every write to a disk, noted by QEMU's ``blklogwrites``, and what a power cut may make of them.

The log has the format of Linux's dm-log-writes (Documentation/admin-guide/device-mapper): a sector
that says how many entries there are, then for each entry a sector that says what it was, and what
was written.  All numbers are little-endian.  This reads such logs, replays them, and has
:func:`exported`, which makes a disk of a file without any machine.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
import time
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from harness.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from random import Random

SECTOR: Final = 512
"""Bytes; what a disk writes whole or not at all."""
DAEMON: Final = "qemu-storage-daemon"

_MAGIC: Final = 0x6A736677736872
_VERSION: Final = 1
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_STARTED: Final = 10.0


class Flag(IntFlag):
    """What an entry is besides a write."""

    FLUSH = 1
    """Whatever was written before is on the disk from here on."""
    FUA = 2
    """This is on the disk when it is done."""
    DISCARD = 4
    """The content is of no use any more; there is no data."""
    MARK = 8
    """Somebody's note, no access to the disk."""


@dataclass(frozen=True)
class Entry:
    """One access, of *data* to be found at *offset* in bytes; *size* is that of a discard, too."""

    offset: int
    size: int
    flags: Flag
    data: bytes = b""

    def apply(self, image: bytearray, size: int | None = None) -> None:
        """Write to *image*, and of the data only the first *size* bytes if that is given.

        What was discarded reads as zeros, as from a file with a hole.
        """
        if self.flags & Flag.MARK:
            return
        data = bytes(self.size) if self.flags & Flag.DISCARD else self.data[:size]
        image[self.offset : self.offset + len(data)] = data


def count(log: Path) -> int:
    """Return how many entries *log* had at the last flush, while it is written as well.

    :raises ValueError: if it is no such log.
    """
    with log.open("rb") as file:
        return _head(file.read(_SUPER.size))[0]


def read(log: Path) -> list[Entry]:
    """Return what *log* has, in order.

    :raises ValueError: if it is no such log, or ends too early.
    """
    data = log.read_bytes()
    number, sector = _head(data)
    entries: list[Entry] = []
    place = sector
    for _ in range(number):
        if place + _ENTRY.size > len(data):
            raise ValueError(f"{log}: ends after {len(entries)} of {number} entries")
        start, sectors, flags, extra = _ENTRY.unpack_from(data, place)
        place += sector
        size = extra if flags & Flag.MARK else sectors * sector
        held = 0 if flags & Flag.DISCARD else size
        if place + held > len(data):
            raise ValueError(f"{log}: ends within entry {len(entries)} of {number}")
        content = data[place : place + held]
        entries.append(Entry(start * sector, size, Flag(flags), content))
        place += -(-held // sector) * sector
    return entries


def _head(data: bytes) -> tuple[int, int]:
    """Return the number of entries, and the size of a sector."""
    if len(data) < _SUPER.size:
        raise ValueError("too short for a log of writes")
    magic, version, number, sector = _SUPER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or sector < SECTOR:
        raise ValueError("no log of writes")
    return number, sector


@dataclass(frozen=True)
class Cut:
    """A disk after a power cut, when it had been given so many *entries*.

    :ivar how: what became of them, for people.
    :ivar torn: what was written in part.
    """

    entries: int
    how: str
    image: bytearray
    torn: Entry | None = None

    def __str__(self) -> str:
        return f"power cut after entry {self.entries}, {self.how}"


def cuts(image: bytes, entries: Sequence[Entry], *, random: Random | None = None) -> Iterator[Cut]:
    """Give what *image* may be when the power goes after each entry, until the next is asked for.

    First with all that was written so far.  With *random*, then also with some of what was written
    since the last flush lost, and with the next write torn between two sectors: a disk with a cache
    does that.
    """
    full, flushed = bytearray(image), bytearray(image)
    since: list[Entry] = []
    for number, entry in enumerate(entries, 1):
        if entry.flags & Flag.FLUSH:
            flushed, since = bytearray(full), []
        if random is not None and len(entry.data) > SECTOR:
            torn = bytearray(full)
            entry.apply(torn, SECTOR * random.randrange(1, -(-entry.size // SECTOR)))
            yield Cut(number - 1, "the next write torn", torn, entry)
        entry.apply(full)
        if entry.size:
            since.append(entry)
        yield Cut(number, "all of it written", full)
        if random is not None and len(since) > 1:
            some, lost = bytearray(flushed), 0
            for other in since:
                if other.flags & Flag.FUA or random.choice((True, False)):
                    other.apply(some)
                else:
                    lost += 1
            yield Cut(number, f"{lost} of the last {len(since)} writes lost", some)


def export_fails(binary: str = DAEMON) -> str:
    """Return why :func:`exported` cannot work here; empty if it may."""
    try:
        done = subprocess.run(  # noqa: S603
            [binary, "--help"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{binary}: {error}"
    return "" if "type=]fuse" in done.stdout else f"{binary} has no export by FUSE"


@contextlib.contextmanager
def exported(image: Path, log: Path, *, binary: str = DAEMON) -> Iterator[Path]:
    """Give a file that is *image*, whose writes and flushes are noted in *log* for the block.

    For a loop device that is told not to cache (LO_FLAGS_DIRECT_IO).  It is in the mount namespace
    of the calling thread and ends with that.  What is flushed is not put on this machine's disk.
    Needs root, FUSE, and paths without commas.

    :raises HostError: if it cannot be had.
    """
    place = image.with_name(f"{image.name}.exported")
    for file in (log, place):
        file.write_bytes(b"")
    noting = "driver=blklogwrites,node-name=noted,file=disk,log=log"
    command = [
        *("setpriv", "--pdeathsig", "KILL", "--", binary),
        *("--blockdev", f"driver=file,node-name=disk,filename={image},cache.no-flush=on"),
        *("--blockdev", f"driver=file,node-name=log,filename={log},cache.no-flush=on"),
        *("--blockdev", noting),
        *("--export", f"type=fuse,id=out,node-name=noted,mountpoint={place},writable=on"),
    ]
    with image.with_name(f"{image.name}.errors").open("w+b") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors)  # noqa: S603
        try:
            deadline = time.monotonic() + _STARTED
            while place.stat().st_size == 0:
                if process.poll() is not None or time.monotonic() > deadline:
                    errors.seek(0)
                    said = errors.read().decode("utf-8", "replace").strip()
                    raise HostError(f"{binary} exports nothing: {said or 'it says nothing'}")
                time.sleep(0.005)
            yield place
        finally:
            process.terminate()  # it writes what it has and unmounts
            process.wait()
