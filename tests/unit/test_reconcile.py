# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which mounts are left over, and which are proven to be overlayd's: what looks only."""

from __future__ import annotations

import pytest

from overlayd.model import Phase, Tree
from overlayd.mountinfo import Table
from overlayd.places import ROOTS
from overlayd.reconcile import leftovers, proven
from tests.unit.conftest import OTHER_UUID, UUID, make_mount, make_record

PLACE = "/usr/share/app"


def line(uuid: str, point: str = PLACE, *, mount_id: int = 77, minor: int = 50) -> bytes:
    return f"{mount_id} 1 0:{minor} / {point} rw - overlay overlayd:{uuid} rw\n".encode()


def test_mount_of_a_record_is_no_leftover() -> None:
    assert leftovers(Table(line(UUID)), [make_record()]) == []


def test_tagged_mount_without_a_record_is_left_over() -> None:
    table = Table(line(UUID) + line(OTHER_UUID, "/usr/x", mount_id=5))
    assert [mount.mount_id for mount in leftovers(table, [make_record()])] == [5]
    assert [mount.mount_id for mount in leftovers(table, [])] == [77, 5]


def test_tagged_mount_of_another_superblock_than_the_record_says_is_left_over() -> None:
    table = Table(line(UUID) + line(UUID, mount_id=5, minor=51))
    assert [mount.mount_id for mount in leftovers(table, [make_record()])] == [5]


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.REMOVING, Phase.DRAINING])
def test_mounts_of_an_overlay_that_somebody_works_on_are_left_alone(phase: Phase) -> None:
    assert leftovers(Table(line(UUID)), [make_record(phase=phase, tree=None)]) == []


def test_mounts_of_a_reset_in_progress_are_left_alone() -> None:
    record = make_record(pending=Tree(0, 2))
    assert leftovers(Table(line(UUID, minor=99)), [record]) == []


def test_foreign_mounts_are_no_leftovers() -> None:
    raw = b"77 1 0:50 / /usr/x rw - tmpfs overlayd:x rw\n78 1 0:51 / /usr/y rw - overlay y rw\n"
    assert leftovers(Table(raw), []) == []


def test_what_services_are_shown_of_private_overlays_is_no_leftover() -> None:
    assert leftovers(Table(line(UUID, f"{ROOTS}/holder/usr/x")), []) == []


def test_tag_alone_proves_nothing() -> None:
    assert not proven(make_mount("/", tag=OTHER_UUID))
    assert not proven(make_mount("/usr/share/no-such-place", tag=UUID))
    assert not proven(make_mount("/usr", tag="../../../.."))
