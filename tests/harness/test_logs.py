# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log entries as the machine writes them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from harness import logs

ENTRY = """{"__CURSOR":"s=1","__MONOTONIC_TIMESTAMP":"23456789","__REALTIME_TIMESTAMP":"17",
"_BOOT_ID":"b","PRIORITY":"3","SYSLOG_IDENTIFIER":"systemd","UNIT":"x.service",
"_TRANSPORT":"journal","_SYSTEMD_UNIT":"init.scope","MESSAGE":"Failed to start x.service."}"""


def test_entry_of_the_journal() -> None:
    event = logs.from_journal(json.loads(ENTRY))
    assert event.message == "Failed to start x.service."
    assert (event.priority, event.identifier, event.unit) == (3, "systemd", "x.service")
    assert event.monotonic == 23.456789
    assert not event.kernel
    assert str(event) == "[   23.456789] systemd: Failed to start x.service."
    assert event.fields["_BOOT_ID"] == "b"


def test_entry_whose_message_is_no_text_or_repeated_or_too_long() -> None:
    assert logs.from_journal({"MESSAGE": [104, 105, 255]}).message == "hi�"
    assert logs.from_journal({"MESSAGE": ["a", [98, 99]]}).message == "a\nbc"
    assert logs.from_journal({"MESSAGE": None, "_COMM": "x"}).identifier == "x"


def test_entry_of_the_kernels_log_in_the_journal() -> None:
    event = logs.from_journal({"MESSAGE": "x", "_TRANSPORT": "kernel", "PRIORITY": "2"})
    assert event.kernel
    assert event.priority == 2


def test_number_that_nobody_means_is_none() -> None:
    for digits in ("9" * 400, "9" * 5000):
        assert logs.from_kmsg(f"{digits},1,{digits},-;x").monotonic == 0
        assert (
            logs.from_journal({"__MONOTONIC_TIMESTAMP": digits, "PRIORITY": digits}).priority == 6
        )


def test_record_of_the_kernel() -> None:
    event = logs.from_kmsg("12,339,5140900,-;WARNING: CPU\\x09at\n SUBSYSTEM=acpi\n")
    assert event.message == "WARNING: CPU\tat"
    assert (event.priority, event.identifier, event.monotonic) == (4, "kernel", 5.1409)
    assert event.kernel


@given(st.text())
def test_any_record_is_an_event(text: str) -> None:
    assert 0 <= logs.from_kmsg(text).priority <= 7


@given(st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.integers())))
def test_any_entry_is_an_event(entry: dict[str, object]) -> None:
    assert 0 <= logs.from_journal(entry).priority <= 7
