# SPDX-License-Identifier: LGPL-2.1-or-later
"""The form of a sent source: what is packed is parsed again, and nothing else is."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd import stream
from overlayd.errors import RefusedError
from overlayd.model import SourceKind
from overlayd.stream import FRAME, FRAME_MAX, HEADER, Entry, Header, Stored, Type
from tests.unit.conftest import PAGE, file_names, is_one_printable_line

if TYPE_CHECKING:
    from collections.abc import Callable

    Attributes = list[tuple[bytes, bytes]]

times = st.integers(-stream.TIME_MAX, stream.TIME_MAX)
sizes = st.integers(0, (1 << 63) - 1)
attribute_names = (
    st.binary(min_size=1, max_size=250)
    .filter(lambda raw: b"\0" not in raw and not raw.startswith(b"overlay."))
    .map(lambda raw: b"user." + raw)
)
attributes = st.dictionaries(attribute_names, st.binary(max_size=300), max_size=32).map(
    lambda found: sorted(found.items())
)
entries = st.builds(Entry, file_names, st.integers(0, 0o777), times, attributes, sizes)
BAD_NAMES = [b"", b".", b"..", b"/", b"a/b", b"/a", b"a/", b"a\0", b"\0", b"n" * 256]


def body(frame: bytes, kind: Type) -> bytes:
    """Return the body of one whole *frame* of type *kind*."""
    assert stream.parse_frame(frame[: FRAME.size]) == (kind, len(frame) - FRAME.size)
    return frame[FRAME.size :]


def refused(parse: Callable[[bytes], object], data: bytes) -> str:
    """Return the message with which *parse* refuses *data*."""
    with pytest.raises(RefusedError) as caught:
        parse(data)
    assert caught.value.message.startswith("the source that was sent makes no sense: ")
    assert is_one_printable_line(caught.value.message)
    return caught.value.message


# What is packed is parsed


@given(st.sampled_from(SourceKind), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_header_comes_back(kind: SourceKind, count: int, size: int) -> None:
    header = Header(kind, count, size)
    assert stream.parse_header(stream.pack_header(header)) == header


@given(entries)
def test_file_comes_back(entry: Entry) -> None:
    assert stream.parse_file(body(stream.pack_file(entry), Type.FILE)) == entry


@given(entries, st.booleans())
def test_directory_comes_back_but_for_its_size(entry: Entry, sticky: bool) -> None:  # noqa: FBT001
    made = Entry(entry.name, entry.mode | 0o1000 * sticky, entry.mtime, entry.attributes)
    assert stream.parse_enter(body(stream.pack_enter(made), Type.ENTER)) == made


@given(sizes, st.binary(min_size=1, max_size=5000))
def test_data_comes_back(offset: int, data: bytes) -> None:
    frame = stream.pack_data(offset, len(data)) + data
    found, rest = stream.parse_data(body(frame, Type.DATA))
    assert (found, bytes(rest)) == (offset, data)


@given(
    file_names,
    times,
    st.binary(min_size=1, max_size=4095).map(lambda raw: raw.replace(b"\0", b"/")),
)
def test_symlink_comes_back(name: bytes, mtime: int, text: bytes) -> None:
    frame = stream.pack_symlink(name, mtime, text)
    assert stream.parse_symlink(body(frame, Type.SYMLINK)) == (name, mtime, text)


@given(file_names, st.lists(file_names, min_size=1, max_size=200))
def test_link_comes_back(name: bytes, first: list[bytes]) -> None:
    assert stream.parse_link(body(stream.pack_link(name, first), Type.LINK)) == (name, first)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_end_comes_back(count: int, size: int) -> None:
    assert stream.parse_end(body(stream.pack_end(count, size), Type.END)) == (count, size)


def test_leave_carries_nothing() -> None:
    stream.parse_leave(body(stream.pack(Type.LEAVE), Type.LEAVE))
    assert "1 bytes" in refused(stream.parse_leave, b"x")


def test_largest_of_everything_fits_a_frame() -> None:
    most = [(b"user.%0250d" % number, b"v" * 65536) for number in range(32)]
    entry = Entry(b"n" * 255, 0o777, 0, most)
    assert stream.parse_file(body(stream.pack_file(entry), Type.FILE)) == entry
    data = bytes(stream.DATA_MAX)
    stream.parse_data(body(stream.pack_data(0, len(data)) + data, Type.DATA))


# What a stretch of data takes


@given(st.lists(st.integers(0, 20 * PAGE), min_size=2, max_size=12, unique=True))
def test_stretches_that_share_a_page_count_it_once(ends: list[int]) -> None:
    ends = sorted(ends)[: len(ends) // 2 * 2]
    stored = Stored()
    found, used = 0, set()
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        found += stored.add(start, end)
        used |= set(range(start // PAGE, (end - 1) // PAGE + 1))
        assert found == len(used) * PAGE


# What is refused


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_could_lead_elsewhere_is_refused_wherever_it_stands(name: bytes) -> None:
    entry = Entry(name, 0o644, 0)
    assert "the name" in refused(stream.check_name, name)
    assert "the name" in refused(stream.parse_file, stream.pack_file(entry)[FRAME.size :])
    assert "the name" in refused(stream.parse_enter, stream.pack_enter(entry)[FRAME.size :])
    if len(name) < 256:  # more the length cannot say
        assert "the name" in refused(
            stream.parse_symlink, stream.pack_symlink(name, 0, b"x")[FRAME.size :]
        )
        assert "the name" in refused(
            stream.parse_link, stream.pack_link(name, [b"x"])[FRAME.size :]
        )


@pytest.mark.parametrize(
    "path", [b"", b".", b"..", b"/", b"/a", b"a/", b"a//b", b"a/../b", b"a/./b", b"a\0", b"n" * 256]
)
def test_path_of_a_link_that_could_lead_elsewhere_is_refused(path: bytes) -> None:
    assert "the name" in refused(stream.parse_link, b"\1n" + path)


def test_path_of_a_link_that_is_longer_than_any_is_refused() -> None:
    long = b"/".join([b"n" * 255] * 256)
    assert stream.parse_link(b"\1n" + long)[1] == [b"n" * 255] * 256
    assert "65537 bytes" in refused(stream.parse_link, b"\1n" + long + b"/n")


@pytest.mark.parametrize("mode", [0o1000, 0o1777, 0o2755, 0o4755, 0o10644, 0o100644, 0o177777])
def test_mode_of_a_file_has_permissions_alone(mode: int) -> None:
    frame = stream.pack_file(Entry(b"name", mode, 0))
    assert f"mode {mode:o} of 'name'" in refused(stream.parse_file, frame[FRAME.size :])


@pytest.mark.parametrize("mode", [0o2000, 0o3777, 0o4755, 0o10755, 0o40755, 0o177777])
def test_mode_of_a_directory_has_permissions_and_the_sticky_bit_alone(mode: int) -> None:
    frame = stream.pack_enter(Entry(b"name", mode, 0))
    assert f"mode {mode:o} of directory 'name'" in refused(stream.parse_enter, frame[FRAME.size :])


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
def test_size_that_no_file_can_have_is_refused(size: int) -> None:
    frame = stream.pack_file(Entry(b"name", 0, 0, (), size))
    assert f"{size} bytes in 'name'" in refused(stream.parse_file, frame[FRAME.size :])


BAD_ATTRIBUTES: dict[str, Attributes] = {
    "trusted": [(b"trusted.own", b"")],
    "trusted of an overlay": [(b"trusted.overlay.opaque", b"y")],
    "security": [(b"security.capability", b"")],
    "system": [(b"system.posix_acl_access", b"")],
    "of an overlay": [(b"user.overlay.opaque", b"y")],
    "redirect": [(b"user.overlay.redirect", b"/etc")],
    "no name space": [(b"colour", b"")],
    "no name": [(b"user.", b"")],
    "empty": [(b"", b"")],
    "capitals": [(b"USER.x", b"")],
    "NUL": [(b"user.a\0b", b"")],
    "NUL at the end": [(b"user.a\0", b"")],
    "twice": [(b"user.a", b""), (b"user.a", b"")],
    "disorder": [(b"user.b", b""), (b"user.a", b"")],
    "second": [(b"user.a", b""), (b"trusted.b", b"")],
    "too many": [(b"user.%02d" % number, b"") for number in range(33)],
    "too long": [(b"user.a", b"v" * 65537)],
}


@pytest.mark.parametrize("found", BAD_ATTRIBUTES.values(), ids=BAD_ATTRIBUTES.keys())
def test_attributes_other_than_a_user_s_own_are_refused(found: Attributes) -> None:
    entry = Entry(b"name", 0o644, 0, found)
    for parse, pack in (
        (stream.parse_file, stream.pack_file),
        (stream.parse_enter, stream.pack_enter),
    ):
        assert "attribute" in refused(parse, pack(entry)[FRAME.size :])


def test_frame_that_is_cut_short_anywhere_is_refused() -> None:
    entry = Entry(b"name", 0o644, 5, [(b"user.a", b"value"), (b"user.b", b"")], 7)
    cut: list[tuple[Callable[[bytes], object], bytes, int]] = [
        (stream.parse_file, stream.pack_file(entry), 4),
        (stream.parse_enter, stream.pack_enter(entry), 4),
        (stream.parse_symlink, stream.pack_symlink(b"name", 5, b"text"), 4),
        (stream.parse_link, stream.pack_link(b"name", [b"first"]), 5),
        (stream.parse_data, stream.pack_data(5, 4) + b"data", 4),
        (stream.parse_end, stream.pack_end(1, 2), 1),
    ]
    for parse, frame, rest in cut:
        whole = frame[FRAME.size :]
        parse(whole)
        for length in range(len(whole) - rest + 1):  # beyond that it is a shorter last part
            refused(parse, whole[:length])


def test_attribute_that_says_it_is_longer_than_the_frame_is_refused() -> None:
    head = struct.pack("<HqQH", 0o644, 0, 0, 1)
    for length in (9, 65536, 0xFFFFFFFF):
        data = head + struct.pack("<BI", 6, length) + b"user.a" + b"12345678"
        assert "too long" in refused(stream.parse_file, data)


@pytest.mark.parametrize("text", [b"", b"t" * 4096, b"a\0b", b"\0"])
def test_symlink_to_what_none_can_lead_to_is_refused(text: bytes) -> None:
    frame = stream.pack_symlink(b"name", 0, text)
    assert "'name' leads" in refused(stream.parse_symlink, frame[FRAME.size :])


@pytest.mark.parametrize("size", [0, stream.DATA_MAX + 1])
def test_no_data_and_too_much_at_a_time_are_refused(size: int) -> None:
    frame = stream.pack_data(0, size) + bytes(size)
    assert f"{size} bytes of data" in refused(stream.parse_data, frame[FRAME.size :])


@pytest.mark.parametrize("kind", [0, 8, 255])
def test_frame_of_unknown_type_is_refused(kind: int) -> None:
    assert f"type {kind}" in refused(stream.parse_frame, FRAME.pack(kind, 0))


def test_frame_is_as_long_as_any_may_be_and_no_longer() -> None:
    assert stream.parse_frame(FRAME.pack(1, FRAME_MAX)) == (Type.ENTER, FRAME_MAX)
    for length in (FRAME_MAX + 1, 0xFFFFFFFF):
        assert f"{length} bytes" in refused(stream.parse_frame, FRAME.pack(1, length))


def test_header_of_anything_else_is_refused() -> None:
    header = stream.pack_header(Header(SourceKind.FILE, 1, 2))
    for at in range(len(stream.MAGIC)):
        other = bytearray(header)
        other[at] ^= 1
        refused(stream.parse_header, bytes(other))
    for kind in (2, 255):
        other = bytearray(header)
        other[len(stream.MAGIC)] = kind
        refused(stream.parse_header, bytes(other))
    assert len(header) == HEADER.size


def test_end_that_is_too_long_is_refused() -> None:
    refused(stream.parse_end, bytes(17))


PARSERS: list[Callable[[bytes], object]] = [
    stream.parse_enter,
    stream.parse_leave,
    stream.parse_file,
    stream.parse_data,
    stream.parse_symlink,
    stream.parse_link,
    stream.parse_end,
]


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused_and_nothing_else(data: bytes) -> None:
    for parse in PARSERS:
        try:
            parse(data)
        except RefusedError as error:
            assert is_one_printable_line(error.message)  # noqa: PT017


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_any_bytes_are_no_header(data: bytes) -> None:
    refused(stream.parse_header, data)
