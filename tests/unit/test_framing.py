# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages are found in what is read, however it is cut, with the descriptors that are theirs."""

from __future__ import annotations

import array
import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jeepney import (
    DBusAddress,
    HeaderFields,
    MessageFlag,
    new_error,
    new_method_call,
    new_method_return,
)
from jeepney.low_level import Endianness, Header, Message

from overlayd.framing import MAX_BODY, Framer, Incoming

if TYPE_CHECKING:
    from collections.abc import Iterator

PLACE = DBusAddress("/a/b", bus_name="c.d", interface="e.f")
CALL = new_method_call(PLACE, "Do", "s", ("x",))
CALL.header.serial = 3  # what it is answered by says so


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    os.close(fd)


def as_bytes(message: Message, serial: int, *, sender: str = ":1.7", big: bool = False) -> bytes:
    """Return a message as the bus passes it on."""
    message.header.fields[HeaderFields.sender] = sender
    message.header.endianness = Endianness.big if big else Endianness.little
    data: bytes = message.serialise(serial, fds=array.array("i"))
    return data


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Give a message of any kind, of any size up to a little over the largest."""
    text = draw(st.text(max_size=12).filter(lambda each: "\0" not in each))
    many = draw(st.sampled_from([0, 1, 7, 500, MAX_BODY, MAX_BODY + 9]))
    body = (text, bytes(many))
    kind = draw(st.sampled_from(["call", "return", "error", "no reply", "without"]))
    if kind == "return":
        made = new_method_return(CALL, "say", body)
    elif kind == "error":
        made = new_error(CALL, "a.b.C", "say", body)
    elif kind == "without":
        made = new_method_call(PLACE, "Do")
    else:
        made = new_method_call(PLACE, "Do", "say", body)
        if kind == "no reply":
            made.header.flags |= MessageFlag.no_reply_expected
    return as_bytes(made, draw(st.integers(1, 2**32 - 1)), big=draw(st.booleans()))


@given(st.lists(messages(), max_size=6), st.data())
def test_messages_are_what_jeepney_reads_however_they_are_cut(
    some: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(some)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=8).map(sorted))
    framer, found = Framer(), []
    for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        found += framer.feed(whole[start:end], [])
    assert len(found) == len(some)
    for message, sent in zip(found, some, strict=True):
        expected = Message.from_buffer(sent)
        assert vars(message.header) == vars(expected.header)
        if message.length <= MAX_BODY:
            assert message.parse() == tuple(expected.body)
        else:
            assert message.body == b""


@given(st.lists(st.tuples(messages(), st.booleans()), min_size=1, max_size=6), st.data())
def test_descriptors_belong_to_the_message_they_came_with(
    some: list[tuple[bytes, bool]], data: st.DataObject
) -> None:
    framer, found = Framer(), []
    # As the kernel does: a message with descriptors is read from its first byte with the
    # descriptors, after what came before it or alone, and nothing is read beyond it.
    before = b""
    for sent, has_fds in some:
        if not has_fds:
            before += sent
            continue
        cut = data.draw(st.integers(1, len(sent)))
        fd = os.open("/dev/null", os.O_RDONLY)
        found += framer.feed(before + sent[:cut], [fd])
        before = sent[cut:]
    found += framer.feed(before, [])
    try:
        assert [len(message.fds) for message in found] == [int(has) for _, has in some]
    finally:
        for message in found:
            message.close()


def test_what_is_unknown_or_too_long_is_passed_over_and_its_descriptors_closed(null: int) -> None:
    good = as_bytes(CALL, 5)
    strange = bytearray(good)
    strange[16] = 77  # a field of a later version of D-Bus
    kind = bytearray(good)
    kind[1] = 9
    long = as_bytes(new_method_call(DBusAddress("/" + "x" * 20_000, bus_name="c.d"), "Do"), 6)
    for passed in (bytes(strange), bytes(kind), long):
        for cut in (1, 15, 16, 17, len(passed) - 1, len(passed)):
            framer = Framer()
            fd = os.dup(null)
            found = framer.feed(passed[:cut], [fd]) + framer.feed(passed[cut:] + good, [])
            assert [message.header.serial for message in found] == [5]
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_what_is_no_message_is_said_and_nothing_stays_open(null: int) -> None:
    fds = [os.dup(null), os.dup(null)]
    with pytest.raises(ValueError, match="no message"):
        Framer().feed(as_bytes(CALL, 1) + b"x" * 16, fds)
    half = Framer()
    third = os.dup(null)
    assert half.feed(as_bytes(CALL, 1)[:30], [third]) == []
    half.close()
    for fd in (*fds, third):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@given(st.binary(max_size=80), st.integers(0, 64))
def test_header_of_junk_is_passed_over(junk: bytes, length: int) -> None:
    fixed = struct.pack("<cBBBIII", b"l", 1, 0, 1, 0, 9, min(length, len(junk)))
    end = as_bytes(CALL, 5)
    padding = bytes(-len(junk[:length]) % 8)
    found = Framer().feed(fixed + junk[:length] + padding + end, [])
    assert found[-1].header.serial == 5
    assert len(found) <= 2


@pytest.mark.parametrize(
    "kind", ["a()", "a(()())", "aa()", "a{s()}", "v", "a{vs}", "z", "(", "a", "ss", ""]
)
def test_variant_of_a_hostile_signature_is_refused_at_once(kind: str) -> None:
    """An array of structures of nothing has no end: reading one took all time and memory."""
    text = kind.encode()
    body = struct.pack("<B", len(text)) + text + b"\0"
    body += b"\0" * (-len(body) % 4) + struct.pack("<I", 1 << 20) + bytes(64)
    fields = {HeaderFields.signature: "v"}
    message = Incoming(
        Header(Endianness.little, 1, 0, 1, len(body), 1, fields), body, len(body), []
    )
    with pytest.raises(ValueError, match=r".*"):
        message.parse()
