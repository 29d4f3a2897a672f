# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's native protocol, read back the way journald reads it, from a real socket."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd import history, journal
from tests.unit.histories import attempt

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def parsed(data: bytes) -> list[tuple[str, bytes]]:
    """Read an entry as its documentation says: either form of a field, one after the other."""
    found = []
    while data:
        line, newline, rest = data.partition(b"\n")
        assert newline
        key, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, end, data = (
                rest[8 : 8 + length],
                rest[8 + length : 9 + length],
                rest[9 + length :],
            )
            assert end == b"\n"
        else:
            data = rest
        found.append((key.decode(), value))
    return found


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listen as journald does; the path of a socket must be short."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
    ):
        channel.bind(f"{folder}/socket")
        channel.settimeout(10)
        yield channel


@given(st.dictionaries(st.sampled_from(["A", "B_C", "MESSAGE"]), st.text() | st.text("\n=A\0é")))
def test_fields_come_back_as_they_were_and_none_is_added(fields: dict[str, str]) -> None:
    assert parsed(journal.encode(fields)) == [
        (key, journal.as_bytes(value)) for key, value in fields.items()
    ]


@given(st.binary())
def test_bytes_of_a_path_that_are_not_utf8_are_written_as_they_are(data: bytes) -> None:
    assert journal.as_bytes(os.fsdecode(data)) == data


def test_entry_arrives_at_a_real_socket(listener: socket.socket) -> None:
    assert journal.send(
        {"MESSAGE": "a\nPRIORITY=0", "PRIORITY": "5"}, address=listener.getsockname()
    )
    assert dict(parsed(listener.recv(1 << 17))) == {
        "MESSAGE": b"a\nPRIORITY=0",
        "PRIORITY": b"5",
        "SYSLOG_IDENTIFIER": b"overlayd",
    }


def test_no_journal_or_none_that_listens_is_silently_nothing(tmp_path: Path) -> None:
    assert not journal.send({"MESSAGE": "x"}, address=str(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert not journal.send({"MESSAGE": "x"}, address=str(tmp_path / "file"))
    assert not journal.send({"MESSAGE": "x"}, address="/" + "x" * 300)


def test_journal_that_does_not_keep_up_is_not_waited_for(listener: socket.socket) -> None:
    start = time.monotonic()
    taken = [
        journal.send({"MESSAGE": "x" * 1000}, address=listener.getsockname()) for _ in range(2000)
    ]
    assert taken[0]
    assert not taken[-1]
    assert time.monotonic() - start < 10


def test_entry_that_would_not_fit_is_left_out(listener: socket.socket) -> None:
    assert not journal.send({"MESSAGE": "x" * journal.MAX_BYTES}, address=listener.getsockname())


def test_attempt_has_its_fields_the_fixed_id_and_nothing_unknown(
    listener: socket.socket, tmp_path: Path
) -> None:
    noted = attempt(
        name="a\nOVERLAYD_UID=7", target="/usr/x\x1b[31m", session_id=None, login_uid=1000, uid=0
    )
    history.note(noted, database=tmp_path / "d/h", address=listener.getsockname())
    entry = parsed(listener.recv(1 << 17))
    assert len(dict(entry)) == len(entry)
    found = dict(entry)
    assert found["MESSAGE_ID"] == history.MESSAGE_ID.encode()
    assert found["OVERLAYD_UID"] == b"0"
    assert found["OVERLAYD_LOGIN_UID"] == b"1000"
    assert found["OVERLAYD_NAME"] == b"a\nOVERLAYD_UID=7"
    assert found["OVERLAYD_ALLOWED"] == b"1"
    assert found["OVERLAYD_OUTCOME"] == b"done"
    assert found["PRIORITY"] == b"6"
    assert "OVERLAYD_SESSION_ID" not in found
    assert b"\\x1b[31m" in found["MESSAGE"]
    assert found["MESSAGE"].decode().isprintable()


@pytest.mark.parametrize(
    ("allowed", "outcome", "priority"),
    [(True, "done", b"6"), (True, "busy", b"5"), (False, "refused", b"4")],
)
def test_priority_tells_what_was_done_failed_and_denied(
    listener: socket.socket,
    tmp_path: Path,
    allowed: bool,  # noqa: FBT001  # a parameter of the test
    outcome: str,
    priority: bytes,
) -> None:
    noted = attempt(allowed=allowed, outcome=outcome, message="why")
    history.note(noted, database=tmp_path / "d/h", address=listener.getsockname())
    found = dict(parsed(listener.recv(1 << 17)))
    assert found["PRIORITY"] == priority
    assert found["MESSAGE"].endswith(b": why") == (outcome != "done")


def test_longest_attempt_fits_into_an_entry(listener: socket.socket, tmp_path: Path) -> None:
    long = "\n\U0001f600" * 100_000
    noted = attempt(
        **dict.fromkeys(("via", "verb", "name", "target", "source", "uuid"), long),
        **dict.fromkeys(("rule", "digest", "outcome", "message", "boot_id"), long),
    )
    assert history.note(noted, database=tmp_path / "d/h", address=listener.getsockname())
    assert len(dict(parsed(listener.recv(1 << 17)))["OVERLAYD_TARGET"]) == 4096
    (back,) = history.read(tmp_path / "d/h")
    assert long.startswith(back.name)
    assert len(back.name.encode("utf-8", "surrogateescape")) == 256
