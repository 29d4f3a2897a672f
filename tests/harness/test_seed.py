# SPDX-License-Identifier: LGPL-2.1-or-later
"""The seed's file system, read with a reader of our own and with blkid."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from harness import seed
from harness.errors import BuildError

ROOT = Path(__file__).parents[2]
FILES = {"user-data": b"#cloud-config\n", "meta-data": b"instance-id: one\n" * 300}
SECTOR = 2048


def contents(image: bytes) -> dict[str, bytes]:
    """Return the files of an ISO 9660 image, by its primary descriptor."""
    volume = image[16 * SECTOR : 17 * SECTOR]
    assert volume[:6] == b"\1CD001"
    assert len(image) == struct.unpack_from("<I", volume, 80)[0] * SECTOR
    start, size = struct.unpack_from("<I4xI", volume, 156 + 2)
    directory, found, at = image[start * SECTOR :][:size], {}, 0
    while length := directory[at]:
        assert length % 2 == 0
        where, big_where, count, big_count = struct.unpack_from("<I", directory, at + 2) + (
            struct.unpack_from(">I", directory, at + 6)
            + struct.unpack_from("<I", directory, at + 10)
            + struct.unpack_from(">I", directory, at + 14)
        )
        assert (where, count) == (big_where, big_count)
        name = directory[at + 33 :][: directory[at + 32]]
        if len(name) > 1:
            found[name.decode()] = image[where * SECTOR :][:count]
        at += length
    return found


def test_seed_has_the_files_under_the_names_linux_makes_lower_case() -> None:
    found = contents(seed.iso9660("CIDATA", FILES))
    assert found == {"META-DATA.;1": FILES["meta-data"], "USER-DATA.;1": FILES["user-data"]}


def test_equal_files_give_equal_bytes_in_any_order() -> None:
    reversed_files = dict(reversed(FILES.items()))
    assert seed.iso9660("CIDATA", FILES) == seed.iso9660("CIDATA", reversed_files)


@pytest.mark.skipif(not shutil.which("blkid"), reason="no blkid")
def test_seed_is_found_by_its_label(tmp_path: Path) -> None:
    image = tmp_path / "seed.iso"
    seed.write(FILES, image)
    command = ("blkid", "--probe", "--output", "export", image)
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {"LABEL=CIDATA", "TYPE=iso9660"} <= set(said.splitlines())


def test_seed_without_meta_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="without meta-data"):
        seed.write({"user-data": b""}, tmp_path / "seed.iso")


def test_name_that_cloud_init_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="userdata"):
        seed.write({**FILES, "userdata": b""}, tmp_path / "seed.iso")


def test_files_that_are_none_of_the_seed_are_not_read(tmp_path: Path) -> None:
    for name in ("user-data", "meta-data", "README", "user-data~"):
        (tmp_path / name).write_text(name)
    assert seed.read(tmp_path) == {"user-data": b"user-data", "meta-data": b"meta-data"}


def test_own_seed_begins_as_cloud_init_wants_it() -> None:
    own = seed.read(ROOT / "vm/cloud-init")
    assert own["user-data"].startswith(b"#cloud-config\n")
    assert b"instance-id: " in own["meta-data"]
