# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a record and the mount table say together."""

from __future__ import annotations

import pytest

from overlayd.errors import NotFoundError
from overlayd.model import Options, Phase, State, Storage, Tree
from overlayd.mountinfo import Table
from overlayd.state import attached, by_name, observe, unfinished, with_storage
from tests.unit.conftest import OTHER_UUID, UUID, make_overlay, make_record

PLACE = "/usr/share/app"


def line(uuid: str, point: str = PLACE, *, mount_id: int = 77, minor: int = 50) -> bytes:
    return f"{mount_id} 1 0:{minor} / {point} rw - overlay overlayd:{uuid} rw\n".encode()


def test_record_is_found_by_name_unless_it_is_draining() -> None:
    gone = make_record(phase=Phase.DRAINING)
    record = make_record(uuid=OTHER_UUID)
    assert by_name("fix", [gone, record]) is record
    for present in ([gone], [make_record(name="fi")], []):
        with pytest.raises(NotFoundError, match="'fix'"):
            by_name("fix", present)


def test_settled_world_needs_nothing() -> None:
    assert not unfinished([])
    assert not unfinished([make_record()])
    assert not unfinished([make_record(phase=Phase.DRAINING), make_record()])


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.REMOVING])
def test_record_in_the_midst_of_something_is_unfinished(phase: Phase) -> None:
    assert unfinished([make_record(), make_record(phase=phase)])


def test_record_that_was_about_to_show_something_is_unfinished() -> None:
    assert unfinished([make_record(), make_record(pending=Tree(0, 2))])


def test_mounts_of_a_record_are_those_with_its_tag_at_its_place() -> None:
    table = Table(
        line(UUID, mount_id=1)
        + line(UUID, "/usr/share/app2", mount_id=2)
        + line(OTHER_UUID, mount_id=3)
        + line(UUID, mount_id=4)
    )
    assert [mount.mount_id for mount in attached(make_record(), table)] == [1, 4]


def test_overlay_without_its_mount_is_lost() -> None:
    for table in (
        Table(b""),
        Table(line(OTHER_UUID)),
        Table(line(UUID, "/usr/elsewhere")),
        Table(line(UUID, minor=51)),
    ):
        overlay = observe(make_record(), table)
        assert (overlay.state, overlay.mount_id) == (State.LOST, None)


def test_overlay_that_was_never_shown_is_lost() -> None:
    assert observe(make_record(tree=None), Table(line(UUID))).state is State.LOST


def test_draining_is_draining_whatever_is_mounted() -> None:
    assert observe(make_record(phase=Phase.DRAINING), Table(line(UUID))).state is State.DRAINING


def test_mount_that_the_table_has_and_nobody_sees_is_covered() -> None:
    # The table is made up, so the place is not what it says: as if something lay over it.
    assert observe(make_record(), Table(line(UUID))).state is State.COVERED


def test_read_only_overlay_has_no_figures_but_zeros() -> None:
    overlay = make_overlay(options=Options(read_only=True), tree=Tree(1, 0))
    assert with_storage(overlay).storage == Storage(0, 0, 0, 0)


def test_storage_that_is_gone_has_no_figures() -> None:
    assert with_storage(make_overlay(tree=Tree(1, 12345))).storage is None
