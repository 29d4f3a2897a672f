# SPDX-License-Identifier: LGPL-2.1-or-later
"""Summing up: times in use, days, bars, and the times that people write."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayd import report
from overlayd.cli_history import moment
from tests.unit.histories import NOON, attempt

if TYPE_CHECKING:
    from overlayd.history import Attempt

NOW = NOON + 1_000_000
BOOT = "present"


def at(when: float, verb: str = "apply", uuid: str = "u1", **changes: object) -> Attempt:
    """Return an attempt that took no time, *when* seconds after noon, of the present boot."""
    whole = {"boot_id": BOOT, "seconds": 0.0, **changes}
    return attempt(at=NOON + when, verb=verb, uuid=uuid, **whole)


def used(*attempts: Attempt) -> list[tuple[str, float, bool]]:
    """Return uuid, seconds in use and whether it is still there."""
    found = report.uses(attempts, now=NOW, boot_id=BOOT)
    return [(use.uuid, use.end - use.start, use.still) for use in found]


def test_time_in_use_is_from_apply_to_remove_of_the_same_uuid() -> None:
    assert used(
        at(0, uuid="a"),
        at(5, uuid="b"),
        at(10, "remove", "a"),
        at(11, uuid="c"),
        at(12, "reset", "b"),
        at(30, "remove", "c"),
        at(40, "remove", "b"),
    ) == [("a", 10, False), ("b", 35, False), ("c", 19, False)]


def test_time_that_the_commands_took_is_not_in_use_before_and_is_until_removed() -> None:
    assert used(at(0, seconds=4.0), at(10, "remove", seconds=3.0)) == [("u1", 9, False)]


def test_what_failed_begins_and_ends_nothing() -> None:
    assert used(at(0, outcome="refused")) == []
    assert used(at(0), at(5, "remove", outcome="busy"), at(9, "remove")) == [("u1", 9, False)]


def test_open_one_of_this_boot_counts_until_now() -> None:
    assert used(at(0)) == [("u1", 1_000_000, True)]


def test_open_one_of_an_earlier_boot_counts_until_the_last_thing_noted_of_it() -> None:
    assert used(
        at(0, boot_id="old"),
        at(70, "remove", "x", boot_id="old", outcome="not-found"),
        at(100, boot_id=BOOT, uuid="new"),
    ) == [("u1", 70, False), ("new", 999_900, True)]


def test_cleanup_of_a_name_ends_the_latest_overlay_of_that_name_in_that_boot() -> None:
    assert used(at(0), at(10, "cleanup", "", boot_id="other"), at(20, "cleanup", "")) == [
        ("u1", 20, False)
    ]
    assert used(at(0), at(5, "remove"), at(20, "cleanup", "")) == [("u1", 5, False)]


def test_report_counts_by_user_target_outcome_and_day() -> None:
    summed = report.summed(
        [
            at(0, uid=1, target="/usr/a"),
            at(10, "remove", uid=0, target="/usr/a"),
            at(20, uid=2, target="/usr/b", outcome="refused"),
        ],
        now=NOW,
        boot_id=BOOT,
    )
    assert summed.as_object() == {
        "attempts": 3,
        "by_user": [
            {"uid": 1, "attempts": 1, "applies": 1, "failed": 0, "seconds_in_use": 10},
            {"uid": 0, "attempts": 1, "applies": 0, "failed": 0, "seconds_in_use": 0},
            {"uid": 2, "attempts": 1, "applies": 0, "failed": 1, "seconds_in_use": 0},
        ],
        "by_target": [
            {"target": "/usr/a", "attempts": 2, "applies": 1, "failed": 0, "seconds_in_use": 10},
            {"target": "/usr/b", "attempts": 1, "applies": 0, "failed": 1, "seconds_in_use": 0},
        ],
        "by_outcome": {"done": 2, "refused": 1},
        "applies_per_day": [{"day": time.strftime("%Y-%m-%d", time.localtime(NOON)), "applies": 1}],
        "seconds_in_use": 10,
    }


def test_report_of_a_while_clips_what_is_older_and_of_a_user_sees_who_else_removed() -> None:
    attempts = [at(0, uid=1), at(100, "remove", uid=0)]
    summed = report.summed(attempts, now=NOW, boot_id=BOOT, since=NOON + 90)
    assert (summed.attempts, summed.seconds) == (1, 10)
    summed = report.summed(attempts, now=NOW, boot_id=BOOT, uid=1)
    assert (summed.attempts, summed.seconds) == (1, 100)
    summed = report.summed(attempts, now=NOW, boot_id=BOOT, uid=0)
    assert (summed.attempts, summed.seconds) == (1, 0)


def test_days_have_no_gaps() -> None:
    days = report.per_day([NOON, NOON + 86400 * 3, NOON + 86400 * 3])
    assert list(days.values()) == [1, 0, 0, 2]
    assert report.per_day([]) == {}
    assert len(report.per_day([0.0, NOON])) <= 368


@given(
    st.dictionaries(st.text("0123456789-", min_size=10, max_size=10), st.integers(0, 10**6)),
    st.integers(1, 200),
    st.sampled_from(["utf-8", "ascii", "latin-1", "nonsense"]),
)
def test_bars_fit_the_terminal_and_its_encoding(
    counts: dict[str, int], width: int, encoding: str
) -> None:
    text = report.bars(counts, width, encoding)
    if encoding != "utf-8":
        assert text.isascii()
    lines = text.splitlines()
    assert len(lines) == len(counts)
    assert all(len(line) <= width for line in lines)


def test_bars_are_as_long_as_their_counts_say() -> None:
    lines = report.bars({"a": 8, "b": 4, "c": 1, "d": 0}, 12, "ascii").splitlines()
    assert lines == ["a  ####### 8", "b  ### 4", "c  # 1", "d  0"]
    lines = report.bars({"a": 16, "b": 1}, 14, "utf-8").splitlines()
    assert lines == ["a  ████████ 16", "b  ▌ 1"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.9, "0 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (86400 * 3 + 7200 + 59, "3 d 2 h"),
        (86400 + 59, "1 d"),
    ],
)
def test_span_in_two_units(seconds: float, text: str) -> None:
    assert report.span(seconds) == text


def test_times_that_people_write() -> None:
    for text, seconds in (("90s", 90), ("30m", 1800), ("2h", 7200), ("3d", 259200), ("1w", 604800)):
        assert moment(text, NOW) == NOW - seconds
    midnight = datetime.fromtimestamp(moment("today", NOW)).astimezone()
    assert (midnight.hour, midnight.minute, midnight.second) == (0, 0, 0)
    assert 0 <= NOW - midnight.timestamp() < 90_000
    assert 82_000 < midnight.timestamp() - moment("yesterday", NOW) < 91_000
    assert moment("2026-11-27T08:30:00Z", NOW) == 1795768200
    assert moment("2026-11-27T08:30+01:00", NOW) == 1795764600
    local = datetime(2026, 11, 27, 8, 30).astimezone().timestamp()
    assert moment("2026-11-27 08:30", NOW) == local
    assert moment("2026-11-27", NOW) == datetime(2026, 11, 27).astimezone().timestamp()


@pytest.mark.parametrize(
    "text",
    ["", "2", "h", "2 h", "-2h", "2y", "tomorrow", "0001-01-01", "2026-13-01", "\x1b[2J", "9" * 40],
)
def test_other_times_are_usage_errors_on_one_printable_line(text: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        moment(text, NOW)
    assert caught.value.message.isprintable()
