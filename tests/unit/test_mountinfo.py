# SPDX-License-Identifier: LGPL-2.1-or-later
r"""The mount table, as Linux writes it: escapes, trees by components, nothing malformed.

The kernel escapes space, tab, newline and backslash in paths, and ``#`` in sources as well; every
other byte stands as it is, ``\r``, ``\v`` and ``\f`` too (tried on Linux 6.18).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from overlayd import mountinfo
from overlayd.mountinfo import Table, parse_line
from tests.unit.conftest import OTHER_UUID, UUID, absolute_paths, file_names

if TYPE_CHECKING:
    from collections.abc import Sequence


def escaped(raw: bytes, special: bytes = b" \t\n\\") -> bytes:
    """Write *raw* as ``mangle_path`` of the kernel does."""
    return b"".join(b"\\%03o" % byte if byte in special else bytes([byte]) for byte in raw)


def line(  # noqa: PLR0913  # the fields of a line
    point: str = "/",
    *,
    mount_id: int = 30,
    parent_id: int = 1,
    device: str = "0:50",
    root: str = "/",
    optional: str = "",
    fstype: str = "tmpfs",
    source: str = "none",
) -> bytes:
    """Return one line of mountinfo, with its newline."""
    return b" ".join(
        [
            f"{mount_id} {parent_id} {device}".encode(),
            escaped(os.fsencode(root)),
            escaped(os.fsencode(point)),
            f"rw,relatime{optional and ' '}{optional} - {fstype}".encode(),
            escaped(os.fsencode(source), b" \t\n\\#"),
            b"rw,size=1024k\n",
        ]
    )


def table(*points: str) -> Table:
    """Return a table with a mount at each of *points*, ids from 100."""
    lines = [line(point, mount_id=100 + i) for i, point in enumerate(points)]
    return Table(b"".join(lines))


def ids(mounts: Sequence[mountinfo.Mount]) -> list[int]:
    return [mount.mount_id for mount in mounts]


def test_every_field_of_a_line_is_read() -> None:
    mount = parse_line(
        rb"36 35 98:0 /mnt1 /mnt2 rw,noatime shared:1 master:2 - ext3 /dev/root rw,errors=continue"
    )
    assert mount == mountinfo.Mount(
        mount_id=36,
        parent_id=35,
        st_dev=os.makedev(98, 0),
        root="/mnt1",
        mount_point="/mnt2",
        options=frozenset({"rw", "noatime"}),
        propagation=("shared:1", "master:2"),
        fstype="ext3",
        source="/dev/root",
    )


@pytest.mark.parametrize(
    ("optional", "shared"),
    [("", False), ("shared:4", True), ("master:4", False), ("master:1 shared:12", True)],
)
def test_mount_in_a_peer_group_is_shared(optional: str, shared: bool) -> None:  # noqa: FBT001
    assert parse_line(line(optional=optional)).shared is shared


def test_mount_with_an_empty_source_is_read() -> None:
    assert parse_line(line(source="")).source == ""


def test_octal_escapes_stand_for_bytes() -> None:
    mount = parse_line(rb"30 1 0:5 / /a\040b\134040\012c\011 rw - tmpfs no\043ne rw")
    assert mount.mount_point == "/a b\\040\nc\t"
    assert mount.source == "no#ne"


@given(absolute_paths, absolute_paths, file_names.map(os.fsdecode))
def test_any_path_comes_back_as_it_went_in(point: str, root: str, source: str) -> None:
    mount = parse_line(line(point, root=root, source=source).rstrip(b"\n"))
    assert (mount.mount_point, mount.root, mount.source) == (point, root, source)


@given(absolute_paths, absolute_paths)
@example("/usr/a\rb", "/")
@example("/usr/a\vb", "/")
@example("/usr/a\fb", "/")
@example("/usr/a", "/root\rof")
def test_mount_at_any_path_is_found_there_and_in_each_directory_above(
    point: str, root: str
) -> None:
    found = Table(line("/") + line(point, mount_id=100, root=root) + line(point + "x"))
    assert ids(found.within(point)) == [100]
    above = point.rpartition("/")[0]
    while above:
        assert 100 in ids(found.within(above))
        above = above.rpartition("/")[0]
    assert 100 in ids(found.within("/"))


@given(st.lists(absolute_paths, max_size=6), absolute_paths)
@example(["/usr/a\r/x"], "/usr")
def test_within_finds_what_lies_in_the_tree_by_components_and_what_lies_on_it_first(
    points: list[str], path: str
) -> None:
    points = [*points, path, path + "/x", *(path + point for point in points), path]
    points += [path + char for char in "x-.01 \n"]  # what sorts beside a slash
    top = path.split("/")
    expected = {100 + i for i, point in enumerate(points) if point.split("/")[: len(top)] == top}
    found = table(*points).within(path)
    assert set(ids(found)) == expected
    assert len(found) == len(expected)
    on = [mount.mount_point == path for mount in found]
    assert on == sorted(on, reverse=True)


def test_usr_lib64_is_not_inside_usr_lib() -> None:
    assert ids(table("/usr/lib64", "/usr/lib64/x", "/usr/lib.d", "/usr").within("/usr/lib")) == []


def test_pattern_characters_of_a_path_stand_for_themselves() -> None:
    assert ids(table("/usr/lib", "/usr/xyz").within("/usr/l.b")) == []
    assert ids(table("/usr/l.b+(x)[y]*", "/usr/lib").within("/usr/l.b+(x)[y]*")) == [100]


def test_path_in_other_fields_is_not_a_mount_point() -> None:
    found = Table(line("/mnt", root="/usr/lib", source="/usr/lib"))
    assert found.within("/usr/lib") == []


def test_everything_lies_within_the_root() -> None:
    assert set(ids(table("/", "/usr", "/a b").within("/"))) == {100, 101, 102}


def test_trailing_slash_makes_no_difference_to_within() -> None:
    assert ids(table("/usr/lib", "/usr/lib/x").within("/usr/lib/")) == [100, 101]


def test_only_an_overlay_with_the_prefix_carries_a_tag() -> None:
    assert parse_line(line(fstype="overlay", source=f"overlayd:{UUID}")).tag == UUID
    assert parse_line(line(fstype="tmpfs", source=f"overlayd:{UUID}")).tag is None
    assert parse_line(line(fstype="overlay", source="overlay")).tag is None
    assert parse_line(line(fstype="overlay", source=f"xoverlayd:{UUID}")).tag is None


@given(st.lists(st.tuples(absolute_paths, st.sampled_from([UUID, OTHER_UUID, None])), max_size=8))
@example([("/usr/a\rb", UUID)])
def test_tagged_mounts_are_found_by_uuid_among_all_others(
    mounts: list[tuple[str, str | None]],
) -> None:
    expected: dict[str, list[str]] = {}
    lines = []
    for point, uuid in mounts:
        if uuid is None:
            lines.append(line(point, root=f"/ - overlay overlayd:{UUID}"))
            continue
        lines.append(line(point, fstype="overlay", source=f"overlayd:{uuid}"))
        expected.setdefault(uuid, []).append(point)
    raw = b"".join(lines)
    for text in (raw, raw.removesuffix(b"\n")):
        found = Table(text).tagged
        assert {u: [m.mount_point for m in ms] for u, ms in found.items()} == expected


@given(st.lists(absolute_paths, max_size=5))
@example(["/usr/a\rb"])
def test_iterating_parses_every_line(points: list[str]) -> None:
    assert [mount.mount_point for mount in table(*points)] == points


@given(
    st.lists(absolute_paths, max_size=4),
    st.lists(st.tuples(absolute_paths, st.sampled_from([UUID, OTHER_UUID, None])), max_size=3),
    st.lists(absolute_paths, max_size=2),
)
@example(["/usr/lib", "/usr/lib/x", "/usr/lib64"], [("/usr/lib", UUID)], ["/usr/lib"])
def test_table_changed_by_hand_is_the_table_that_would_be_read(
    points: list[str], made: list[tuple[str, str | None]], removed: list[str]
) -> None:
    added = [
        mountinfo.own_mount(
            point,
            "tmpfs" if uuid is None else "overlay",
            "storage" if uuid is None else f"overlayd:{uuid}",
            st_dev=os.makedev(0, 50),
            mount_id=200 + i,
        )
        for i, (point, uuid) in enumerate(made)
    ]
    points = [*points, *(point + "/x" for point in removed), *removed]
    before = Table(
        table(*points).raw
        + b"".join(
            line(point, mount_id=300 + i, fstype="overlay", source=f"overlayd:{UUID}")
            for i, point in enumerate(points[:2])
        )
    )
    found = before.changed(added, removed)
    left = [
        mount
        for mount in before
        if not any(
            mount.mount_point.split("/")[: p.count("/") + 1] == p.split("/") for p in removed
        )
    ]
    expected = [*ids(left), *ids(added)]
    assert sorted(ids(found.within("/"))) == sorted(expected)
    assert sorted(ids(list(found))) == sorted(expected)
    for path in {*points, *removed, *(point for point, _ in made)}:
        inside = [
            mount.mount_id
            for mount in [*left, *added]
            if mount.mount_point.split("/")[: path.count("/") + 1] == path.split("/")
        ]
        assert sorted(ids(found.within(path))) == sorted(inside)
    tagged: dict[str, list[int]] = {}
    for mount in [*left, *added]:
        if mount.tag is not None:
            tagged.setdefault(mount.tag, []).append(mount.mount_id)
    assert {uuid: ids(mounts) for uuid, mounts in found.tagged.items()} == tagged
    assert ids(before.within("/")) == ids(Table(before.raw).within("/"))


def test_empty_table_has_no_mounts() -> None:
    empty = Table(b"")
    assert (list(empty), empty.tagged, empty.within("/")) == ([], {}, [])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"garbage",
        b"30 1 0:5 / /x rw",
        b"30 1 0:5 / /x rw - tmpfs",
        b"30 1 0:5 / rw - tmpfs none rw",
        b"x 1 0:5 / /x rw - tmpfs none rw",
        b"30 x 0:5 / /x rw - tmpfs none rw",
        b"30 1 0 / /x rw - tmpfs none rw",
        b"30 1 :5 / /x rw - tmpfs none rw",
        b"30 1 0:x / /x rw - tmpfs none rw",
        b"30 1 99999999999999999999:0 / /x rw - tmpfs none rw",
        b"30 1 4294967296:0 / /x rw - tmpfs none rw",
        b"30 1 0:5 / /x \xff - tmpfs none rw",
        b"30 1 0:5 / /x rw \xff - tmpfs none rw",
    ],
)
def test_malformed_line_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the type is the contract
        parse_line(text)


@given(st.data())
def test_damaged_line_is_read_or_a_value_error_and_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(line("/usr/a b", optional="shared:3", fstype="overlay", source="overlayd:x"))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=24))
        raw += b" "
    _survives(bytes(raw))


@given(st.binary(max_size=200))
def test_garbage_is_a_value_error_and_nothing_else(raw: bytes) -> None:
    _survives(raw)


def _survives(raw: bytes) -> None:
    questions = (
        lambda: parse_line(raw),
        lambda: list(Table(raw)),
        lambda: Table(raw).tagged,
        lambda: Table(raw).within("/usr"),
    )
    for question in questions:
        try:
            question()
        except ValueError:
            continue


def test_table_of_this_process_is_read_whole() -> None:
    found = mountinfo.read()
    assert found.raw.endswith(b"\n")
    assert len(list(found)) == found.raw.count(b"\n")
    assert any(mount.mount_point == "/" for mount in found.within("/"))


def test_reading_the_table_of_a_process_that_is_gone_is_an_oserror() -> None:
    with pytest.raises(FileNotFoundError):
        mountinfo.read("0")


def test_namespace_is_the_one_this_process_is_in() -> None:
    number = os.stat("/proc/self/ns/mnt").st_ino
    assert mountinfo.namespace() == f"mnt:[{number}]"
