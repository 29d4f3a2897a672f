# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logs of writes: made by hand and by QEMU, and what a power cut may make of what they say."""

from __future__ import annotations

import os
import struct
from random import Random
from typing import TYPE_CHECKING

import pytest

from harness import blocklog
from harness.blocklog import SECTOR, Cut, Entry, Flag
from harness.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SIZE = 8 * SECTOR
PLAIN = Flag(0)
FLUSH = Entry(0, 0, Flag.FLUSH)


def block(letter: bytes, sectors: int = 1) -> bytes:
    return letter * SECTOR * sectors


def write(sector: int, data: bytes, flags: Flag = PLAIN) -> Entry:
    return Entry(sector * SECTOR, len(data), flags, data)


def log_of(
    entries: Sequence[Entry], *, sector: int = SECTOR, magic: int = 0x6A736677736872
) -> bytes:
    """Write a log as the kernel's documentation of dm-log-writes has it."""
    made = struct.pack("<QQQI", magic, 1, len(entries), sector).ljust(sector, b"\0")
    for entry in entries:
        mark = bool(entry.flags & Flag.MARK)
        numbers = (entry.offset // sector, 0 if mark else entry.size // sector, int(entry.flags))
        made += struct.pack("<QQQQ", *numbers, entry.size if mark else 0).ljust(sector, b"\0")
        made += entry.data.ljust(-(-len(entry.data) // sector) * sector, b"\0")
    return made


def images(entries: Sequence[Entry], random: Random | None = None) -> list[tuple[str, bytes]]:
    """Return what each cut leaves, with its number in front of how it came about."""
    found = blocklog.cuts(bytes(SIZE), entries, random=random)
    return [(f"{cut.entries} {cut.how}", bytes(cut.image)) for cut in found]


@pytest.mark.parametrize("sector", [512, 4096])
def test_log_comes_back_as_it_was_written(tmp_path: Path, sector: int) -> None:
    entries = [
        write(0, b"a" * sector * 2),
        FLUSH,
        Entry(0, 5, Flag.MARK, b"hello"),
        Entry(sector, sector, Flag.DISCARD),
        Entry(3 * sector, sector, Flag.FLUSH | Flag.FUA, b"b" * sector),
    ]
    log = tmp_path / "log"
    log.write_bytes(log_of(entries, sector=sector) + b"what is written at the moment")
    assert blocklog.read(log) == entries
    assert blocklog.count(log) == len(entries)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:7], "too short"),
        (lambda data: bytes(len(data)), "no log of writes"),
        (lambda data: data[:SECTOR], "ends after 0 of 2"),
        (lambda data: data[: 3 * SECTOR], "ends within entry 0 of 2"),
    ],
)
def test_what_is_no_log_or_half_of_one_is_refused(
    tmp_path: Path, damage: type[bytes], said: str
) -> None:
    log = tmp_path / "log"
    log.write_bytes(damage(log_of([write(0, block(b"a", 2)), FLUSH])))
    with pytest.raises(ValueError, match=said):
        blocklog.read(log)


def test_cut_leaves_what_was_written_before() -> None:
    a, b = block(b"a"), block(b"b")
    rest = bytes(SIZE - 2 * SECTOR)
    entries = [write(0, a), write(1, b), FLUSH, Entry(0, SECTOR, Flag.DISCARD)]
    assert [image for _, image in images(entries)] == [
        a + bytes(SECTOR) + rest,
        a + b + rest,
        a + b + rest,
        bytes(SECTOR) + b + rest,
    ]


def test_what_was_flushed_is_never_lost_and_anything_else_may_be() -> None:
    flushed = [write(0, block(b"a")), FLUSH]
    later = [write(1, block(b"b")), write(2, block(b"c")), write(3, block(b"d"), Flag.FUA)]
    lost: set[tuple[bytes, bytes]] = set()
    for seed in range(40):
        for cut in blocklog.cuts(bytes(SIZE), [*flushed, *later], random=Random(seed)):
            seen = [bytes(cut.image[SECTOR * n : SECTOR * n + 1]) for n in range(4)]
            if cut.entries >= 2:
                assert seen[0] == b"a"
            if cut.entries == 5:
                assert seen[3] == b"d"
                lost.add((seen[1], seen[2]))
    nothing = b"\0"
    assert lost == {(b"b", b"c"), (b"b", nothing), (nothing, b"c"), (nothing, nothing)}


def test_write_is_torn_between_sectors_before_it_is_whole() -> None:
    entry = write(2, block(b"a", 3))
    torn = set()
    for seed in range(20):
        cut, *_ = blocklog.cuts(bytes(SIZE), [entry], random=Random(seed))
        assert (cut.entries, cut.torn) == (0, entry)
        written = bytes(cut.image).count(b"a")
        assert written % SECTOR == 0
        torn.add(written // SECTOR)
    assert torn == {1, 2}
    assert (
        str(Cut(3, "all of it written", bytearray()))
        == "power cut after entry 3, all of it written"
    )


def test_flush_that_carries_data_flushes_only_what_was_before() -> None:
    entries = [write(0, block(b"a")), write(1, block(b"b"), Flag.FLUSH), write(2, block(b"c"))]
    seen = set()
    for seed in range(40):
        *_, cut = blocklog.cuts(bytes(SIZE), entries, random=Random(seed))
        assert cut.image[0] == ord("a")
        seen.add((bool(cut.image[SECTOR]), bool(cut.image[2 * SECTOR])))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}


# QEMU's own.


def need_export() -> None:
    if why := blocklog.export_fails():
        pytest.skip(why)
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and FUSE")


def test_writes_and_flushes_to_an_exported_file_are_noted_in_order(tmp_path: Path) -> None:
    need_export()
    image, log = tmp_path / "image", tmp_path / "log"
    image.write_bytes(block(b"o", 8))
    with blocklog.exported(image, log) as place:
        fd = os.open(place, os.O_RDWR)
        assert os.pread(fd, SIZE, 0) == block(b"o", 8)
        os.pwrite(fd, block(b"a", 2), SECTOR)
        os.fsync(fd)
        assert blocklog.count(log) == 2
        os.pwrite(fd, block(b"b"), 0)
        os.fsync(fd)
        os.close(fd)
        assert blocklog.count(log) == 4
    assert image.read_bytes() == block(b"b") + block(b"a", 2) + block(b"o", 5)
    entries = blocklog.read(log)
    assert entries[:4] == [write(1, block(b"a", 2)), FLUSH, write(0, block(b"b")), FLUSH]
    assert not any(entry.size for entry in entries[4:])
    *_, last = blocklog.cuts(block(b"o", 8), entries)
    assert last.image == image.read_bytes()


def test_export_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    need_export()
    image = tmp_path / "image"
    image.write_bytes(b"")
    broken = tmp_path / "daemon"
    broken.write_text("#!/bin/sh\necho no such option >&2; exit 1\n")
    broken.chmod(0o755)
    with (
        pytest.raises(HostError, match="no such option"),
        blocklog.exported(image, tmp_path / "log", binary=str(broken)),
    ):
        pass
    assert "no export" in blocklog.export_fails("true")
    assert "no-such-program" in blocklog.export_fails("no-such-program")
